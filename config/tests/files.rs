//! Whole files: what is in them arrives, and what is wrong in them is told, all at once.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};
use trunkline_config::dynamic::{SynchronousMode, new_cluster};
use trunkline_config::validate::validate;
use trunkline_config::{ClientConfig, Env, Local, PostgresConfig, RouterConfig, Secret, Settings};

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

/// Writes `patroni.yml` and gives back what `use_file` says, with the file's path cut to its name.
fn with_file<T>(text: &str, use_file: impl FnOnce(&Path) -> T) -> T {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("patroni.yml");
    fs::write(&file, text).expect("written");
    use_file(&file)
}

fn load_errors(text: &str, env: &Env) -> String {
    with_file(text, |file| {
        let errors = Local::load(Some(file), env).expect_err("wrong").to_string();
        errors.replace(&file.display().to_string(), "patroni.yml")
    })
}

#[test]
fn a_classic_file_loads_unchanged() {
    let (local, notices) = Local::load(Some(&testdata("classic.yml")), &Env::default()).expect("loads");
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert_eq!(notices[0].message, "the v3 API of etcd is used, as if it were named etcd3");
    assert_eq!((local.scope.as_str(), local.name.as_str(), local.namespace.as_str()), ("batman", "alpha", "service"));
    assert_eq!(local.restapi.listen, "127.0.0.1:8008");
    assert_eq!(local.api_url(), "http://127.0.0.1:8008");
    assert_eq!(local.etcd.endpoints, ["http://127.0.0.1:2379"]);
    let bootstrap = local.bootstrap.as_ref().expect("bootstrap");
    assert_eq!(
        (bootstrap.method.as_str(), &bootstrap.initdb[..]),
        ("initdb", &["--encoding=UTF8".to_owned(), "--data-checksums".to_owned()][..])
    );
    assert_eq!(local.log.level, "INFO");
    assert_eq!(local.tags.keys().collect::<Vec<_>>(), ["noloadbalance", "clonefrom", "nostream"]);

    let dynamic = new_cluster(&bootstrap.dcs);
    assert_eq!((&dynamic["ttl"], &dynamic["loop_wait"]), (&json!(30), &json!(10)));
    let (settings, notices) = Settings::from_value(&dynamic);
    assert_eq!(notices, []);
    let (postgres, notices) = PostgresConfig::effective(&local, &settings);
    assert_eq!(notices, []);
    assert_eq!((postgres.listen_addresses.as_str(), postgres.port), ("127.0.0.1", 5432));
    assert!(postgres.data_dir.is_absolute() && postgres.data_dir.ends_with("data/alpha"));
    assert!(postgres.use_pg_rewind && postgres.use_slots);
    assert_eq!(postgres.rewind.username, "rewinder");
    assert_eq!(postgres.parameters["unix_socket_directories"], "..");
    assert_eq!(postgres.protected["cluster_name"], "batman");
    assert_eq!(postgres.pg_hba.map(|lines| lines.len()), Some(2));
}

#[test]
fn a_file_grown_over_years_loads() {
    let (local, notices) = Local::load(Some(&testdata("grown.yml")), &Env::default()).expect("loads");
    let shown: Vec<_> = notices.iter().map(|notice| format!("{}: {}", notice.path, notice.message)).collect();
    assert_eq!(shown, [".defaults: unknown key, ignored", "log.loggers: is about Python; ignored"]);
    assert_eq!((local.namespace.as_str(), local.name.as_str()), ("db", "orders-2"));
    // Octal, as PyYAML reads it; whoever wrote it has had this password ever since.
    assert_eq!(local.restapi.authentication, Some(("admin".to_owned(), Secret::new("42798"))));
    assert_eq!(local.ctl.authentication, local.restapi.authentication);
    assert!(local.restapi.allowlist_include_members);
    assert_eq!(local.restapi.http_extra_headers, [("X-Frame-Options".to_owned(), "SAMEORIGIN".to_owned())]);
    assert_eq!(local.etcd.endpoints, ["https://10.0.0.11:2379", "https://10.0.0.12:2379", "https://etcd-3:2380"]);
    assert_eq!(local.etcd.authentication, Some(("patroni".to_owned(), Secret::new("p@ss"))));
    let bootstrap = local.bootstrap.as_ref().expect("bootstrap");
    assert_eq!(bootstrap.method, "pgbackrest");
    assert_eq!(bootstrap.initdb, ["--encoding=UTF8", "--locale=C.UTF-8"]);

    let dynamic = new_cluster(&bootstrap.dcs);
    let (settings, notices) = Settings::from_value(&dynamic);
    assert_eq!(notices, []);
    assert_eq!(settings.ttl.as_secs(), 5);
    assert_eq!(settings.synchronous_mode, SynchronousMode::On);
    assert_eq!(settings.primary_start_timeout.as_secs(), 0);
    assert_eq!(settings.slots.keys().collect::<Vec<_>>(), ["audit", "tape"]);

    let (postgres, notices) = PostgresConfig::effective(&local, &settings);
    let shown: Vec<_> = notices.iter().map(|notice| notice.path.as_str()).collect();
    assert_eq!(shown, ["postgresql.parameters.Max_Connections", "postgresql.parameters_replica.wal_level"]);
    assert_eq!((postgres.port, postgres.connect_address.as_str()), (5433, "10.0.0.2:5433"));
    assert_eq!(postgres.proxy_address.as_deref(), Some("10.0.0.2:6432"));
    assert_eq!(postgres.protected["max_connections"], "500");
    assert_eq!(postgres.protected["wal_level"], "logical");
    let expected = [
        ("archive_mode", "on"),
        ("jit", "off"),
        ("log_file_mode", "0640"),
        ("shared_buffers", "8GB"),
        ("timezone", "UTC"),
        ("wal_keep_size", "128MB"),
    ];
    let parameters: Vec<_> = postgres.parameters.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(parameters, expected);
    assert_eq!(postgres.recovery_conf["restore_command"], "cp /archive/%f %p");
    assert_eq!(postgres.parameters_for("replica")["hot_standby_feedback"], "on");
    assert!(!postgres.parameters_for("primary").contains_key("hot_standby_feedback"));
    assert_eq!(postgres.pg_hba_for("replica"), Some(vec!["local all all peer".to_owned()]));
    assert_eq!(postgres.pg_hba_for("primary"), None);
    assert_eq!(postgres.replication.options["sslmode"], "verify-full");
    assert_eq!(postgres.rewind, postgres.superuser);
    assert_eq!(postgres.basebackup, ["--max-rate=100M", "--checkpoint=fast", "--verbose"]);
    assert_eq!(postgres.create_replica_methods, ["pgbackrest", "basebackup"]);
    assert_eq!(postgres.pg_ctl_timeout.as_secs(), 120);
    assert!(postgres.raw["pgbackrest"]["keep_data"].as_bool().is_some_and(|keep| keep));
}

#[test]
fn no_password_is_shown_by_debug() {
    let (local, _) = Local::load(Some(&testdata("classic.yml")), &Env::default()).expect("loads");
    let (postgres, _) = PostgresConfig::effective(&local, &Settings::default());
    let (client, _) = ClientConfig::load(Some(&testdata("grown.yml")), &Env::default(), None).expect("loads");
    let shown = format!("{local:?} {postgres:?} {client:?}");
    for password in ["rep-pass", "secret", "rewind-pass", "42798", "p@ss"] {
        assert!(!shown.contains(password), "{password} in {shown}");
    }
}

#[test]
fn the_environment_lies_over_the_file() {
    let variables = [
        ("PATRONI_NAME", "beta"),
        ("PATRONI_ETCD3_HOSTS", "'a:1', 'b:2'"),
        ("PATRONI_POSTGRESQL_DATA_DIR", "/elsewhere"),
        ("PATRONI_SUPERUSER_PASSWORD", "other"),
    ];
    let (local, notices) =
        Local::load(Some(&testdata("classic.yml")), &variables.into_iter().collect()).expect("loads");
    assert_eq!(local.name, "beta");
    assert_eq!(local.etcd.endpoints, ["http://a:1", "http://b:2"]);
    assert_eq!(notices[0].message, "ignored beside etcd3");
    let (postgres, _) = PostgresConfig::effective(&local, &Settings::default());
    assert_eq!(postgres.data_dir, Path::new("/elsewhere"));
    assert_eq!(postgres.superuser.username, "postgres");
    assert_eq!(postgres.superuser.password, Some(Secret::new("other")));
}

#[test]
fn the_environment_alone_is_enough() {
    let variables = [
        ("PATRONI_SCOPE", "demo"),
        ("PATRONI_NAME", "n1"),
        ("PATRONI_RESTAPI_LISTEN", "0.0.0.0:8008"),
        ("PATRONI_ETCD3_URL", "https://u:p@h:1"),
        ("PATRONI_POSTGRESQL_LISTEN", "0.0.0.0:5432"),
        ("PATRONI_POSTGRESQL_DATA_DIR", "/d"),
        ("PATRONI_REPLICATION_USERNAME", "rep"),
        ("HOME", "/home/pg"),
    ];
    let (local, _) = Local::load(None, &variables.into_iter().collect()).expect("loads");
    assert_eq!(local.etcd.endpoints, ["https://h:1"]);
    assert_eq!(local.bootstrap, None);
    let (postgres, _) = PostgresConfig::effective(&local, &Settings::default());
    assert_eq!(postgres.pgpass, Path::new("/home/pg/pgpass"));
    assert_eq!(postgres.connect_address, "localhost:5432");
}

#[test]
fn what_nobody_reads_is_told_wherever_it_stands() {
    let text = "
scope: d
name: a
restapi: {listen: '127.0.0.1:1'}
etcd3: {host: 'e:1'}
bootstrap:
  dcs: {}
  post_boostrap: /x
  initdbs: {encoding: UTF8}
  clone: {command: /x}
postgresql:
  listen: '127.0.0.1:2'
  data_dir: /d
  paramters: {work_mem: 1MB}
  wal_e: {command: /x}
  barman: {}
  create_replica_methods: [barman]
  callbacks: {on_rolechange: /x, on_stop: /x}
  bin_name: {postgress: p}
  authentication:
    superuser: {username: s, sslcrl: /crl, channel_binding: require, gssencmode: prefer, sslnegotiation: direct}
    replication: {username: r}
    rewnd: {username: w}
";
    let (local, notices) = with_file(text, |file| Local::load(Some(file), &Env::default())).expect("loads");
    let shown: Vec<_> = notices.iter().map(|notice| format!("{}: {}", notice.path, notice.message)).collect();
    let libpq = "is for replication and PostgreSQL's programs; the agent's own connections do without it";
    assert_eq!(
        shown,
        [
            "bootstrap.post_boostrap: unknown key, ignored; post_bootstrap was meant?".to_owned(),
            "bootstrap.initdbs: unknown key, ignored; initdb was meant?".to_owned(),
            "postgresql.paramters: unknown key, ignored; parameters was meant?".to_owned(),
            "postgresql.authentication.rewnd: unknown key, ignored; rewind was meant?".to_owned(),
            "postgresql.callbacks.on_rolechange: unknown key, ignored; on_role_change was meant?".to_owned(),
            "postgresql.bin_name.postgress: unknown key, ignored; postgres was meant?".to_owned(),
            format!("postgresql.authentication.superuser.sslcrl: {libpq}"),
            format!("postgresql.authentication.superuser.channel_binding: {libpq}"),
            format!("postgresql.authentication.superuser.sslnegotiation: {libpq}"),
        ]
    );
    // The same of the dynamic configuration.
    let dynamic = json!({ "postgresql": { "parametres": { "work_mem": "1MB" }, "callbacks": { "on_strat": "/x" } } });
    let notices = Settings::from_value(&dynamic).1;
    let paths: Vec<_> = notices.iter().map(|notice| notice.path.as_str()).collect();
    assert_eq!(paths, ["postgresql.parametres", "postgresql.callbacks.on_strat"]);
    assert_eq!(PostgresConfig::effective(&local, &Settings::default()).1, []);
}

#[test]
fn every_error_is_told_at_once_with_its_place() {
    let text = "
scope: ''
name: a/b
restapi: {listen: '8008', authentication: {username: x}, verify_client: perhaps, allowlist_include_members: perhaps}
etcd3: {hosts: ['h:2379'], cert: c}
bootstrap: {initdb: [pgdata: /x]}
postgresql:
  listen: 0.0.0.0:99999
  parameters: [max_connections]
  authentication: {superuser: {password: [1]}}
log: {level: LOUD}
";
    let expected = "\
PATRONI_LOG_STATIC_FIELDS: log.static_fields = \"[\": a YAML map is expected, such as a: b, c: d
patroni.yml: scope = \"\": must not be empty
patroni.yml: name = \"a/b\": must not contain a slash, as it is part of a key in etcd
patroni.yml: restapi.listen = \"8008\": host:port is expected, with a port from 1 to 65535
PATRONI_RESTAPI_CONNECT_ADDRESS: restapi.connect_address = \"here\": host:port is expected, with a port from 1 to 65535
patroni.yml: restapi.verify_client = \"perhaps\": one of none, optional, required is expected
patroni.yml: restapi.authentication.password: missing: a password belongs to the user name
patroni.yml: restapi.allowlist_include_members = \"perhaps\": on, off, true, false, yes or no is expected
PATRONI_ETCD3_PORT: etcd3.port = \"x\": a whole number from 1 to 65535 is expected
patroni.yml: etcd3.key: missing: cert is given, and a client certificate needs both
patroni.yml: bootstrap.initdb = \"pgdata\": the option pgdata is set by the agent; any but pgdata, nosync, pwfile, sync-only, version is allowed
patroni.yml: postgresql.listen = \"0.0.0.0:99999\": host or host:port is expected, with a port from 1 to 65535
patroni.yml: postgresql.data_dir: missing: the data directory; give postgresql: {listen: '0.0.0.0:5432', data_dir: /var/lib/postgresql/data, authentication: …}
patroni.yml: postgresql.parameters = [\"max_connections\"]: a section (key: value) is expected
patroni.yml: postgresql.authentication.superuser.password = ***: a text is expected
patroni.yml: postgresql.authentication.replication.username: missing: the user that standbys connect as
patroni.yml: log.level = \"LOUD\": one of debug, info, warning, warn, error, critical, fatal is expected";
    let variables =
        [("PATRONI_RESTAPI_CONNECT_ADDRESS", "here"), ("PATRONI_ETCD3_PORT", "x"), ("PATRONI_LOG_STATIC_FIELDS", "[")];
    assert_eq!(load_errors(text, &variables.into_iter().collect()), expected);
}

#[test]
fn an_almost_empty_file_names_all_that_is_needed() {
    let expected = "\
patroni.yml: scope: missing: the cluster's name; give scope: … or PATRONI_SCOPE
patroni.yml: restapi.listen: missing: where the REST API listens; give restapi: {listen: '0.0.0.0:8008'} or PATRONI_RESTAPI_LISTEN
patroni.yml: consul = {…}: only etcd (v3 API) is supported; give etcd3: {hosts: ['10.0.0.1:2379', '10.0.0.2:2379']} or PATRONI_ETCD3_HOSTS
patroni.yml: postgresql: missing: what belongs to this node's PostgreSQL; give postgresql: {listen: '0.0.0.0:5432', data_dir: /var/lib/postgresql/data, authentication: …}";
    assert_eq!(load_errors("name: x\nconsul: {host: y}\n", &Env::default()), expected);
}

#[test]
fn users_in_the_places_of_old_files_count() {
    let text = "
scope: s
restapi: {listen: 'h:8008'}
etcd: {host: h}
postgresql:
  name: old
  listen: h
  data_dir: /d
  replication: {username: rep, password: x, network: 127.0.0.1/32}
  pg_rewind: {username: admin, password: y}
";
    let (local, notices) =
        with_file(text, |file| Local::load(Some(file), &Env::default()).map_err(|e| e.to_string())).expect("loads");
    assert_eq!(local.name, "old");
    assert!(notices.iter().any(|notice| notice.path == "postgresql.authentication.replication.network"), "{notices:?}");
    let (postgres, _) = PostgresConfig::effective(&local, &Settings::default());
    assert_eq!((postgres.replication.username.as_str(), postgres.superuser.username.as_str()), ("rep", "admin"));
    assert!(postgres.use_pg_rewind);
    assert_eq!(postgres.connect_address, "h:5432");
}

#[test]
fn contradicting_tags_are_told_in_patronis_words() {
    let text = fs::read_to_string(testdata("classic.yml")).expect("readable");
    let text = text.replace("    # failover_priority: 1", "    nofailover: true\n    failover_priority: 1");
    let (_, notices) = with_file(&text, |file| Local::load(Some(file), &Env::default())).expect("loads");
    let expected = "Conflicting configuration between nofailover: True and failover_priority: 1. \
                    Defaulting to nofailover: True";
    assert!(notices.iter().any(|notice| notice.message == expected), "{notices:?}");
}

fn problems(text: &str, env: &Env) -> Vec<String> {
    with_file(text, |file| {
        let problems = validate(Some(file), env).0;
        problems.iter().map(|p| p.to_string().replace(&file.display().to_string(), "patroni.yml")).collect()
    })
}

#[test]
fn validation_looks_at_the_machine_and_at_bootstrap_dcs() {
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path().join("data");
    fs::create_dir(&data).expect("made");
    fs::write(data.join("notes.txt"), "x").expect("written");
    let text = format!(
        "
scope: s
name: n
restapi: {{listen: '0.0.0.0:5432', certfile: {dir}/absent.pem}}
etcd3: {{host: h}}
bootstrap:
  dcs:
    ttl: 10
    loop_wait: 2
    retry_timeout: 5
    synchronous_mode: perhaps
    maximum_lag_on_failover: -1
    slots: {{audit: {{type: logical, database: d}}}}
    postgresql:
      use_slots: perhaps
      parameters: {{max_connections: 5, hot_standby: off}}
      basebackup: [format: t]
postgresql:
  listen: '*:5432'
  data_dir: {data}
  bin_dir: {dir}
  pgpass: {dir}
  use_pg_rewind: perhaps
  authentication: {{replication: {{username: r, sslrootcert: {dir}}}}}
watchdog: {{mode: sometimes, safety_margin: -2}}
tags: {{nofailover: false, failover_priority: 2, nosync: perhaps}}
",
        dir = dir.path().display(),
        data = data.display(),
    );
    let found = problems(&text, &Env::default()).join("\n").replace(&dir.path().display().to_string(), "DIR");
    let expected = "\
patroni.yml: watchdog.mode = \"sometimes\": one of off, disable, disabled, false, automatic, auto, required, require is expected
patroni.yml: watchdog.safety_margin = -2: a whole number from -1 to 86400 is expected
patroni.yml: restapi.listen = \"0.0.0.0:5432\": other members cannot connect to a wildcard address; give connect_address with an address of this machine
patroni.yml: tags.failover_priority = 2: at most one of nofailover and failover_priority may be given
patroni.yml: tags.nosync = \"perhaps\": on, off, true, false, yes or no is expected
patroni.yml: restapi.certfile = \"DIR/absent.pem\": cannot be read: No such file or directory (os error 2)
patroni.yml: postgresql.authentication.replication.sslrootcert = \"DIR\": cannot be read: is no file
patroni.yml: postgresql.use_pg_rewind = \"perhaps\": on, off, true, false, yes or no is expected
patroni.yml: postgresql.listen = \"*:5432\": other members cannot connect to a wildcard address; give connect_address with an address of this machine
patroni.yml: postgresql.authentication.superuser.username: missing: the administrative user
patroni.yml: postgresql.data_dir = \"DIR/data\": neither empty nor a data directory of PostgreSQL: PG_VERSION is missing; remove what is there, or name another directory
patroni.yml: postgresql.pgpass = \"DIR\": exists and is no file
patroni.yml: postgresql.bin_dir = \"DIR\": has no program postgres
patroni.yml: postgresql.bin_dir = \"DIR\": has no program initdb
patroni.yml: postgresql.bin_dir = \"DIR\": has no program pg_controldata
patroni.yml: postgresql.bin_dir = \"DIR\": has no program pg_basebackup
patroni.yml: bootstrap.dcs.ttl = 10: loop_wait + 2 * retry_timeout must not exceed ttl, but 12 > 10; make ttl longer, or the others shorter
patroni.yml: bootstrap.dcs.synchronous_mode = \"perhaps\": one of on, off, true, false, yes, no, 1, 0, quorum is expected
patroni.yml: bootstrap.dcs.maximum_lag_on_failover = -1: a whole number of at least 0 is expected
patroni.yml: bootstrap.dcs.slots.audit = {…}: Bad value for slot 'audit': a logical slot needs database and plugin
patroni.yml: bootstrap.dcs.postgresql.parameters.max_connections = 5: at least 25 is expected; 100 is used
patroni.yml: bootstrap.dcs.postgresql.parameters.hot_standby = \"off\": must be on; on is used
patroni.yml: bootstrap.dcs.postgresql.use_slots = \"perhaps\": on, off, true, false, yes or no is expected
patroni.yml: bootstrap.dcs.postgresql.basebackup = \"format\": the option format is set by the agent; any but pgdata, format, wal-method, xlog-method, gzip, version, dbname, host, port, username, password is allowed
patroni.yml: restapi.listen = 5432: postgresql.listen has the same port; give the REST API another one, such as 8008";
    assert_eq!(found, expected);
}

#[test]
fn a_valid_file_has_no_problem() {
    let dir = tempfile::tempdir().expect("a directory");
    for program in ["postgres", "initdb", "pg_controldata", "pg_basebackup", "pg_rewind"] {
        use std::os::unix::fs::PermissionsExt;
        let file = dir.path().join(program);
        fs::write(&file, "").expect("written");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("made executable");
    }
    let env: Env = [("PATH", dir.path().to_str().expect("text"))].into_iter().collect();
    let (problems, notices) = validate(Some(&testdata("classic.yml")), &env);
    assert_eq!(problems, []);
    let told: Vec<_> = notices.iter().map(|notice| notice.path.as_str()).collect();
    assert_eq!(told, ["etcd", "restapi.connect_address", "postgresql.connect_address"]);
}

#[test]
fn print_gives_the_merged_document_as_yaml() {
    let env = [("PATRONI_NAME", "beta")].into_iter().collect();
    let (local, _) = Local::load(Some(&testdata("classic.yml")), &env).expect("loads");
    let text = trunkline_config::yaml::to_yaml(&local.raw);
    assert!(text.contains("\nname: beta\n"), "{text}");
    assert_eq!(trunkline_config::yaml::from_str(&text), Ok(local.raw));
}

/// Values of every kind for every key of the classic file.
fn broken_documents() -> impl Strategy<Value = Value> {
    let odd = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[0-9a-z:.,\\[\\]/@-]{0,12}".prop_map(Value::from),
        Just(json!([1, {"a": []}])),
        Just(json!({"a": {"b": "c"}})),
    ];
    (prop::collection::vec((any::<prop::sample::Index>(), odd), 1..6)).prop_map(|changes| {
        let name = if changes.len() % 2 == 0 { "classic.yml" } else { "grown.yml" };
        let text = fs::read_to_string(testdata(name)).expect("readable");
        let mut document = trunkline_config::yaml::from_str(&text).expect("valid");
        for (index, odd) in changes {
            let mut paths = Vec::new();
            pointers(&document, "", &mut paths);
            if let Some(value) = document.pointer_mut(&paths[index.index(paths.len())]) {
                *value = odd;
            }
        }
        document
    })
}

fn pointers(value: &Value, at: &str, paths: &mut Vec<String>) {
    paths.push(at.to_owned());
    if let Value::Object(map) = value {
        map.iter().for_each(|(key, value)| pointers(value, &format!("{at}/{key}"), paths));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_document_panics(document in broken_documents()) {
        let text = trunkline_config::yaml::to_yaml(&document);
        with_file(&text, |file| {
            let env = Env::default();
            let _ = (validate(Some(file), &env), RouterConfig::load(Some(file), &env), ClientConfig::load(Some(file), &env, None));
            match Local::load(Some(file), &env) {
                Ok((local, _)) => {
                    let dcs = local.bootstrap.as_ref().map(|bootstrap| new_cluster(&bootstrap.dcs)).unwrap_or_default();
                    let (settings, _) = Settings::from_value(&dcs);
                    let (postgres, _) = PostgresConfig::effective(&local, &settings);
                    assert!(!postgres.replication.username.is_empty());
                }
                Err(errors) => {
                    assert!(!errors.0.is_empty());
                    assert!(errors.0.iter().all(|problem| !problem.to_string().contains('\n')), "{errors}");
                }
            }
        });
    }

    #[test]
    fn no_text_panics(text in "(?s).{0,200}", variable in "[A-Z_]{0,20}", value in ".{0,20}") {
        with_file(&text, |file| {
            let env = [(format!("PATRONI_{variable}"), value)].into_iter().collect();
            let _ = (Local::load(Some(file), &env), RouterConfig::load(Some(file), &env), validate(Some(file), &env));
        });
    }
}

#[test]
fn the_leaders_address() {
    let text = |vip: &str| {
        format!(
            "scope: d\nname: a\netcd3: {{host: 'e:1'}}\nrestapi: {{listen: '127.0.0.1:1'}}\nbootstrap: {{dcs: {{}}}}\n\
             postgresql: {{listen: '127.0.0.1:2', data_dir: /d, authentication: {{replication: {{username: r}}}}}}\nvip: {vip}\n"
        )
    };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p.yml");
    let load = |vip: &str| {
        std::fs::write(&file, text(vip)).unwrap();
        let loaded = Local::load(Some(&file), &Env::default());
        loaded.map(|(local, _)| local.vip).map_err(|errors| errors.to_string())
    };
    let vip = load("{address: 10.0.0.9/24, interface: eth0}").unwrap().unwrap();
    assert_eq!((vip.addresses[0].to_string().as_str(), vip.interface.as_str()), ("10.0.0.9/24", "eth0"));
    let both = load("{address: [10.0.0.9/24, 'fd00::9/64'], interface: eth0.7}").unwrap().unwrap();
    assert_eq!(both.addresses.len(), 2);
    for (vip, complaint) in [
        ("{address: 10.0.0.9/24}", "vip.interface: missing"),
        ("{interface: eth0}", "vip.address: missing"),
        (
            "{address: 10.0.0.9, interface: eth0}",
            "vip.address = \"10.0.0.9\": an address with the length of its prefix",
        ),
        ("{address: 127.0.0.1/8, interface: eth0}", "an address with the length of its prefix"),
        ("{address: [], interface: eth0}", "an address with the length of its prefix"),
        ("{address: 10.0.0.9/24, interface: 'far too long a name'}", "the name of a network interface"),
    ] {
        let errors = load(vip).unwrap_err();
        assert!(errors.contains(complaint), "{vip}: {errors}");
    }
}
