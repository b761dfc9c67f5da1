//! Sockets: how the router listens, dials, and what it asks of the kernel.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::sockopt;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};
use tokio::net::{TcpSocket, TcpStream};

/// Connections the kernel completes before they are accepted; it cuts this to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// A silent server is noticed after `IDLE + PROBES × INTERVAL`, 8 seconds.
const SERVER_IDLE: Duration = Duration::from_secs(5);
const SERVER_INTERVAL: Duration = Duration::from_secs(1);
const SERVER_PROBES: u32 = 3;
/// … and so is one that does not acknowledge what it was sent. See [`forget_user_timeout`].
const SERVER_USER_TIMEOUT: Duration = Duration::from_secs(8);

/// A vanished client costs a session of the server, no data: minutes will do.
const CLIENT_IDLE: Duration = Duration::from_secs(60);
const CLIENT_INTERVAL: Duration = Duration::from_secs(10);
const CLIENT_PROBES: u32 = 6;

/// Resolves `host:port`; `*` and an empty host mean every address.
pub fn resolve(listen: &str) -> io::Result<SocketAddr> {
    let every = listen.strip_prefix("*:").or_else(|| listen.strip_prefix(':').filter(|rest| !rest.contains(':')));
    let found = match every {
        Some(port) => format!("0.0.0.0:{port}").to_socket_addrs()?.next(),
        None => listen.to_socket_addrs()?.next(),
    };
    found.ok_or_else(|| io::Error::new(io::ErrorKind::AddrNotAvailable, "no address"))
}

/// A listening socket that others may share the address with (`SO_REUSEPORT`): one per thread, and the kernel spreads the
/// connections, so that a session never changes its thread.
pub fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Fails if somebody who does not share the address has it: with `SO_REUSEPORT` alone, a second router of the same user
/// would silently take half of the connections.
pub fn check_free(address: SocketAddr) -> io::Result<()> {
    if address.port() == 0 {
        return Ok(());
    }
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    Ok(())
}

/// Opens a connection to a server, trying each address of a name in turn, all within `timeout`.
pub async fn dial(host: &str, port: u16, timeout: Duration) -> io::Result<TcpStream> {
    let attempt = async {
        let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
        for address in tokio::net::lookup_host((host, port)).await? {
            match dial_address(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    match tokio::time::timeout(timeout, attempt).await {
        Ok(outcome) => outcome,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer within connect_timeout")),
    }
}

async fn dial_address(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_nodelay(true)?;
    keepalive(&socket, SERVER_IDLE, SERVER_INTERVAL, SERVER_PROBES)?;
    sockopt::set_tcp_user_timeout(&socket, SERVER_USER_TIMEOUT.as_millis() as u32)?;
    socket.connect(address).await
}

/// Prepares an accepted connection.
pub fn tune_client(client: &TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    keepalive(client, CLIENT_IDLE, CLIENT_INTERVAL, CLIENT_PROBES)
}

fn keepalive(socket: impl std::os::fd::AsFd, idle: Duration, interval: Duration, probes: u32) -> io::Result<()> {
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, idle)?;
    sockopt::set_tcp_keepintvl(&socket, interval)?;
    sockopt::set_tcp_keepcnt(&socket, probes)?;
    Ok(())
}

/// Fills `buffer`, and takes nothing beyond it.
pub async fn read_exact(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    let mut have = 0;
    while have < buffer.len() {
        stream.readable().await?;
        match stream.try_read(&mut buffer[have..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `bytes`.
pub async fn write_all(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Turns `TCP_USER_TIMEOUT` off. Linux ends a connection by it also when the peer is alive and acknowledges every probe,
/// but with a window of zero (tcp_probe_timer; seen on 6.18): a COPY that waits for a lock would die.
pub fn forget_user_timeout(server: &TcpStream) {
    if let Err(error) = sockopt::set_tcp_user_timeout(server, 0) {
        tracing::debug!(%error, "TCP_USER_TIMEOUT can't be turned off");
    }
}

/// Ends a connection with a reset, at once and from any thread: what waits in its buffers is neither sent nor read any
/// more. (To connect a TCP socket to `AF_UNSPEC` is how Linux disconnects it.)
pub fn abort(stream: &TcpStream) {
    if rustix::net::connect_unspec(stream).is_err() {
        close_both_ways(stream);
    }
}

/// Ends both directions, whoever is reading or writing. What was written before is still delivered.
pub fn close_both_ways(stream: &TcpStream) {
    // ENOTCONN: closed already.
    let _ = rustix::net::shutdown(stream, Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_to_listen_on() {
        for (listen, expected) in [
            ("127.0.0.1:5000", "127.0.0.1:5000"),
            ("[::1]:5000", "[::1]:5000"),
            ("*:5000", "0.0.0.0:5000"),
            (":5000", "0.0.0.0:5000"),
        ] {
            assert_eq!(resolve(listen).unwrap(), expected.parse().unwrap(), "{listen}");
        }
        assert!(resolve("127.0.0.1").is_err());
    }

    #[test]
    fn a_taken_port_is_noticed_though_it_could_be_shared() {
        let taken = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = taken.local_addr().unwrap();
        assert!(check_free(address).is_err());
        assert!(listen(address).is_ok(), "threads share it");
    }
}
