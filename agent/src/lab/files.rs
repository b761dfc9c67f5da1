//! The configuration files of a lab's servers. JSON is YAML, so it is written as such: no quoting rules to get wrong.

use serde_json::{Map, Value, json};

use super::cluster::Spec;
use super::node::Node;
use super::proxy::Ports;

/// `patroni.yml` of one node: the same for our agent and for Patroni.
pub(super) fn patroni_yml(spec: &Spec, node: &Node, etcd: &[String]) -> String {
    let auth = if spec.trust { "trust" } else { "scram-sha-256" };
    let user = |name: &str| json!({ "username": name, "password": spec.password });
    let mut config = json!({
        "scope": spec.scope,
        "name": node.name(),
        "etcd3": { "hosts": etcd },
        "restapi": { "listen": loopback(node.rest_port()), "connect_address": loopback(node.rest_port()) },
        "bootstrap": {
            "dcs": {
                "ttl": spec.timing.ttl,
                "loop_wait": spec.timing.loop_wait,
                "retry_timeout": spec.timing.retry_timeout,
                "maximum_lag_on_failover": 1_048_576,
                "postgresql": {
                    "use_pg_rewind": true,
                    "use_slots": true,
                    "parameters": { "wal_keep_size": "64MB" },
                },
            },
            "initdb": [{ "encoding": "UTF8" }, { "locale": "C" }, "data-checksums", "no-sync"],
        },
        "postgresql": {
            "listen": loopback(node.port()),
            "connect_address": loopback(node.port()),
            "data_dir": node.data_dir(),
            "bin_dir": node.postgres_bin(),
            "pgpass": node.dir().join("pgpass"),
            "authentication": {
                "superuser": user(super::cluster::SUPERUSER),
                "replication": user("replicator"),
                "rewind": user("rewind_user"),
            },
            "pg_hba": [
                format!("local all all {auth}"),
                format!("host all all 127.0.0.1/32 {auth}"),
                format!("host replication replicator 127.0.0.1/32 {auth}"),
            ],
            "basebackup": [{ "checkpoint": "fast" }, "no-sync"],
            "parameters": {
                "unix_socket_directories": node.dir(),
                "shared_buffers": "32MB",
                // With the data, so that a server that is killed leaves nothing in /dev/shm.
                "dynamic_shared_memory_type": "mmap",
                "max_wal_size": "256MB",
                "log_line_prefix": "%m [%p] ",
                "password_encryption": "scram-sha-256",
            },
        },
        "tags": {},
    });
    merge(&mut config["bootstrap"]["dcs"], &spec.dcs);
    merge(&mut config, &spec.local);
    merge(&mut config, node.local());
    pretty(&config)
}

/// `router.yml`: a read-write and a read-only port.
pub(super) fn router_yml(scope: &str, ports: &Ports, etcd: &[String], extra: &Value) -> String {
    let mut config = json!({
        "scope": scope,
        "etcd3": { "hosts": etcd },
        "ports": [
            { "name": "read-write", "listen": loopback(ports.read_write), "target": "leader" },
            { "name": "read-only", "listen": loopback(ports.read_only), "target": "replica", "no_candidate": "hold" },
        ],
        "admin": loopback(ports.admin),
    });
    merge(&mut config, extra);
    pretty(&config)
}

fn loopback(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

fn pretty(config: &Value) -> String {
    format!("{config:#}\n")
}

/// Lays `over` on top: maps merge, `null` removes, anything else replaces.
fn merge(base: &mut Value, over: &Value) {
    let Value::Object(over) = over else {
        return if !over.is_null() {
            *base = over.clone()
        };
    };
    if !base.is_object() {
        *base = Value::Object(Map::new());
    }
    let Value::Object(base) = base else { return };
    for (key, value) in over {
        match value {
            Value::Null => drop(base.remove(key)),
            value => merge(base.entry(key).or_insert(Value::Null), value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_replaces_scalars_and_removes_nulls() {
        let mut base = json!({ "a": 1, "b": { "c": 2, "d": [1] }, "e": 5 });
        merge(&mut base, &json!({ "b": { "c": null, "d": [2] }, "e": { "f": 6 }, "g": "new" }));
        assert_eq!(base, json!({ "a": 1, "b": { "d": [2] }, "e": { "f": 6 }, "g": "new" }));
        merge(&mut base, &Value::Null);
        assert_eq!(base["a"], 1);
    }
}
