//! A port of the router: `ports` in `router.yml`.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;

use crate::local::VerifyClient;
use crate::router::Limits;
use crate::section::Section;
use crate::{address, tags};

/// One port.
#[derive(Debug, Clone, PartialEq)]
pub struct Port {
    /// Name in logs and metrics.
    pub name: String,
    /// Where it listens; never empty.
    pub listen: Vec<Listen>,
    /// Whom it leads to.
    pub target: Target,
    /// A client may ask for another target by a start-up parameter.
    pub choice: bool,
    /// What to do while there is no such server.
    pub no_candidate: NoCandidate,
    /// Tags that a member must have: for each, one of the values.
    pub tags: BTreeMap<String, Vec<String>>,
    /// A standby further behind gets no new sessions.
    pub max_lag: Lag,
    /// Sessions on a standby further behind are ended.
    pub end_lag: Lag,
    /// Sessions on a standby that has been down for so long, as far as the DCS knows, are ended; `None`: never.
    pub end_down_time: Option<Duration>,
    /// Which of several servers.
    pub balance: Balance,
    /// Sessions at once.
    pub max_sessions: Option<usize>,
    /// Sessions at once from one address.
    pub max_per_client: Option<usize>,
    /// Connections accepted per second.
    pub accept_rate: Option<u32>,
    /// How long a connection is held.
    pub hold_timeout: Duration,
    /// How long a client may take to send its first packet.
    pub startup_timeout: Duration,
    /// How long a server may take to accept.
    pub connect_timeout: Duration,
    /// A client that does not even acknowledge for so long is given up; `None`: never.
    pub client_silence: Option<Duration>,
    /// The same of a server.
    pub server_silence: Option<Duration>,
    /// Whose connections begin with a PROXY header.
    pub proxied: Proxied,
    /// Connections to servers begin with a PROXY header.
    pub send_proxy: Option<ProxyVersion>,
    /// Sessions in plain text are refused.
    pub require_tls: bool,
    /// TLS with clients ends here, with this certificate; `None`: it is passed through.
    pub tls: Option<ServerCertificate>,
    /// TLS with servers begins here.
    pub server_tls: Option<ServerTls>,
    /// The beginning and the end of every session are told in the log, not for debugging only.
    pub log_sessions: bool,
}

/// What clients are shown, and what is asked of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerCertificate {
    /// Certificate and chain.
    pub certfile: PathBuf,
    /// Its key; without it, the same file has it.
    pub keyfile: Option<PathBuf>,
    /// Who may have signed clients' certificates.
    pub cafile: Option<PathBuf>,
    /// Whether clients need one.
    pub verify_client: VerifyClient,
}

/// How servers are spoken to in TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTls {
    /// What is checked.
    pub mode: ServerTlsMode,
    /// Who may have signed servers' certificates; without it, whom the system trusts.
    pub cafile: Option<PathBuf>,
    /// A certificate for servers that ask for one.
    pub certfile: Option<PathBuf>,
    /// Its key; without it, the same file has it.
    pub keyfile: Option<PathBuf>,
}

/// What is checked of a server, in libpq's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerTlsMode {
    /// Nothing: encryption only.
    Require,
    /// Who signed its certificate.
    VerifyCa,
    /// And that it is for this host.
    VerifyFull,
}

/// Who begins with a PROXY header, and is believed what it says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Proxied {
    /// Whoever connects from these networks.
    pub networks: Vec<IpNet>,
    /// Whoever connects by unix socket.
    pub unix: bool,
}

impl Proxied {
    /// Whether `address` does; `None` is a unix socket.
    pub fn contains(&self, address: Option<IpAddr>) -> bool {
        match address {
            Some(address) => self.networks.iter().any(|network| network.contains(&address)),
            None => self.unix,
        }
    }
}

/// A version of the PROXY protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyVersion {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Listen {
    /// `host:port`; the host may be `*`.
    Tcp(String),
    /// A unix socket's file.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp(address) => f.write_str(address),
            Listen::Unix(path) => path.display().fmt(f),
        }
    }
}

/// Whom a port leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The primary.
    Leader,
    /// Streaming standbys.
    Replica,
    /// Synchronous standbys.
    Sync,
    /// Asynchronous standbys.
    Async,
    /// Everybody who is running.
    Any,
}

impl Target {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        TARGETS.iter().find(|(_, target)| *target == self).map_or("", |(word, _)| word)
    }

    /// What `word` means.
    pub fn parse(word: &str) -> Option<Self> {
        TARGETS.iter().find(|(known, _)| known.eq_ignore_ascii_case(word)).map(|(_, target)| *target)
    }
}

/// What a port does while it has no server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoCandidate {
    /// Hold new connections until there is one.
    Hold,
    /// Use the leader.
    Leader,
    /// Answer with an error at once.
    Refuse,
}

/// How far behind a standby may be: the first limit that it passes counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lag {
    /// In bytes of WAL.
    pub bytes: Option<u64>,
    /// How long ago the leader had what the standby has now.
    pub time: Option<Duration>,
}

/// Which of several servers a new session goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// Of two at random, the one with fewer sessions.
    TwoChoices,
    /// One after the other.
    RoundRobin,
    /// Always the same for the same client address, while it is there.
    ClientAddress,
}

impl Balance {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        BALANCES.iter().find(|(_, balance)| *balance == self).map_or("", |(word, _)| word)
    }
}

impl Port {
    /// A port with defaults for all that is not said.
    pub fn new(name: impl Into<String>, listen: Listen, target: Target) -> Self {
        let limits = Limits::default();
        Self {
            name: name.into(),
            listen: vec![listen],
            target,
            choice: false,
            no_candidate: default_no_candidate(target),
            tags: BTreeMap::new(),
            max_lag: Lag::default(),
            end_lag: Lag::default(),
            end_down_time: None,
            balance: Balance::TwoChoices,
            max_sessions: None,
            max_per_client: None,
            accept_rate: None,
            hold_timeout: limits.hold_timeout,
            startup_timeout: limits.startup_timeout,
            connect_timeout: limits.connect_timeout,
            client_silence: limits.client_silence,
            server_silence: limits.server_silence,
            proxied: Proxied::default(),
            send_proxy: None,
            require_tls: false,
            tls: None,
            server_tls: None,
            log_sessions: false,
        }
    }

    /// The same port for a client that has asked for `target`.
    pub fn with_target(&self, target: Target) -> Self {
        let no_candidate = match (target, self.no_candidate) {
            (Target::Leader, NoCandidate::Leader) => NoCandidate::Hold,
            (_, other) => other,
        };
        Self { target, no_candidate, ..self.clone() }
    }

    /// Whether the router answers requests for encryption itself.
    pub fn speaks_tls(&self) -> bool {
        self.tls.is_some() || self.server_tls.is_some()
    }

    /// The files that its certificates come from.
    pub fn tls_files(&self) -> Vec<PathBuf> {
        let of_clients =
            self.tls.iter().flat_map(|tls| [Some(&tls.certfile), tls.keyfile.as_ref(), tls.cafile.as_ref()]);
        let of_servers = self.server_tls.iter().flat_map(|tls| [&tls.cafile, &tls.certfile, &tls.keyfile]);
        of_clients.chain(of_servers.map(Option::as_ref)).flatten().cloned().collect()
    }

    /// Whether it looks at how long standbys are behind.
    pub fn needs_lag_time(&self) -> bool {
        self.max_lag.time.is_some() || self.end_lag.time.is_some()
    }
}

/// Writes wait for a leader; reads are answered by the leader rather than not at all.
fn default_no_candidate(target: Target) -> NoCandidate {
    match target {
        Target::Leader => NoCandidate::Hold,
        Target::Replica | Target::Sync | Target::Async | Target::Any => NoCandidate::Leader,
    }
}

/// So far back the router remembers where the leader was.
const LONGEST_LAG: Duration = Duration::from_secs(3_600);

const EXAMPLE: &str = "write - {name: rw, listen: '0.0.0.0:5000', target: leader}";

const TARGETS: &[(&str, Target)] = &[
    ("leader", Target::Leader),
    ("replica", Target::Replica),
    ("sync", Target::Sync),
    ("async", Target::Async),
    ("any", Target::Any),
];

const NO_CANDIDATE: &[(&str, NoCandidate)] =
    &[("hold", NoCandidate::Hold), ("leader", NoCandidate::Leader), ("refuse", NoCandidate::Refuse)];

const BALANCES: &[(&str, Balance)] = &[
    ("two_choices", Balance::TwoChoices),
    ("round_robin", Balance::RoundRobin),
    ("client_address", Balance::ClientAddress),
];

const KNOWN: &[&str] = &[
    "name",
    "listen",
    "target",
    "choice",
    "no_candidate",
    "tags",
    "max_lag",
    "max_lag_time",
    "end_lag",
    "end_lag_time",
    "end_down_time",
    "balance",
    "max_sessions",
    "max_per_client",
    "accept_rate",
    "hold_timeout",
    "startup_timeout",
    "connect_timeout",
    "client_silence",
    "server_silence",
    "proxy_protocol",
    "require_tls",
    "tls",
    "server_tls",
    "log_sessions",
];

/// Where no ports are given: one for writes, one for reads.
fn default_ports(limits: &Limits, log_sessions: bool) -> Vec<Port> {
    let port = |name: &str, listen: &str, target| {
        let port = Port { log_sessions, ..Port::new(name, Listen::Tcp(listen.into()), target) };
        within(limits, port)
    };
    vec![port("rw", "0.0.0.0:5000", Target::Leader), port("ro", "0.0.0.0:5001", Target::Replica)]
}

/// `limits` have the times that a port does not name.
fn within(limits: &Limits, port: Port) -> Port {
    Port {
        hold_timeout: limits.hold_timeout,
        startup_timeout: limits.startup_timeout,
        connect_timeout: limits.connect_timeout,
        client_silence: limits.client_silence,
        server_silence: limits.server_silence,
        ..port
    }
}

/// Reads `ports`; names and addresses are unique.
pub(crate) fn read_ports(root: &Section<'_>, limits: &Limits) -> Option<Vec<Port>> {
    let log_sessions = root.boolean("log_sessions").unwrap_or(false);
    let items = match root.get("ports") {
        None => return Some(default_ports(limits, log_sessions)),
        Some(Value::Array(items)) if !items.is_empty() => items,
        Some(_) => return root.wrong_with("ports", "a list of ports is expected", Some(EXAMPLE)),
    };
    let read = |(position, item): (usize, &Value)| match item {
        Value::Object(map) => {
            read_port(&Section::at(map, format!("ports[{position}]"), root.report()), limits, log_sessions)
        }
        _ => {
            let path = format!("ports[{position}]");
            root.report().problem(&path, Some(item.to_string()), "a port is expected", Some(EXAMPLE.to_owned()));
            None
        }
    };
    let ports: Vec<Option<Port>> = items.iter().enumerate().map(read).collect();
    let mut names = BTreeMap::new();
    let mut listens = BTreeMap::new();
    for (position, port) in ports.iter().enumerate() {
        let Some(port) = port else { continue };
        let once = |seen: &mut BTreeMap<String, usize>, key: &str, value: &str| {
            if let Some(first) = seen.insert(value.to_owned(), position) {
                let path = format!("ports[{position}].{key}");
                let value = Some(format!("{value:?}"));
                root.report().problem(&path, value, format!("is that of ports[{first}] already"), None);
            }
        };
        once(&mut names, "name", &port.name);
        port.listen.iter().for_each(|listen| once(&mut listens, "listen", &listen.to_string()));
    }
    ports.into_iter().collect()
}

fn read_port(section: &Section<'_>, limits: &Limits, log_sessions: bool) -> Option<Port> {
    section.unknown(KNOWN);
    let needed = |key: &str, what: &str| {
        if !section.has(key) {
            section.missing::<()>(key, what, Some(EXAMPLE));
        }
    };
    needed("name", "its name in logs and metrics");
    needed("listen", "where it listens");
    needed("target", "leader, replica, sync, async or any");
    let name = section.name("name");
    let listen = read_listen(section);
    let target = section.choice("target", TARGETS);
    let no_candidate = section.choice("no_candidate", NO_CANDIDATE);
    if target == Some(Target::Leader) && no_candidate == Some(NoCandidate::Leader) {
        section.wrong::<()>("no_candidate", "hold or refuse is expected where the target is the leader");
    }
    let choice = section.boolean("choice").unwrap_or(false);
    let (max_lag, end_lag) = (read_lag(section, "max_lag"), read_lag(section, "end_lag"));
    if target == Some(Target::Leader) && !choice {
        for key in ["max_lag", "max_lag_time", "end_lag", "end_lag_time", "end_down_time", "balance"] {
            if section.has(key) {
                section.notice(key, "has no effect where the target is the leader");
            }
        }
    }
    let number = |key: &str| section.integer(key, 1..=10_000_000, None);
    let max_sessions = number("max_sessions").and_then(|n| usize::try_from(n).ok());
    let max_per_client = number("max_per_client").and_then(|n| usize::try_from(n).ok());
    let accept_rate = number("accept_rate").and_then(|n| u32::try_from(n).ok());
    let tags = read_tags(section);
    let balance = section.choice("balance", BALANCES).unwrap_or(Balance::TwoChoices);
    let hold_timeout = section.duration("hold_timeout").unwrap_or(limits.hold_timeout);
    let startup_timeout = section.some_time("startup_timeout").unwrap_or(limits.startup_timeout);
    let connect_timeout = section.some_time("connect_timeout").unwrap_or(limits.connect_timeout);
    let client_silence = read_silence(section, "client_silence", limits.client_silence);
    let server_silence = read_silence(section, "server_silence", limits.server_silence);
    let (proxied, send_proxy) = read_proxy_protocol(section);
    let (tls, server_tls) = (read_tls(section), read_server_tls(section));
    let target = target?;
    Some(Port {
        name: name?,
        listen: listen?,
        target,
        choice,
        no_candidate: no_candidate.unwrap_or_else(|| default_no_candidate(target)),
        tags,
        max_lag,
        end_lag,
        end_down_time: section.duration("end_down_time"),
        balance,
        max_sessions,
        max_per_client,
        accept_rate,
        hold_timeout,
        startup_timeout,
        connect_timeout,
        client_silence,
        server_silence,
        proxied,
        send_proxy,
        require_tls: section.boolean("require_tls").unwrap_or(false),
        tls,
        server_tls,
        log_sessions: section.boolean("log_sessions").unwrap_or(log_sessions),
    })
}

fn read_tls(section: &Section<'_>) -> Option<ServerCertificate> {
    let section = section.section("tls")?;
    section.unknown(&["certfile", "keyfile", "cafile", "verify_client"]);
    let words =
        [("none", VerifyClient::None), ("optional", VerifyClient::Optional), ("required", VerifyClient::Required)];
    let verify_client = section.choice("verify_client", &words).unwrap_or_default();
    let cafile = section.file("cafile");
    if verify_client != VerifyClient::None && cafile.is_none() {
        section.missing::<()>("cafile", "who may have signed clients' certificates", None);
    }
    let certfile = match section.file("certfile") {
        None => return section.missing("certfile", "the certificate that clients are shown", None),
        Some(certfile) => certfile,
    };
    Some(ServerCertificate { certfile, keyfile: section.file("keyfile"), cafile, verify_client })
}

fn read_server_tls(section: &Section<'_>) -> Option<ServerTls> {
    let section = section.section("server_tls")?;
    section.unknown(&["mode", "cafile", "certfile", "keyfile"]);
    let words = [
        ("require", ServerTlsMode::Require),
        ("verify-ca", ServerTlsMode::VerifyCa),
        ("verify-full", ServerTlsMode::VerifyFull),
    ];
    Some(ServerTls {
        mode: section.choice("mode", &words).unwrap_or(ServerTlsMode::VerifyFull),
        cafile: section.file("cafile"),
        certfile: section.file("certfile"),
        keyfile: section.file("keyfile"),
    })
}

/// `proxy_protocol: {accept_from: […], send: …}`.
fn read_proxy_protocol(section: &Section<'_>) -> (Proxied, Option<ProxyVersion>) {
    let Some(section) = section.section("proxy_protocol") else { return (Proxied::default(), None) };
    section.unknown(&["accept_from", "send"]);
    let mut proxied = Proxied::default();
    for text in section.lines("accept_from").unwrap_or_default() {
        let address = text.parse::<IpAddr>().map(IpNet::from);
        match address.ok().or_else(|| text.parse().ok()) {
            Some(network) => proxied.networks.push(network),
            None if text == "unix" => proxied.unix = true,
            None => {
                section.wrong::<()>("accept_from", "addresses, networks (10.0.0.0/8) or the word unix are expected");
            }
        }
    }
    (proxied, section.choice("send", &[("v1", ProxyVersion::V1), ("v2", ProxyVersion::V2)]))
}

/// One address, or a list of them.
fn read_listen(section: &Section<'_>) -> Option<Vec<Listen>> {
    let texts = section.lines("listen")?;
    let read = |text: &String| match text.starts_with('/') {
        true => Ok(Listen::Unix(text.into())),
        false => address::split(text, None).map(|_| Listen::Tcp(text.clone())),
    };
    match texts.iter().map(read).collect() {
        Ok(_) if texts.is_empty() => section.wrong("listen", "must not be empty"),
        Ok(listen) => Some(listen),
        Err(expected) => section.wrong("listen", format!("{expected}; or a unix socket's path")),
    }
}

/// `<key>` in bytes, `<key>_time` in time. A session is not ended sooner than new ones stop.
fn read_lag(section: &Section<'_>, key: &str) -> Lag {
    let time_key = format!("{key}_time");
    let time = match section.duration(&time_key) {
        Some(time) if time > LONGEST_LAG => section.wrong(&time_key, "1h or less is expected"),
        time => time,
    };
    let lag = Lag { bytes: section.bytes(key), time };
    if key == "end_lag" {
        let max_bytes = section.has("max_lag").then(|| section.bytes("max_lag")).flatten();
        if max_bytes.zip(lag.bytes).is_some_and(|(max, end)| end < max) {
            section.wrong::<()>("end_lag", "must not be less than max_lag");
        }
        let max_time = section.has("max_lag_time").then(|| section.duration("max_lag_time")).flatten();
        if max_time.zip(lag.time).is_some_and(|(max, end)| end < max) {
            section.wrong::<()>("end_lag_time", "must not be less than max_lag_time");
        }
    }
    lag
}

/// `tag: value`, or `tag: [value, …]`.
fn read_tags(section: &Section<'_>) -> BTreeMap<String, Vec<String>> {
    let Some(section) = section.section("tags") else { return BTreeMap::new() };
    let mut wanted = BTreeMap::new();
    for (tag, value) in section.map() {
        let items = match value {
            Value::Array(items) => items.as_slice(),
            single => std::slice::from_ref(single),
        };
        match items.iter().map(tags::text).collect::<Option<Vec<_>>>() {
            Some(values) if !values.is_empty() => drop(wanted.insert(tag.clone(), values)),
            _ => drop(section.wrong::<()>(tag, "a text, a number, true, false, or a list of them is expected")),
        }
    }
    wanted
}

/// The shortest is what the kernel can count: probes are a whole second apart.
pub(crate) fn read_silence(section: &Section<'_>, key: &str, default: Option<Duration>) -> Option<Duration> {
    match section.duration(key) {
        None => default,
        Some(Duration::ZERO) => None,
        Some(time) if time < Duration::from_secs(4) => section.wrong(key, "4s or more is expected, or 0 for never"),
        time => time,
    }
}
