//! A new cluster: initdb, its users, and the user's own script (config reference §3.4, ha-loop §5.1, §6).

use std::io::Write as _;
use std::time::Duration;

use serde_json::Value;
use tokio_postgres::Client;
use trunkline_common::Clock;
use trunkline_config::PostgresConfig;
use trunkline_config::postgres::Credentials;

use super::files::{self, Unfinished};
use super::instance::Instance;
use super::listening::Listening;
use super::pidfile::PidFile;
use super::settings::{self, Managed};
use super::start::{Way, check_version};
use super::{CustomBootstrap, PgError, StartAs, StopMode, conninfo, program, query};

/// Options that initdb gets from us or that make no sense here.
const FORBIDDEN: [&str; 5] = ["pgdata", "nosync", "pwfile", "sync-only", "version"];

/// The bound on the statements that create the users.
const USERS_LIMIT: Duration = Duration::from_secs(60);

/// The bounds on initdb and on the user's script: what hangs must not keep the cluster from coming to be by another node.
const INITDB_LIMIT: Duration = Duration::from_secs(600);
/// A restore from a backup far away, and recovery after it, take hours.
const RESTORE_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Keys of a method that are ours and not arguments of its command.
const RESTORE_KEYS: [&str; 4] = ["command", "no_params", "keep_existing_recovery_conf", "recovery_conf"];
const POST_BOOTSTRAP_LIMIT: Duration = Duration::from_secs(3600);

/// What pg_rewind reads with on the source, for a user who isn't a superuser (PostgreSQL's documentation of pg_rewind).
const REWIND_FUNCTIONS: [&str; 4] = [
    "pg_ls_dir(text, boolean, boolean)",
    "pg_stat_file(text, boolean)",
    "pg_read_binary_file(text)",
    "pg_read_binary_file(text, bigint, bigint, boolean)",
];

impl Instance {
    pub(super) async fn run_initdb(&self, options: Vec<String>, hba: Vec<String>) -> Result<(), PgError> {
        let config = self.config_now();
        for option in &options {
            let name = option.trim_start_matches('-').split('=').next().unwrap_or_default();
            if FORBIDDEN.contains(&name) || option.starts_with("-D") {
                return Err(PgError::Unusable(format!("bootstrap.initdb: the option {name} is not allowed")));
            }
        }
        let data_dir = config.data_dir.clone();
        self.in_pool(move |_| {
            files::create_private_dir(&data_dir)?;
            files::end(Unfinished::Copy, &data_dir)?;
            files::begin(Unfinished::Bootstrap, &data_dir)
        })
        .await?;
        let mut command = tokio::process::Command::new(program::path(&config, "initdb"));
        command.arg("--pgdata").arg(&config.data_dir).args(&options);
        command.arg(format!("--username={}", query::user(&config)));
        let password_file = config.superuser.password.as_ref().map(|password| {
            // Readable for us only, and gone when dropped.
            let mut file = tempfile::NamedTempFile::new()?;
            file.write_all(password.reveal().as_bytes())?;
            Ok::<_, std::io::Error>(file)
        });
        let password_file = password_file.transpose().map_err(|error| PgError::Failed(format!("pwfile: {error}")))?;
        if let Some(file) = &password_file {
            command.arg(format!("--pwfile={}", file.path().display()));
        }
        tracing::info!("initdb in {}", config.data_dir.display());
        program::run_within(INITDB_LIMIT, &mut command).await?;
        files::end(Unfinished::Rewind, &config.data_dir)?;
        self.reset_managed();
        if config.pg_hba.is_none() && !config.parameters.contains_key("hba_file") {
            files::append(&config.data_dir.join("pg_hba.conf"), &hba)?;
        }
        Ok(())
    }

    pub(super) async fn run_restore(&self, method: &CustomBootstrap) -> Result<(), PgError> {
        let config = self.config_now();
        let section = &method.section;
        let command = section.get("command").and_then(Value::as_str).unwrap_or_default();
        let mut command = program::shell_words(command)?;
        if !program::flag(section, "no_params") {
            command.args(program::arguments(section, &RESTORE_KEYS));
            command.arg(format!("--scope={}", self.scope()));
            command.arg(format!("--datadir={}", config.data_dir.display()));
        }
        files::remove_empty(&config.data_dir);
        files::end(Unfinished::Copy, &config.data_dir)?;
        files::begin(Unfinished::Bootstrap, &config.data_dir)?;
        tracing::info!("running custom bootstrap script: {}", method.name);
        program::run_within(RESTORE_LIMIT, &mut command).await?;
        files::end(Unfinished::Rewind, &config.data_dir)?;
        self.reset_managed();
        let keep = program::flag(section, "keep_existing_recovery_conf");
        let recovery = section.get("recovery_conf").and_then(Value::as_object).filter(|_| !keep);
        let recovery: settings::Values =
            recovery.into_iter().flatten().map(|(key, value)| (key.clone(), program::plain(value))).collect();
        let recovers = keep || !recovery.is_empty();
        match (keep, recovers) {
            (true, _) => {}
            (false, true) => files::set_recovery_signal(&config.data_dir)?,
            (false, false) => files::set_standby_signal(&config.data_dir, false)?,
        }
        check_version(&config, self.version())?;
        self.rewrite(|managed| {
            *managed = Managed { role: "primary", recovery, open: true, keep_recovery: keep, ..Managed::default() };
        })?;
        let way = if recovers { Way::Restored } else { Way::Primary };
        self.spawn_until(way, self.inner.clock.now() + RESTORE_LIMIT).await
    }

    pub(super) async fn run_end_restore(&self) -> Result<(), PgError> {
        self.rewrite(|managed| *managed = Managed { role: "primary", ..Managed::default() })?;
        // Which file has the access rules is settled at a start.
        let limit = self.config_now().pg_ctl_timeout;
        self.run_stop(StopMode::Fast, limit, None).await?;
        files::remove_open_hba(&self.config_now())?;
        self.run_start(StartAs::Primary, limit).await
    }

    pub(super) async fn run_create_users(&self, post_bootstrap: Option<String>) -> Result<(), PgError> {
        let config = self.config_now();
        let connection = self.connect(USERS_LIMIT).await?;
        let client = &connection.client;
        // Passwords must not reach the server's log or pg_stat_statements, and no standby exists to wait for.
        let quiet = "SET synchronous_commit = 'local'; SET log_statement = 'none'; SET log_min_duration_statement = -1;
            SET log_min_error_statement = 'log'; SET track_activities = off;
            SELECT set_config('pg_stat_statements.track_utility', 'off', false)";
        client.batch_execute(quiet).await.map_err(query::failed)?;
        if config.superuser.password.is_some() {
            role(client, &config.superuser, "SUPERUSER").await?;
        }
        if let Some(command) = post_bootstrap {
            run_post_bootstrap(&config, &command).await?;
        }
        let superuser = query::user(&config);
        let named = |user: &Credentials| !user.username.is_empty() && user.username != superuser;
        if named(&config.replication) {
            role(client, &config.replication, "REPLICATION").await?;
        }
        if named(&config.rewind) {
            let attributes = if config.rewind.username == config.replication.username { "REPLICATION" } else { "" };
            role(client, &config.rewind, attributes).await?;
            for function in REWIND_FUNCTIONS {
                let to = identifier(&config.rewind.username);
                let grant = format!("GRANT EXECUTE ON FUNCTION pg_catalog.{function} TO {to}");
                client.batch_execute(&grant).await.map_err(query::failed)?;
            }
        }
        Ok(())
    }
}

/// Creates a role or changes the one there.
async fn role(client: &Client, user: &Credentials, attributes: &str) -> Result<(), PgError> {
    let exists = client.query_opt("SELECT 1 FROM pg_roles WHERE rolname = $1", &[&user.username]).await;
    let verb = if exists.map_err(query::failed)?.is_some() { "ALTER" } else { "CREATE" };
    let mut statement = format!("{verb} ROLE {} WITH LOGIN {attributes}", identifier(&user.username));
    if let Some(password) = &user.password {
        statement.push_str(&format!(" PASSWORD {}", literal(password.reveal())));
    }
    client.batch_execute(&statement).await.map_err(query::failed)
}

async fn run_post_bootstrap(config: &PostgresConfig, command: &str) -> Result<(), PgError> {
    let listening = Listening::of(config, PidFile::read(&config.data_dir).as_ref());
    let host = listening.local_host(config.use_unix_socket);
    let superuser = Credentials { username: query::user(config).to_owned(), ..config.superuser.clone() };
    let entry = if host.starts_with('/') { "localhost" } else { &host };
    let text = conninfo::with_local(String::new(), &[entry], listening.port, &[&superuser]);
    if !text.is_empty() {
        files::replace(&config.pgpass, &text).map_err(|error| files::unwritable(&config.pgpass, &error))?;
    }
    let settings = [
        ("dbname", config.database.clone()),
        ("user", superuser.username),
        ("host", host),
        ("port", listening.port.to_string()),
    ];
    let settings = settings.map(|(key, value)| (key.to_owned(), value)).into();
    let mut process = program::shell_words(command)?;
    process.arg(conninfo::render(&settings));
    process.env("PGPASSFILE", &config.pgpass);
    process.env("PGOPTIONS", "-c synchronous_commit=local -c statement_timeout=0");
    tracing::info!("running post_bootstrap");
    program::run_within(POST_BOOTSTRAP_LIMIT, &mut process).await
}

/// Quoted as an identifier.
pub(super) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quoted as a string, whatever `standard_conforming_strings` is.
pub(super) fn literal(value: &str) -> String {
    match value.contains('\\') {
        true => format!(" E'{}'", value.replace('\\', r"\\").replace('\'', "''")),
        false => format!("'{}'", value.replace('\'', "''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_passwords_are_quoted() {
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal("a\\b'"), " E'a\\\\b'''");
    }
}
