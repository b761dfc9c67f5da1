//! `etcd3` (or `etcd`): where the store is.

use serde_json::Value;

use crate::local::Etcd;
use crate::section::Section;
use crate::{Secret, address};

/// Stores that Patroni knows beside etcd.
pub(crate) const OTHER_STORES: &[&str] = &["consul", "zookeeper", "exhibitor", "kubernetes", "raft"];

const DEFAULT_PORT: u16 = 2379;

const KNOWN: &[&str] = &[
    "host",
    "hosts",
    "port",
    "url",
    "proxy",
    "srv",
    "srv_suffix",
    "discovery_srv",
    "srv_domain",
    "use_proxies",
    "protocol",
    "username",
    "password",
    "cacert",
    "cert",
    "key",
];

/// The store of a document; `None` where it names none (with `required`, that is an error).
pub(crate) fn read(root: &Section<'_>, required: bool) -> Option<Etcd> {
    let others: Vec<&str> = OTHER_STORES.iter().copied().filter(|store| root.map().contains_key(*store)).collect();
    let Some(name) = ["etcd3", "etcd"].into_iter().find(|name| root.has(name)) else {
        return match others.first() {
            Some(store) => root.wrong_with(store, "only etcd (v3 API) is supported", Some(EXAMPLE)),
            None if required => root.missing("etcd3", "where etcd is", Some(EXAMPLE)),
            None => None,
        };
    };
    for store in others {
        root.notice(store, format!("only etcd (v3 API) is supported; {name} is used"));
    }
    if name == "etcd" {
        root.notice("etcd", "the v3 API of etcd is used, as if it were named etcd3");
    } else if root.has("etcd") {
        root.notice("etcd", "ignored beside etcd3");
    }
    let section = root.section(name)?;
    section.unknown(KNOWN);
    let etcd = read_section(&section)?;
    if etcd.cacert.is_some() && etcd.endpoints.iter().all(|endpoint| endpoint.starts_with("http:")) {
        section.notice("cacert", "has no effect, as the endpoints are http; protocol: https makes them use TLS");
    }
    Some(etcd)
}

const EXAMPLE: &str = "give etcd3: {hosts: ['10.0.0.1:2379', '10.0.0.2:2379']} or PATRONI_ETCD3_HOSTS";

fn read_section(section: &Section<'_>) -> Option<Etcd> {
    let https = section.choice("protocol", &[("http", false), ("https", true)]).unwrap_or(false);
    let authentication = match (section.text("username"), section.text("password")) {
        (Some(user), password) => Some((user, Secret::new(password.unwrap_or_default()))),
        (None, _) => None,
    };
    let (endpoints, in_url) = endpoints(section, https)?;
    let (cert, key) = (section.file("cert"), section.file("key"));
    if cert.is_some() != key.is_some() {
        let (have, lack) = if cert.is_some() { ("cert", "key") } else { ("key", "cert") };
        return section.missing(lack, &format!("{have} is given, and a client certificate needs both"), None);
    }
    let use_proxies = section.boolean("use_proxies").unwrap_or(false) || section.has("proxy");
    let authentication = in_url.or(authentication);
    Some(Etcd { endpoints, authentication, cacert: section.file("cacert"), cert, key, use_proxies })
}

type User = Option<(String, Secret)>;

/// In Patroni's order: `proxy`, `url`, `hosts`, `host`.
fn endpoints(section: &Section<'_>, https: bool) -> Option<(Vec<String>, User)> {
    if let Some(key) = ["proxy", "url"].into_iter().find(|key| section.has(key)) {
        let text = section.text(key)?;
        return match parse_url(&text, https) {
            Some((endpoint, user)) => Some((vec![endpoint], user)),
            None => section.wrong(key, "a URL is expected, such as https://10.0.0.1:2379"),
        };
    }
    let port =
        section.integer("port", 1..=65535, None).and_then(|port| u16::try_from(port).ok()).unwrap_or(DEFAULT_PORT);
    if let Some(key) = ["hosts", "host"].into_iter().find(|key| section.has(key)) {
        let hosts = hosts(section, key)?;
        let endpoints: Option<Vec<_>> = hosts.iter().map(|host| endpoint(host, https, port)).collect();
        return match endpoints {
            Some(endpoints) if !endpoints.is_empty() => Some((endpoints, None)),
            _ => section.wrong(key, "host:port, or a list of them, is expected"),
        };
    }
    let srv = ["srv", "srv_suffix", "discovery_srv", "srv_domain"].into_iter().find(|key| section.has(key));
    match srv {
        Some(key) => section.wrong_with(
            key,
            "discovery by DNS SRV records is not supported",
            Some("list the endpoints in hosts"),
        ),
        None => section.missing("hosts", "one of hosts, host, url or proxy is needed", Some(EXAMPLE)),
    }
}

/// A list, or one text with commas.
fn hosts(section: &Section<'_>, key: &str) -> Option<Vec<String>> {
    let lines = match section.get(key) {
        // A missing quote makes `- host: 2379` a map.
        Some(Value::Array(items)) if items.iter().any(Value::is_object) => {
            return section.wrong_with(key, "a list of host:port is expected", Some("write no space after the colon"));
        }
        _ => section.lines(key)?,
    };
    let split = lines.iter().flat_map(|line| line.split(',')).map(str::trim).filter(|host| !host.is_empty());
    Some(split.map(str::to_owned).collect())
}

fn endpoint(host: &str, https: bool, default_port: u16) -> Option<String> {
    if host.contains("://") {
        return parse_url(host, https).map(|(endpoint, _)| endpoint);
    }
    let (host, port) = address::split(host, Some(default_port)).ok()?;
    let scheme = if https { "https" } else { "http" };
    Some(format!("{scheme}://{}", address::join(&host, port)))
}

/// `[scheme://][user:password@]host[:port][/…]`.
fn parse_url(text: &str, https: bool) -> Option<(String, User)> {
    let (https, rest) = match text.split_once("://") {
        Some(("http", rest)) => (false, rest),
        Some(("https", rest)) => (true, rest),
        Some(_) => return None,
        None => (https, text),
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority),
    };
    let user = user.map(|user| {
        let (name, password) = user.split_once(':').unwrap_or((user, ""));
        (decoded(name), Secret::new(decoded(password)))
    });
    Some((endpoint(host, https, DEFAULT_PORT)?, user))
}

/// Percent-decoded; what is no escape stays.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let hex = |b: &u8| char::from(*b).to_digit(16);
        match (byte, tail.first().and_then(hex), tail.get(1).and_then(hex)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high * 16 + low) as u8);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The DCS of `--dcs-url`: `[scheme://]host[:port][/namespace]`.
///
/// # Errors
/// What is expected, as a sentence.
pub(crate) fn parse_dcs_url(text: &str) -> Result<(Etcd, Option<String>), String> {
    let expected = "[etcd3://]host[:port][/namespace] is expected";
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let wanted = match scheme {
        "" | "etcd" | "etcd3" | "http" => false,
        "https" => true,
        other => return Err(format!("{other} is not supported, only etcd (v3 API) is; {expected}")),
    };
    let (hosts, namespace) = match rest.split_once('/') {
        Some((hosts, namespace)) => {
            (hosts, Some(namespace.trim_matches('/')).filter(|namespace| !namespace.is_empty()))
        }
        None => (rest, None),
    };
    let endpoints: Option<Vec<_>> = hosts.split(',').map(|host| endpoint(host.trim(), wanted, DEFAULT_PORT)).collect();
    let endpoints = endpoints.ok_or(expected)?;
    Ok((Etcd { endpoints, ..Etcd::default() }, namespace.map(str::to_owned)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;
    use crate::report::{Origins, Report};

    fn read_value(value: Value) -> Result<Etcd, String> {
        let Value::Object(map) = value else { return Err("no map".to_owned()) };
        let report = Report::new(Origins::new("f"));
        let etcd = read(&Section::root(&map, &report), true);
        let problems = report.into_parts().0;
        assert_eq!(etcd.is_none(), !problems.is_empty(), "a reason for what is not there");
        etcd.ok_or_else(|| problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    #[test]
    fn endpoints_in_every_form() {
        let cases = [
            (json!({"host": "127.0.0.1:2379"}), vec!["http://127.0.0.1:2379"]),
            (json!({"host": "etcd"}), vec!["http://etcd:2379"]),
            (json!({"hosts": "a:1,b"}), vec!["http://a:1", "http://b:2379"]),
            (json!({"hosts": ["a:1", "b"], "port": 5, "protocol": "https"}), vec!["https://a:1", "https://b:5"]),
            (json!({"hosts": ["https://a:1", "[::1]:2"]}), vec!["https://a:1", "http://[::1]:2"]),
            (json!({"url": "https://a", "host": "b"}), vec!["https://a:2379"]),
            (json!({"proxy": "http://p:1/", "url": "https://a"}), vec!["http://p:1"]),
        ];
        for (section, expected) in cases {
            assert_eq!(read_value(json!({ "etcd3": section })).expect("etcd").endpoints, expected, "{section}");
        }
    }

    #[test]
    fn users_come_from_keys_or_the_url() {
        let user = |section| read_value(json!({ "etcd3": section })).expect("etcd").authentication;
        assert_eq!(user(json!({"host": "a"})), None);
        assert_eq!(
            user(json!({"host": "a", "username": "u", "password": "p"})),
            Some(("u".to_owned(), Secret::new("p")))
        );
        assert_eq!(user(json!({"url": "http://u:p%40@a:1"})), Some(("u".to_owned(), Secret::new("p@"))));
    }

    #[test]
    fn what_stands_for_the_cluster_is_all_there_is() {
        let fixed = |section| read_value(json!({ "etcd3": section })).expect("etcd").use_proxies;
        assert!(!fixed(json!({"host": "a"})) && !fixed(json!({"url": "http://a", "use_proxies": "off"})));
        assert!(fixed(json!({"host": "a", "use_proxies": true})) && fixed(json!({"proxy": "http://a"})));
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let cases = [
            (json!({}), "f: etcd3: missing: where etcd is"),
            (json!({"consul": {"host": "x"}}), "f: consul = {…}: only etcd (v3 API) is supported"),
            (json!({"etcd3": {}}), "f: etcd3.hosts: missing: one of hosts, host, url or proxy is needed"),
            (
                json!({"etcd3": {"hosts": ["a:x"]}}),
                "f: etcd3.hosts = [\"a:x\"]: host:port, or a list of them, is expected",
            ),
            (json!({"etcd3": {"hosts": [{"a": 1}]}}), "f: etcd3.hosts = [{\"a\":1}]: a list of host:port is expected"),
            (json!({"etcd3": {"srv": "x"}}), "f: etcd3.srv = \"x\": discovery by DNS SRV records is not supported"),
            (json!({"etcd3": {"host": "a", "cert": "c"}}), "f: etcd3.key: missing: cert is given, and a client"),
            (json!({"etcd3": "a"}), "f: etcd3 = \"a\": a section (key: value) is expected"),
        ];
        for (value, expected) in cases {
            let error = read_value(value).expect_err(expected);
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn other_stores_beside_etcd_are_only_noticed() {
        let map =
            Map::from_iter([("etcd".to_owned(), json!({"host": "a"})), ("consul".to_owned(), json!({"host": "b"}))]);
        let report = Report::new(Origins::new("f"));
        assert!(read(&Section::root(&map, &report), true).is_some());
        let notices: Vec<_> = report.finish().expect("no error").iter().map(ToString::to_string).collect();
        assert_eq!(
            notices,
            [
                "f: consul: only etcd (v3 API) is supported; etcd is used",
                "f: etcd: the v3 API of etcd is used, as if it were named etcd3"
            ]
        );
    }

    #[test]
    fn dcs_urls() {
        let cases = [
            ("localhost", Some(("http://localhost:2379", None))),
            ("etcd3://h:1/ns", Some(("http://h:1", Some("ns")))),
            ("etcd://h/a/b/", Some(("http://h:2379", Some("a/b")))),
            ("https://h:1", Some(("https://h:1", None))),
            ("consul://h", None),
            ("", None),
            ("h:x", None),
        ];
        for (text, expected) in cases {
            let parsed = parse_dcs_url(text).ok().map(|(etcd, namespace)| (etcd.endpoints[0].clone(), namespace));
            let expected = expected.map(|(endpoint, namespace)| (endpoint.to_owned(), namespace.map(str::to_owned)));
            assert_eq!(parsed, expected, "{text}");
        }
    }
}
