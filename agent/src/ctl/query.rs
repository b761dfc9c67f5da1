//! `query`: SQL on a member, printed as patronictl prints what psycopg2 gives it.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use futures::future::Either;
use tokio::net::TcpStream;
use tokio_postgres::config::SslMode;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};
use trunkline_common::Clock;
use trunkline_config::postgres::Credentials;

use super::args::{QueryArgs, Role};
use super::context::{Cluster, Context};
use super::error::{CtlError, Result};
use super::list::watch_interval;
use super::output::{Sheet, render};
use super::prompt::{ask_hidden, echo};
use super::select::{Node, any_member};
use super::text::{quoted, seconds_stamp};
use super::values::python_value;
use crate::postgres::tls;
use crate::postgres::walsender::Io;

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);

/// `query`.
pub(super) async fn query(context: &Context, args: &QueryArgs) -> Result<()> {
    let sql = sql(args)?;
    let password = if args.password { Some(ask_hidden("Password")?) } else { None };
    let cluster = context.target(&context.scope(args.cluster.as_deref())?, args.group).read().await?;
    let interval = watch_interval(args.watch);
    // Until somebody interrupts it: that is what watching is.
    loop {
        let began = context.clock.now();
        let sheet = match run(&cluster, args, password.as_deref(), &sql).await? {
            Ok(sheet) => sheet,
            Err(why) => {
                let row = vec![seconds_stamp(context.clock.wall()).into(), why.into()];
                Sheet { rows: vec![row], ..Sheet::default() }
            }
        };
        echo(render(&sheet, args.format.into(), &args.delimiter))?;
        match interval {
            Some(interval) => context.clock.sleep_until(began + interval).await,
            None => return Ok(()),
        }
    }
}

fn sql(args: &QueryArgs) -> Result<String> {
    match (&args.file, &args.command) {
        (Some(_), Some(_)) => Err(CtlError::new("--file and --command are mutually exclusive options")),
        (None, None) => Err(CtlError::new("You need to specify either --command or --file")),
        (None, Some(sql)) => Ok(sql.clone()),
        (Some(file), None) => {
            let mut sql = String::new();
            let read = match file.as_str() {
                "-" => std::io::stdin().read_to_string(&mut sql),
                file => std::fs::File::open(file).and_then(|mut file| file.read_to_string(&mut sql)),
            };
            read.map(|_| sql).map_err(|error| CtlError::new(format!("Can not read {file}: {error}")))
        }
    }
}

/// The result, or a sentence for the row that stands in its place.
async fn run(
    cluster: &Cluster,
    args: &QueryArgs,
    password: Option<&str>,
    sql: &str,
) -> Result<std::result::Result<Sheet, String>> {
    let node = any_member(cluster, args.role, args.member.as_deref())?;
    let none = || match (&args.member, args.role) {
        (Some(member), _) => format!("No connection to member {member} is available"),
        (None, Some(role)) => format!("No connection to role {} is available", quoted(role.as_str())),
        (None, None) => "No connection is available".to_owned(),
    };
    let Some(node) = node else { return Ok(Err(none())) };
    let config = connection(&node, args, password)?;
    let (host, port) = node.member.host_port().unwrap_or_default();
    let client = match connect(&config, &host, port).await {
        Ok(client) => client,
        Err(why) => {
            let place = format!("connection to server at \"{host}\", port {port} failed");
            return Ok(Err(format!("ERROR, SQLSTATE: {place}: {why}")));
        }
    };
    match fits(&client, args.role).await {
        Ok(true) => {}
        Ok(false) => return Ok(Err(none())),
        Err(error) => return Ok(Err(described(&error))),
    }
    Ok(execute(&client, sql).await)
}

/// User and password come from where libpq looks for them.
///
/// # Errors
/// The member does not tell its address, or nobody tells a user.
fn connection(node: &Node, args: &QueryArgs, password: Option<&str>) -> Result<Config> {
    let no_address =
        || CtlError::new(format!("Member {} does not tell its address (no conn_url in its key)", node.name));
    let (host, port) = node.member.host_port().ok_or_else(no_address)?;
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let user = args.username.clone().or_else(|| variable("PGUSER")).or_else(os_user);
    let user = user.ok_or_else(|| CtlError::new("Which database user? Give -U, or set PGUSER"))?;
    let database = args.dbname.clone().or_else(|| variable("PGDATABASE")).unwrap_or_else(|| user.clone());
    let password = password.map(str::to_owned).or_else(|| variable("PGPASSWORD")).or_else(|| {
        let file = variable("PGPASSFILE").map(PathBuf::from);
        let file = file.or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".pgpass")))?;
        find_password(&std::fs::read_to_string(file).ok()?, [&host, &port.to_string(), &database, &user])
    });
    let mut config = Config::new();
    config.user(&user).dbname(&database).ssl_mode(SslMode::Disable);
    config.application_name(variable("PGAPPNAME").as_deref().unwrap_or("trunklinectl"));
    if let Some(options) = variable("PGOPTIONS") {
        config.options(options);
    }
    if let Some(password) = password {
        config.password(password);
    }
    Ok(config)
}

fn os_user() -> Option<String> {
    let uid = rustix::process::getuid().as_raw().to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
    let user = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    };
    passwd.lines().find_map(user).or_else(|| std::env::var("USER").ok())
}

/// The password of the first line of a `.pgpass` file that fits: `host:port:database:user:password`, `*` fits all, `\`
/// escapes.
fn find_password(pgpass: &str, wanted: [&str; 4]) -> Option<String> {
    pgpass.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = unescaped_fields(line);
        let (password, fields) = fields.split_last()?;
        let fits = |(field, wanted): (&String, &&str)| field == "*" || field == wanted;
        (fields.len() == 4 && fields.iter().zip(&wanted).all(fits)).then(|| password.clone())
    })
}

fn unescaped_fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        let is_separator = c == ':' && fields.len() < 5;
        if is_separator {
            fields.push(String::new());
        } else if let Some(field) = fields.last_mut() {
            field.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
        }
    }
    fields
}

/// With TLS as libpq's variables say; by default where the server has it.
async fn connect(config: &Config, host: &str, port: u16) -> std::result::Result<Client, String> {
    let connecting = async {
        let stream = TcpStream::connect((host, port)).await.map_err(|error| unreachable(&error))?;
        // TLS is negotiated here; the protocol runs inside it.
        let stream: Box<dyn Io> = match tls::negotiate(stream, host, &tls_settings()).await? {
            Either::Left(plain) => Box::new(plain),
            Either::Right(encrypted) => encrypted,
        };
        config.connect_raw(stream, NoTls).await.map_err(|error| refused(&error))
    };
    let connected = tokio::time::timeout(CONNECT, connecting).await;
    let (client, connection) = connected.map_err(|_| "timeout expired ".to_owned())??;
    // Ends with the client.
    tokio::spawn(connection);
    Ok(client)
}

/// What libpq takes from the environment about TLS.
fn tls_settings() -> Credentials {
    let names =
        [("sslmode", "PGSSLMODE"), ("sslrootcert", "PGSSLROOTCERT"), ("sslcert", "PGSSLCERT"), ("sslkey", "PGSSLKEY")];
    let given = names.into_iter().filter_map(|(key, name)| Some((key.to_owned(), std::env::var(name).ok()?)));
    Credentials { options: given.collect(), ..Credentials::default() }
}

/// libpq's words.
fn refused(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        return format!("{}:  {} ", db.severity(), db.message().replace('\n', " "));
    }
    one_line(error)
}

/// The same before the server has said anything.
fn unreachable(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => {
            "Connection refused \tIs the server running on that host and accepting TCP/IP connections? ".to_owned()
        }
        std::io::ErrorKind::TimedOut => "timeout expired ".to_owned(),
        _ => one_line(error),
    }
}

/// The DCS may lag behind: whoever asks for a role gets a server that has it.
async fn fits(client: &Client, role: Option<Role>) -> std::result::Result<bool, tokio_postgres::Error> {
    let Some(role) = role.filter(|role| !matches!(role, Role::Any | Role::Leader)) else { return Ok(true) };
    let in_recovery: bool = client.query_one("SELECT pg_catalog.pg_is_in_recovery()", &[]).await?.get(0);
    Ok(in_recovery != (role == Role::Primary))
}

/// Runs the statements and keeps the result of the last one.
async fn execute(client: &Client, sql: &str) -> std::result::Result<Sheet, String> {
    if sql.trim().is_empty() {
        return Err("ERROR, SQLSTATE: can't execute an empty query".to_owned());
    }
    // The simple protocol tells no types; a single statement can be asked for them beforehand.
    let types: Vec<Type> = match client.prepare(sql).await {
        Ok(statement) => statement.columns().iter().map(|column| column.type_().clone()).collect(),
        Err(_) => Vec::new(),
    };
    let mut sheet: Option<Sheet> = None;
    let mut finished = true;
    for message in client.simple_query(sql).await.map_err(|error| described(&error))? {
        match message {
            SimpleQueryMessage::RowDescription(columns) => {
                let columns = columns.iter().map(|column| column.name().to_owned()).collect();
                sheet = Some(Sheet { columns: Some(columns), ..Sheet::default() });
                finished = false;
            }
            SimpleQueryMessage::Row(row) => {
                let cell = |n: usize| python_value(row.get(n), types.get(n));
                if let Some(sheet) = &mut sheet {
                    sheet.rows.push((0..row.len()).map(cell).collect());
                }
            }
            // Of a statement without a result, after one with a result.
            SimpleQueryMessage::CommandComplete(_) if std::mem::replace(&mut finished, true) => sheet = None,
            _ => {}
        }
    }
    sheet.ok_or_else(|| "ERROR, SQLSTATE: no results to fetch".to_owned())
}

fn described(error: &tokio_postgres::Error) -> String {
    match error.code() {
        Some(code) => format!("ERROR, SQLSTATE: {}", code.code()),
        None => format!("ERROR, SQLSTATE: {}", one_line(error)),
    }
}

fn one_line(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let text: Vec<String> = causes.map(|error| error.to_string().replace('\n', " ")).collect();
    text.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_found_as_libpq_does() {
        let file = "# comment\nother:*:*:*:x\nh:5432:db:u\\:ser:se:cret\\\\\n*:*:*:*:any\n";
        assert_eq!(find_password(file, ["h", "5432", "db", "u:ser"]).as_deref(), Some("se:cret\\"));
        assert_eq!(find_password(file, ["h", "5433", "db", "u:ser"]).as_deref(), Some("any"));
        assert_eq!(find_password("a:b\n\n:::\n", ["a", "b", "c", "d"]), None);
    }
}
