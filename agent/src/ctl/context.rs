//! Where the clusters are: configuration, DCS and REST APIs, opened once for a command.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use trunkline_common::dcs::codec;
use trunkline_common::dcs::etcd::EtcdDcs;
use trunkline_common::dcs::paths::Paths;
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::dcs::{Dcs, DcsError, Snapshot};
use trunkline_common::{ClusterView, Member, SystemClock};
use trunkline_config::{ClientConfig, Env};

use super::args::{Cli, DefaultGroupArgs};
use super::error::{CtlError, Result};
use super::members::Listing;
use super::prompt::warning;
use super::rest::Rest;
use super::select::Node;

/// How long the DCS may take to answer (Patroni's default `retry_timeout`).
const PATIENCE: Duration = Duration::from_secs(10);

/// Everything a command needs from outside.
pub(super) struct Context {
    config: ClientConfig,
    dcs: EtcdDcs<SystemClock>,
    /// Members' REST APIs.
    pub rest: Rest,
    /// What time it is.
    pub clock: SystemClock,
}

/// A cluster to work on, or a group of a Citus cluster.
pub(super) struct Target {
    /// The scope.
    pub name: String,
    /// `Some`: a Citus cluster; inside, which group of it (`None`: all).
    pub citus: Option<Option<u32>>,
    /// Its keys; of all groups, the coordinator's.
    pub store: ClusterStore<EtcdDcs<SystemClock>>,
    prefix: String,
    endpoints: String,
}

/// One reading of a [`Target`].
pub(super) struct Cluster {
    /// The scope.
    pub name: String,
    /// As in [`Target::citus`].
    pub citus: Option<Option<u32>>,
    /// The cluster, or the chosen group, or the coordinator.
    pub view: ClusterView,
    /// The other groups, where all are meant.
    pub workers: BTreeMap<u32, ClusterView>,
}

impl Context {
    /// Reads the configuration. Talks to nobody yet.
    pub async fn open(cli: &Cli) -> Result<Self> {
        let file = config_file(cli)?;
        let (mut config, notices) = ClientConfig::load(file.as_deref(), &Env::of_process(), cli.dcs_url.as_deref())
            .map_err(|errors| CtlError::new(format!("the configuration can not be used\n{errors}")))?;
        for notice in notices {
            warning(&notice.to_string());
        }
        config.ctl.insecure |= cli.insecure;
        let Some(etcd) = &config.etcd else {
            return Err(CtlError::new(
                "Can not find a DCS: set etcd3.hosts in the configuration file (-c), PATRONI_ETCD3_HOSTS in the environment, \
                 or give -d etcd3://host:2379",
            ));
        };
        let dcs = EtcdDcs::connect(etcd, SystemClock, PATIENCE)
            .await
            .map_err(|error| unreachable(&etcd.endpoints.join(", "), &error))?;
        let rest = Rest::new(&config.ctl)?;
        Ok(Self { dcs, rest, clock: SystemClock, config })
    }

    /// The cluster's name: as given, or as configured.
    pub fn scope(&self, given: Option<&str>) -> Result<String> {
        given.or(self.config.scope.as_deref()).map(str::to_owned).ok_or_else(|| {
            CtlError::new("Which cluster? Give its name as argument, or set scope in the configuration (PATRONI_SCOPE)")
        })
    }

    /// The cluster's name where one is known.
    pub fn configured_scope(&self) -> Option<&str> {
        self.config.scope.as_deref()
    }

    /// The member whose file this is, if it is one's: its name, and where its REST API is.
    pub fn own_member(&self) -> Option<Node> {
        let text = |pointer: &str| self.config.raw.pointer(pointer).and_then(Value::as_str);
        let address = text("/restapi/connect_address").or_else(|| text("/restapi/listen"))?;
        let scheme = if text("/restapi/certfile").is_some() { "https" } else { "http" };
        let member = Member { api_url: Some(format!("{scheme}://{address}/patroni")), ..Member::default() };
        Some(Node { name: text("/name").unwrap_or("this node").to_owned(), member })
    }

    /// A cluster by name; without `group`, a Citus cluster as a whole.
    pub fn target(&self, name: &str, group: Option<u32>) -> Target {
        let configured = self.config.raw.get("citus").and_then(|citus| citus.get("group")).is_some();
        let citus = (configured || group.is_some()).then_some(group);
        let scope = citus.map_or_else(|| name.to_owned(), |group| format!("{name}/{}", group.unwrap_or(0)));
        Target {
            name: name.to_owned(),
            citus,
            store: ClusterStore::new(self.dcs.clone(), Paths::new(&self.config.namespace, &scope)),
            prefix: Paths::new(&self.config.namespace, name).prefix().to_owned(),
            endpoints: self.config.etcd.as_ref().map(|etcd| etcd.endpoints.join(", ")).unwrap_or_default(),
        }
    }

    /// A cluster for the commands whose group is the configured one unless given.
    pub fn target_in_own_group(&self, args: &DefaultGroupArgs) -> Result<Target> {
        let configured = || {
            let group = self.config.raw.get("citus")?.get("group")?;
            group.as_u64().or_else(|| group.as_str()?.parse().ok())?.try_into().ok()
        };
        Ok(self.target(&self.scope(args.cluster.as_deref())?, args.group.or_else(configured)))
    }
}

impl Target {
    /// Reads it, linearizably.
    pub async fn read(&self) -> Result<Cluster> {
        let cluster = |view, workers| Cluster { name: self.name.clone(), citus: self.citus, view, workers };
        if self.citus != Some(None) {
            return Ok(cluster(self.store.read().await.map_err(|error| self.error(&error))?, BTreeMap::new()));
        }
        let snapshot = self.store.dcs().read(&self.prefix).await.map_err(|error| self.error(&error))?;
        let mut groups = split_groups(&self.prefix, &snapshot);
        Ok(cluster(groups.remove(&0).unwrap_or_default(), groups))
    }

    /// A sentence for a failure of the DCS.
    pub fn error(&self, error: &DcsError) -> CtlError {
        unreachable(&self.endpoints, error)
    }
}

impl Cluster {
    /// All groups that are meant.
    pub fn views(&self) -> impl Iterator<Item = &ClusterView> {
        std::iter::once(&self.view).chain(self.workers.values())
    }

    /// For the member table.
    pub fn listing(&self, extended: bool) -> Listing<'_> {
        let group = self.citus.flatten().unwrap_or(0);
        let workers = self.workers.iter().map(|(group, view)| (*group, view));
        let clusters = std::iter::once((group, &self.view)).chain(workers).collect();
        Listing { name: &self.name, clusters, citus: self.citus, extended }
    }

    /// A setting of the DCS as it stands there.
    pub fn setting(&self, key: &str) -> Option<&Value> {
        self.view.config.as_ref()?.value.get(key)
    }

    /// The error of commands that work on one group only.
    pub fn one_group_only(&self) -> Result<()> {
        match self.citus {
            Some(None) => Err(CtlError::new("For Citus clusters the --group must me specified")),
            _ => Ok(()),
        }
    }
}

fn split_groups(prefix: &str, snapshot: &Snapshot) -> BTreeMap<u32, ClusterView> {
    let group_of = |key: &str| key.strip_prefix(prefix)?.split_once('/')?.0.parse::<u32>().ok();
    let mut groups: BTreeMap<u32, Snapshot> = BTreeMap::new();
    for entry in &snapshot.entries {
        if let Some(group) = group_of(&entry.key) {
            groups.entry(group).or_default().entries.push(entry.clone());
        }
    }
    let view = |(group, mut part): (u32, Snapshot)| {
        part.revision = snapshot.revision;
        (group, codec::view(&Paths::new(prefix, &group.to_string()), &part, None))
    };
    groups.into_iter().map(view).collect()
}

/// The named file must be there; the usual one may.
fn config_file(cli: &Cli) -> Result<Option<PathBuf>> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let named = cli
        .config_file
        .clone()
        .or_else(|| variable("TRUNKLINECTL_CONFIG_FILE"))
        .or_else(|| variable("PATRONICTL_CONFIG_FILE"));
    if let Some(file) = named {
        return match std::fs::File::open(&file) {
            Ok(_) => Ok(Some(file)),
            Err(_) => Err(CtlError::new(format!(
                "Provided config file {} not existing or no read rights. Check the -c/--config-file parameter",
                file.display()
            ))),
        };
    }
    let home = variable("XDG_CONFIG_HOME").or_else(|| variable("HOME").map(|home| home.join(".config")));
    let usual = home.map(|home| home.join("patroni/patronictl.yaml"));
    Ok(usual.filter(|file| std::fs::File::open(file).is_ok()))
}

fn unreachable(endpoints: &str, error: &DcsError) -> CtlError {
    CtlError::new(match error {
        DcsError::Refused(why) => {
            format!(
                "The DCS at {endpoints} refused the request: {why}. Check user and password (etcd3.username, etcd3.password)"
            )
        }
        other => format!(
            "Can not talk to the DCS at {endpoints}: {other}. Is etcd running there? The address comes from etcd3.hosts in the \
             configuration, PATRONI_ETCD3_HOSTS, or -d"
        ),
    })
}
