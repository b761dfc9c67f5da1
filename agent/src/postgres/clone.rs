//! Making a replica: pg_basebackup, or the user's own methods (ha-loop §5.2).

use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;
use trunkline_common::{Clock, SystemClock};
use trunkline_config::PostgresConfig;

use super::files::{self, Unfinished};
use super::instance::Instance;
use super::{PgError, Upstream, conninfo, program};

/// How often pg_basebackup is tried, and the pause between (ha-loop §21).
const TRIES: u32 = 2;
const PAUSE: Duration = Duration::from_secs(5);

/// The bound on a method of the user's own: a restore from a backup far away takes hours, one that hangs must end.
const CUSTOM_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Keys of a method that are ours and not arguments of its command.
const METHOD_KEYS: [&str; 4] = ["command", "keep_data", "no_params", "no_leader"];

impl Instance {
    /// By these methods, or by those that are configured; without a `source` by the ones that need none.
    pub(super) async fn run_clone(&self, source: Option<&Upstream>, methods: &[String]) -> Result<(), PgError> {
        if self.process().find().is_some() {
            return Err(PgError::Failed("a clone needs a stopped server".to_owned()));
        }
        let config = self.config_now();
        if let Some(source) = source {
            files::write_pgpass(&config, source)?;
        }
        let mut last = PgError::Unusable("postgresql.create_replica_methods names no method for this".to_owned());
        let methods = if methods.is_empty() { &config.create_replica_methods } else { methods };
        for method in methods {
            let result = match (method.as_str(), source) {
                ("basebackup", Some(source)) => self.basebackup(&config, source).await,
                (method, source) if source.is_some() || needs_no_leader(&config, method) => {
                    self.custom(&config, method, source).await
                }
                _ => continue,
            };
            match result {
                Ok(()) => {
                    self.reset_managed();
                    files::end_all(&config.data_dir)?;
                    return Ok(());
                }
                Err(error) => {
                    tracing::error!("making a replica by {method} failed: {error}");
                    last = error;
                }
            }
        }
        Err(last)
    }

    async fn basebackup(&self, config: &PostgresConfig, source: &Upstream) -> Result<(), PgError> {
        program::require(config, "pg_basebackup")?;
        let mut settings = conninfo::to_upstream(source, &config.replication, &config.pgpass, self.version());
        // A source that vanishes without a word must end this; a large copy may take hours, so there is no other bound.
        conninfo::end_when_vanished(&mut settings);
        let mut tried = 0;
        loop {
            tried += 1;
            self.empty_data_dir().await?;
            let mut command = Command::new(program::path(config, "pg_basebackup"));
            command.env("PGPASSFILE", &config.pgpass);
            command.arg("--pgdata").arg(&config.data_dir).args(["-X", "stream"]);
            command.arg(format!("--dbname={}", conninfo::render(&settings)));
            // Waiting for the source's next regular checkpoint would take minutes.
            if !config.basebackup.iter().any(|option| option.starts_with("--checkpoint") || option.starts_with("-c")) {
                command.arg("--checkpoint=fast");
            }
            command.args(&config.basebackup);
            tracing::info!("pg_basebackup from {} at {}:{}", source.name, source.host, source.port);
            match program::run(&mut command).await {
                Ok(()) => return Ok(()),
                Err(error) if tried == TRIES || matches!(error, PgError::Unusable(_)) => {
                    self.empty_data_dir().await?;
                    return Err(error);
                }
                Err(error) => tracing::warn!("trying again in {PAUSE:?}: {error}"),
            }
            SystemClock.sleep(PAUSE).await;
        }
    }

    async fn custom(&self, config: &PostgresConfig, method: &str, source: Option<&Upstream>) -> Result<(), PgError> {
        let empty = serde_json::Map::new();
        let section = config.raw.get(method).and_then(Value::as_object).unwrap_or(&empty);
        let flag = |key: &str| program::flag(section, key);
        if !flag("keep_data") {
            self.empty_data_dir().await?;
            files::remove_empty(&config.data_dir);
        }
        let mut command = program::shell_words(section.get("command").and_then(Value::as_str).unwrap_or(method))?;
        command.env("PGPASSFILE", &config.pgpass);
        if !flag("no_params") {
            command.args(program::arguments(section, &METHOD_KEYS));
            let to = |source| conninfo::to_upstream(source, &config.replication, &config.pgpass, self.version());
            let connstring = source.map(to).map_or_else(String::new, |settings| conninfo::render(&settings));
            command.arg(format!("--scope={}", self.scope())).arg("--role=replica");
            command.arg(format!("--datadir={}", config.data_dir.display()));
            command.arg(format!("--connstring={connstring}"));
        }
        files::begin(Unfinished::Copy, &config.data_dir)?;
        let result = program::run_within(CUSTOM_LIMIT, &mut command).await;
        if result.is_err() && !flag("keep_data") {
            self.empty_data_dir().await?;
        }
        result
    }
}

/// Whether a method says that it can do without a running server to copy from.
pub fn needs_no_leader(config: &PostgresConfig, method: &str) -> bool {
    config.raw.get(method).and_then(|section| section.get("no_leader")).is_some_and(trunkline_config::tags::truthy)
}
