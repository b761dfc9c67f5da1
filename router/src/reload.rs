//! A changed configuration file, in force without a restart: ports and limits, and the certificates that ports name. A wrong
//! one is refused whole, and tried again: what was missing may be there by then, a certificate as well as an address.
//!
//! All this has a thread of its own: a file system that hangs keeps nobody else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use std::{fs, io};

use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};
use trunkline_common::Clock;
use trunkline_config::router::Port;
use trunkline_config::{Env, Errors, Notice, RouterConfig};

use crate::listeners::{Inherited, Listeners};
use crate::router::Router;

/// How often the file is looked at. By its attributes, which works in every file system and through every symbolic link.
const PAUSE: Duration = Duration::from_secs(1);

/// What comes of reading a file.
pub type Read = Result<(RouterConfig, Vec<Notice>), Errors>;

/// A configuration in force, and where it came from.
#[derive(Debug)]
pub struct Reloader {
    /// The router.
    pub router: Arc<Router>,
    /// Its sockets.
    pub listeners: Arc<Listeners>,
    /// The file or directory.
    pub path: Option<PathBuf>,
    /// What is in force.
    pub config: RouterConfig,
}

impl Reloader {
    /// Reloads at SIGHUP and when a file has changed, until the router drains.
    ///
    /// # Errors
    /// There is no thread for that.
    pub fn start(self) -> io::Result<()> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("reload".into()).spawn(move || runtime.block_on(self.run())).map(drop)
    }

    async fn run(mut self) {
        let mut hup = match signal(SignalKind::hangup()) {
            Ok(hup) => hup,
            Err(error) => return error!(%error, "SIGHUP can't be handled"),
        };
        let mut seen = self.marks();
        loop {
            let clock = self.router.clock;
            let mut again = false;
            tokio::select! {
                _ = hup.recv() => {}
                () = self.router.drain_begun() => return,
                () = clock.sleep_until(clock.now() + PAUSE) => {
                    again = self.marks() == seen;
                    if again && self.router.config_trouble().is_none() {
                        continue;
                    }
                    if !again {
                        // What is still being written is read when it has been the same for a while.
                        clock.sleep_until(clock.now() + PAUSE / 10).await;
                    }
                }
            }
            seen = self.marks();
            self.reload(RouterConfig::load(self.path.as_deref(), &Env::of_process()), again);
        }
    }

    /// Puts what was read in force, or says why not; but not `again`, if it is refused for the same reason as the last time.
    pub fn reload(&mut self, read: Read, again: bool) {
        let (notices, result) = match read {
            Ok((config, notices)) => (notices, self.apply(config).map_err(|error| error.to_string())),
            Err(errors) => (Vec::new(), Err(errors.to_string())),
        };
        let trouble = result.clone().err();
        if again && trouble.is_some() && trouble == self.router.config_trouble() {
            return;
        }
        notices.iter().for_each(|notice| warn!("{notice}"));
        match &result {
            Ok("applied") => info!("the changed configuration is in force"),
            Ok(_) => info!("the configuration has not changed"),
            Err(trouble) => {
                trouble.lines().for_each(|problem| error!("{problem}"));
                error!("the changed configuration is refused; the one before stays in force");
            }
        }
        self.router.metrics.reloads.with_label_values(&[result.unwrap_or("refused")]).inc();
        self.router.set_config_trouble(trouble);
    }

    fn apply(&mut self, config: RouterConfig) -> io::Result<&'static str> {
        let for_a_restart = needs_restart(&self.config, &config);
        let same = (&self.config.ports, &self.config.limits) == (&config.ports, &config.limits);
        // The same names of certificates may stand for other certificates.
        let unchanged = same && !config.ports.iter().any(Port::speaks_tls);
        if !unchanged {
            self.listeners.apply(&config.ports, Inherited::new())?;
            self.router.set_limits(config.limits);
            (self.config.ports, self.config.limits) = (config.ports, config.limits);
        }
        if !for_a_restart.is_empty() {
            warn!(keys = for_a_restart.join(", "), "these take effect at the next start");
        }
        Ok(if unchanged { "unchanged" } else { "applied" })
    }

    /// What tells a changed file from the one that was read.
    fn marks(&self) -> BTreeMap<PathBuf, Mark> {
        let files = self.config.ports.iter().flat_map(Port::tls_files);
        self.path.clone().into_iter().chain(files).flat_map(|path| marks(&path)).collect()
    }
}

/// Sections that differ and are read at the start only.
fn needs_restart(before: &RouterConfig, after: &RouterConfig) -> Vec<&'static str> {
    let changed = [
        ("scope", before.scope != after.scope),
        ("namespace", before.namespace != after.namespace),
        ("etcd3", before.etcd != after.etcd),
        ("ctl", before.ctl != after.ctl),
        ("members", before.members != after.members),
        ("admin", before.admin != after.admin),
        ("threads", before.threads != after.threads),
        ("settle_after", before.settle_after != after.settle_after),
        ("log", before.log != after.log),
    ];
    changed.into_iter().filter(|(_, changed)| *changed).map(|(key, _)| key).collect()
}

/// Inode, length and time of change of a file.
type Mark = (u64, u64, Option<SystemTime>);

/// Of the file, or of every file of the directory.
fn marks(path: &Path) -> BTreeMap<PathBuf, Mark> {
    use std::os::unix::fs::MetadataExt;
    let mark = |path: PathBuf| {
        let found = fs::metadata(&path).ok()?;
        let mark = (found.ino(), found.len(), found.modified().ok());
        Some((path, mark))
    };
    let inside = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    inside.chain([path.to_owned()]).filter_map(mark).collect()
}

#[cfg(test)]
mod tests {
    use trunkline_config::router::{Limits, Listen, Target};

    use super::*;
    use crate::socket::Address;

    fn load(text: &str) -> Read {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("router.yml");
        fs::write(&file, format!("scope: s\netcd3: {{hosts: 'h:1'}}\n{text}")).unwrap();
        RouterConfig::load(Some(&file), &Env::default())
    }

    /// With a port `a`, at an address that the kernel chooses.
    fn reloader() -> Reloader {
        let router = Router::new(Limits::default()).unwrap();
        let (listeners, threads) = Listeners::new(router.clone(), 2);
        std::mem::forget(threads);
        let (mut config, _) = load("").unwrap();
        config.ports = vec![Port::new("a", Listen::Tcp("127.0.0.1:0".into()), Target::Leader)];
        listeners.apply(&config.ports, Inherited::new()).unwrap();
        Reloader { router, listeners: Arc::new(listeners), path: None, config }
    }

    fn free_port() -> u16 {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    fn listening(reloader: &Reloader) -> Vec<(String, u16)> {
        let port = |(name, address): (Arc<str>, Address)| match address {
            Address::Tcp(address) => (name.to_string(), address.port()),
            Address::Unix(_) => (name.to_string(), 0),
        };
        reloader.listeners.addresses().into_iter().map(port).collect()
    }

    #[test]
    fn ports_come_go_and_change_their_names() {
        let mut reloader = reloader();
        let (one, two) = (free_port(), free_port());
        let ports = |a: &str, b: &str| {
            format!(
                "ports:\n- {{name: {a}, listen: '127.0.0.1:{one}', target: leader}}\n- {{name: {b}, listen: '127.0.0.1:{two}', target: any}}\n"
            )
        };
        reloader.reload(load(&format!("{}limits: {{max_held: 7}}", ports("a", "b"))), false);
        assert_eq!(reloader.router.limits().max_held, 7);
        let mut expected = vec![("a".to_owned(), one), ("b".to_owned(), two)];
        expected.sort_by_key(|(_, port)| port.to_string());
        let sorted = |reloader: &Reloader| {
            let mut found = listening(reloader);
            found.sort_by_key(|(_, port)| port.to_string());
            found
        };
        assert_eq!(sorted(&reloader), expected);
        // The names change places: the sockets stay.
        reloader.reload(load(&ports("b", "a")), false);
        expected.iter_mut().for_each(|(name, _)| *name = if name == "a" { "b".into() } else { "a".into() });
        assert_eq!(sorted(&reloader), expected);
        reloader.reload(load(&format!("ports: [{{name: c, listen: '127.0.0.1:{one}', target: sync}}]")), false);
        assert_eq!(listening(&reloader), [("c".to_owned(), one)]);
        assert_eq!(reloader.router.ports().len(), 1);
        assert!(reloader.router.config_trouble().is_none());
    }

    #[test]
    fn an_address_may_be_written_otherwise_become_wider_and_narrower() {
        let mut reloader = reloader();
        reloader.listeners.begin().unwrap();
        let port = free_port();
        for (written, meant) in [
            (format!("*:{port}"), format!("0.0.0.0:{port}")),
            (format!("0.0.0.0:{port}"), format!("0.0.0.0:{port}")),
            (format!("127.0.0.1:{port}"), format!("127.0.0.1:{port}")),
            (format!("*:{port}"), format!("0.0.0.0:{port}")),
        ] {
            reloader.reload(load(&format!("ports: [{{name: a, listen: '{written}', target: any}}]")), false);
            assert_eq!(reloader.router.config_trouble(), None, "{written}");
            let addresses = reloader.listeners.addresses();
            assert_eq!(addresses, [("a".into(), Address::Tcp(meant.parse().unwrap()))]);
            assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(), "{written}");
        }
        let twice = format!(
            "ports: [{{name: a, listen: '*:{port}', target: any}}, {{name: b, listen: '0.0.0.0:{port}', target: leader}}]"
        );
        reloader.reload(load(&twice), false);
        assert!(reloader.router.config_trouble().unwrap().contains("of port 'a'"));
    }

    #[test]
    fn what_is_wrong_is_refused_whole() {
        let mut reloader = reloader();
        let before = (listening(&reloader), reloader.config.clone());
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = taken.local_addr().unwrap();
        let free = free_port();
        for text in [
            "ports: [{name: a, listen: '127.0.0.1:1', target: nobody}]\nlimits: {max_held: 7}".to_owned(),
            format!(
                "ports: [{{name: a, listen: ['127.0.0.1:{free}', '{taken}'], target: any}}]\nlimits: {{max_held: 7}}"
            ),
        ] {
            let read = load(&text);
            for again in [false, true, true] {
                reloader.reload(read.clone(), again);
            }
            assert_eq!((listening(&reloader), reloader.config.clone()), before, "{text}");
            assert_eq!(reloader.router.limits(), Limits::default());
            assert!(reloader.router.config_trouble().is_some());
            assert!(std::net::TcpListener::bind(("127.0.0.1", free)).is_ok(), "nothing is left open");
        }
        let refused = reloader.router.metrics.reloads.with_label_values(&["refused"]);
        assert_eq!(refused.get(), 2, "each of them was told once");
    }

    #[test]
    fn what_needs_a_restart_is_named() {
        let (before, _) = load("").unwrap();
        let (after, _) = load("threads: 3\nnamespace: n\nadmin: 'h:1'").unwrap();
        assert_eq!(needs_restart(&before, &after), ["namespace", "admin", "threads"]);
        assert!(needs_restart(&before, &before.clone()).is_empty());
    }

    #[test]
    fn files_are_known_by_their_marks() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yml");
        fs::write(&file, "1").unwrap();
        let (of_file, of_dir) = (marks(&file), marks(dir.path()));
        assert_eq!((of_file.len(), of_dir.len()), (1, 2));
        fs::write(dir.path().join("new"), "2").unwrap();
        fs::rename(dir.path().join("new"), &file).unwrap();
        assert_ne!(marks(&file), of_file);
        assert_ne!(marks(dir.path()), of_dir);
        assert!(marks(Path::new("/nowhere")).is_empty());
    }
}
