//! Sockets: where requests come in, with or without TLS, and the bounds on what clients can hold.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use trunkline_common::Clock;
use trunkline_common::dcs::Dcs;

use super::auth::Caller;
use super::{Api, Observe, RestError};

/// How many connections there may be; further ones wait to be accepted.
const MOST_CONNECTIONS: usize = 512;

/// How long a TLS handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

/// How long a request's head may take to come in, and a connection may be idle between two requests.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// The largest request head.
const LARGEST_HEAD: usize = 64 * 1024;

/// How long open requests may go on once the server is to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// Pause after a failed accept (out of file descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The API on its socket.
pub struct Server<D, P, C> {
    api: Arc<Api<D, P, C>>,
    listener: TcpListener,
}

impl<D: Dcs, P: Observe, C: Clock> Server<D, P, C> {
    /// Listens on `restapi.listen`, so that a taken port is known before anything else is touched.
    pub async fn bind(api: Arc<Api<D, P, C>>) -> Result<Self, RestError> {
        let listen = api.policy.borrow().listen.clone();
        let failed = |cause| RestError::Listen { remedy: remedy(&cause), cause, address: listen.clone() };
        let listener = TcpListener::from_std(bind(&listen)?).map_err(failed)?;
        Ok(Self { api, listener })
    }

    /// Where it listens; the port that was chosen where the configuration says 0.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers requests until `shutdown`, then lets open ones end within a second.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Self { api, mut listener } = self;
        let slots = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        let closing = watch::Sender::new(false);
        let mut policy = api.policy.subscribe();
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Ok(()) = policy.changed() => {
                    let moved = api.moved.lock().take();
                    match moved.map(TcpListener::from_std) {
                        Some(Ok(new)) => listener = new,
                        Some(Err(error)) => tracing::error!(%error, "REST API: the new address is not used"),
                        None => {}
                    }
                }
                (permit, accepted) = accept(&listener, &slots) => match accepted {
                    Ok((stream, from)) => {
                        tokio::spawn(connection(api.clone(), stream, from, permit, closing.subscribe()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "REST API: a connection could not be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        closing.send_replace(true);
        let all = u32::try_from(MOST_CONNECTIONS).unwrap_or(u32::MAX);
        let _ = tokio::time::timeout(DRAIN_LIMIT, slots.acquire_many(all)).await;
    }
}

/// Takes the permit first, so that what can't be served stays in the kernel's queue.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> (Option<OwnedSemaphorePermit>, io::Result<(TcpStream, SocketAddr)>) {
    // The semaphore is never closed.
    let permit = slots.clone().acquire_owned().await.ok();
    (permit, listener.accept().await)
}

async fn connection<D: Dcs, P: Observe, C: Clock>(
    api: Arc<Api<D, P, C>>,
    stream: TcpStream,
    from: SocketAddr,
    _permit: Option<OwnedSemaphorePermit>,
    closing: watch::Receiver<bool>,
) {
    if let Err(error) = tune(&stream) {
        tracing::debug!(%from, %error, "REST API: socket options");
    }
    let tls = api.policy.borrow().tls.clone();
    let Some(config) = tls else {
        return serve(api, stream, Caller { address: from, certificate: false }, closing).await;
    };
    match tokio::time::timeout(HANDSHAKE_LIMIT, TlsAcceptor::from(config).accept(stream)).await {
        Ok(Ok(stream)) => {
            let certificate = stream.get_ref().1.peer_certificates().is_some_and(|chain| !chain.is_empty());
            serve(api, stream, Caller { address: from, certificate }, closing).await;
        }
        Ok(Err(error)) => tracing::debug!(%from, %error, "REST API: TLS handshake"),
        Err(_) => tracing::debug!(%from, "REST API: the TLS handshake took too long"),
    }
}

async fn serve<D: Dcs, P: Observe, C: Clock>(
    api: Arc<Api<D, P, C>>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    caller: Caller,
    mut closing: watch::Receiver<bool>,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let api = api.clone();
        async move { Ok::<_, Infallible>(api.handle(caller, request.map(Body::new)).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_LIMIT)
        .max_buf_size(LARGEST_HEAD)
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        // An error means that the server is gone altogether.
        () = async { drop(closing.wait_for(|closing| *closing).await) } => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(from = %caller.address, %error, "REST API: connection");
    }
}

/// Answers at once, and notices within about 13 s that the other end is gone.
fn tune(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(3))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(3))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    Ok(())
}

/// Blocks while a host's name is looked up: at the start and at a reload only.
pub(super) fn bind(listen: &str) -> Result<std::net::TcpListener, RestError> {
    let bad = || RestError::BadAddress(listen.to_owned());
    let (host, port) = listen.rsplit_once(':').ok_or_else(bad)?;
    let port: u16 = port.trim().parse().map_err(|_| bad())?;
    let host = host.trim().trim_start_matches('[').trim_end_matches(']');
    let failed = |cause: io::Error| RestError::Listen { address: listen.to_owned(), remedy: remedy(&cause), cause };
    let addresses: Vec<SocketAddr> = match host {
        // IPv6's wildcard takes IPv4 too; where there is no IPv6, IPv4's does.
        "" | "*" => vec![(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()],
        host => (host, port).to_socket_addrs().map_err(failed)?.collect(),
    };
    let listener = std::net::TcpListener::bind(addresses.as_slice()).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

fn remedy(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::AddrInUse => "another program has this port: stop it, or choose another port in restapi.listen",
        io::ErrorKind::AddrNotAvailable => "this host has no such address: use one of its own, or *",
        io::ErrorKind::PermissionDenied => "ports below 1024 need privileges: choose a higher one in restapi.listen",
        _ => "set restapi.listen to an address of this host",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_named_with_its_remedy() {
        let taken = bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let holder = TcpListener::bind(taken).await.unwrap();
        let text = bind(&taken.to_string()).unwrap_err().to_string();
        assert!(text.contains(&taken.to_string()) && text.contains("another program has this port"), "{text}");
        drop(holder);
    }

    #[test]
    fn addresses() {
        for listen in ["*:0", ":0", "localhost:0", "127.0.0.1:0"] {
            assert!(bind(listen).is_ok(), "{listen}");
        }
        for listen in ["127.0.0.1", "x:y", "", "127.0.0.1:70000"] {
            assert!(matches!(bind(listen), Err(RestError::BadAddress(_))), "{listen}");
        }
        assert!(matches!(bind("203.0.113.77:0"), Err(RestError::Listen { .. })));
    }
}
