//! TLS towards a PostgreSQL server with libpq's meaning of `sslmode`, `sslrootcert`, `sslcert` and `sslkey`.

use std::path::Path;

use bytes::BytesMut;
use futures::future::Either;
use postgres_protocol::message::frontend;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use trunkline_common::tls::{Verify, client_config};
use trunkline_config::postgres::Credentials;

/// Asks the server for TLS where `sslmode` says so (libpq's default is `prefer`), and continues on what it answers.
pub async fn negotiate(
    mut stream: TcpStream,
    host: &str,
    user: &Credentials,
) -> Result<Either<TcpStream, Box<TlsStream<TcpStream>>>, String> {
    let option = |key: &str| user.options.get(key).map(String::as_str).filter(|value| !value.is_empty());
    let mode = option("sslmode").unwrap_or("prefer");
    if matches!(mode, "disable" | "allow") {
        return Ok(Either::Left(stream));
    }
    let io = |error: std::io::Error| error.to_string();
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await.map_err(io)?;
    match stream.read_u8().await.map_err(io)? {
        b'S' => {}
        b'N' if mode == "prefer" => return Ok(Either::Left(stream)),
        b'N' => return Err(format!("the server has no TLS, and sslmode is {mode}")),
        _ => return Err("an unexpected answer to SSLRequest".to_owned()),
    }
    let file = |key: &str| option(key).map(Path::new);
    let root = file("sslrootcert");
    let config = client_config(root, file("sslcert"), file("sslkey"), verification(mode, root.is_some())?);
    let config = config.map_err(|error| error.to_string())?;
    let name = ServerName::try_from(host.to_owned()).map_err(|error| format!("{host}: {error}"))?;
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(io)?;
    Ok(Either::Right(Box::new(stream)))
}

/// What is verified: `require` with a root certificate is `verify-ca`, as in libpq.
fn verification(mode: &str, root: bool) -> Result<Verify, String> {
    match (mode, root) {
        ("prefer", _) | ("require", false) => Ok(Verify::Nothing),
        ("require" | "verify-ca", true) => Ok(Verify::Chain),
        ("verify-full", true) => Ok(Verify::Full),
        ("verify-ca" | "verify-full", false) => Err(format!("sslmode {mode} needs sslrootcert")),
        _ => Err(format!("sslmode {mode} is not known")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sslmode_means_what_it_means_to_libpq() {
        assert_eq!(verification("prefer", true), Ok(Verify::Nothing));
        assert_eq!(verification("require", false), Ok(Verify::Nothing));
        assert_eq!(verification("require", true), Ok(Verify::Chain));
        assert_eq!(verification("verify-full", true), Ok(Verify::Full));
        assert!(verification("verify-ca", false).is_err() && verification("yes", true).is_err());
    }
}
