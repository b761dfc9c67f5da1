//! `router.yml`.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::env::Env;
use crate::local::{self, Ctl, Etcd};
use crate::port::{read_ports, read_silence};
use crate::report::{Errors, Notice};
use crate::section::Section;
use crate::{document, etcd};

pub use crate::local::VerifyClient;
pub use crate::port::{
    Balance, Lag, Listen, NoCandidate, Port, Proxied, ProxyVersion, ServerCertificate, ServerTls, ServerTlsMode, Target,
};

/// The router's configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterConfig {
    /// The cluster's name.
    pub scope: String,
    /// Prefix of the keys.
    pub namespace: String,
    /// Where etcd is.
    pub etcd: Etcd,
    /// Certificates for the members' REST APIs.
    pub ctl: Ctl,
    /// Members that are asked who leads where etcd has never been reached.
    pub members: Vec<KnownMember>,
    /// The ports applications connect to; never empty, names unique.
    pub ports: Vec<Port>,
    /// Where `/metrics`, `/health` … listen, `host:port`; none = nowhere.
    pub admin: Option<String>,
    /// Threads that move bytes; 0 = one per core.
    pub threads: usize,
    /// After so many questions of its client that were answered (or soon after its start) a session that just talks moves to a thread
    /// that does nothing else; 0 = never.
    pub settle_after: u32,
    /// Bounds of everything.
    pub limits: Limits,
    /// Logging.
    pub log: crate::local::Log,
}

/// A member that is known without etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownMember {
    /// Its name.
    pub name: String,
    /// Its REST API: `http(s)://host:port`.
    pub api_url: String,
    /// Its server: `host:port`.
    pub connect_address: String,
}

/// Bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sessions at once, over all ports.
    pub max_sessions: usize,
    /// Held connections at once, over all ports.
    pub max_held: usize,
    /// Connections made at once to a server that is about to lead, for those that are held.
    pub max_ahead: usize,
    /// `/ready` says no while more connections are held.
    pub ready_held: usize,
    /// How long a connection is held, where its port says nothing else.
    pub hold_timeout: Duration,
    /// Held connections released per second once there is a server, as a pace.
    pub release_rate: u32,
    /// Cancel requests passed on per second, counted by the servers they go to.
    pub cancel_rate: u32,
    /// How long a client may take to send its first packet, where its port says nothing else.
    pub startup_timeout: Duration,
    /// How long a server may take to accept, where its port says nothing else.
    pub connect_timeout: Duration,
    /// A client that does not even acknowledge for so long is given up, where its port says nothing else.
    pub client_silence: Option<Duration>,
    /// The same of a server.
    pub server_silence: Option<Duration>,
    /// How old unconfirmed knowledge of the leader may be before new connections are held.
    pub stale_after: Duration,
    /// How long a session may go on once its leader has announced a planned stop, where its transactions can be seen; 0: until
    /// the server ends it.
    pub switchover_budget: Duration,
    /// How long sessions may go on at shutdown.
    pub drain_timeout: Duration,
    /// How long those that can't leave may go on in a process that has handed over to the next one; `None`: as long as they like.
    pub handover_timeout: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_sessions: 20_000,
            max_held: 10_000,
            max_ahead: 16,
            ready_held: 5_000,
            hold_timeout: Duration::from_secs(30),
            release_rate: 2_000,
            cancel_rate: 100,
            startup_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(1),
            client_silence: Some(Duration::from_secs(20)),
            server_silence: Some(Duration::from_secs(8)),
            stale_after: Duration::from_secs(5),
            switchover_budget: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(30),
            handover_timeout: Some(Duration::from_secs(24 * 3600)),
        }
    }
}

impl RouterConfig {
    /// Reads `router.yml`, with `PATRONI_SCOPE`, `PATRONI_NAMESPACE`, `PATRONI_ETCD3_*` and `PATRONI_LOG_*` over it; without
    /// a file, those alone. Unknown keys become notices.
    ///
    /// # Errors
    /// Everything that is wrong, at once.
    pub fn load(path: Option<&Path>, env: &Env) -> Result<(Self, Vec<Notice>), Errors> {
        let (map, report) = document::load(path, &env.only(VARIABLES));
        let config = if map.is_empty() { None } else { read(&Section::root(&map, &report)) };
        match (config, report.finish()) {
            (_, Err(errors)) => Err(errors),
            (Some(config), Ok(notices)) => Ok((config, notices)),
            // What could not be read has always left a problem behind.
            (None, Ok(_)) => Err(Errors(Vec::new())),
        }
    }
}

/// Others are for an agent that shares the environment.
/// So many turns are worth more than the move costs.
const SETTLE_AFTER: u32 = 32;

const VARIABLES: &[&str] = &["PATRONI_SCOPE", "PATRONI_NAMESPACE", "PATRONI_ETCD3_", "PATRONI_ETCD_", "PATRONI_LOG_"];

const KNOWN: &[&str] = &[
    "scope",
    "namespace",
    "etcd3",
    "etcd",
    "ctl",
    "members",
    "ports",
    "log_sessions",
    "admin",
    "threads",
    "settle_after",
    "limits",
    "log",
];

const MEMBER: &str = "write - {name: pg1, api_url: 'http://10.0.0.1:8008', connect_address: '10.0.0.1:5432'}";

fn read(root: &Section<'_>) -> Option<RouterConfig> {
    root.unknown(KNOWN);
    let scope = match root.has("scope") {
        true => root.name("scope"),
        false => root.missing("scope", "the cluster's name", Some("give scope: … or PATRONI_SCOPE")),
    };
    let namespace = local::read_namespace(root);
    let etcd = etcd::read(root, true);
    let ctl = local::read_ctl(root);
    let members = read_members(root);
    let limits = read_limits(root);
    let ports = read_ports(root, &limits);
    let admin = read_admin(root);
    if let Some(admin) = &admin {
        let taken = |port: &&Port| port.listen.contains(&Listen::Tcp(admin.clone()));
        for port in ports.iter().flatten().filter(taken) {
            root.wrong::<()>("admin", format!("port {} listens there already", port.name));
        }
    }
    let threads = root.integer("threads", 0..=1024, None).and_then(|threads| usize::try_from(threads).ok());
    let settle_after = root.integer("settle_after", 0..=1_000_000, None).and_then(|turns| u32::try_from(turns).ok());
    let log = local::read_log(root);
    Some(RouterConfig {
        scope: scope?,
        namespace,
        etcd: etcd?,
        ctl,
        members,
        ports: ports?,
        admin,
        threads: threads.unwrap_or(0),
        settle_after: settle_after.unwrap_or(SETTLE_AFTER),
        limits,
        log,
    })
}

/// `members`: a list, names unique.
fn read_members(root: &Section<'_>) -> Vec<KnownMember> {
    let items = match root.get("members") {
        None => return Vec::new(),
        Some(Value::Array(items)) => items,
        Some(_) => {
            root.wrong_with::<()>("members", "a list of members is expected", Some(MEMBER));
            return Vec::new();
        }
    };
    let mut members: Vec<KnownMember> = Vec::new();
    for (position, item) in items.iter().enumerate() {
        let path = format!("members[{position}]");
        let Value::Object(map) = item else {
            let expected = "a member is expected";
            root.report().problem(&path, Some(item.to_string()), expected, Some(MEMBER.to_owned()));
            continue;
        };
        let section = Section::at(map, path, root.report());
        section.unknown(&["name", "api_url", "connect_address"]);
        for key in ["name", "api_url", "connect_address"].into_iter().filter(|key| !section.has(key)) {
            section.missing::<()>(key, "name, REST API and server are needed of a member", Some(MEMBER));
        }
        let (name, api_url) = (section.name("name"), section.text("api_url"));
        let api_url = api_url.filter(|url| {
            let known = url.starts_with("http://") || url.starts_with("https://");
            known || section.wrong::<()>("api_url", "http://host:port or https://host:port is expected").is_some()
        });
        let (Some(name), Some(api_url), Some(connect_address)) = (name, api_url, section.address("connect_address"))
        else {
            continue;
        };
        if members.iter().any(|known| known.name == name) {
            section.wrong::<()>("name", "is that of another member already");
        }
        members.push(KnownMember { name, api_url, connect_address });
    }
    members
}

/// `admin: {listen: …}`, or just the address.
fn read_admin(root: &Section<'_>) -> Option<String> {
    if root.get("admin")?.is_string() {
        return root.address("admin");
    }
    let section = root.section("admin")?;
    section.unknown(&["listen"]);
    match section.has("listen") {
        true => section.address("listen"),
        false => section.missing("listen", "where /metrics and /health listen", Some("write listen: '0.0.0.0:8010'")),
    }
}

fn read_limits(root: &Section<'_>) -> Limits {
    let default = Limits::default();
    let Some(section) = root.section("limits") else { return default };
    section.unknown(&[
        "max_sessions",
        "max_held",
        "max_ahead",
        "ready_held",
        "hold_timeout",
        "release_rate",
        "cancel_rate",
        "startup_timeout",
        "connect_timeout",
        "client_silence",
        "server_silence",
        "stale_after",
        "switchover_budget",
        "drain_timeout",
        "handover_timeout",
    ]);
    let number = |key: &str, least: i64, default: usize| {
        section.integer(key, least..=10_000_000, None).and_then(|n| usize::try_from(n).ok()).unwrap_or(default)
    };
    let duration = |key: &str, default: Duration| section.duration(key).unwrap_or(default);
    let some_time = |key: &str, default: Duration| section.some_time(key).unwrap_or(default);
    let max_held = number("max_held", 0, default.max_held);
    Limits {
        max_sessions: number("max_sessions", 1, default.max_sessions),
        max_held,
        max_ahead: number("max_ahead", 0, default.max_ahead),
        ready_held: number("ready_held", 0, max_held / 2),
        hold_timeout: duration("hold_timeout", default.hold_timeout),
        release_rate: u32::try_from(number("release_rate", 1, default.release_rate as usize)).unwrap_or(u32::MAX),
        cancel_rate: u32::try_from(number("cancel_rate", 1, default.cancel_rate as usize)).unwrap_or(u32::MAX),
        startup_timeout: some_time("startup_timeout", default.startup_timeout),
        connect_timeout: some_time("connect_timeout", default.connect_timeout),
        client_silence: read_silence(&section, "client_silence", default.client_silence),
        server_silence: read_silence(&section, "server_silence", default.server_silence),
        stale_after: some_time("stale_after", default.stale_after),
        switchover_budget: duration("switchover_budget", default.switchover_budget),
        drain_timeout: duration("drain_timeout", default.drain_timeout),
        handover_timeout: section
            .duration("handover_timeout")
            .map_or(default.handover_timeout, |time| (!time.is_zero()).then_some(time)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn load(text: &str) -> Result<(RouterConfig, Vec<String>), String> {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("router.yml");
        fs::write(&file, text).expect("written");
        let short = |text: String| text.replace(&file.display().to_string(), "router.yml");
        let loaded = RouterConfig::load(Some(&file), &Env::default());
        let (config, notices) = loaded.map_err(|errors| short(errors.to_string()))?;
        Ok((config, notices.iter().map(|notice| short(notice.to_string())).collect()))
    }

    const MINIMAL: &str = "scope: demo\netcd3: {hosts: ['127.0.0.1:2379']}\n";

    #[test]
    fn the_least_file_has_sensible_defaults() {
        let (config, notices) = load(MINIMAL).expect("loads");
        assert_eq!(notices, Vec::<String>::new());
        assert_eq!((config.scope.as_str(), config.namespace.as_str()), ("demo", "service"));
        assert_eq!(config.limits, Limits::default());
        let ports: Vec<_> =
            config.ports.iter().map(|p| (p.name.as_str(), p.listen[0].to_string(), p.no_candidate)).collect();
        let expected = [("rw", "0.0.0.0:5000", NoCandidate::Hold), ("ro", "0.0.0.0:5001", NoCandidate::Leader)];
        assert_eq!(ports, expected.map(|(name, listen, policy)| (name, listen.to_owned(), policy)));
        assert_eq!((config.admin, config.threads, config.settle_after), (None, 0, 32));
    }

    #[test]
    fn everything_can_be_said() {
        let text = format!(
            "{MINIMAL}namespace: /db/
ports:
- {{name: rw, listen: '0.0.0.0:6000', target: leader, no_candidate: refuse}}
- {{name: ro, listen: '[::]:6001', target: sync, max_lag: 16MB}}
- {{name: all, listen: '0.0.0.0:6002', target: any, no_candidate: hold, max_lag: 100}}
admin: {{listen: '127.0.0.1:8010'}}
threads: 2
settle_after: 0
limits: {{max_sessions: 10, max_held: 0, hold_timeout: 500ms, release_rate: 5, startup_timeout: 1min, stale_after: 2.5}}
log: {{level: debug, type: json}}
"
        );
        let (config, notices) = load(&text).expect("loads");
        assert_eq!(notices, Vec::<String>::new());
        assert_eq!((config.namespace.as_str(), config.threads, config.settle_after), ("db", 2, 0));
        assert_eq!(config.ports[0].no_candidate, NoCandidate::Refuse);
        assert_eq!(config.ports[1].max_lag, Lag { bytes: Some(16 << 20), time: None });
        assert_eq!((config.ports[1].target, config.ports[1].no_candidate), (Target::Sync, NoCandidate::Leader));
        assert_eq!(config.ports[2].no_candidate, NoCandidate::Hold);
        assert_eq!(config.admin.as_deref(), Some("127.0.0.1:8010"));
        assert_eq!(config.limits.hold_timeout, Duration::from_millis(500));
        assert_eq!(config.limits.startup_timeout, Duration::from_secs(60));
        assert_eq!(config.limits.stale_after, Duration::from_millis(2500));
        assert_eq!((config.limits.max_sessions, config.limits.max_held, config.limits.release_rate), (10, 0, 5));
        assert!(config.log.json && config.log.level == "DEBUG");
    }

    #[test]
    fn everything_wrong_is_told_at_once() {
        let text = "
etcd3: {hosts: [nowhere:x]}
ports:
- {name: rw, listen: '5000', target: leader, no_candidate: leader}
- {name: ro, listen: '0.0.0.0:1', target: standby}
- {name: ro, listen: '0.0.0.0:2', target: any, max_lag: 5s}
- {name: ro, listen: '0.0.0.0:2', target: any}
- {listen: '0.0.0.0:3'}
- nothing
admin: {listen: '0.0.0.0:2'}
threads: many
limits: {hold_timeout: 5 apples, max_sessions: 0, stale_after: 0}
";
        let expected = "\
router.yml: scope: missing: the cluster's name; give scope: … or PATRONI_SCOPE
router.yml: etcd3.hosts = [\"nowhere:x\"]: host:port, or a list of them, is expected
router.yml: limits.max_sessions = 0: a whole number from 1 to 10000000 is expected
router.yml: limits.hold_timeout = \"5 apples\": a duration is expected: 500ms, 5s, 1min, 2h or a number of seconds
router.yml: limits.stale_after = 0: must be longer than 0
router.yml: ports[0].listen = \"5000\": host:port is expected, with a port from 1 to 65535; or a unix socket's path
router.yml: ports[0].no_candidate = \"leader\": hold or refuse is expected where the target is the leader
router.yml: ports[1].target = \"standby\": one of leader, replica, sync, async, any is expected
router.yml: ports[2].max_lag = \"5s\": a size is expected: bytes, or a number with kB, MB, GB or TB
router.yml: ports[4].name: missing: its name in logs and metrics; write - {name: rw, listen: '0.0.0.0:5000', target: leader}
router.yml: ports[4].target: missing: leader, replica, sync, async or any; write - {name: rw, listen: '0.0.0.0:5000', target: leader}
router.yml: ports[5] = \"nothing\": a port is expected; write - {name: rw, listen: '0.0.0.0:5000', target: leader}
router.yml: ports[3].name = \"ro\": is that of ports[2] already
router.yml: ports[3].listen = \"0.0.0.0:2\": is that of ports[2] already
router.yml: threads = \"many\": a whole number from 0 to 1024 is expected";
        assert_eq!(load(text).expect_err("wrong"), expected);
    }

    #[test]
    fn a_port_can_say_all_of_this() {
        let text = format!(
            "{MINIMAL}limits: {{hold_timeout: 5s, server_silence: 4s, max_held: 30}}
ports:
- name: ro
  listen: ['0.0.0.0:6001', '[::]:6001', /run/trunkline/.s.PGSQL.6001]
  target: replica
  choice: on
  tags: {{zone: [a, b], reporting: true, tier: 1}}
  max_lag: 16MB
  max_lag_time: 5s
  end_lag: 1GB
  end_lag_time: 1min
  end_down_time: 10s
  balance: client_address
  max_sessions: 100
  max_per_client: 10
  accept_rate: 50
  connect_timeout: 200ms
  client_silence: 0
  proxy_protocol: {{accept_from: [10.0.0.0/8, '::1', unix], send: v2}}
  require_tls: on
  tls: {{certfile: /c.pem, cafile: /ca.pem, verify_client: optional}}
  server_tls: {{mode: verify-ca, cafile: /sca.pem}}
- {{name: rw, listen: '*:6000', target: leader, hold_timeout: 1min, max_lag: 1MB, tags: {{}}, log_sessions: off}}
log_sessions: on
"
        );
        let (config, notices) = load(&text).expect("loads");
        assert_eq!(notices, ["router.yml: ports[1].max_lag: has no effect where the target is the leader"]);
        let ro = &config.ports[0];
        assert_eq!(
            ro.listen[1..],
            [Listen::Tcp("[::]:6001".into()), Listen::Unix("/run/trunkline/.s.PGSQL.6001".into())]
        );
        assert_eq!(ro.tags["zone"], ["a", "b"]);
        assert_eq!(
            (ro.tags["reporting"].as_slice(), ro.tags["tier"].as_slice()),
            (&["true".into()][..], &["1".into()][..])
        );
        assert_eq!(ro.max_lag, Lag { bytes: Some(16 << 20), time: Some(Duration::from_secs(5)) });
        assert_eq!(ro.end_lag, Lag { bytes: Some(1 << 30), time: Some(Duration::from_secs(60)) });
        assert_eq!((ro.end_down_time, config.ports[1].end_down_time), (Some(Duration::from_secs(10)), None));
        assert_eq!((ro.balance, ro.choice), (Balance::ClientAddress, true));
        assert_eq!((ro.max_sessions, ro.max_per_client, ro.accept_rate), (Some(100), Some(10), Some(50)));
        assert_eq!((ro.hold_timeout, ro.connect_timeout), (Duration::from_secs(5), Duration::from_millis(200)));
        assert_eq!((ro.client_silence, ro.server_silence), (None, Some(Duration::from_secs(4))));
        let ip = |text: &str| Some(text.parse().expect("an address"));
        assert!(ro.proxied.contains(ip("10.1.2.3")) && ro.proxied.contains(ip("::1")) && ro.proxied.contains(None));
        assert!(!ro.proxied.contains(ip("11.1.2.3")) && !ro.proxied.contains(ip("::2")));
        assert_eq!(ro.send_proxy, Some(ProxyVersion::V2));
        assert!(ro.require_tls && ro.speaks_tls());
        assert_eq!(ro.tls_files(), ["/c.pem", "/ca.pem", "/sca.pem"].map(std::path::PathBuf::from));
        assert_eq!(ro.server_tls.as_ref().map(|tls| tls.mode), Some(ServerTlsMode::VerifyCa));
        let rw = &config.ports[1];
        assert!(!rw.speaks_tls());
        assert!(rw.proxied == Proxied::default() && rw.send_proxy.is_none());
        assert_eq!((rw.hold_timeout, rw.client_silence), (Duration::from_secs(60), Some(Duration::from_secs(20))));
        assert!(ro.log_sessions && !rw.log_sessions, "a port overrules the file");
        assert_eq!(config.limits.ready_held, 15);
        assert_eq!(
            ro.with_target(Target::Leader).no_candidate,
            NoCandidate::Hold,
            "the leader is no substitute for itself"
        );
    }

    #[test]
    fn what_a_port_can_not_say() {
        let text = format!(
            "{MINIMAL}ports:
- {{name: a, listen: [], target: any}}
- {{name: b, listen: ['0.0.0.0:1', x], target: any, balance: least, tags: {{zone: {{}}}}, server_silence: 1s}}
- {{name: c, listen: '0.0.0.0:2', target: any, max_lag: 2MB, end_lag: 1MB, max_lag_time: 2s, end_lag_time: 1s}}
- {{name: d, listen: ['0.0.0.0:2', /run/a], target: any, max_sessions: 0, connect_timeout: 0}}
- {{name: e, listen: /run/a, target: any}}
- {{name: f, listen: /run/b, target: any, proxy_protocol: {{accept_from: [10.0.0.0/33], send: 3}}}}
- {{name: g, listen: /run/c, target: any, tls: {{verify_client: required}}, server_tls: {{mode: prefer}}}}
"
        );
        let expected = "\
router.yml: ports[0].listen = []: must not be empty
router.yml: ports[1].listen = [\"0.0.0.0:1\",\"x\"]: host:port is expected, with a port from 1 to 65535; or a unix socket's path
router.yml: ports[1].tags.zone = {…}: a text, a number, true, false, or a list of them is expected
router.yml: ports[1].balance = \"least\": one of two_choices, round_robin, client_address is expected
router.yml: ports[1].server_silence = \"1s\": 4s or more is expected, or 0 for never
router.yml: ports[2].end_lag = \"1MB\": must not be less than max_lag
router.yml: ports[2].end_lag_time = \"1s\": must not be less than max_lag_time
router.yml: ports[3].max_sessions = 0: a whole number from 1 to 10000000 is expected
router.yml: ports[3].connect_timeout = 0: must be longer than 0
router.yml: ports[5].proxy_protocol.accept_from = [\"10.0.0.0/33\"]: addresses, networks (10.0.0.0/8) or the word unix are expected
router.yml: ports[5].proxy_protocol.send = 3: one of v1, v2 is expected
router.yml: ports[6].tls.cafile: missing: who may have signed clients' certificates
router.yml: ports[6].tls.certfile: missing: the certificate that clients are shown
router.yml: ports[6].server_tls.mode = \"prefer\": one of require, verify-ca, verify-full is expected
router.yml: ports[3].listen = \"0.0.0.0:2\": is that of ports[2] already
router.yml: ports[4].listen = \"/run/a\": is that of ports[3] already";
        assert_eq!(load(&text).expect_err("wrong"), expected);
    }

    #[test]
    fn members_that_are_known_without_etcd() {
        let members = "members:
- {name: pg1, api_url: 'http://10.0.0.1:8008', connect_address: '10.0.0.1:5432'}
- {name: pg2, api_url: 'https://db2:8008', connect_address: '[::1]:5433'}
";
        let (config, notices) = load(&format!("{MINIMAL}{members}")).expect("loads");
        assert_eq!((config.members.len(), notices.len()), (2, 0));
        assert_eq!(config.members[1].connect_address, "[::1]:5433");
        let wrong = "members:
- {name: pg1, api_url: 'http://10.0.0.1:8008', connect_address: '10.0.0.1:5432'}
- {name: pg1, api_url: 'http://10.0.0.2:8008', connect_address: '10.0.0.2:5432'}
- {name: pg3, api_url: '10.0.0.3:8008', connect_address: '10.0.0.3'}
- {name: pg4, connect_address: '10.0.0.4:5432'}
- pg5
";
        let expected = "\
router.yml: members[1].name = \"pg1\": is that of another member already
router.yml: members[2].api_url = \"10.0.0.3:8008\": http://host:port or https://host:port is expected
router.yml: members[2].connect_address = \"10.0.0.3\": host:port is expected, with a port from 1 to 65535
router.yml: members[3].api_url: missing: name, REST API and server are needed of a member; write - {name: pg1, api_url: 'http://10.0.0.1:8008', connect_address: '10.0.0.1:5432'}
router.yml: members[4] = \"pg5\": a member is expected; write - {name: pg1, api_url: 'http://10.0.0.1:8008', connect_address: '10.0.0.1:5432'}";
        assert_eq!(load(&format!("{MINIMAL}{wrong}")).expect_err("wrong"), expected);
    }

    #[test]
    fn unknown_keys_are_only_noticed() {
        let text = format!("{MINIMAL}limits: {{hold_timout: 5s}}\nmetrics: on\n");
        let (_, notices) = load(&text).expect("loads");
        assert_eq!(
            notices,
            [
                "router.yml: metrics: unknown key, ignored",
                "router.yml: limits.hold_timout: unknown key, ignored; hold_timeout was meant?"
            ]
        );
    }

    #[test]
    fn the_environment_alone_is_enough() {
        let variables = [("PATRONI_SCOPE", "demo"), ("PATRONI_ETCD3_HOST", "h"), ("PATRONI_RESTAPI_LISTEN", "x:1")];
        let (config, notices) = RouterConfig::load(None, &variables.into_iter().collect()).expect("loads");
        assert_eq!(notices, []);
        assert_eq!(config.etcd.endpoints, ["http://h:2379"]);
    }
}
