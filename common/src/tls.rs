//! TLS from PEM files, on rustls with the *ring* provider.
//!
//! Many Patroni sites have one self-signed certificate that is CA, server and client at once. webpki refuses such a
//! certificate as an end entity (it says `CA:TRUE`), OpenSSL doesn't; here it is accepted where the very same
//! certificate is in the file of trusted ones and not expired.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use trunkline_config::local::VerifyClient;

/// Where distributions keep the certificates that everybody trusts.
const SYSTEM_CERTIFICATES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Why TLS can't be set up: always a file and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// The file can't be read, or has nothing of the kind.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Client certificates shall be verified, but nobody is trusted to have signed them.
    #[error("client certificates can only be verified with a cafile")]
    NoClientCa,
}

impl TlsError {
    fn file(path: &Path, why: impl ToString) -> Self {
        Self::File { path: path.to_owned(), why: why.to_string() }
    }
}

/// How much of a server's certificate a client checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Who signed it, and that it is for this host.
    Full,
    /// Who signed it.
    Chain,
    /// Nothing: encryption only.
    Nothing,
}

/// A server with this certificate (and its chain); its key is in the same file where `key` names none. `ca`: who may have
/// signed client certificates.
pub fn server_config(
    certificate: &Path,
    key: Option<&Path>,
    ca: Option<&Path>,
    clients: VerifyClient,
) -> Result<Arc<ServerConfig>, TlsError> {
    let (chain, private) = identity(certificate, key)?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::file(certificate, error))?;
    let builder = match clients {
        VerifyClient::None => builder.with_no_client_auth(),
        VerifyClient::Optional | VerifyClient::Required => {
            let ca = ca.ok_or(TlsError::NoClientCa)?;
            builder.with_client_cert_verifier(Arc::new(ClientVerifier::new(ca, clients)?))
        }
    };
    builder.with_single_cert(chain, private).map(Arc::new).map_err(|error| TlsError::file(certificate, error))
}

/// A client that trusts servers signed by `ca` (without one: by whom the system trusts), and shows `certificate`, if any.
pub fn client_config(
    ca: Option<&Path>,
    certificate: Option<&Path>,
    key: Option<&Path>,
    verify: Verify,
) -> Result<Arc<ClientConfig>, TlsError> {
    let trusted = match (verify, ca) {
        (Verify::Nothing, _) => Trusted::nobody(),
        (_, Some(ca)) => Trusted::read(ca)?,
        (_, None) => match system_certificates() {
            Some(file) => Trusted::read(file)?,
            // Nobody is trusted then: plain HTTP works, and every TLS server is refused when it is met.
            None => Trusted::nobody(),
        },
    };
    let verifier = Arc::new(ServerVerifier { trusted, verify, provider: provider() });
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::file(certificate.or(ca).unwrap_or(Path::new("TLS")), error))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let Some(certificate) = certificate else { return Ok(Arc::new(builder.with_no_client_auth())) };
    let (chain, private) = identity(certificate, key)?;
    let config = builder.with_client_auth_cert(chain, private);
    config.map(Arc::new).map_err(|error| TlsError::file(certificate, error))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn system_certificates() -> Option<&'static Path> {
    SYSTEM_CERTIFICATES.iter().map(Path::new).find(|path| path.is_file())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err(TlsError::file(path, "there is no PEM certificate in it")),
        Ok(found) => Ok(found),
        Err(error) => Err(TlsError::file(path, error)),
    }
}

fn identity(
    certificate: &Path,
    key: Option<&Path>,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let chain = certificates(certificate)?;
    let key = key.unwrap_or(certificate);
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| match error {
        rustls::pki_types::pem::Error::NoItemsFound => {
            TlsError::file(key, "there is no PEM private key in it that is not encrypted")
        }
        error => TlsError::file(key, error),
    })?;
    Ok((chain, private))
}

/// Whom to trust: as roots of chains, and by themselves.
#[derive(Debug)]
struct Trusted {
    roots: Arc<RootCertStore>,
    certificates: Vec<CertificateDer<'static>>,
}

impl Trusted {
    fn nobody() -> Self {
        Self { roots: Arc::new(RootCertStore::empty()), certificates: Vec::new() }
    }

    fn read(path: &Path) -> Result<Self, TlsError> {
        let certificates = certificates(path)?;
        let mut roots = RootCertStore::empty();
        let (usable, _) = roots.add_parsable_certificates(certificates.iter().cloned());
        if usable == 0 {
            return Err(TlsError::file(path, "none of its certificates can be used"));
        }
        Ok(Self { roots: Arc::new(roots), certificates })
    }

    /// Whether this is one of the trusted certificates itself, and in its time.
    fn contains(&self, end_entity: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
        if !self.certificates.iter().any(|trusted| trusted.as_ref() == end_entity.as_ref()) {
            return Err(Error::InvalidCertificate(CertificateError::UnknownIssuer));
        }
        let parsed = x509_parser::parse_x509_certificate(end_entity);
        let (_, parsed) = parsed.map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let validity = parsed.validity();
        match now {
            now if now < validity.not_before.timestamp() => {
                Err(Error::InvalidCertificate(CertificateError::NotValidYet))
            }
            now if now > validity.not_after.timestamp() => Err(Error::InvalidCertificate(CertificateError::Expired)),
            _ => Ok(()),
        }
    }
}

/// Checks servers.
#[derive(Debug)]
struct ServerVerifier {
    trusted: Trusted,
    verify: Verify,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.verify == Verify::Nothing {
            return Ok(ServerCertVerified::assertion());
        }
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        let roots = &self.trusted.roots;
        verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, algorithms)
            .or_else(|error| self.trusted.contains(end_entity, now).map_err(|_| error))?;
        if self.verify == Verify::Full {
            verify_server_name(&parsed, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Checks clients: webpki's rules, and the trusted certificates themselves.
#[derive(Debug)]
struct ClientVerifier {
    webpki: Arc<dyn ClientCertVerifier>,
    trusted: Trusted,
}

impl ClientVerifier {
    fn new(ca: &Path, clients: VerifyClient) -> Result<Self, TlsError> {
        let trusted = Trusted::read(ca)?;
        let builder = WebPkiClientVerifier::builder_with_provider(trusted.roots.clone(), provider());
        let builder = if clients == VerifyClient::Required { builder } else { builder.allow_unauthenticated() };
        let webpki = builder.build().map_err(|error| TlsError::file(ca, error))?;
        Ok(Self { webpki, trusted })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn offer_client_auth(&self) -> bool {
        self.webpki.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.webpki.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.webpki.verify_client_cert(end_entity, intermediates, now);
        verified.or_else(|error| match self.trusted.contains(end_entity, now) {
            Ok(()) => Ok(ClientCertVerified::assertion()),
            Err(_) => Err(error),
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;

    /// Runs openssl in `dir`, words split at spaces.
    fn openssl(dir: &Path, arguments: &str) {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// `self.pem`: self-signed with CA:TRUE, for localhost. `ca.pem`, and `leaf.pem` that it signed. `other.pem`: nobody's.
    fn files() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30";
        for name in ["self", "ca", "other"] {
            let more = "-addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:TRUE";
            openssl(dir.path(), &format!("{new} -subj /CN={name} {more} -keyout {name}.key -out {name}.pem"));
        }
        let request = "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=leaf";
        openssl(dir.path(), &format!("{request} -addext subjectAltName=DNS:localhost -keyout leaf.key -out leaf.csr"));
        openssl(
            dir.path(),
            "x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -days 30 -copy_extensions copy -out leaf.pem",
        );
        dir
    }

    /// One handshake and a byte each way; true: the server saw a client certificate.
    async fn handshake(
        server: Arc<ServerConfig>,
        client: Arc<ClientConfig>,
        host: &'static str,
    ) -> Result<bool, String> {
        let (near, far) = tokio::io::duplex(1 << 16);
        let accepting = async {
            let mut stream = TlsAcceptor::from(server).accept(far).await.map_err(|e| e.to_string())?;
            stream.write_all(b"x").await.map_err(|e| e.to_string())?;
            stream.flush().await.map_err(|e| e.to_string())?;
            Ok::<_, String>(stream.get_ref().1.peer_certificates().is_some())
        };
        let connecting = async {
            let name = ServerName::try_from(host).unwrap();
            let mut stream = TlsConnector::from(client).connect(name, near).await.map_err(|e| e.to_string())?;
            stream.read_u8().await.map_err(|e| e.to_string())
        };
        let (accepted, connected) = tokio::join!(accepting, connecting);
        connected?;
        accepted
    }

    #[tokio::test]
    async fn one_self_signed_certificate_is_ca_server_and_client() {
        let dir = files();
        let path = |name: &str| dir.path().join(name);
        let (cert, key, other) = (path("self.pem"), path("self.key"), path("other.pem"));
        let server = server_config(&cert, Some(&key), Some(&cert), VerifyClient::Required).unwrap();
        let client = |ca, verify| client_config(Some(ca), Some(&cert), Some(&key), verify).unwrap();
        assert_eq!(handshake(server.clone(), client(&cert, Verify::Full), "localhost").await, Ok(true));
        assert_eq!(handshake(server.clone(), client(&cert, Verify::Chain), "10.0.0.1").await, Ok(true));
        assert_eq!(handshake(server.clone(), client(&other, Verify::Nothing), "10.0.0.1").await, Ok(true));
        assert!(handshake(server.clone(), client(&cert, Verify::Full), "example.org").await.is_err(), "not its name");
        assert!(handshake(server.clone(), client(&other, Verify::Chain), "localhost").await.is_err(), "not its CA");
    }

    #[tokio::test]
    async fn a_chain_works_as_usual() {
        let dir = files();
        let path = |name: &str| dir.path().join(name);
        let server = server_config(&path("leaf.pem"), Some(&path("leaf.key")), None, VerifyClient::None).unwrap();
        let client = |ca: &str, verify| client_config(Some(&path(ca)), None, None, verify).unwrap();
        assert_eq!(handshake(server.clone(), client("ca.pem", Verify::Full), "localhost").await, Ok(false));
        assert!(handshake(server.clone(), client("other.pem", Verify::Chain), "localhost").await.is_err());
    }

    #[tokio::test]
    async fn client_certificates_are_asked_for_as_configured() {
        let dir = files();
        let path = |name: &str| dir.path().join(name);
        let (leaf, leaf_key, ca) = (path("leaf.pem"), path("leaf.key"), path("ca.pem"));
        let with = |name: &str| {
            let (cert, key) = (path(&format!("{name}.pem")), path(&format!("{name}.key")));
            client_config(Some(&ca), Some(&cert), Some(&key), Verify::Full).unwrap()
        };
        let without = client_config(Some(&ca), None, None, Verify::Full).unwrap();
        let server = |clients| server_config(&leaf, Some(&leaf_key), Some(&ca), clients).unwrap();
        assert_eq!(handshake(server(VerifyClient::Optional), without.clone(), "localhost").await, Ok(false));
        assert_eq!(handshake(server(VerifyClient::Optional), with("leaf"), "localhost").await, Ok(true));
        assert!(handshake(server(VerifyClient::Required), without, "localhost").await.is_err());
        assert!(handshake(server(VerifyClient::Required), with("other"), "localhost").await.is_err());
    }

    #[test]
    fn errors_name_the_file() {
        let dir = files();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("empty"), "").unwrap();
        let text = |result: Result<Arc<ServerConfig>, TlsError>| result.unwrap_err().to_string();
        let none = VerifyClient::None;
        assert!(text(server_config(&path("missing"), None, None, none)).contains("missing"));
        assert!(text(server_config(&path("empty"), None, None, none)).contains("no PEM certificate"));
        assert!(text(server_config(&path("leaf.pem"), None, None, none)).contains("no PEM private key"));
        assert!(text(server_config(&path("leaf.pem"), Some(&path("ca.key")), None, none)).contains("leaf.pem"));
        let keyed = server_config(&path("leaf.pem"), Some(&path("leaf.key")), None, VerifyClient::Required);
        assert_eq!(keyed.unwrap_err(), TlsError::NoClientCa);
    }
}
