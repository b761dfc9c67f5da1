//! A configuration for tests.

use std::path::Path;
use std::time::Duration;

use trunkline_config::postgres::Credentials;
use trunkline_config::{PostgresConfig, Secret};

/// A server on the loopback interface with the defaults of a new cluster, its files in and beside `data_dir`.
pub fn config(data_dir: &Path, port: u16) -> PostgresConfig {
    let user = |name: &str| Credentials {
        username: name.to_owned(),
        password: Some(Secret::new(format!("{name}-pass"))),
        ..Credentials::default()
    };
    let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    PostgresConfig {
        listen_addresses: "127.0.0.1".into(),
        port,
        connect_address: format!("127.0.0.1:{port}"),
        proxy_address: None,
        data_dir: data_dir.to_owned(),
        config_dir: data_dir.to_owned(),
        bin_dir: Some("/usr/lib/postgresql/15/bin".into()),
        bin_name: Default::default(),
        pgpass: data_dir.with_extension("pgpass"),
        database: "postgres".into(),
        superuser: user("postgres"),
        replication: user("replicator"),
        rewind: user("rewinder"),
        parameters: Default::default(),
        protected: map(&[
            ("wal_level", "hot_standby"),
            ("hot_standby", "on"),
            ("max_connections", "100"),
            ("max_wal_senders", "10"),
            ("max_prepared_transactions", "0"),
            ("max_locks_per_transaction", "64"),
            ("track_commit_timestamp", "off"),
            ("max_replication_slots", "10"),
            ("max_worker_processes", "8"),
            ("wal_log_hints", "on"),
        ]),
        parameters_by_role: Default::default(),
        pg_hba: None,
        pg_ident: None,
        custom_conf: None,
        recovery_conf: Default::default(),
        use_slots: true,
        use_pg_rewind: true,
        remove_data_directory_on_rewind_failure: false,
        remove_data_directory_on_diverged_timelines: false,
        basebackup: Vec::new(),
        rewind_options: Vec::new(),
        create_replica_methods: vec!["basebackup".into()],
        callbacks: Default::default(),
        pre_promote: None,
        before_stop: None,
        pg_ctl_timeout: Duration::from_secs(60),
        use_unix_socket: false,
        use_unix_socket_repl: false,
        raw: Default::default(),
    }
}
