//! libpq connection strings and the password file: pure text, and one atomic write.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use trunkline_config::postgres::Credentials;

use super::{Upstream, tls};

/// Keys in the order Patroni writes them (config reference §8.1); `password` never stands in a conninfo.
const ORDER: [&str; 20] = [
    "dbname",
    "user",
    "passfile",
    "host",
    "port",
    "sslmode",
    "sslcompression",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslrootcert",
    "sslcrl",
    "sslcrldir",
    "application_name",
    "krbsrvname",
    "gssencmode",
    "channel_binding",
    "target_session_attrs",
    "sslnegotiation",
    "options",
];

/// The keys of a user's `options` that are libpq's.
const CREDENTIAL_KEYS: [&str; 10] = [
    "sslmode",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslrootcert",
    "sslcrl",
    "sslcrldir",
    "gssencmode",
    "channel_binding",
    "sslnegotiation",
];

/// Who connects where, as settings of libpq.
pub type Settings = BTreeMap<String, String>;

/// The settings for a connection of `credentials` to `upstream`, with libpq's defaults made explicit as Patroni does.
/// `version` is the major version of the PostgreSQL that will read it.
pub fn to_upstream(upstream: &Upstream, credentials: &Credentials, passfile: &Path, version: u32) -> Settings {
    let mut settings = Settings::new();
    let mut set = |key: &str, value: &str| settings.insert(key.to_owned(), value.to_owned());
    set("host", &upstream.host);
    set("port", &upstream.port.to_string());
    if !credentials.username.is_empty() {
        set("user", &credentials.username);
    }
    if credentials.password.is_some() {
        set("passfile", &passfile.to_string_lossy());
    }
    set("sslmode", tls::default_mode(credentials.options.get("sslrootcert").map(String::as_str)));
    set("gssencmode", "prefer");
    if version >= 13 {
        set("channel_binding", "prefer");
    }
    if version >= 17 {
        set("sslnegotiation", "postgres");
    }
    // Of several hosts whichever is the primary: they stand for a cluster (`standby_cluster.host`).
    if upstream.host.contains(',') {
        set("target_session_attrs", "read-write");
    }
    for (key, value) in credentials.options.iter().filter(|(key, _)| CREDENTIAL_KEYS.contains(&key.as_str())) {
        set(key, value);
    }
    settings
}

/// Makes a connection end, within half a minute, when the other side vanishes without a word: while it is waited for, and
/// while something is under way to it.
pub fn end_when_vanished(settings: &mut Settings) {
    let limits = [
        ("connect_timeout", "10"),
        ("keepalives_idle", "10"),
        ("keepalives_interval", "5"),
        ("keepalives_count", "3"),
        ("tcp_user_timeout", "25000"),
    ];
    settings.extend(limits.map(|(key, value)| (key.to_owned(), value.to_owned())));
}

/// Renders settings as `key=value` pairs, quoted where libpq needs it.
pub fn render(settings: &Settings) -> String {
    let rank = |key: &str| ORDER.iter().position(|known| *known == key).unwrap_or(ORDER.len());
    let mut pairs: Vec<_> = settings.iter().collect();
    pairs.sort_by_key(|(key, _)| rank(key));
    let mut text = String::new();
    for (key, value) in pairs {
        let space = if text.is_empty() { "" } else { " " };
        let _ = write!(text, "{space}{key}={}", quoted(value));
    }
    text
}

/// Reads `key=value` pairs as libpq does (`conninfo_parse`); `None` where libpq would refuse the text. URLs are not
/// understood: nothing here writes one.
pub fn parse(text: &str) -> Option<Settings> {
    let mut settings = Settings::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Some(settings);
        }
        let mut key = String::new();
        while let Some(c) = chars.next_if(|c| *c != '=' && !c.is_ascii_whitespace()) {
            key.push(c);
        }
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        if chars.next() != Some('=') || key.is_empty() {
            return None;
        }
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        let mut value = String::new();
        if chars.next_if_eq(&'\'').is_some() {
            loop {
                match chars.next()? {
                    '\'' => break,
                    '\\' => value.push(chars.next()?),
                    c => value.push(c),
                }
            }
        } else {
            while let Some(c) = chars.next_if(|c| !c.is_ascii_whitespace()) {
                value.push(if c == '\\' { chars.next()? } else { c });
            }
        }
        settings.insert(key, value);
    }
}

/// `host:port` of a conninfo, as shown to people.
pub fn address(text: &str) -> Option<String> {
    let settings = parse(text)?;
    let host = settings.get("host").filter(|host| !host.is_empty())?;
    Some(format!("{host}:{}", settings.get("port").map_or("5432", String::as_str)))
}

/// Lines of a password file for `users` at `upstream`: `host:port:*:user:password`.
pub fn pgpass(upstream: &Upstream, users: &[&Credentials]) -> String {
    let mut text = String::new();
    for user in users {
        let Some(password) = &user.password else { continue };
        for host in upstream.host.split(',') {
            // libpq looks up a unix socket's entry under "localhost".
            let host = if host.starts_with('/') { "localhost" } else { host };
            let line = format!(
                "{}:{}:*:{}:{}\n",
                pgpass_escaped(host),
                upstream.port,
                pgpass_escaped(&user.username),
                pgpass_escaped(password.reveal())
            );
            if !text.contains(&line) {
                text.push_str(&line);
            }
        }
    }
    text
}

/// Lines for users of the local server.
pub fn with_local(mut text: String, hosts: &[&str], port: u16, users: &[&Credentials]) -> String {
    for user in users {
        let Some(password) = &user.password else { continue };
        for host in hosts {
            let user = pgpass_escaped(&user.username);
            let _ = writeln!(text, "{}:{port}:*:{user}:{}", pgpass_escaped(host), pgpass_escaped(password.reveal()));
        }
    }
    text
}

fn quoted(value: &str) -> String {
    let plain = !value.is_empty() && value.chars().all(|c| !c.is_whitespace() && c != '\'' && c != '\\');
    if plain {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\\', r"\\").replace('\'', r"\'"))
}

fn pgpass_escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace(':', r"\:")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use trunkline_config::Secret;

    fn upstream() -> Upstream {
        Upstream { name: "b".into(), host: "10.0.0.2".into(), port: 5433, slot: None }
    }

    fn replicator() -> Credentials {
        Credentials {
            username: "replicator".into(),
            password: Some(Secret::new("a:b\\c")),
            options: [("sslmode".to_owned(), "verify-ca".to_owned()), ("unknown".to_owned(), "x".to_owned())].into(),
        }
    }

    #[test]
    fn primary_conninfo_has_patronis_order_and_no_password() {
        let mut settings = to_upstream(&upstream(), &replicator(), Path::new("/run/my pass"), 15);
        settings.insert("application_name".into(), "a".into());
        assert_eq!(
            render(&settings),
            "user=replicator passfile='/run/my pass' host=10.0.0.2 port=5433 sslmode=verify-ca application_name=a \
             gssencmode=prefer channel_binding=prefer"
        );
        assert_eq!(address(&render(&settings)).as_deref(), Some("10.0.0.2:5433"));
    }

    #[test]
    fn the_password_file_is_escaped_and_has_no_line_without_a_password() {
        let nobody = Credentials { username: "n".into(), ..Default::default() };
        assert_eq!(pgpass(&upstream(), &[&replicator(), &nobody]), "10.0.0.2:5433:*:replicator:a\\:b\\\\c\n");
    }

    #[test]
    fn refuses_what_libpq_refuses() {
        for text in ["host", "host = 'x", "=x", "host=a b"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
        assert_eq!(parse(" host = 'a b'  port=1 ").and_then(|s| s.get("host").cloned()).as_deref(), Some("a b"));
    }

    proptest! {
        #[test]
        fn render_and_parse_are_inverse(settings in prop::collection::btree_map("[a-z_]{1,12}", "\\PC*", 0..6)) {
            prop_assert_eq!(parse(&render(&settings)), Some(settings));
        }

        #[test]
        fn parse_never_panics(text: String) {
            let _ = parse(&text);
        }
    }
}
