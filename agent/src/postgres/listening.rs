//! Where the local server listens. PostgreSQL takes port and addresses when it starts: between an edit and the restart it
//! listens as it was started, and that is where this node, its members and the routers go.

use std::path::Path;

use trunkline_config::{PostgresConfig, address};

use super::pidfile::PidFile;

/// What a server was started with, or would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listening {
    /// The TCP port, which a unix socket has in its name.
    pub port: u16,
    /// As `listen_addresses` has them.
    addresses: Vec<String>,
    /// The directory of its unix socket.
    socket_dir: String,
}

impl Listening {
    /// The server behind `pid_file`; without one, that of the next start.
    pub fn of(config: &PostgresConfig, pid_file: Option<&PidFile>) -> Self {
        let socket_dir = pid_file.and_then(|file| file.socket_dir.clone());
        let port = pid_file.map(|file| file.port).filter(|port| *port != 0).unwrap_or(config.port);
        // The pid file has the first address only.
        let started_with = pid_file.and_then(|file| given(&config.data_dir).or_else(|| file.address.clone()));
        let addresses = started_with.unwrap_or_else(|| config.listen_addresses.clone());
        Self { port, addresses: list(&addresses), socket_dir: socket_dir.unwrap_or_else(|| configured_socket(config)) }
    }

    /// Where local connections go: a socket directory (with a leading slash), if `unix` says so, or an address (config
    /// reference §5).
    pub fn local_host(&self, unix: bool) -> String {
        if unix {
            return self.socket_dir.clone();
        }
        for (address, local) in [("*", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")] {
            if self.addresses.iter().any(|listed| listed == address) {
                return local.to_owned();
            }
        }
        if self.addresses.iter().any(|listed| listed == "localhost") {
            return "localhost".to_owned();
        }
        self.addresses.first().map_or_else(|| "127.0.0.1".to_owned(), Clone::clone)
    }

    /// Where others reach this server: `connect_address`, as far as it is not about where only the next one will listen. A port or
    /// an address of a forwarding host stays.
    pub fn connect_address(&self, config: &PostgresConfig) -> String {
        let Ok((host, port)) = address::split(&config.connect_address, Some(config.port)) else {
            return config.connect_address.clone();
        };
        let port = if port == config.port { self.port } else { port };
        let next_only = list(&config.listen_addresses).contains(&host) && !self.takes(&host);
        let host = self.addresses.first().filter(|_| next_only).unwrap_or(&host);
        address::join(host, port)
    }

    /// Whether it listens on this address, as far as the list tells.
    fn takes(&self, host: &str) -> bool {
        self.addresses.iter().any(|listed| listed == host || ["*", "0.0.0.0", "::"].contains(&listed.as_str()))
    }
}

/// `listen_addresses` on the command line of the server that was started last, which it has written into its directory.
fn given(data_dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(data_dir.join("postmaster.opts")).ok()?;
    text.rsplit_once("\"--listen_addresses=")?.1.split('"').next().map(str::to_owned)
}

fn list(addresses: &str) -> Vec<String> {
    addresses.split(',').map(str::trim).filter(|address| !address.is_empty()).map(str::to_owned).collect()
}

fn configured_socket(config: &PostgresConfig) -> String {
    let configured = config.parameters.get("unix_socket_directories");
    let absolute = |dirs: &String| dirs.split(',').map(str::trim).find(|dir| dir.starts_with('/')).map(str::to_owned);
    configured.and_then(absolute).unwrap_or_else(|| "/var/run/postgresql".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::testing::config;
    use super::*;

    fn running(port: u16, address: &str) -> PidFile {
        PidFile::parse(&format!("7\n/data\n1\n{port}\n/tmp\n{address}\n  1 1\nready\n")).expect("parses")
    }

    #[test]
    fn local_connections_go_where_the_server_listens() {
        let mut config = config(Path::new("/data"), 5432);
        for (listen, host) in [
            ("*", "127.0.0.1"),
            ("10.0.0.1, 0.0.0.0", "127.0.0.1"),
            ("localhost", "localhost"),
            ("10.0.0.1,::1", "10.0.0.1"),
        ] {
            config.listen_addresses = listen.into();
            assert_eq!(Listening::of(&config, None).local_host(false), host);
        }
        config.parameters.insert("unix_socket_directories".into(), "@abstract, /run/pg".into());
        assert_eq!(Listening::of(&config, None).local_host(true), "/run/pg");
        let now = Listening::of(&config, Some(&running(5431, "10.0.0.9")));
        assert_eq!((now.port, now.local_host(false), now.local_host(true)), (5431, "10.0.0.9".into(), "/tmp".into()));
    }

    #[test]
    fn the_command_line_has_every_address() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config(dir.path(), 5432);
        let opts = "/bin/postgres \"-D\" \"/data\" \"--listen_addresses=10.0.0.9,localhost\" \"--port=5432\"\n";
        std::fs::write(dir.path().join("postmaster.opts"), opts).expect("written");
        assert_eq!(Listening::of(&config, Some(&running(5432, "10.0.0.9"))).local_host(false), "localhost");
        assert_eq!(Listening::of(&config, None).local_host(false), "127.0.0.1", "that of the next start");
    }

    #[test]
    fn others_are_sent_to_the_server_that_runs() {
        let mut config = config(Path::new("/data"), 5433);
        for (was, is, connect, expected) in [
            ("10.0.0.5", "10.0.0.5", "10.0.0.5:5433", "10.0.0.5:5432"),
            ("10.0.0.5", "*", "10.0.0.5:5433", "10.0.0.5:5432"),
            ("10.0.0.5", "10.0.0.6", "10.0.0.6:5433", "10.0.0.5:5432"),
            ("*", "10.0.0.6", "10.0.0.6:5433", "10.0.0.6:5432"),
            ("fd00::5", "fd00::6", "[fd00::6]:5433", "[fd00::5]:5432"),
            ("10.0.0.5", "10.0.0.6", "db1.example.org:5433", "db1.example.org:5432"),
            ("10.0.0.5", "10.0.0.5", "192.0.2.1:15432", "192.0.2.1:15432"),
        ] {
            (config.listen_addresses, config.connect_address) = (is.into(), connect.into());
            let now = Listening::of(&config, Some(&running(5432, was)));
            assert_eq!(now.connect_address(&config), expected, "{was} -> {is}");
            assert_eq!(Listening::of(&config, None).connect_address(&config), connect);
        }
    }
}
