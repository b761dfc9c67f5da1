//! Patroni and our agents in one cluster: what an operator changes works whichever of them leads, and both command lines print the
//! same about it.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use trunkline_tests::{LIMIT, Program, Scene, Spec, Timing, patroni, rest, wait};

/// What every member of the cluster says it is, by one member's word.
async fn roles(scene: &Scene, asked: usize) -> Result<Vec<String>> {
    let document: Value = rest::get(scene.cluster.nodes[asked].rest_port(), "/cluster").await?.body;
    let members = document["members"].as_array().context("members")?;
    Ok(members.iter().map(|member| member["role"].as_str().unwrap_or_default().to_owned()).collect())
}

/// The mode is in force: two standbys confirm by vote, or one is named.
async fn mode_in_force(scene: &Scene, leader: usize, role: &str, standbys: usize) -> Result<()> {
    let in_force = async || {
        let roles = roles(scene, leader).await?;
        ensure!(roles.iter().filter(|r| *r == role).count() == standbys, "{roles:?}, not {standbys} of {role}");
        Ok(())
    };
    wait::until(&format!("{standbys} of {role}"), LIMIT, in_force).await
}

async fn everywhere(scene: &Scene, sql: &str, expected: &str) -> Result<()> {
    for node in 0..scene.cluster.nodes.len() {
        let target = scene.node(node);
        let arrived = async || {
            let found = target.query_one(sql, LIMIT).await?;
            ensure!(found == expected, "{sql} is {found} on node {node}");
            Ok(())
        };
        wait::until(&format!("{sql} to be {expected}"), LIMIT, arrived).await?;
    }
    Ok(())
}

fn listed(program: &Program, scene: &Scene) -> Result<Vec<String>> {
    let mut command = Command::new(&program.path);
    command.arg("-c").arg(scene.cluster.nodes[0].config()).args(["list", "demo"]);
    let output = command.output().context("list")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // Positions move on between the two.
    let columns = |line: &str| line.split('|').take(6).collect::<Vec<_>>().join("|");
    Ok(text.lines().filter(|line| line.starts_with('|')).map(columns).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_changed_works_whichever_product_leads() -> Result<()> {
    let agents = vec![Program::agent()?, patroni::program()?, Program::agent()?];
    let mut spec = Spec::new(agents.len(), &agents[0]);
    (spec.agents, spec.timing) = (agents, Timing::PATRONI_LOWEST);
    let mut scene = Scene::with("mixed-matrix", 1, spec).await?;
    let load = scene.load().await?;
    let ctl = Program::new(Program::agent()?.path.with_file_name("trunklinectl"));

    // Patroni leads our replicas, then the other way round.
    for (leader, work_mem) in [(1, "5MB"), (0, "6MB")] {
        let now = scene.cluster.settled(LIMIT).await?;
        if now != leader {
            // Any of them may lead by vote.
            scene.cluster.patch_config(&json!({ "synchronous_mode": "quorum" })).await?;
            mode_in_force(&scene, now, "quorum_standby", 2).await?;
            scene.cluster.switchover(now, Some(leader)).await?;
            ensure!(scene.cluster.leader_other_than(now, LIMIT).await? == leader, "somebody else leads");
            scene.cluster.patch_config(&json!({ "synchronous_mode": true })).await?;
            scene.cluster.settled(LIMIT).await?;
        }
        let parameters = json!({ "postgresql": { "parameters": { "work_mem": work_mem } } });
        scene.cluster.patch_config(&parameters).await?;
        everywhere(&scene, "SHOW work_mem", work_mem).await?;

        scene.cluster.patch_config(&json!({ "synchronous_mode": "quorum" })).await?;
        mode_in_force(&scene, leader, "quorum_standby", 2).await?;
        load.writers.progress(50, LIMIT).await?;
        scene.cluster.patch_config(&json!({ "synchronous_mode": true })).await?;
        mode_in_force(&scene, leader, "sync_standby", 1).await?;
        load.writers.progress(50, LIMIT).await?;

        let slots = async || {
            let text = "SELECT count(*)::text FROM pg_replication_slots WHERE active";
            let active = scene.node(leader).query_one(text, LIMIT).await?;
            ensure!(active == "2", "{active} slots are in use");
            Ok(())
        };
        wait::until("both standbys to use their slots", LIMIT, slots).await?;

        for paused in [true, false] {
            scene.cluster.patch_config(&json!({ "pause": paused })).await?;
            for node in &scene.cluster.nodes {
                let known = async || {
                    let status = node.status().await?;
                    ensure!(status.get("pause").is_some_and(|pause| *pause == true) == paused, "{status}");
                    Ok(())
                };
                wait::until("the pause to be known", LIMIT, known).await?;
            }
        }
        let same = async || {
            let (ours, theirs) = (listed(&ctl, &scene)?, listed(&patroni::ctl()?, &scene)?);
            ensure!(ours.len() == 4 && ours == theirs, "{ours:#?}\n{theirs:#?}");
            Ok(())
        };
        wait::until("both command lines to print the same", LIMIT, same).await?;

        // And over to whoever is allowed to, of either product.
        scene.cluster.settled(LIMIT).await?;
        scene.cluster.nodes[leader].kill_postmaster()?;
        scene.cluster.leader_other_than(leader, LIMIT).await?;
        load.writers.progress(50, LIMIT).await?;
    }
    scene.finish(load).await?;
    Ok(())
}
