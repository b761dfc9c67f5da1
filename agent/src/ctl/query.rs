//! `query`: SQL on a member, printed as patronictl prints what psycopg2 gives it.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Number, Value};
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};
use trunkline_common::Clock;

use super::args::{QueryArgs, Role};
use super::context::{Cluster, Context};
use super::error::{CtlError, Result};
use super::list::watch_interval;
use super::output::{Sheet, render};
use super::prompt::{ask_hidden, echo};
use super::select::{Node, any_member};
use super::text::{quoted, seconds_stamp};

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
    let Some(config) = node.and_then(|node| connection(&node, args, password)) else { return Ok(Err(none())) };
    let client = match connect(&config).await {
        Ok(client) => client,
        Err(why) => return Ok(Err(format!("ERROR, SQLSTATE: {why}"))),
    };
    match fits(&client, args.role).await {
        Ok(true) => {}
        Ok(false) => return Ok(Err(none())),
        Err(error) => return Ok(Err(described(&error))),
    }
    Ok(execute(&client, sql).await)
}

/// User and password come from where libpq looks for them.
fn connection(node: &Node, args: &QueryArgs, password: Option<&str>) -> Option<Config> {
    let (host, port) = node.member.host_port()?;
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let user = args.username.clone().or_else(|| variable("PGUSER")).or_else(os_user)?;
    let database = args.dbname.clone().or_else(|| variable("PGDATABASE")).unwrap_or_else(|| user.clone());
    let password = password.map(str::to_owned).or_else(|| variable("PGPASSWORD")).or_else(|| {
        let file = variable("PGPASSFILE").map(PathBuf::from);
        let file = file.or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".pgpass")))?;
        find_password(&std::fs::read_to_string(file).ok()?, [&host, &port.to_string(), &database, &user])
    });
    let mut config = Config::new();
    config.host(&host).port(port).user(&user).dbname(&database).connect_timeout(CONNECT);
    config.application_name(variable("PGAPPNAME").as_deref().unwrap_or("trunklinectl"));
    if let Some(options) = variable("PGOPTIONS") {
        config.options(options);
    }
    if let Some(password) = password {
        config.password(password);
    }
    Some(config)
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

async fn connect(config: &Config) -> std::result::Result<Client, String> {
    let limit = CONNECT + Duration::from_secs(1);
    let connected = tokio::time::timeout(limit, config.connect(NoTls)).await;
    let (client, connection) = connected
        .map_err(|_| format!("no answer within {} seconds", limit.as_secs()))?
        .map_err(|error| error.code().map_or_else(|| one_line(&error), |code| code.code().to_owned()))?;
    // Ends with the client.
    tokio::spawn(connection);
    Ok(client)
}

/// The DCS may lag behind: whoever asks for a role gets a server that has it.
async fn fits(client: &Client, role: Option<Role>) -> std::result::Result<bool, tokio_postgres::Error> {
    let Some(role) = role.filter(|role| !matches!(role, Role::Any | Role::Leader)) else { return Ok(true) };
    let in_recovery: bool = client.query_one("SELECT pg_catalog.pg_is_in_recovery()", &[]).await?.get(0);
    Ok(in_recovery != (role == Role::Primary))
}

/// Runs the statements and keeps the result of the last one.
async fn execute(client: &Client, sql: &str) -> std::result::Result<Sheet, String> {
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
                let cell = |n: usize| cell(row.get(n), types.get(n));
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

/// A value as Python has it: what it prints differs from PostgreSQL's text for a few types.
fn cell(text: Option<&str>, of: Option<&Type>) -> Value {
    let Some(text) = text else { return Value::Null };
    let typed = match of {
        Some(&Type::BOOL) => Some(Value::Bool(text == "t")),
        Some(&(Type::INT2 | Type::INT4 | Type::INT8 | Type::OID)) => text.parse::<i64>().ok().map(Value::from),
        Some(&(Type::FLOAT4 | Type::FLOAT8)) => float(text),
        Some(&(Type::JSON | Type::JSONB)) => serde_json::from_str(text).ok(),
        Some(&(Type::TIMESTAMP | Type::TIMESTAMPTZ)) => Some(timestamp(text).into()),
        _ => None,
    };
    typed.unwrap_or_else(|| text.into())
}

fn float(text: &str) -> Option<Value> {
    match text {
        "NaN" => Some("nan".into()),
        "Infinity" => Some("inf".into()),
        "-Infinity" => Some("-inf".into()),
        text => Number::from_f64(text.parse().ok()?).map(Value::Number),
    }
}

/// Python writes all six digits of a fraction, and minutes in an offset.
fn timestamp(text: &str) -> String {
    let Some((date, time)) = text.split_once(' ') else { return text.to_owned() };
    let (clock, offset) = match time.find(['+', '-']) {
        Some(at) => time.split_at(at),
        None => (time, ""),
    };
    let clock = match clock.split_once('.') {
        Some((whole, fraction)) => format!("{whole}.{fraction:0<6}"),
        None => clock.to_owned(),
    };
    let minutes = if offset.len() == 3 { ":00" } else { "" };
    format!("{date} {clock}{offset}{minutes}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn cells_are_pythons() {
        let table = [
            (Some("t"), Some(Type::BOOL), json!(true)),
            (Some("t"), Some(Type::TEXT), json!("t")),
            (Some("t"), None, json!("t")),
            (None, Some(Type::BOOL), json!(null)),
            (Some("5"), Some(Type::INT4), json!(5)),
            (Some("5"), Some(Type::FLOAT8), json!(5.0)),
            (Some("NaN"), Some(Type::FLOAT8), json!("nan")),
            (Some("1.50"), Some(Type::NUMERIC), json!("1.50")),
            (Some(r#"{"a": 1}"#), Some(Type::JSONB), json!({"a": 1})),
            (Some("2031-05-01 10:30:00.5+00"), Some(Type::TIMESTAMPTZ), json!("2031-05-01 10:30:00.500000+00:00")),
            (Some("2031-05-01 10:30:00"), Some(Type::TIMESTAMP), json!("2031-05-01 10:30:00")),
            (Some("2031-05-01 10:30:00+05:30"), Some(Type::TIMESTAMPTZ), json!("2031-05-01 10:30:00+05:30")),
            (Some("infinity"), Some(Type::TIMESTAMP), json!("infinity")),
        ];
        for (text, of, expected) in table {
            assert_eq!(cell(text, of.as_ref()), expected, "{text:?}");
        }
    }

    #[test]
    fn passwords_are_found_as_libpq_does() {
        let file = "# comment\nother:*:*:*:x\nh:5432:db:u\\:ser:se:cret\\\\\n*:*:*:*:any\n";
        assert_eq!(find_password(file, ["h", "5432", "db", "u:ser"]).as_deref(), Some("se:cret\\"));
        assert_eq!(find_password(file, ["h", "5433", "db", "u:ser"]).as_deref(), Some("any"));
        assert_eq!(find_password("a:b\n\n:::\n", ["a", "b", "c", "d"]), None);
    }
}
