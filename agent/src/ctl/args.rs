//! The command line: patronictl's commands, options and their spelling (cli.md §6).

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::output::Format;

/// Operates a PostgreSQL cluster run by Trunkline or Patroni.
#[derive(Debug, Parser)]
#[command(name = "trunklinectl", version, arg_required_else_help = true)]
pub struct Cli {
    /// Configuration file [env: TRUNKLINECTL_CONFIG_FILE, PATRONICTL_CONFIG_FILE] [default: patroni/patronictl.yaml in
    /// the user's configuration directory, if it is there]
    #[arg(short = 'c', long)]
    pub(super) config_file: Option<PathBuf>,
    /// The DCS: [etcd3://]host[:port][/namespace]
    #[arg(short = 'd', long, visible_alias = "dcs", env = "DCS_URL")]
    pub(super) dcs_url: Option<String>,
    /// Don't verify certificates of REST APIs
    #[arg(short = 'k', long)]
    pub(super) insecure: bool,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the members of clusters
    List(ListArgs),
    /// Print the replication tree of clusters
    Topology(TopologyArgs),
    /// Show the history of failovers and switchovers
    History(HistoryArgs),
    /// Show what the members decided lately, and why
    Decisions(DecisionsArgs),
    /// Ask every member whether it may lead, and which numbers it compares
    Why(DecisionsArgs),
    /// Show how long writes will be out, from what has been measured
    Rto(HistoryArgs),
    /// Questions about the configuration
    Config(ConfigArgs),
    /// Show the dynamic configuration
    ShowConfig(DefaultGroupArgs),
    /// Edit the dynamic configuration
    EditConfig(EditArgs),
    /// Make another member the leader, with the leader's consent
    Switchover(SwitchoverArgs),
    /// Make a member the leader
    Failover(FailoverArgs),
    /// Make the cluster a standby cluster of a server outside
    DemoteCluster(DemoteClusterArgs),
    /// Set a standby cluster free: it takes writes
    PromoteCluster(PromoteClusterArgs),
    /// Restart PostgreSQL of members
    Restart(RestartArgs),
    /// Reload the configuration of members
    Reload(ReloadArgs),
    /// Clone replicas anew
    Reinit(ReinitArgs),
    /// Disable automatic failover
    Pause(PauseArgs),
    /// Enable automatic failover again
    Resume(PauseArgs),
    /// Forget a scheduled restart or switchover
    Flush(FlushArgs),
    /// Remove a cluster from the DCS
    Remove(RemoveArgs),
    /// Print how to connect to a member, by default the leader
    Dsn(DsnArgs),
    /// Run SQL on a member, by default the leader
    Query(QueryArgs),
    /// Show the version of this tool, and of running members
    Version(VersionArgs),
    /// Look at routers
    #[command(subcommand)]
    Router(RouterCommand),
    /// Run a whole cluster on this machine, to look at or to be checked
    Demo(crate::lab::demo::DemoArgs),
}

/// What to look at.
#[derive(Debug, Subcommand)]
pub(super) enum RouterCommand {
    /// Show ports, sessions and rates, again and again
    Top(TopArgs),
}

/// `router top`.
#[derive(Debug, Args)]
pub(super) struct TopArgs {
    /// Admin ports of routers, host:port
    #[arg(default_value = "127.0.0.1:8010")]
    pub routers: Vec<String>,
    /// Seconds between two looks [default: 1]
    #[arg(short = 'w', long, value_name = "SECONDS", value_parser = seconds)]
    pub watch: Option<f64>,
    /// Look so many times; default: until interrupted
    #[arg(short = 'n', long)]
    pub count: Option<u64>,
}

/// Which member by its place in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Role {
    Leader,
    Primary,
    StandbyLeader,
    Replica,
    Standby,
    Any,
}

impl Role {
    /// The role as it is given.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Leader => "leader",
            Self::Primary => "primary",
            Self::StandbyLeader => "standby-leader",
            Self::Replica => "replica",
            Self::Standby => "standby",
            Self::Any => "any",
        }
    }
}

/// `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum FormatName {
    Pretty,
    Tsv,
    Json,
    #[value(alias = "yml")]
    Yaml,
}

impl From<FormatName> for Format {
    fn from(name: FormatName) -> Self {
        match name {
            FormatName::Pretty => Self::Pretty,
            FormatName::Tsv => Self::Tsv,
            FormatName::Json => Self::Json,
            FormatName::Yaml => Self::Yaml,
        }
    }
}

/// `-w SECONDS`, `-W`.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct WatchArgs {
    /// Update every 2 seconds
    #[arg(short = 'W')]
    pub every_two_seconds: bool,
    /// Update every so many seconds
    #[arg(short = 'w', long, value_name = "SECONDS", value_parser = seconds)]
    pub watch: Option<f64>,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "a number of seconds is expected".to_owned())?;
    if (0.0..=86_400.0).contains(&seconds) { Ok(seconds) } else { Err("0 to 86400 seconds are possible".to_owned()) }
}

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Clusters; default: `scope` of the configuration
    pub clusters: Vec<String>,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
    /// Show some extra information
    #[arg(short, long)]
    pub extended: bool,
    /// Print a time stamp first
    #[arg(short, long)]
    pub timestamp: bool,
    /// Output format
    #[arg(short, long, default_value = "pretty")]
    pub format: FormatName,
    #[command(flatten)]
    pub watch: WatchArgs,
}

#[derive(Debug, Args)]
pub(super) struct TopologyArgs {
    /// Clusters; default: `scope` of the configuration
    pub clusters: Vec<String>,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
    #[command(flatten)]
    pub watch: WatchArgs,
}

#[derive(Debug, Args)]
pub(super) struct DefaultGroupArgs {
    /// Cluster; default: `scope` of the configuration
    pub cluster: Option<String>,
    /// Citus group; default: `citus.group` of the configuration
    #[arg(long)]
    pub group: Option<u32>,
}

#[derive(Debug, Args)]
pub(super) struct HistoryArgs {
    #[command(flatten)]
    pub target: DefaultGroupArgs,
    /// Output format
    #[arg(short, long, default_value = "pretty")]
    pub format: FormatName,
}

#[derive(Debug, Args)]
pub(super) struct DecisionsArgs {
    #[command(flatten)]
    pub history: HistoryArgs,
    /// The member; default: all
    #[arg(short, long)]
    pub member: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    #[command(subcommand)]
    pub command: ConfigCommand,
}

/// What to ask about the configuration.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Say which layer a setting comes from, and why the others have no effect
    Explain(ExplainArgs),
}

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// A dotted path (ttl, restapi.listen, postgresql.parameters.work_mem) or the name of a parameter of PostgreSQL
    pub key: String,
    #[command(flatten)]
    pub of: DecisionsArgs,
}

#[derive(Debug, Args)]
pub(super) struct EditArgs {
    #[command(flatten)]
    pub target: DefaultGroupArgs,
    /// Don't show changes
    #[arg(short, long)]
    pub quiet: bool,
    /// Set a value: a dotted path, `=`, YAML; null deletes
    #[arg(short, long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Set a PostgreSQL parameter: short for --set postgresql.parameters.KEY=VALUE
    #[arg(short, long = "pg", value_name = "KEY=VALUE")]
    pub pg: Vec<String>,
    /// Lay the YAML of a file over the configuration; - is standard input
    #[arg(long, value_name = "FILE", allow_hyphen_values = true)]
    pub apply: Option<String>,
    /// Replace the configuration by the YAML of a file; - is standard input
    #[arg(long, value_name = "FILE", allow_hyphen_values = true)]
    pub replace: Option<String>,
    /// Don't ask
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(super) struct SwitchoverArgs {
    /// Cluster; default: `scope` of the configuration
    pub cluster: Option<String>,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
    /// The current leader
    #[arg(long, visible_alias = "primary")]
    pub leader: Option<String>,
    /// The next leader
    #[arg(long)]
    pub candidate: Option<String>,
    /// When, in an unambiguous format such as ISO 8601
    #[arg(long)]
    pub scheduled: Option<String>,
    /// Don't ask
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(super) struct FailoverArgs {
    /// Cluster; default: `scope` of the configuration
    pub cluster: Option<String>,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
    /// The next leader
    #[arg(long)]
    pub candidate: Option<String>,
    /// Don't ask
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(super) struct DemoteClusterArgs {
    /// Cluster; default: `scope` of the configuration
    pub cluster: Option<String>,
    /// Address of the server outside
    #[arg(long)]
    pub host: Option<String>,
    /// Its port
    #[arg(long)]
    pub port: Option<u16>,
    /// How to get WAL from its archive
    #[arg(long, value_name = "COMMAND")]
    pub restore_command: Option<String>,
    /// Our replication slot there
    #[arg(long, value_name = "NAME")]
    pub primary_slot_name: Option<String>,
    /// Don't ask
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(super) struct PromoteClusterArgs {
    /// Cluster; default: `scope` of the configuration
    pub cluster: Option<String>,
    /// Don't ask
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(super) struct RestartArgs {
    /// Cluster
    pub cluster: String,
    /// Members; default: all
    pub members: Vec<String>,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
    /// Only members with this role
    #[arg(short, long, default_value = "any")]
    pub role: Role,
    /// Only one of the members, by chance
    #[arg(long)]
    pub any: bool,
    /// When, in an unambiguous format such as ISO 8601
    #[arg(long)]
    pub scheduled: Option<String>,
    /// Only if PostgreSQL is older than this (e.g. 15.4)
    #[arg(long, value_name = "VERSION")]
    pub pg_version: Option<String>,
    /// Only where a restart is pending
    #[arg(long)]
    pub pending: bool,
    /// Report an error, and fail over if need be, when a restart takes longer than this
    #[arg(long)]
    pub timeout: Option<String>,
    /// Don't ask
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(super) struct ReloadArgs {
    /// Cluster
    pub cluster: String,
    /// Members; default: all
    pub members: Vec<String>,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
    /// Only members with this role
    #[arg(short, long, default_value = "any")]
    pub role: Role,
    /// Don't ask
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(super) struct ReinitArgs {
    /// Cluster
    pub cluster: String,
    /// Replicas
    pub members: Vec<String>,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
    /// Don't ask; cancel what the member is doing
    #[arg(long)]
    pub force: bool,
    /// Copy from the leader, not from another replica
    #[arg(long)]
    pub from_leader: bool,
    /// Wait until it is done
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub(super) struct PauseArgs {
    #[command(flatten)]
    pub target: DefaultGroupArgs,
    /// Wait until all members know it
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub(super) struct FlushArgs {
    /// Cluster
    pub cluster: String,
    /// Members, and then what to forget: restart or switchover
    #[arg(required = true, value_name = "MEMBER... restart|switchover")]
    pub members_and_target: Vec<String>,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
    /// Only members with this role
    #[arg(short, long, default_value = "any")]
    pub role: Role,
    /// Don't ask
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    /// Cluster
    pub cluster: String,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
    /// Output format of the member table
    #[arg(short, long, default_value = "pretty")]
    pub format: FormatName,
}

#[derive(Debug, Args)]
pub(super) struct DsnArgs {
    /// Cluster; default: `scope` of the configuration
    pub cluster: Option<String>,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
    /// Of any member with this role
    #[arg(short, long)]
    pub role: Option<Role>,
    /// Of this member
    #[arg(short, long)]
    pub member: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct QueryArgs {
    /// Cluster; default: `scope` of the configuration
    pub cluster: Option<String>,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
    /// Output format
    #[arg(long, default_value = "tsv")]
    pub format: FormatName,
    /// Execute the SQL of this file; - is standard input
    #[arg(short, long)]
    pub file: Option<String>,
    /// Execute this SQL
    #[arg(short, long)]
    pub command: Option<String>,
    /// Ask for the password
    #[arg(long)]
    pub password: bool,
    /// Database user
    #[arg(short = 'U', long)]
    pub username: Option<String>,
    /// Database
    #[arg(short, long)]
    pub dbname: Option<String>,
    #[command(flatten)]
    pub watch: WatchArgs,
    /// On any member with this role
    #[arg(short, long)]
    pub role: Option<Role>,
    /// On this member
    #[arg(short, long)]
    pub member: Option<String>,
    /// What stands between columns of format tsv
    #[arg(long, default_value = "\t", hide_default_value = true)]
    pub delimiter: String,
}

#[derive(Debug, Args)]
pub(super) struct VersionArgs {
    /// Cluster; default: none, only this tool
    pub cluster: Option<String>,
    /// Members; default: all
    pub members: Vec<String>,
    /// Citus group
    #[arg(long)]
    pub group: Option<u32>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_and_arguments_mix_as_in_patronictl() {
        let accepted = [
            "list demo other -e -t -f json -W",
            "-c f -d etcd3://h:1 -k list",
            "--dcs h topology -w 0.5 demo",
            "query -c select -f x -d db -U u -w 1 -r replica --format json --delimiter ;",
            "edit-config demo -s a=b --set c=d -p e=f --pg g=h --apply - --replace - -q --force",
            "switchover --primary a --candidate b --scheduled now demo --force",
            "failover demo --candidate b --group 1",
            "restart demo --force a b -r standby-leader --any --pending --pg-version 15.4 --timeout 5",
            "reload demo -r any",
            "reinit demo a --from-leader --wait --force",
            "flush demo a b restart --force",
            "flush demo switchover",
            "remove demo -f yml",
            "dsn -r any",
            "version demo a",
            "demote-cluster demo --host h --port 5432 --restore-command x --primary-slot-name s --force",
            "promote-cluster --force",
        ];
        for line in accepted {
            let parsed = Cli::try_parse_from(std::iter::once("trunklinectl").chain(line.split(' ')));
            assert!(parsed.is_ok(), "{line}: {}", parsed.err().map(|e| e.to_string()).unwrap_or_default());
        }
        for line in ["list -f xml", "restart", "dsn -r boss", "nothing", "list -w -1", "list -w nan"] {
            let error = Cli::try_parse_from(std::iter::once("trunklinectl").chain(line.split(' '))).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
