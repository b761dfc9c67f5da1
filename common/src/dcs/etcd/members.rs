//! Members of etcd that the configuration does not name: they are used when those do not answer that it names, as by Patroni.

use std::net::IpAddr;

/// A member as etcd lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    /// Its number.
    pub id: u64,
    /// Where it says that clients find it; empty while it has never been started.
    pub urls: Vec<String>,
    /// It has no vote yet, and answers nobody.
    pub is_learner: bool,
}

/// What an etcd cluster has beside what is configured.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Found {
    /// The cluster's number.
    pub cluster: u64,
    /// How many members it has.
    pub members: usize,
    /// Their addresses, in order.
    pub urls: Vec<String>,
}

impl Found {
    /// Of the members of `cluster`, as the one with the number `told_by` has listed them. Unless that was found `before`, its
    /// address is one of the configured ones, under whatever name.
    ///
    /// Left out: what the same scheme does not lead to (there may be no certificates for it), what is no address at all, and a
    /// member's name for itself on its own host, unless the configuration has nothing else.
    pub fn new(cluster: u64, told_by: u64, listed: &[Listed], configured: &[String], before: &[String]) -> Self {
        let schemes: Vec<&str> = configured.iter().filter_map(|url| Some(url.split_once("://")?.0)).collect();
        let all_local = configured.iter().all(|url| reach(url) == Reach::OwnHost);
        let usable = |url: &&str| {
            let known = url.split_once("://").is_some_and(|(scheme, _)| schemes.contains(&scheme));
            let reached = match reach(url) {
                Reach::Network => true,
                Reach::OwnHost => all_local,
                Reach::Nowhere => false,
            };
            known && reached && !configured.iter().any(|own| own == url)
        };
        let among =
            |member: &Listed, urls: &[String]| member.urls.iter().any(|url| urls.iter().any(|u| u == trimmed(url)));
        let named = |member: &Listed| among(member, configured) || (member.id == told_by && !among(member, before));
        let others = listed.iter().filter(|member| !member.is_learner && !named(member));
        let urls = others.flat_map(|member| member.urls.iter().map(|url| trimmed(url))).filter(usable);
        let mut urls: Vec<String> = urls.map(str::to_owned).collect();
        urls.sort();
        urls.dedup();
        Self { cluster, members: listed.len(), urls }
    }
}

fn trimmed(url: &str) -> &str {
    url.trim_end_matches('/')
}

/// From where an address can be reached.
#[derive(PartialEq, Eq)]
enum Reach {
    Network,
    OwnHost,
    Nowhere,
}

fn reach(url: &str) -> Reach {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host).trim_matches(['[', ']']);
    match host.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() => Reach::Nowhere,
        Ok(ip) if ip.is_loopback() => Reach::OwnHost,
        Err(_) if host.is_empty() => Reach::Nowhere,
        Err(_) if host == "localhost" => Reach::OwnHost,
        _ => Reach::Network,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(id: u64, urls: &[&str]) -> Listed {
        Listed { id, urls: urls.iter().map(|url| (*url).to_owned()).collect(), is_learner: false }
    }

    fn found(told_by: u64, members: &[Listed], configured: &[&str]) -> Vec<String> {
        found_again(told_by, members, configured, &[])
    }

    fn found_again(told_by: u64, members: &[Listed], configured: &[&str], before: &[&str]) -> Vec<String> {
        let owned = |urls: &[&str]| urls.iter().map(|url| (*url).to_owned()).collect::<Vec<_>>();
        let found = Found::new(7, told_by, members, &owned(configured), &owned(before));
        assert_eq!((found.cluster, found.members), (7, members.len()));
        found.urls
    }

    #[test]
    fn the_others_are_found() {
        let three = [
            listed(1, &["http://10.0.0.1:2379"]),
            listed(2, &["http://10.0.0.2:2379/", "http://127.0.0.1:2379"]),
            listed(3, &["http://10.0.0.3:2379", "https://10.0.0.3:1", "unix://x:0", "http://0.0.0.0:1", "http://:1"]),
        ];
        let others = ["http://10.0.0.2:2379", "http://10.0.0.3:2379"];
        assert_eq!(found(1, &three, &["http://10.0.0.1:2379"]), others);
        assert_eq!(found(1, &three, &["http://etcd.example.org:2379"]), others, "by another name");
        assert_eq!(found(1, &three, &["http://10.0.0.1:2379", "http://10.0.0.2:2379"]), others[1..]);
        assert_eq!(found_again(2, &three, &["http://10.0.0.1:2379"], &others), others, "told by one that was found");
        let [one, two, mut three] = three;
        three.is_learner = true;
        assert_eq!(found(1, &[one, two, three], &["http://10.0.0.1:2379"]), others[..1]);
    }

    #[test]
    fn a_members_name_for_itself_is_of_use_on_its_own_host() {
        let own = [listed(1, &["http://localhost:2379"]), listed(2, &["http://localhost:2479"]), listed(3, &[])];
        assert_eq!(found(1, &own, &["http://127.0.0.1:2379"]), ["http://localhost:2479"]);
        assert_eq!(found(1, &own, &["http://10.0.0.1:2379"]), [""; 0]);
        assert_eq!(found(1, &own, &["http://[::1]:2379"]), ["http://localhost:2479"]);
    }
}
