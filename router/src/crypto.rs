//! TLS that ends or begins at the router: the certificates of a port, and the two handshakes.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use trunkline_common::tls::{self, TlsError, Verify};
use trunkline_config::router::{Port, ServerTlsMode};

use crate::startup;
use crate::wire::{Tls, Wire};

/// PostgreSQL's name among the protocols that TLS can carry (ALPN).
const PROTOCOL: &[u8] = b"postgresql";

/// What a port needs for TLS.
#[derive(Clone, Default)]
pub struct Crypto {
    accept: Option<TlsAcceptor>,
    connect: Option<TlsConnector>,
}

impl std::fmt::Debug for Crypto {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (accept, connect) = (self.accept.is_some(), self.connect.is_some());
        f.debug_struct("Crypto").field("accept", &accept).field("connect", &connect).finish()
    }
}

impl Crypto {
    /// Reads the certificates of `port`, as they are now.
    ///
    /// # Errors
    /// A file can't be used.
    pub fn of(port: &Port) -> Result<Self, TlsError> {
        let accept = port.tls.as_ref().map(|tls| {
            let (key, ca) = (tls.keyfile.as_deref(), tls.cafile.as_deref());
            let mut config = (*tls::server_config(&tls.certfile, key, ca, tls.verify_client)?).clone();
            config.alpn_protocols = vec![PROTOCOL.to_vec()];
            Ok(TlsAcceptor::from(Arc::new(config)))
        });
        let connect = port.server_tls.as_ref().map(|tls| {
            let verify = match tls.mode {
                ServerTlsMode::Require => Verify::Nothing,
                ServerTlsMode::VerifyCa => Verify::Chain,
                ServerTlsMode::VerifyFull => Verify::Full,
            };
            let (ca, certificate) = (tls.cafile.as_deref(), tls.certfile.as_deref());
            let mut config = (*tls::client_config(ca, certificate, tls.keyfile.as_deref(), verify)?).clone();
            config.alpn_protocols = vec![PROTOCOL.to_vec()];
            Ok(TlsConnector::from(Arc::new(config)))
        });
        Ok(Self { accept: accept.transpose()?, connect: connect.transpose()? })
    }

    /// Whether TLS with clients ends here.
    pub fn accepts(&self) -> bool {
        self.accept.is_some()
    }

    /// The handshake with a client; what it sends begins with `before`. `direct`: it has not asked first, so that it has to
    /// name the protocol.
    ///
    /// # Errors
    /// There is no TLS here, or the client and the router don't come together.
    pub async fn accept(&self, client: &Arc<TcpStream>, before: Vec<u8>, direct: bool) -> io::Result<Tls> {
        let Some(acceptor) = &self.accept else { return Err(io::ErrorKind::Unsupported.into()) };
        let tls = acceptor.accept(Wire::new(client.clone(), before)).await?;
        if direct && tls.get_ref().1.alpn_protocol() != Some(PROTOCOL) {
            return Err(io::Error::other("direct TLS without the protocol postgresql"));
        }
        Ok(Box::new(TlsStream::Server(tls)))
    }

    /// Whether TLS with servers begins here.
    pub fn connects(&self) -> bool {
        self.connect.is_some()
    }

    /// The handshake with a server, if `port` wants TLS there.
    ///
    /// # Errors
    /// The server has no TLS, or another certificate than it should have; or nothing that belongs to such a port has been read.
    pub async fn connect(&self, port: &Port, server: &Arc<TcpStream>, host: &str) -> io::Result<Option<Tls>> {
        if port.server_tls.is_none() {
            return Ok(None);
        }
        let Some(connector) = &self.connect else { return Err(io::ErrorKind::Unsupported.into()) };
        let mut wire = Wire::new(server.clone(), Vec::new());
        wire.write_all(&startup::SSL_REQUEST_PACKET).await?;
        if wire.read_u8().await? != b'S' {
            return Err(io::Error::other("the server has no TLS"));
        }
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        Ok(Some(Box::new(TlsStream::Client(connector.connect(name, wire).await?))))
    }
}

#[cfg(test)]
mod tests {
    use trunkline_config::router::{Listen, ServerTls, Target};

    use super::*;

    #[tokio::test]
    async fn a_server_that_is_to_be_spoken_to_in_tls_never_hears_plain_text() {
        let tls = ServerTls { mode: ServerTlsMode::VerifyFull, cafile: None, certfile: None, keyfile: None };
        let plain = Port::new("rw", Listen::Tcp("127.0.0.1:0".into()), Target::Leader);
        let port = Port { server_tls: Some(tls), ..plain.clone() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Arc::new(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        assert!(Crypto::default().connect(&port, &server, "localhost").await.is_err());
        assert!(Crypto::default().connect(&plain, &server, "localhost").await.unwrap().is_none());
    }
}
