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
    let root = option("sslrootcert");
    let mode = option("sslmode").unwrap_or(default_mode(root));
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
    let verify = verification(mode, root)?;
    let root = root.filter(|root| *root != SYSTEM).map(Path::new);
    let config = client_config(root, file("sslcert"), file("sslkey"), verify);
    let config = config.map_err(|error| error.to_string())?;
    let name = ServerName::try_from(host.to_owned()).map_err(|error| format!("{host}: {error}"))?;
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(io)?;
    Ok(Either::Right(Box::new(stream)))
}

/// libpq's word (since 16) for a `sslrootcert` that is whom the system trusts.
const SYSTEM: &str = "system";

/// `sslmode` where none is given. Whom the system trusts may be anybody who has a certificate, so its name counts.
pub fn default_mode(root: Option<&str>) -> &'static str {
    if root == Some(SYSTEM) { "verify-full" } else { "prefer" }
}

/// What is verified: `require` with a root certificate is `verify-ca`, as in libpq.
fn verification(mode: &str, root: Option<&str>) -> Result<Verify, String> {
    match (mode, root) {
        ("verify-full", Some(_)) => Ok(Verify::Full),
        (mode, Some(SYSTEM)) => Err(format!("sslmode {mode} is too weak for sslrootcert system; use verify-full")),
        ("prefer", _) | ("require", None) => Ok(Verify::Nothing),
        ("require" | "verify-ca", Some(_)) => Ok(Verify::Chain),
        ("verify-ca" | "verify-full", None) => Err(format!("sslmode {mode} needs sslrootcert")),
        _ => Err(format!("sslmode {mode} is not known")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sslmode_means_what_it_means_to_libpq() {
        let file = Some("/ca.crt");
        assert_eq!(verification("prefer", file), Ok(Verify::Nothing));
        assert_eq!(verification("require", None), Ok(Verify::Nothing));
        assert_eq!(verification("require", file), Ok(Verify::Chain));
        assert_eq!(verification("verify-full", file), Ok(Verify::Full));
        assert!(verification("verify-ca", None).is_err() && verification("yes", file).is_err());
        assert_eq!(verification(default_mode(Some("system")), Some("system")), Ok(Verify::Full));
        assert!(verification("require", Some("system")).is_err());
    }
}
