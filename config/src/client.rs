//! What `trunklinectl` needs of a configuration: everything is optional, the environment alone does.

use std::fmt;
use std::path::Path;

use serde_json::{Map, Value};

use crate::document;
use crate::env::Env;
use crate::etcd;
use crate::local::{self, Ctl, Etcd};
use crate::report::{Errors, Notice, Origins, Report};
use crate::section::Section;

/// The command line's view of `patroni.yml`, `patronictl.yaml` or the environment.
#[derive(Clone, PartialEq)]
pub struct ClientConfig {
    /// The cluster's name, where one is configured.
    pub scope: Option<String>,
    /// Prefix of the keys, default `service`.
    pub namespace: String,
    /// Where etcd is, where that is configured.
    pub etcd: Option<Etcd>,
    /// How REST APIs are called, with what comes from `restapi`.
    pub ctl: Ctl,
    /// The whole merged document.
    pub raw: Value,
}

/// Without the document, which may hold passwords.
impl fmt::Debug for ClientConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientConfig")
            .field("scope", &self.scope)
            .field("namespace", &self.namespace)
            .field("etcd", &self.etcd)
            .field("ctl", &self.ctl)
            .finish_non_exhaustive()
    }
}

impl ClientConfig {
    /// Reads a file if one is given, with the environment over it. `dcs_url` (`[etcd3://]host[:port][/namespace]`) replaces
    /// the store of both. Nothing but what the command line uses is looked at.
    ///
    /// # Errors
    /// A named file that cannot be read, and everything that is wrong in what is used.
    pub fn load(path: Option<&Path>, env: &Env, dcs_url: Option<&str>) -> Result<(Self, Vec<Notice>), Errors> {
        let configured = path.is_some() || env.get("PATRONI_CONFIGURATION").is_some() || env.sets_anything();
        let (map, report) = match configured {
            true => document::load(path, env),
            false => (Map::new(), Report::new(Origins::new("environment"))),
        };
        if let Some(path) = path.filter(|path| !path.exists()) {
            report.problem_of(&path.display().to_string(), "no such file");
        }
        let config = read(&map, &report, dcs_url);
        report.finish().map(|notices| (config, notices))
    }
}

fn read(map: &Map<String, Value>, report: &Report, dcs_url: Option<&str>) -> ClientConfig {
    let root = Section::root(map, report);
    let mut config = ClientConfig {
        scope: root.text("scope").filter(|scope| !scope.is_empty()),
        namespace: local::read_namespace(&root),
        etcd: None,
        ctl: local::read_ctl(&root),
        raw: Value::Object(map.clone()),
    };
    match dcs_url.map(etcd::parse_dcs_url) {
        None => config.etcd = etcd::read(&root, false),
        Some(Ok((etcd, namespace))) => {
            config.etcd = Some(etcd);
            config.namespace = namespace.unwrap_or(config.namespace);
        }
        Some(Err(expected)) => report.problem_of("--dcs-url", expected),
    }
    config
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_environment_alone_is_enough() {
        let variables = [
            ("PATRONI_SCOPE", "demo"),
            ("PATRONI_ETCD3_HOSTS", "a:1,b:2"),
            ("PATRONI_RESTAPI_USERNAME", "u"),
            ("PATRONI_RESTAPI_PASSWORD", "p"),
            ("PATRONI_CTL_INSECURE", "on"),
        ];
        let (config, notices) = ClientConfig::load(None, &variables.into_iter().collect(), None).expect("loads");
        assert_eq!(config.scope.as_deref(), Some("demo"));
        assert_eq!(config.etcd.expect("etcd").endpoints, ["http://a:1", "http://b:2"]);
        assert_eq!(config.ctl.authentication.expect("user").0, "u");
        assert!(config.ctl.insecure);
        assert_eq!(notices, []);
    }

    #[test]
    fn nothing_at_all_is_fine() {
        let (config, _) = ClientConfig::load(None, &Env::default(), None).expect("loads");
        assert_eq!((config.scope, config.namespace.as_str(), config.etcd), (None, "service", None));
    }

    #[test]
    fn a_dcs_url_replaces_the_store() {
        let env: Env = [("PATRONI_ETCD_HOST", "a"), ("PATRONI_NAMESPACE", "n")].into_iter().collect();
        let (config, _) = ClientConfig::load(None, &env, Some("etcd3://h:1/other")).expect("loads");
        assert_eq!(config.etcd.expect("etcd").endpoints, ["http://h:1"]);
        assert_eq!(config.namespace, "other");
        let error = ClientConfig::load(None, &env, Some("consul://h")).expect_err("not supported");
        assert!(error.to_string().starts_with("--dcs-url: consul is not supported"), "{error}");
    }

    #[test]
    fn a_named_file_must_be_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("c.yaml");
        let env: Env = [("PATRONI_SCOPE", "demo")].into_iter().collect();
        let error = ClientConfig::load(Some(&file), &env, None).expect_err("no file");
        assert!(error.to_string().contains("c.yaml: no such file"), "{error}");
        fs::write(&file, "scope: other\nctl:\n  authentication: {username: a, password: b}\nrestapi: {cafile: f}\n")
            .expect("written");
        let (config, _) = ClientConfig::load(Some(&file), &Env::default(), None).expect("loads");
        assert_eq!(config.scope.as_deref(), Some("other"));
        assert_eq!(config.ctl.cacert.expect("a CA").to_str(), Some("f"));
        assert_eq!(config.ctl.authentication.expect("user").0, "a");
    }
}
