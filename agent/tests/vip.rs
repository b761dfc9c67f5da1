//! The leader's address on real interfaces, in a network namespace of its own. Needs root.

use std::num::NonZeroU32;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType};
use trunkline_agent::guard::vip::{Holder, Vip};
use trunkline_common::{Clock, SystemClock};
use trunkline_config::local;

/// Whether this is the process inside of the namespace; else runs this very test there. None: not root.
fn inside(test: &str) -> Option<bool> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: addresses of a network of its own take root");
        return None;
    }
    if std::env::var_os("TRUNKLINE_TEST_INSIDE").is_some() {
        return Some(true);
    }
    let own = std::env::current_exe().expect("this program");
    let mut command = Command::new("unshare");
    command.args(["--net", "--"]).arg(own).args([test, "--exact", "--nocapture"]).env("TRUNKLINE_TEST_INSIDE", "1");
    assert!(command.status().expect("unshare of util-linux").success());
    Some(false)
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).stderr(Stdio::inherit()).output().expect("iproute2");
    assert!(output.status.success(), "ip {arguments}");
    String::from_utf8(output.stdout).expect("text")
}

fn vip(interface: &str) -> local::Vip {
    let addresses = vec!["10.9.9.9/24".parse().expect("valid"), "fd00:9::9/64".parse().expect("valid")];
    local::Vip { addresses, interface: interface.to_owned() }
}

/// Everything that passes by, as the payload of its frame.
fn sniff(socket: &rustix::fd::OwnedFd, wanted: impl Fn(&[u8]) -> bool) -> bool {
    let give_up = SystemClock.now() + Duration::from_secs(10);
    let mut buffer = [0; 2048];
    while SystemClock.now() < give_up {
        let mut waits = [PollFd::new(socket, PollFlags::IN)];
        rustix::event::poll(&mut waits, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).expect("polled");
        let Ok((length, _)) = rustix::net::recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) else { continue };
        if wanted(&buffer[..length]) {
            return true;
        }
    }
    false
}

#[test]
fn addresses_come_are_told_and_go() {
    if inside("addresses_come_are_told_and_go") != Some(true) {
        return;
    }
    ip("link add v0 type veth peer name v1");
    ip("link set v0 up");
    ip("link set v1 up");
    let all = Protocol::from_raw(NonZeroU32::new(u32::from(3u16.to_be())).expect("not 0"));
    let socket = rustix::net::socket_with(AddressFamily::PACKET, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(all));
    let socket = socket.expect("a packet socket");
    let here = || ip("-o addr show dev v0");

    let holder = Holder::new(Vip::new(&vip("v0")));
    holder.hold(SystemClock.now() + Duration::from_secs(60));
    assert!(here().contains("10.9.9.9/24") && here().contains("fd00:9::9/64"), "{}", here());
    let tentative = here().lines().any(|line| line.contains("fd00:9::9") && line.contains("tentative"));
    assert!(!tentative, "it can be used at once: {}", here());
    assert!(
        sniff(&socket, |packet| packet.starts_with(&[0, 1, 8, 0, 6, 4, 0, 1]) && packet[14..18] == [10, 9, 9, 9]),
        "ARP"
    );
    let told = sniff(&socket, |packet| packet.len() == 72 && packet[40] == 136 && packet[55..64].ends_with(&[9]));
    assert!(told, "neighbour advertisement");

    // Every renewal; and one that somebody took away comes back.
    holder.hold(SystemClock.now() + Duration::from_secs(60));
    ip("addr del 10.9.9.9/24 dev v0");
    holder.hold(SystemClock.now() + Duration::from_secs(60));
    assert!(here().contains("10.9.9.9/24"));
    // A time that is over means nothing.
    assert!(holder.give_up() && !here().contains("10.9.9.9") && !here().contains("fd00:9::9"), "{}", here());
    assert!(holder.give_up(), "once more");
    holder.hold(SystemClock.now());
    assert!(!here().contains("10.9.9.9"));

    // What an earlier agent has left.
    ip("addr add 10.9.9.9/24 dev v0");
    assert!(Holder::new(Vip::new(&vip("v0"))).give_up() && !here().contains("10.9.9.9"));
    // No interface, no address.
    let nowhere = Vip::new(&vip("nowhere"));
    assert!(nowhere.add().is_err());
    assert!(!nowhere.remove().expect("there is none"));
}
