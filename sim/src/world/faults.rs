//! What goes wrong in a world, and how.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;
use trunkline_agent::guard::Guard;
use trunkline_agent::node::{Command, RestartFilter};
use trunkline_common::ClusterView;
use trunkline_common::dcs::Dcs;
use trunkline_common::dcs::memory::{Backup, MemoryDcs};
use trunkline_common::dcs::store::Outcome;
use trunkline_config::merge;

use super::World;
use crate::executor::ProcessId;
use crate::judge::Loss;
use crate::scenario::{Aim, End, Event, Fault, NEXT_LEADER_WITHIN};
use crate::server::{self, Killed, Server};
use crate::slots::FOREIGN_SLOT;
use crate::stage::{host_of, name};

impl World {
    /// One event: waits for its time, finds whom it hits, and lets it happen.
    pub(super) async fn carry_out(&self, event: Event) {
        self.wait(event.at).await;
        let node = match event.aim {
            None => None,
            Some(Aim::Leader) => self.leader(),
            Some(Aim::Synchronous) => self.synchronous(),
            Some(Aim::NextLeader) => match self.next_leader().await {
                None => return,
                some => some,
            },
        };
        let what = match node {
            Some(node) => event.what.at(node),
            None => event.what,
        };
        tracing::info!("FAULT {what:?}");
        let hit = what.hits();
        self.stage.trouble(&hit, true);
        self.happen(what).await;
        self.stage.trouble(&hit, false);
    }

    /// The holder of the leader key. Before there is one: whoever makes the cluster.
    fn leader(&self) -> Option<usize> {
        match self.stage.holder() {
            Some(holder) => self.host(&holder),
            None => (0..self.scenario.nodes.len()).find(|host| self.is_guarded(*host)),
        }
    }

    /// Who takes the leader key from now on, some milliseconds after that: about when it is promoted.
    async fn next_leader(&self) -> Option<usize> {
        let mut leads = self.leads.subscribe();
        let since = self.stage.store().peek("").revision;
        let taken = leads.wait_for(|leader| leader.as_ref().is_some_and(|(_, created)| *created > since));
        let name = tokio::select! {
            biased;
            taken = taken => taken.ok()?.as_ref().map(|(name, _)| name.0.clone())?,
            () = self.wait(NEXT_LEADER_WITHIN) => return None,
        };
        self.stage.micros(0..80_000).await;
        self.host(&name)
    }

    fn synchronous(&self) -> Option<usize> {
        let sync = self.stage.key("sync")?;
        self.host(sync["sync_standby"].as_str()?.split(',').next()?)
    }

    fn host(&self, name: &str) -> Option<usize> {
        host_of(name).filter(|host| *host < self.scenario.nodes.len())
    }

    fn is_guarded(&self, host: usize) -> bool {
        self.stage.guard(host).is_some_and(|guard| guard.is_armed())
    }

    fn freeze(&self, process: ProcessId, freeze: bool) {
        let mut frozen = self.frozen.lock();
        let reasons = frozen.entry(process).or_default();
        *reasons = if freeze { *reasons + 1 } else { reasons.saturating_sub(1) };
        self.stage.executor().freeze(process, *reasons > 0);
    }

    async fn frozen_for(&self, processes: impl IntoIterator<Item = ProcessId>, ms: u64) {
        let processes: BTreeSet<ProcessId> = processes.into_iter().collect();
        processes.iter().for_each(|process| self.freeze(*process, true));
        self.stage.executor().sleep(Duration::from_millis(ms)).await;
        processes.iter().for_each(|process| self.freeze(*process, false));
        // Whoever waits for a frozen server looks again.
        self.stage.servers(|servers| servers.iter().for_each(Server::touch));
    }

    async fn cut_for(&self, cuts: Vec<(End, End)>, ms: u64) {
        let set = |cut: bool| {
            self.stage.network(|network| cuts.iter().for_each(|(from, to)| network.cut(*from, *to, cut)));
            self.refresh_links();
        };
        set(true);
        self.stage.executor().sleep(Duration::from_millis(ms)).await;
        set(false);
    }

    async fn wait(&self, ms: u64) {
        self.stage.executor().sleep(Duration::from_millis(ms)).await;
    }

    /// One event, from its beginning to its end.
    async fn happen(&self, what: Fault) {
        match what {
            Fault::KillAgent { node, ms } => {
                let Some(process) = self.agent_process(node) else { return };
                self.stage.executor().kill(process);
                self.restart_agent(node, process, ms).await;
            }
            Fault::StopAgent { node, ms } => {
                let Some(process) = self.agent_process(node) else { return };
                if let Some(agent) = &self.hosts.lock()[node].agent {
                    agent.stop.send_replace(true);
                }
                // It is started again when it has ended; a supervisor loses patience, too.
                self.wait(30_000.max(ms)).await;
                if self.agent_process(node) == Some(process) && self.hosts.lock()[node].down == 0 {
                    self.stage.executor().kill(process);
                    self.restart_agent(node, process, 100).await;
                }
            }
            Fault::KillPostgres { node } => {
                let leads = self.stage.holder() == Some(name(node).0);
                let now = self.stage.executor().now();
                self.stage.server(node, |server| {
                    let up = server.running().map(|postmaster| now - postmaster.since.running);
                    server.killed = up.filter(|_| leads && server.is_primary()).map(|up| Killed { at: now, up });
                });
                server::kill(&self.stage, node);
            }
            Fault::CrashHost { node, ms } => {
                self.hosts.lock()[node].down += 1;
                if let Some(process) = self.agent_process(node) {
                    self.stage.executor().kill(process);
                }
                server::vanish(&self.stage, node);
                if let Some(guard) = self.stage.guard(node) {
                    self.stage.executor().kill(guard.process());
                    guard.disarm();
                }
                self.wait(ms).await;
                let up = {
                    let mut hosts = self.hosts.lock();
                    hosts[node].down -= 1;
                    hosts[node].down == 0
                };
                if up {
                    self.boot(node);
                }
            }
            Fault::FreezeAgent { node, ms } => self.frozen_for(self.agent_process(node), ms).await,
            Fault::FreezePostgres { node, ms } => self.frozen_for(self.postgres_process(node), ms).await,
            Fault::FreezeHost { node, ms } => {
                self.hosts.lock()[node].frozen += 1;
                let guard = self.stage.guard(node).map(|guard| guard.process());
                let all = [self.agent_process(node), self.postgres_process(node), guard];
                self.frozen_for(all.into_iter().flatten(), ms).await;
                self.hosts.lock()[node].frozen -= 1;
            }
            Fault::FreezeRouter { router, ms } => {
                let process = self.routers.lock().get(router).map(|(router, _)| router.process);
                self.frozen_for(process, ms).await;
            }
            Fault::Cut { from, to, both, ms } => {
                let mut cuts = vec![(from, to)];
                if both {
                    cuts.push((to, from));
                }
                self.cut_for(cuts, ms).await;
            }
            Fault::Isolate { node, ms } => {
                let own = [End::Agent(node), End::Postgres(node)];
                let others = (0..self.scenario.nodes.len()).filter(|other| *other != node);
                let mut ends: Vec<End> = others.flat_map(|other| [End::Agent(other), End::Postgres(other)]).collect();
                ends.extend((0..self.scenario.routers).map(End::Router));
                ends.push(End::Dcs);
                let cuts = own.iter().flat_map(|own| ends.iter().flat_map(|end| [(*own, *end), (*end, *own)]));
                self.cut_for(cuts.collect(), ms).await;
            }
            Fault::DcsDown { refused, ms } => {
                let change = |by: i32| {
                    let mut down = self.dcs_down.lock();
                    let count = if refused { &mut down.1 } else { &mut down.0 };
                    *count = count.saturating_add_signed(by);
                    drop(down);
                    self.refresh_links();
                };
                change(1);
                self.wait(ms).await;
                change(-1);
            }
            Fault::DcsLeaderChange { ms } => {
                self.dcs_down.lock().0 += 1;
                self.refresh_links();
                self.wait(ms).await;
                self.stage.store().restart_leases();
                self.dcs_down.lock().0 -= 1;
                self.refresh_links();
                self.break_watches();
            }
            Fault::RevokeLease { node } => {
                if let Some(member) = self.view().members.get(&name(node)) {
                    if self.stage.holder() == Some(name(node).0) {
                        self.stage.judge(|judge, now| judge.revoked(now, node, Loss::Lease));
                    }
                    let _ = self.stage.store().client().revoke(member.lease).await;
                }
            }
            Fault::RestoreDcs { age, anew, ms } => {
                let backup = if anew { Backup::default() } else { self.stage.store().backup() };
                self.wait(age).await;
                self.dcs_down.lock().1 += 1;
                self.refresh_links();
                self.wait(ms).await;
                if let Some(host) = self.stage.holder().as_deref().and_then(host_of) {
                    self.stage.judge(|judge, now| judge.revoked(now, host, Loss::Restore));
                }
                self.stage.store().restore(&backup);
                let awake = |host: &usize| {
                    let agent = self.hosts.lock()[*host].agent.as_ref().map(|agent| agent.process);
                    agent.is_some_and(|process| self.stage.executor().is_awake(process))
                };
                let awake = (0..self.scenario.nodes.len()).filter(awake);
                let wal = |host| self.stage.server(host, |server| server.data.as_ref().map(|data| data.wal.clone()));
                let there: Vec<_> = awake.filter_map(wal).collect();
                self.stage.judge(|judge, _| judge.restored(&there));
                self.dcs_down.lock().1 -= 1;
                self.refresh_links();
            }
            Fault::LoseAnswers { node, count } => {
                if let Some(link) = &self.hosts.lock()[node].link {
                    link.set_faults(|faults| faults.lost_answers = count);
                }
            }
            Fault::SlowDcs { node, request, answer, ms } => {
                let delays = (Duration::from_millis(request), Duration::from_millis(answer));
                self.hosts.lock()[node].slow_dcs = delays;
                self.refresh_link(node);
                self.wait(ms).await;
                self.hosts.lock()[node].slow_dcs = (Duration::ZERO, Duration::ZERO);
                self.refresh_link(node);
            }
            Fault::SlowWatch { node, delay, ms } => {
                self.hosts.lock()[node].slow_watch = Duration::from_millis(delay);
                self.refresh_link(node);
                self.wait(ms).await;
                self.hosts.lock()[node].slow_watch = Duration::ZERO;
                self.refresh_link(node);
            }
            Fault::SlowRouter { router, delay, ms } => {
                let delayed = |by| {
                    if let Some((_, link)) = self.routers.lock().get(router) {
                        link.set_faults(|faults| faults.watch_delay = by);
                    }
                };
                delayed(Duration::from_millis(delay));
                self.wait(ms).await;
                delayed(Duration::ZERO);
            }
            Fault::LoseEvents { node, count } => {
                if let Some(link) = &self.hosts.lock()[node].link {
                    link.set_faults(|faults| faults.lost_events = count);
                }
            }
            Fault::BreakWatches => self.break_watches(),
            Fault::Compact => {
                let revision = self.stage.store().peek("").revision;
                self.stage.store().compact(revision);
            }
            Fault::DiskFull { node, ms } => {
                self.stage.server(node, |server| server.disk_full = true);
                self.wait(ms).await;
                self.stage.server(node, |server| {
                    server.disk_full = false;
                    server.touch();
                });
            }
            Fault::FreezePostmaster { node, ms } => {
                let Some(number) = self.stage.server(node, |server| {
                    let postmaster = server.postmaster.as_mut()?;
                    postmaster.hung = true;
                    Some(postmaster.number)
                }) else {
                    return;
                };
                self.wait(ms).await;
                self.stage.server(node, |server| {
                    if let Some(postmaster) = server.postmaster(number) {
                        postmaster.hung = false;
                    }
                    server.touch();
                });
            }
            Fault::RefusePromotion { node, ms } => {
                let since = self.stage.executor().now();
                self.stage.server(node, |server| server.refuses_promotion = Some(since));
                self.wait(ms).await;
                self.stage.server(node, |server| server.refuses_promotion = None);
            }
            Fault::RefuseAgent { node, ms } => {
                self.stage.server(node, |server| server.refuses_agent = true);
                self.wait(ms).await;
                self.stage.server(node, |server| server.refuses_agent = false);
            }
            Fault::SlowReplay { node, ms } => {
                let until = self.stage.executor().now() + Duration::from_millis(ms);
                self.stage.server(node, |server| server.replays_until = until);
            }
            Fault::BreakWatchdog { node, ms } => {
                let since = self.stage.executor().now();
                self.stage.server(node, |server| server.watchdog_broken = Some(since));
                self.wait(ms).await;
                self.stage.server(node, |server| server.watchdog_broken = None);
            }
            Fault::MakeSlot { node } => self.stage.server(node, |server| {
                if let Some(data) = server.data.as_mut().filter(|_| server.postmaster.is_some()) {
                    data.create_slot(FOREIGN_SLOT.to_owned());
                }
            }),
            Fault::SlowDisk { node, ms } => {
                self.stage.server(node, |server| server.disk_slow = true);
                self.wait(ms).await;
                self.stage.server(node, |server| server.disk_slow = false);
            }
            Fault::WallJump { node, by } => {
                self.hosts.lock()[node].wall_offset.fetch_add(by, Ordering::Relaxed);
            }
            Fault::Switchover { candidate } => {
                let Some(leader) = self.stage.holder() else { return };
                let mut request = json!({ "leader": leader });
                if let Some(candidate) = candidate {
                    request["member"] = Value::from(name(candidate).0);
                }
                let _ = self.store().put_failover(&request, None).await;
            }
            Fault::Failover { candidate } => {
                let _ = self.store().put_failover(&json!({ "member": name(candidate).0 }), None).await;
            }
            Fault::Restart { node } => {
                let (reply, _) = oneshot::channel();
                self.command(node, Command::Restart(RestartFilter::default(), reply)).await;
            }
            Fault::Reinitialize { node } => {
                let (reply, _) = oneshot::channel();
                self.stage.server(node, |server| server.reinitialized = true);
                self.command(node, Command::Reinitialize { force: false, from_leader: false, reply }).await;
            }
            Fault::Configure { patch } => self.configure(patch).await,
            Fault::Pause { ms } => {
                self.configure(json!({ "pause": true })).await;
                self.wait(ms).await;
                self.configure(json!({ "pause": null })).await;
            }
        }
    }

    /// Where there is a cluster to configure.
    async fn configure(&self, patch: Value) {
        let (store, Value::Object(patch)) = (self.store(), patch) else { return };
        while let Ok(ClusterView { config: Some(config), .. }) = store.read().await {
            let Value::Object(mut value) = config.value.clone() else { return };
            merge::patch(&mut value, &patch);
            match store.put_config(&Value::Object(value), Some(config.revision)).await {
                Ok(Outcome::Conflict) => {}
                _ => return,
            }
        }
    }

    fn break_watches(&self) {
        self.hosts.lock().iter().filter_map(|host| host.link.as_ref()).for_each(MemoryDcs::break_watches);
        self.routers.lock().iter().for_each(|(_, link)| link.break_watches());
    }

    pub(super) async fn command(&self, node: usize, command: Command) {
        if let Some(api) = self.stage.api(node) {
            let _ = api.commands.try_send(command);
        }
    }
}
