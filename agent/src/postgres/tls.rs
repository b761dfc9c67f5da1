//! TLS towards another PostgreSQL with libpq's meaning of `sslmode`, `sslrootcert`, `sslcert` and `sslkey`.

use std::path::Path;
use std::sync::Arc;

use bytes::BytesMut;
use futures::future::Either;
use postgres_protocol::message::frontend;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
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
    let config = client_config(mode, option("sslrootcert"), option("sslcert"), option("sslkey"))?;
    let name = ServerName::try_from(host.to_owned()).map_err(|error| format!("{host}: {error}"))?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(io)?;
    Ok(Either::Right(Box::new(stream)))
}

fn client_config(
    mode: &str,
    root: Option<&str>,
    cert: Option<&str>,
    key: Option<&str>,
) -> Result<ClientConfig, String> {
    let provider = Arc::new(ring::default_provider());
    // `require` with a root certificate verifies the chain, as libpq does for compatibility.
    let roots = match root.filter(|_| matches!(mode, "require" | "verify-ca" | "verify-full")) {
        Some(file) => certificates(file)?,
        None if mode.starts_with("verify") => return Err(format!("sslmode {mode} needs sslrootcert")),
        None => Vec::new(),
    };
    let verifier = Verifier { roots, check_name: mode == "verify-full", provider: provider.clone() };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    match (cert, key) {
        (Some(cert), Some(key)) => {
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| format!("{key}: {error}"))?;
            builder.with_client_auth_cert(certificates(cert)?, key).map_err(|error| format!("{cert}: {error}"))
        }
        _ => Ok(builder.with_no_client_auth()),
    }
}

fn certificates(file: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(Path::new(file)).and_then(Iterator::collect);
    let list: Vec<_> = read.map_err(|error| format!("{file}: {error}"))?;
    if list.is_empty() { Err(format!("{file} has no certificate")) } else { Ok(list) }
}

/// Verifies as libpq: nothing without a root certificate, the chain with one, the name only for `verify-full`.
#[derive(Debug)]
struct Verifier {
    roots: Vec<CertificateDer<'static>>,
    check_name: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.roots.is_empty() {
            return Ok(ServerCertVerified::assertion());
        }
        let cert = ParsedCertificate::try_from(end_entity)?;
        // A self-signed certificate that is its own authority is common; webpki would refuse a CA as a server.
        if !self.roots.iter().any(|root| root == end_entity) {
            let mut store = RootCertStore::empty();
            store.add_parsable_certificates(self.roots.iter().cloned());
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&cert, &store, intermediates, now, algorithms)?;
        }
        if self.check_name {
            verify_server_name(&cert, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
