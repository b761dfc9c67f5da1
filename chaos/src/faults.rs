//! Faults in the world: roles become hosts, and everything that was done is undone.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use trunkline_agent::lab::rest;

use crate::network::Cut;
use crate::schedule::{ETCDS, Episode, Fault, NODES, Part, Planned, ROUTERS, Who};
use crate::workload::Recorder;
use crate::world::{Kind, REST_PORT, World};

/// Injects an episode's faults at their times and heals each at its end; returns when all are healed.
pub async fn play(world: &Arc<World>, recorder: &Arc<Recorder>, episode: &Episode, first_id: u64) {
    let one = |(i, planned): (usize, &Planned)| {
        let (world, recorder, planned) = (world.clone(), recorder.clone(), planned.clone());
        async move {
            tokio::time::sleep(Duration::from_millis(planned.at_ms)).await;
            strike(&world, &recorder, &planned, first_id + i as u64).await;
        }
    };
    futures::future::join_all(episode.faults.iter().enumerate().map(one)).await;
}

async fn strike(world: &World, recorder: &Recorder, planned: &Planned, id: u64) {
    let lasting = Duration::from_millis(planned.for_ms);
    let said = |what: &str, result: Result<()>| {
        let outcome = result.map_or_else(|error| format!(": {error:#}"), |()| String::new());
        world.journal().note(&format!("{what}{outcome}"));
    };
    let names =
        |hosts: &[usize]| hosts.iter().map(|host| world.hosts()[*host].name.as_str()).collect::<Vec<_>>().join(",");
    let text = planned.to_string();
    match &planned.fault {
        Fault::Kill { on, part } => {
            let hosts = resolve(world, recorder, *on).await;
            // A host without power sends no farewell.
            if *part == Part::Host {
                let cut = world.cut(id, hosts.iter().map(|host| Cut::Off(*host)).collect());
                said("its packets disappear", cut);
            }
            hosts.iter().for_each(|host| world.kill(*host, *part));
            said(&format!("BEGIN {text} [{}]", names(&hosts)), Ok(()));
            tokio::time::sleep(lasting).await;
            let mended = if *part == Part::Host { world.mend(id) } else { Ok(()) };
            hosts.iter().for_each(|host| world.release(*host));
            said(&format!("END   {text}"), mended);
        }
        Fault::Freeze { on, part } => {
            let hosts = resolve(world, recorder, *on).await;
            hosts.iter().for_each(|host| world.freeze(*host, *part));
            said(&format!("BEGIN {text} [{}]", names(&hosts)), Ok(()));
            tokio::time::sleep(lasting).await;
            hosts.iter().for_each(|host| world.thaw(*host));
            said(&format!("END   {text}"), Ok(()));
        }
        Fault::Cut { from, to, both, refuse } => {
            let (senders, receivers) = (resolve(world, recorder, *from).await, resolve(world, recorder, *to).await);
            let cut = |from, to| if *refuse { Cut::Refuse { from, to } } else { Cut::Drop { from, to } };
            let mut cuts = Vec::new();
            for (one, other) in senders.iter().flat_map(|one| receivers.iter().map(move |other| (*one, *other))) {
                if one != other {
                    cuts.push(cut(one, other));
                    cuts.extend(both.then(|| cut(other, one)));
                }
            }
            let result = world.cut(id, cuts);
            said(&format!("BEGIN {text} [{} | {}]", names(&senders), names(&receivers)), result);
            tokio::time::sleep(lasting).await;
            said(&format!("END   {text}"), world.mend(id));
        }
        Fault::FillDisk { on } => {
            let hosts = resolve(world, recorder, *on).await;
            said(&format!("BEGIN {text} [{}]", names(&hosts)), Ok(()));
            let full = async {
                loop {
                    for host in &hosts {
                        if let Err(error) = world.fill(*host) {
                            said("filling the disk", Err(error));
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            };
            let _ = tokio::time::timeout(lasting, full).await;
            hosts.iter().for_each(|host| world.drain(*host));
            said(&format!("END   {text}"), Ok(()));
        }
        Fault::Clock { on, seconds } => {
            let hosts = resolve(world, recorder, *on).await;
            let set = |by: i64| hosts.iter().try_for_each(|host| world.set_clock(*host, by));
            said(&format!("BEGIN {text} [{}]", names(&hosts)), set(*seconds));
            tokio::time::sleep(lasting).await;
            said(&format!("END   {text}"), set(0));
        }
        Fault::Switchover { to } => {
            let leader = recorder.leader();
            let mut arguments =
                vec!["switchover", crate::world::SCOPE, "--leader", &world.hosts()[leader].name, "--force"];
            if let Some(to) = to.and_then(|to| others(leader).nth(to)) {
                arguments.extend(["--candidate", &world.hosts()[to].name]);
            }
            said(&format!("BEGIN {}", arguments.join(" ")), Ok(()));
            let result = world.trunklinectl(&arguments).await;
            said(&format!("END   {text}"), result.map(|_| ()));
        }
        Fault::Setting { key, value, back } => {
            said(&format!("BEGIN {text}"), set(world, key, *value).await);
            tokio::time::sleep(lasting).await;
            // The end of the fault is that it is back as it was, so this one insists, for a minute.
            for _ in 0..60 {
                let result = set(world, key, *back).await;
                let done = result.is_ok();
                said(&format!("END   {text}"), result);
                if done {
                    break;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn set(world: &World, key: &str, value: u64) -> Result<()> {
    let value = if key.ends_with("_mode") { json!(value != 0) } else { json!(value) };
    let mut last = anyhow::anyhow!("nobody asked");
    for node in 0..NODES {
        match rest::patch(world.address(Kind::Node(node), REST_PORT), "/config", &json!({ key: value })).await {
            Ok(answer) if answer.status == 200 => return Ok(()),
            Ok(answer) => last = anyhow::anyhow!("{}: {}", answer.status, answer.body),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn others(leader: usize) -> impl Iterator<Item = usize> {
    (0..NODES).filter(move |node| *node != leader)
}

/// The hosts that have this role now.
async fn resolve(world: &World, recorder: &Recorder, who: Who) -> Vec<usize> {
    let leader = recorder.leader();
    let one = |kind| vec![world.index(kind)];
    match who {
        Who::Leader => one(Kind::Node(leader)),
        Who::Replica(i) => others(leader).nth(i).into_iter().collect(),
        Who::Replicas => others(leader).collect(),
        Who::EtcdLeader => one(Kind::Etcd(world.etcd_leader().await.unwrap_or(0))),
        Who::Etcd(i) => one(Kind::Etcd(i.min(ETCDS - 1))),
        Who::Etcds => (0..ETCDS).map(|i| world.index(Kind::Etcd(i))).collect(),
        Who::Router(i) => one(Kind::Router(i.min(ROUTERS - 1))),
        Who::Routers => (0..ROUTERS).map(|i| world.index(Kind::Router(i))).collect(),
        Who::Everybody => (0..world.hosts().len()).collect(),
    }
}
