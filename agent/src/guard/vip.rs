//! The leader's virtual address: added to an interface of this host and announced, and taken away again.
//!
//! The agent adds it once its server takes writes with the leader key held, and takes it away before it gives the key up. The
//! guard takes it away when its time is over: it is the same code, without a runtime, and asks the kernel directly (netlink),
//! as a program like `ip` may not start on a host that is short of memory or whose disk hangs.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{self, SocketFlags, SocketType, ipproto, sockopt};
use rustix::thread::CapabilitySet;
use tracing::{error, info, warn};
use trunkline_common::{Clock, Instant, SystemClock};
use trunkline_config::local;

/// The kernel answers at once; a bound all the same.
const ANSWER: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// When the neighbours are told, after the address was added: an announcement may get lost, or a switch not be ready for it.
const ANNOUNCEMENTS: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(1000), Duration::from_millis(3000)];

/// The addresses and where they belong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vip {
    interface: String,
    addresses: Vec<IpNet>,
}

/// An interface as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Link {
    index: u32,
    /// Its hardware address, if that is Ethernet's.
    mac: Option<[u8; 6]>,
}

impl Vip {
    /// As configured.
    pub fn new(config: &local::Vip) -> Self {
        Self { interface: config.interface.clone(), addresses: config.addresses.clone() }
    }

    /// For the command line of a guard.
    pub fn arguments(&self) -> impl Iterator<Item = String> {
        self.addresses.iter().map(|address| format!("{}={address}", self.interface))
    }

    /// The other direction; `None` without any.
    pub fn of_arguments(arguments: &[String]) -> Option<Self> {
        let pairs: Vec<_> = arguments.iter().filter_map(|argument| argument.rsplit_once('=')).collect();
        let interface = pairs.first()?.0.to_owned();
        Some(Self { interface, addresses: pairs.iter().filter_map(|(_, address)| address.parse().ok()).collect() })
    }

    /// Adds what is not there; whether there was any.
    ///
    /// # Errors
    /// No such interface, or not permitted (CAP_NET_ADMIN).
    pub fn add(&self) -> io::Result<bool> {
        let link = link(&self.interface)?;
        let mut added = false;
        for address in &self.addresses {
            let mut message = message(address, &link);
            // Nobody else has it, as the key is ours: no second of waiting for somebody who might.
            message.header.flags = AddressHeaderFlags::Nodad;
            match ask(RouteNetlinkMessage::NewAddress(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL) {
                Ok(_) => added = true,
                Err(error) if error.raw_os_error() == Some(Errno::EXIST.raw_os_error()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(added)
    }

    /// Takes away what is there; whether there was any.
    ///
    /// # Errors
    /// Not permitted. Where there is no such interface there is no address.
    pub fn remove(&self) -> io::Result<bool> {
        let link = match link(&self.interface) {
            Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => return Ok(false),
            link => link?,
        };
        let mut removed = false;
        for address in &self.addresses {
            match ask(RouteNetlinkMessage::DelAddress(message(address, &link)), NLM_F_ACK) {
                Ok(_) => removed = true,
                Err(error) if error.raw_os_error() == Some(Errno::ADDRNOTAVAIL.raw_os_error()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// Tells the neighbours that the addresses are here now: gratuitous ARP, unsolicited neighbour advertisements.
    ///
    /// # Errors
    /// No such interface, or not permitted (CAP_NET_RAW).
    pub fn announce(&self) -> io::Result<()> {
        let link = link(&self.interface)?;
        let Some(mac) = link.mac else { return Ok(()) };
        for address in &self.addresses {
            match address.addr() {
                IpAddr::V4(address) => gratuitous_arp(address, link.index, mac)?,
                IpAddr::V6(address) => unsolicited_advertisement(address, link.index, mac)?,
            }
        }
        Ok(())
    }

    fn names(&self) -> String {
        let names: Vec<String> = self.addresses.iter().map(|address| address.addr().to_string()).collect();
        format!("{} on {}", names.join(", "), self.interface)
    }
}

/// Runs `spawn` so that its child may change addresses, as far as this process may. Only for this thread.
pub fn with_capability<T>(spawn: impl FnOnce() -> T) -> T {
    let raise = |on| rustix::thread::configure_capability_in_ambient_set(CapabilitySet::NET_ADMIN, on);
    let raised = raise(true).is_ok();
    let result = spawn();
    if raised {
        let _ = raise(false);
    }
    result
}

/// The agent's side: whether the addresses are here.
#[derive(Debug)]
pub struct Holder {
    vip: Vip,
    /// `None`: not known.
    held: Mutex<Option<bool>>,
    /// The last complaint.
    complaint: Mutex<String>,
}

impl Holder {
    /// What an earlier agent has left is left where it is until something is known.
    pub fn new(vip: Vip) -> Self {
        Self { vip, held: Mutex::new(None), complaint: Mutex::default() }
    }

    /// Here until then. Called with every renewal, so what somebody has taken away by hand comes back.
    pub fn hold(&self, until: Instant) {
        let mut held = self.held.lock();
        if SystemClock.now() >= until {
            return;
        }
        *held = Some(true);
        match self.vip.add() {
            Ok(true) => {
                info!("the leader's address is here: {}", self.vip.names());
                self.announce();
            }
            Ok(false) => {}
            Err(error) => {
                self.complain(&format!("the leader's address {} could not be added: {error}", self.vip.names()))
            }
        }
        // This host may have stood still in between, and its guard have been here before.
        if SystemClock.now() >= until && self.vip.remove().is_ok() {
            *held = Some(false);
        }
    }

    /// Not here any more. False: it could not be taken away.
    pub fn give_up(&self) -> bool {
        let mut held = self.held.lock();
        if *held == Some(false) {
            return true;
        }
        match self.vip.remove() {
            Ok(removed) => {
                *held = Some(false);
                if removed {
                    info!("the leader's address is given up: {}", self.vip.names());
                }
                true
            }
            Err(error) => {
                self.complain(&format!("the leader's address {} could not be given up: {error}", self.vip.names()));
                false
            }
        }
    }

    fn complain(&self, text: &str) {
        let mut last = self.complaint.lock();
        if *last != text {
            error!("{text}");
            *last = text.to_owned();
        }
    }

    /// On a thread of its own: nobody here may wait.
    fn announce(&self) {
        let vip = self.vip.clone();
        let tell = move || {
            let mut told = Duration::ZERO;
            for at in ANNOUNCEMENTS {
                std::thread::sleep(at - told);
                told = at;
                // It may be somebody else's by now.
                if !vip.is_here().unwrap_or(false) {
                    return;
                }
                if let Err(error) = vip.announce() {
                    warn!("the neighbours could not be told of the leader's address: {error}");
                    return;
                }
            }
        };
        let started = std::thread::Builder::new().name("vip".to_owned()).stack_size(64 << 10).spawn(tell);
        if let Err(error) = started {
            warn!("the neighbours can't be told of the leader's address: {error}");
        }
    }
}

impl Vip {
    /// Whether the first of the addresses can be bound to, which only a local one can.
    fn is_here(&self) -> io::Result<bool> {
        let Some(address) = self.addresses.first() else { return Ok(false) };
        Ok(std::net::UdpSocket::bind((address.addr(), 0)).is_ok())
    }
}

fn message(address: &IpNet, link: &Link) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = if address.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = address.prefix_len();
    message.header.index = link.index;
    message.attributes = vec![AddressAttribute::Local(address.addr()), AddressAttribute::Address(address.addr())];
    message
}

fn link(interface: &str) -> io::Result<Link> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(interface.to_owned()));
    let Some(RouteNetlinkMessage::NewLink(link)) = ask(RouteNetlinkMessage::GetLink(message), 0)? else {
        return Err(io::Error::other("the kernel does not tell the interface"));
    };
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(mac) => mac.as_slice().try_into().ok(),
        _ => None,
    });
    Ok(Link { index: link.header.index, mac })
}

/// One question to the kernel's routing; its answer, if it is more than "done".
fn ask(message: RouteNetlinkMessage, flags: u16) -> io::Result<Option<RouteNetlinkMessage>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut waits = [PollFd::new(&socket, PollFlags::IN)];
    if rustix::event::poll(&mut waits, Some(&ANSWER))? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel does not answer"));
    }
    let (bytes, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
        _ => Ok(None),
    }
}

const BROADCAST: [u8; 6] = [0xff; 6];

/// ARP for Ethernet and IPv4 (RFC 826): `sender` and `target` are the same address in an announcement.
fn arp(operation: u8, address: Ipv4Addr, mac: [u8; 6]) -> [u8; 28] {
    let mut packet = [0; 28];
    packet[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation]);
    packet[8..14].copy_from_slice(&mac);
    packet[14..18].copy_from_slice(&address.octets());
    packet[18..24].copy_from_slice(&BROADCAST);
    packet[24..].copy_from_slice(&address.octets());
    packet
}

/// Some only learn from requests, some only from replies: both.
fn gratuitous_arp(address: Ipv4Addr, index: u32, mac: [u8; 6]) -> io::Result<()> {
    // Without a protocol: it receives nothing.
    let socket = net::socket_with(net::AddressFamily::PACKET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    for operation in [1, 2] {
        send_to_link(&socket, &arp(operation, address, mac), index)?;
    }
    Ok(())
}

const ETH_P_ARP: u16 = 0x0806;

/// To everybody on the link.
#[allow(unsafe_code)]
fn send_to_link(socket: &OwnedFd, packet: &[u8], index: u32) -> io::Result<()> {
    let mut sll_addr = [0; 8];
    sll_addr[..6].copy_from_slice(&BROADCAST);
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ETH_P_ARP.to_be(),
        sll_ifindex: i32::try_from(index).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr,
    };
    // SAFETY: a plain system call; buffer and address are initialised, as long as is said, and outlive it.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// RFC 4861 §4.4 with the flag "override", to all nodes. The kernel fills the checksum in.
fn advertisement(address: Ipv6Addr, mac: [u8; 6]) -> [u8; 32] {
    let mut packet = [0; 32];
    (packet[0], packet[4]) = (136, 0x20);
    packet[8..24].copy_from_slice(&address.octets());
    (packet[24], packet[25]) = (2, 1);
    packet[26..].copy_from_slice(&mac);
    packet
}

fn unsolicited_advertisement(address: Ipv6Addr, index: u32, mac: [u8; 6]) -> io::Result<()> {
    let socket =
        net::socket_with(net::AddressFamily::INET6, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::ICMPV6))?;
    // Neighbours believe nothing that may come from beyond a router.
    sockopt::set_ipv6_multicast_hops(&socket, 255)?;
    net::bind(&socket, &SocketAddrV6::new(address, 0, 0, index))?;
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    net::sendto(
        &socket,
        &advertisement(address, mac),
        net::SendFlags::empty(),
        &SocketAddrV6::new(all_nodes, 0, 0, index),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_there_and_back() {
        let addresses = vec!["10.0.0.100/24".parse().unwrap(), "fd00::9/64".parse().unwrap()];
        let vip = Vip { interface: "eth0.7".to_owned(), addresses };
        let arguments: Vec<String> = vip.arguments().collect();
        assert_eq!(arguments, ["eth0.7=10.0.0.100/24", "eth0.7=fd00::9/64"]);
        assert_eq!(Vip::of_arguments(&arguments), Some(vip));
        assert_eq!(Vip::of_arguments(&[]), None);
    }

    #[test]
    fn announcements_are_what_the_standards_say() {
        let mac = [2, 0, 0, 0, 0, 9];
        let packet = arp(1, Ipv4Addr::new(10, 0, 0, 9), mac);
        assert_eq!(packet[..8], [0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(
            (&packet[8..14], &packet[14..18], &packet[24..]),
            (&mac[..], &[10, 0, 0, 9][..], &[10, 0, 0, 9][..])
        );
        let packet = advertisement("fd00::9".parse().unwrap(), mac);
        assert_eq!((packet[0], packet[1], packet[4]), (136, 0, 0x20));
        assert_eq!((packet[8], packet[23], &packet[24..26], &packet[26..]), (0xfd, 9, &[2, 1][..], &mac[..]));
    }
}
