//! The network between hosts: one namespace each, all on one bridge, and cuts between them.
//!
//! The bridge is in this program's own namespace, so it reaches every host whatever is cut between them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Packets that don't arrive. Hosts are given by their index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Those of one host to another disappear.
    Drop {
        /// Who sends.
        from: usize,
        /// Who should receive.
        to: usize,
    },
    /// TCP of one host to another is answered with a reset.
    Refuse {
        /// Who sends.
        from: usize,
        /// Who should receive.
        to: usize,
    },
    /// All of a host disappear, those of the bridge's host too: it has no power. Its connections are reset on its side
    /// without a word to the other, so that the kernel, which is alive, does not send what was left in them later.
    Off(usize),
}

/// All hosts' namespaces.
#[derive(Debug)]
pub struct Network {
    hosts: Vec<NetworkHost>,
    cuts: BTreeMap<u64, Vec<Cut>>,
}

#[derive(Debug)]
struct NetworkHost {
    ip: Ipv4Addr,
    namespace: File,
}

impl Network {
    /// Makes a namespace for each of `hosts`, a name and an address of `10.77.0.0/24`; this program is `10.77.0.1`.
    ///
    /// # Errors
    /// `ip` is missing or fails.
    pub fn build(hosts: &[(String, Ipv4Addr)]) -> Result<Self> {
        // Names of namespaces are files here: on a file system of our own they go with us.
        std::fs::create_dir_all("/run/netns").context("/run/netns")?;
        run("mount", "-t tmpfs netns /run/netns")?;
        run("ip", "link set lo up")?;
        run("ip", "link add hub type bridge")?;
        run("ip", "addr add 10.77.0.1/24 dev hub")?;
        run("ip", "link set hub up")?;
        let made = hosts.iter().map(|(name, ip)| {
            run("ip", &format!("netns add {name}"))?;
            run("ip", &format!("link add v-{name} type veth peer name eth0 netns {name}"))?;
            run("ip", &format!("link set v-{name} master hub up"))?;
            run("ip", &format!("-n {name} addr add {ip}/24 dev eth0"))?;
            run("ip", &format!("-n {name} link set eth0 up"))?;
            run("ip", &format!("-n {name} link set lo up"))?;
            let namespace = File::open(Path::new("/run/netns").join(name)).context("a namespace that was just made")?;
            Ok(NetworkHost { ip: *ip, namespace })
        });
        Ok(Self { hosts: made.collect::<Result<_>>()?, cuts: BTreeMap::new() })
    }

    /// Runs `work` on a thread in the namespace of a host: what it starts is on that host.
    ///
    /// # Errors
    /// The namespace can't be entered, or `work` fails.
    pub fn on<T: Send>(&self, host: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = self.hosts[host].namespace.as_fd();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network)).context("entering a host")?;
                work()
            });
            thread.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked"))
        })
    }

    /// Adds cuts; `id` is for [`Network::mend`].
    ///
    /// # Errors
    /// `nft` is missing or fails.
    pub fn cut(&mut self, id: u64, cuts: Vec<Cut>) -> Result<()> {
        self.cuts.insert(id, cuts);
        self.apply()
    }

    /// Takes cuts away.
    ///
    /// # Errors
    /// `nft` fails.
    pub fn mend(&mut self, id: u64) -> Result<()> {
        self.cuts.remove(&id);
        self.apply()
    }

    /// Takes all cuts away.
    ///
    /// # Errors
    /// `nft` fails.
    pub fn mend_all(&mut self) -> Result<()> {
        self.cuts.clear();
        self.apply()
    }

    fn apply(&self) -> Result<()> {
        let cuts: Vec<Cut> = self.cuts.values().flatten().copied().collect();
        let ips: Vec<Ipv4Addr> = self.hosts.iter().map(|host| host.ip).collect();
        for host in 0..self.hosts.len() {
            let rules = rules(host, &ips, &cuts);
            self.on(host, || load(&rules))?;
        }
        Ok(())
    }
}

/// The packet filter of one host. What is dropped is dropped where it arrives. What is refused is refused where it
/// leaves: a reset from the other side would itself be cut where both directions are.
fn rules(host: usize, ips: &[Ipv4Addr], cuts: &[Cut]) -> String {
    let mut input = String::new();
    let mut output = String::new();
    for cut in cuts {
        let _ = match *cut {
            Cut::Drop { from, to } if to == host => writeln!(input, "    ip saddr {} drop", ips[from]),
            Cut::Refuse { from, to } if from == host => {
                writeln!(output, "    ip daddr {} meta l4proto tcp reject with tcp reset", ips[to])
            }
            Cut::Off(off) if off == host => {
                let _ = writeln!(input, "    iif eth0 drop");
                let _ = writeln!(output, "    oif eth0 meta l4proto tcp reject with tcp reset");
                writeln!(output, "    oif eth0 drop")
            }
            _ => Ok(()),
        };
    }
    format!(
        "table inet cuts\ndelete table inet cuts\ntable inet cuts {{\n  chain input {{\n    type filter hook input \
         priority 0\n{input}  }}\n  chain output {{\n    type filter hook output priority 0\n{output}  }}\n}}\n"
    )
}

fn load(rules: &str) -> Result<()> {
    let mut nft = Command::new("nft");
    let mut child = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().context("nft (package nftables)")?;
    child.stdin.take().context("no input")?.write_all(rules.as_bytes())?;
    let status = child.wait()?;
    ensure!(status.success(), "nft refused:\n{rules}");
    Ok(())
}

/// Runs a program to its end.
pub fn run(program: &str, arguments: &str) -> Result<()> {
    let output = Command::new(program).args(arguments.split_whitespace()).output();
    let output = output.with_context(|| format!("{program} does not start"))?;
    let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(output.status.success(), "{program} {arguments}: {error}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_where_it_arrives_and_refused_where_it_leaves() {
        let ips = [Ipv4Addr::new(10, 77, 0, 11), Ipv4Addr::new(10, 77, 0, 21)];
        let cuts = [Cut::Drop { from: 0, to: 1 }, Cut::Refuse { from: 1, to: 0 }];
        assert!(!rules(0, &ips, &cuts).contains("10.77"));
        let other = rules(1, &ips, &cuts);
        assert!(other.contains("ip saddr 10.77.0.11 drop\n"));
        assert!(other.contains("ip daddr 10.77.0.11 meta l4proto tcp reject with tcp reset\n"));
        let off = rules(1, &ips, &[Cut::Off(1)]);
        assert!(off.contains("iif eth0 drop\n") && off.contains("oif eth0 drop\n"));
    }
}
