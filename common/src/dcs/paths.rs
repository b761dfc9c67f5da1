//! Patroni's key layout: `/<namespace>/<scope>/<key>`.

/// The keys of one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    base: String,
}

impl Paths {
    /// `namespace` may begin or end with slashes and contain some; runs of them collapse to one.
    pub fn new(namespace: &str, scope: &str) -> Self {
        let parts: Vec<&str> = namespace.split('/').chain(scope.split('/')).filter(|part| !part.is_empty()).collect();
        Self { base: format!("/{}/", parts.join("/")) }
    }

    /// The prefix of every key of the cluster, with its slash.
    pub fn prefix(&self) -> &str {
        &self.base
    }

    /// One key, such as `leader`.
    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.base)
    }

    /// A member's key.
    pub fn member(&self, name: &crate::MemberName) -> String {
        format!("{}members/{name}", self.base)
    }

    /// The key of a router that is registered with `lease`.
    pub fn router(&self, lease: crate::LeaseId) -> String {
        format!("{}routers/{:x}", self.base, lease.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_collapse_as_in_patroni() {
        for namespace in ["service", "/service", "service/", "//service//"] {
            assert_eq!(Paths::new(namespace, "demo").prefix(), "/service/demo/");
        }
        assert_eq!(Paths::new("/a/b/", "demo").key("leader"), "/a/b/demo/leader");
        assert_eq!(Paths::new("service", "demo").member(&"n1".into()), "/service/demo/members/n1");
    }
}
