//! `list` and `topology`.

use std::time::Duration;

use trunkline_common::Clock;

use super::args::{ListArgs, TopologyArgs, WatchArgs};
use super::context::{Cluster, Context};
use super::error::Result;
use super::members;
use super::output::{Format, render};
use super::prompt::{clear_screen, echo, warning};
use super::text::seconds_stamp;

/// `list`.
pub(super) async fn list(context: &Context, args: &ListArgs) -> Result<()> {
    let show = Show {
        clusters: &args.clusters,
        group: args.group,
        extended: args.extended,
        timestamp: args.timestamp,
        format: args.format.into(),
    };
    show.run(context, args.watch).await
}

/// `topology`.
pub(super) async fn topology(context: &Context, args: &TopologyArgs) -> Result<()> {
    let format = Format::Topology;
    let show = Show { clusters: &args.clusters, group: args.group, extended: false, timestamp: false, format };
    show.run(context, args.watch).await
}

/// Prints the member table and, for people, what stands below it.
pub(super) fn show_members(cluster: &Cluster, extended: bool, format: Format) -> Result<()> {
    let listing = cluster.listing(extended);
    echo(render(&members::sheet(&listing, format), format, "\t"))?;
    if !format.is_table() {
        return Ok(());
    }
    for (group, view) in &listing.clusters {
        let info = members::service_info(view);
        if info.is_empty() {
            continue;
        }
        if cluster.citus == Some(None) {
            echo(format!("Citus group: {group}"))?;
        }
        echo(format!(" {}", info.join("\n ")))?;
    }
    Ok(())
}

/// How long to wait between two showings; `None`: one is enough.
pub(super) fn watch_interval(watch: WatchArgs) -> Option<Duration> {
    let given = watch.watch.filter(|seconds| *seconds > 0.0);
    let seconds = given.or(watch.every_two_seconds.then_some(2.0))?;
    Duration::try_from_secs_f64(seconds).ok()
}

struct Show<'a> {
    clusters: &'a [String],
    group: Option<u32>,
    extended: bool,
    timestamp: bool,
    format: Format,
}

impl Show<'_> {
    async fn run(&self, context: &Context, watch: WatchArgs) -> Result<()> {
        let configured: Vec<String> = context.configured_scope().map(str::to_owned).into_iter().collect();
        let names = if self.clusters.is_empty() { &configured } else { self.clusters };
        if names.is_empty() {
            warning("Listing members: No cluster names were provided");
            return Ok(());
        }
        let interval = watch_interval(watch);
        // Until somebody interrupts it: that is what watching is.
        loop {
            let began = context.clock.now();
            if interval.is_some() {
                clear_screen()?;
            }
            if self.timestamp {
                echo(seconds_stamp(context.clock.wall()))?;
            }
            for name in names {
                let cluster = context.target(name, self.group).read().await?;
                show_members(&cluster, self.extended, self.format)?;
            }
            match interval {
                Some(interval) => context.clock.sleep_until(began + interval).await,
                None => return Ok(()),
            }
        }
    }
}
