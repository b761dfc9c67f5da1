//! Which layer wins, and why an edit has no effect.

use super::*;

/// A node whose file is `file`, with `env` over it.
struct Site {
    layers: Vec<Layer>,
    loaded: Option<Local>,
    dynamic: Value,
}

fn site(file: &str, env: &[(&str, &str)], dynamic: Value) -> Site {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.yml");
    let base = "scope: demo\nname: n1\netcd3: {hosts: 'a:1'}\nrestapi: {listen: '127.0.0.1:8008'}\n";
    std::fs::write(&path, format!("{base}{file}")).unwrap();
    let sources = Sources { path: Some(path.clone()), env: env.iter().copied().collect() };
    let loaded = Local::load(Some(&path), &sources.env).map(|(local, _)| local).unwrap();
    let mut layers = sources.layers();
    for layer in &mut layers {
        layer.name = layer.name.split(' ').next().unwrap_or_default().to_owned();
    }
    Site { layers, loaded: Some(loaded), dynamic }
}

const POSTGRESQL: &str =
    "postgresql: {listen: '127.0.0.1:5432', data_dir: /d, authentication: {replication: {username: r, password: x}}";

impl Site {
    fn ask(&self, key: &str) -> Explanation {
        let layers = Some(self.layers.as_slice());
        let loaded = self.loaded.as_ref();
        explain(key, &Node { layers, loaded, dynamic: Some(&self.dynamic), in_force: None, role: "replica" })
    }
}

/// `value < from | layer=value (verdict begins so)…`
fn line(told: &Explanation) -> String {
    let verdict = |line: &Line| {
        let verdict = if line.verdict == IN_FORCE { "+" } else { "-" };
        format!("{}={}{verdict}", line.layer, line.value)
    };
    let layers: Vec<String> = told.layers.iter().map(verdict).collect();
    format!("{} < {} | {}", told.value.as_deref().unwrap_or("?"), told.from, layers.join(" "))
}

#[test]
fn which_layer_wins() {
    let file = format!(
        "{POSTGRESQL}, parameters: {{work_mem: 8MB, max_connections: 7, shared_preload_libraries: x}}, \
         parameters_replica: {{Work_Mem: 9MB}}, use_slots: false, pg_hba: [a], recovery_conf: {{restore_command: cp}}}}\n\
         ttl: 9\nbootstrap: {{dcs: {{loop_wait: 3}}}}\nlog: {{level: DEBUG}}\ntags: {{az: a}}\n"
    );
    let dynamic = json!({
        "ttl": 20, "retry_timeout": 15, "maximum_lag_on_failover": "many", "tags": {"az": "b"},
        "postgresql": {
            "parameters": {"work_mem": "4MB", "max_wal_senders": 1, "max_connections": 50, "port": 1, "maintenance_work_mem": "1GB"},
            "parameters_replica": {"work_mem": "5MB"}, "listen": "x:1", "pg_hba": ["b"], "use_pg_rewind": true,
        },
    });
    let site = site(&file, &[("PATRONI_LOG_LEVEL", "INFO")], dynamic);
    let table = [
        ("ttl", "20 < dynamic configuration | dynamic configuration=20+ Patroni's default=30- file=9-"),
        ("loop_wait", "1 < Patroni's default | Patroni's default=10+ file, bootstrap.dcs=3-"),
        ("retry_timeout", "9 < dynamic configuration | dynamic configuration=15- Patroni's default=10-"),
        (
            "maximum_lag_on_failover",
            "1048576 < dynamic configuration | dynamic configuration=many- Patroni's default=1048576-",
        ),
        (
            "work_mem",
            "9MB < file, postgresql.parameters_replica | file, postgresql.parameters_replica=9MB+ file=8MB- \
             dynamic configuration=4MB- dynamic configuration, postgresql.parameters_replica=5MB-",
        ),
        ("Maintenance_Work_Mem", "1GB < dynamic configuration | dynamic configuration=1GB+"),
        ("max_connections", "50 < dynamic configuration | dynamic configuration=50+ Patroni's default=100- file=7-"),
        ("max_wal_senders", "10 < Patroni's default | dynamic configuration=1- Patroni's default=10+"),
        ("port", "5432 < Trunkline | dynamic configuration=1-"),
        ("restore_command", "cp < file, recovery_conf | file, recovery_conf=cp+"),
        ("postgresql.use_slots", "? < Patroni's default: on | file=off-"),
        ("postgresql.pg_hba", "[\"a\"] < file | file=[\"a\"]+ dynamic configuration=[\"b\"]-"),
        ("use_pg_rewind", "on < dynamic configuration | dynamic configuration=on+"),
        ("postgresql.listen", "127.0.0.1:5432 < file | file=127.0.0.1:5432+ dynamic configuration=x:1-"),
        ("log.level", "INFO < environment | environment=INFO+ file=DEBUG-"),
        ("tags.az", "a < file | file=a+ dynamic configuration=b-"),
        ("postgresql.authentication.replication.password", "*** < file | file=***+"),
        (
            "postgresql.authentication",
            "{replication: {username: r, password: ***}} < file | file={replication: {username: r, password: ***}}+",
        ),
        (
            "random_page_cost",
            "? < PostgreSQL's own default, or the original configuration file (postgresql.base.conf) | ",
        ),
    ];
    for (key, expected) in table {
        assert_eq!(line(&site.ask(key)), expected, "{key}");
    }
}

#[test]
fn why_an_edit_has_no_effect() {
    let file = format!("{POSTGRESQL}, parameters: {{max_connections: 7, work_mem: 4MB}}}}\n");
    let mut site = site(&file, &[], json!({"synchronous_mode": "quorum"}));
    let verdicts =
        |told: &Explanation| told.layers.iter().map(|line| line.verdict.clone()).collect::<Vec<_>>().join("|");
    assert!(verdicts(&site.ask("max_connections")).contains(DYNAMIC_ONLY));
    let names = site.ask("synchronous_standby_names");
    assert_eq!(names.from, "Trunkline");
    assert!(names.notes[0].contains("synchronous_mode is on"), "{names:?}");
    assert!(site.ask("bootstrap.dcs.ttl").notes[0].contains("read once"));
    assert!(site.ask("work_mem").notes.is_empty());
    // An edit after the agent has read the file.
    let parameters = site.layers[0].map["postgresql"]["parameters"].as_object_mut().unwrap();
    parameters.insert("work_mem".to_owned(), "64MB".into());
    let told = site.ask("postgresql.parameters.work_mem");
    assert!(told.notes[0].contains("goes by 4MB: trunklinectl reload"), "{told:?}");
    assert_eq!(told.value.as_deref(), Some("4MB"), "what the agent goes by");
}

#[test]
fn what_is_no_setting_or_can_not_be_used_is_said() {
    let dynamic = json!({"synchronous_mod": true, "slots": {"Bad-Name": 0, "good": 0}});
    let node = Node { layers: None, loaded: None, dynamic: Some(&dynamic), in_force: None, role: "primary" };
    let told = explain("synchronous_mod", &node);
    assert_eq!(told.layers[0].verdict, "no effect: there is no such setting");
    assert!(told.notes[0].ends_with("synchronous_mode was meant?"), "{told:?}");
    let told = explain("slots", &node);
    assert!(told.notes[0].contains("Bad-Name: 0 is ignored"), "{told:?}");
    let told = explain("slots.Bad-Name", &node);
    assert_eq!((told.value, told.layers[0].verdict.as_str()), (None, "can't be used"));
    assert_eq!(explain("slots.good", &node).layers[0].verdict, IN_FORCE);
    let (dynamic, before) =
        (json!({"synchronous_mode": "onn"}), Settings::from_value(&json!({"synchronous_mode": "quorum"})).0);
    let node = Node { dynamic: Some(&dynamic), in_force: Some(&before), ..node };
    let told = explain("synchronous_mode", &node);
    assert_eq!(told.layers[0].verdict, "can't be used; quorum is in force");
    // A parameter that nobody has set is still taken for one of PostgreSQL's.
    assert_eq!(explain("work_mem", &node).key, "postgresql.parameters.work_mem");
}

#[test]
fn without_the_node_the_cluster_can_still_be_explained() {
    let dynamic = json!({"postgresql": {"parameters": {"wal_level": "minimal"}}});
    let node = Node { layers: None, loaded: None, dynamic: Some(&dynamic), in_force: None, role: "primary" };
    let told = explain("wal_level", &node);
    assert_eq!(line(&told), "replica < Patroni's default | dynamic configuration=minimal- Patroni's default=replica+");
    assert_eq!(explain("", &node).key, "postgresql.parameters.");
}
