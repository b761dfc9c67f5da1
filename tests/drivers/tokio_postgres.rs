//! tokio-postgres, as a driver of `tests/drivers`.

use std::env;
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, CancelToken, Client, Config, NoTls};
use tokio_rustls::TlsConnector;
use trunkline_common::tls::{Verify, client_config};

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

#[tokio::main]
async fn main() {
    for step in env::args().skip(1) {
        if let Err(error) = run(&step).await {
            say(&step, &format!("{error:#}").replace('\n', " "));
        }
    }
}

async fn run(step: &str) -> Result<()> {
    if step.starts_with("hold-") {
        let ended = hold(step).await;
        say(step, if ended.is_err() { "ended" } else { "finished" });
        say(step, &role().await?);
        return Ok(());
    }
    let answer = match step {
        "role" => role().await?,
        "tls" => {
            let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
            let encrypted: bool = connect().await?.0.query_one(sql, &[]).await?.get(0);
            if encrypted { "on" } else { "off" }.to_owned()
        }
        "large" => {
            let text = "x".repeat(16 << 20);
            let row = connect().await?.0.query_one("SELECT $1::text", &[&text]).await?;
            row.get::<_, &str>(0).len().to_string()
        }
        "copy-out" => copy_out("SELECT generate_series(1, 100000)").await?.to_string(),
        "copy-in" => {
            let client = connect().await?.0;
            client.batch_execute("CREATE TEMPORARY TABLE numbers (n int)").await?;
            let sink = client.copy_in("COPY numbers FROM STDIN").await?;
            let mut sink = Box::pin(sink);
            for n in 1..=100_000 {
                sink.send(Bytes::from(format!("{n}\n"))).await?;
            }
            sink.as_mut().finish().await?;
            client.query_one("SELECT sum(n) FROM numbers", &[]).await?.get::<_, i64>(0).to_string()
        }
        "cancel" => cancelled().await?,
        "listen" => {
            let (client, mut notes) = connect().await?;
            client.batch_execute("LISTEN rust").await?;
            connect().await?.0.batch_execute("NOTIFY rust, 'hello'").await?;
            notes.recv().await.context("the session ended")?
        }
        _ => bail!("no such step"),
    };
    say(step, &answer);
    Ok(())
}

async fn hold(step: &str) -> Result<()> {
    let waiting = || say(step, "waiting");
    match step {
        "hold-query" => {
            let client = connect().await?.0;
            waiting();
            client.batch_execute("SELECT pg_sleep(600)").await?;
        }
        "hold-copy-in" => {
            let client = connect().await?.0;
            client.batch_execute("CREATE TEMPORARY TABLE lines (line text)").await?;
            let mut sink = Box::pin(client.copy_in("COPY lines FROM STDIN").await?);
            let row = Bytes::from("x".repeat(10_000) + "\n");
            waiting();
            loop {
                sink.send(row.clone()).await?;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        "hold-copy-out" => {
            waiting();
            copy_out("SELECT i, pg_sleep(0.05) FROM generate_series(1, 10000) i").await?;
        }
        "hold-listen" => {
            let (client, mut notes) = connect().await?;
            client.batch_execute("LISTEN rust_held").await?;
            waiting();
            while notes.recv().await.is_some() {}
            bail!("the session ended");
        }
        _ => bail!("no such step"),
    }
    Ok(())
}

async fn role() -> Result<String> {
    let standby: bool = connect().await?.0.query_one("SELECT pg_is_in_recovery()", &[]).await?.get(0);
    Ok(if standby { "standby" } else { "primary" }.to_owned())
}

async fn copy_out(query: &str) -> Result<usize> {
    let client = connect().await?.0;
    let mut rows = Box::pin(client.copy_out(&format!("COPY ({query}) TO STDOUT")).await?);
    let mut bytes = 0;
    while let Some(data) = rows.next().await {
        bytes += data?.len();
    }
    Ok(bytes)
}

async fn cancelled() -> Result<String> {
    let client = connect().await?.0;
    let token: CancelToken = client.cancel_token();
    let mut asleep = Box::pin(client.batch_execute("SELECT pg_sleep(60)"));
    loop {
        // A request may overtake the query that it is meant for.
        tokio::select! {
            answer = &mut asleep => {
                let error = answer.err().context("finished")?;
                return Ok(error.code().context("no code")?.code().to_owned());
            }
            () = tokio::time::sleep(Duration::from_millis(200)) => token.cancel_query_raw(dial().await?, NoTls).await?,
        }
    }
}

/// A session, and the payloads of its notifications; they end with it.
async fn connect() -> Result<(Client, mpsc::Receiver<String>)> {
    let mut config = Config::new();
    config.user(variable("PGUSER")?).password(variable("PGPASSWORD")?).dbname(variable("PGDATABASE")?);
    let (client, mut connection) = config.connect_raw(dial().await?, NoTls).await?;
    let (tell, notes) = mpsc::channel(16);
    tokio::spawn(async move {
        let mut messages = futures::stream::poll_fn(move |context| connection.poll_message(context));
        while let Some(Ok(message)) = messages.next().await {
            if let AsyncMessage::Notification(note) = message {
                let _ = tell.send(note.payload().to_owned()).await;
            }
        }
    });
    Ok((client, notes))
}

/// TLS is begun here: tokio-postgres leaves it to others, and on such a stream it asks for none.
async fn dial() -> Result<Box<dyn Stream>> {
    let address = (Ipv4Addr::LOCALHOST, variable("PGPORT")?.parse()?);
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    if variable("PGSSLMODE")? == "disable" {
        return Ok(Box::new(stream));
    }
    stream.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").await?;
    if stream.read_u8().await? != b'S' {
        bail!("no TLS");
    }
    let root = PathBuf::from(variable("PGSSLROOTCERT")?);
    let config = client_config(Some(&root), None, None, Verify::Full)?;
    let name = ServerName::try_from(Ipv4Addr::LOCALHOST.to_string())?;
    Ok(Box::new(TlsConnector::from(config).connect(name, stream).await?))
}

fn variable(name: &str) -> Result<String> {
    env::var(name).with_context(|| name.to_owned())
}

fn say(step: &str, answer: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{step}: {answer}").and_then(|()| out.flush());
}
