//! What routers send to nodes, as it is on the wire: tcpdump beside each router, read while it runs.

use std::collections::BTreeMap;
use std::io::{BufReader, Read};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};

use crate::schedule::{NODES, ROUTERS};
use crate::world::{Kind, POSTGRES_PORT, World};

/// One TCP connection of a router to a node's PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// Whose it is, from 0.
    pub router: usize,
    /// Its port on the router.
    pub port: u16,
    /// Where it goes, from 0.
    pub node: usize,
    /// When it began: microseconds of wall time, as the kernel has seen it.
    pub begun: i64,
    /// When bytes left that had not left before: the kernel's repetitions don't count.
    pub last: Option<i64>,
}

/// tcpdump at work. It ends when this is dropped.
#[derive(Debug)]
pub struct Wire {
    taps: Vec<Tap>,
}

#[derive(Debug)]
struct Tap {
    tcpdump: Child,
    reader: Option<JoinHandle<Vec<Flow>>>,
}

impl Wire {
    /// Looks at every router from now on.
    ///
    /// # Errors
    /// tcpdump can't be run.
    pub fn tap(world: &World) -> Result<Self> {
        let nodes: Vec<Ipv4Addr> =
            (0..NODES).map(|node| *world.address(Kind::Node(node), POSTGRES_PORT).ip()).collect();
        let taps = (0..ROUTERS).map(|router| {
            let ip = *world.address(Kind::Router(router), POSTGRES_PORT).ip();
            let mut command = Command::new("tcpdump");
            command.args(["-i", "eth0", "-n", "-s", "96", "-B", "8192", "-Z", "root", "-U", "-w", "-"]);
            command.arg(format!("tcp and src host {ip} and dst port {POSTGRES_PORT}"));
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
            let spawn = || command.spawn().context("tcpdump");
            let mut tcpdump = world.on(world.index(Kind::Router(router)), spawn)?;
            let output = tcpdump.stdout.take().context("tcpdump has no output")?;
            let mut flows = Flows::new(router, nodes.clone());
            let reader = std::thread::spawn(move || {
                // What is cut off is what tcpdump could not write any more: it has ended.
                let _ = read(BufReader::new(output), |at, packet| flows.see(at, packet));
                flows.all
            });
            Ok(Tap { tcpdump, reader: Some(reader) })
        });
        Ok(Self { taps: taps.collect::<Result<_>>()? })
    }

    /// Everything that was seen.
    pub fn end(mut self) -> Vec<Flow> {
        self.taps.iter_mut().flat_map(Tap::end).collect()
    }
}

impl Tap {
    fn end(&mut self) -> Vec<Flow> {
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
        self.reader.take().and_then(|reader| reader.join().ok()).unwrap_or_default()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.end();
    }
}

/// A capture file in the format of libpcap: each packet with its time, to the end.
fn read(mut file: impl Read, mut see: impl FnMut(i64, &[u8])) -> Result<()> {
    let mut head = [0; 24];
    file.read_exact(&mut head)?;
    // Microseconds, written by a machine of this byte order.
    ensure!(head[..4] == 0xa1b2_c3d4_u32.to_ne_bytes(), "not a capture file");
    let mut record = [0; 16];
    let mut packet = Vec::new();
    loop {
        file.read_exact(&mut record)?;
        let word = |at: usize| u32::from_ne_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
        ensure!(word(8) < 1 << 20, "a packet of {} bytes", word(8));
        packet.resize(word(8) as usize, 0);
        file.read_exact(&mut packet)?;
        see(i64::from(word(0)) * 1_000_000 + i64::from(word(4)), &packet);
    }
}

/// Connections, made of packets.
struct Flows {
    router: usize,
    nodes: Vec<Ipv4Addr>,
    all: Vec<Flow>,
    /// The newest of a pair of ports: where it is above, its first number, and the one after the last that was sent.
    newest: BTreeMap<(u16, Ipv4Addr), (usize, u32, u32)>,
}

impl Flows {
    fn new(router: usize, nodes: Vec<Ipv4Addr>) -> Self {
        Self { router, nodes, all: Vec::new(), newest: BTreeMap::new() }
    }

    fn see(&mut self, at: i64, packet: &[u8]) {
        let Some(segment) = Segment::of(packet) else { return };
        let Some(node) = self.nodes.iter().position(|node| *node == segment.to) else { return };
        let pair = (segment.from_port, segment.to);
        if segment.begins {
            if self.newest.get(&pair).is_none_or(|(_, first, _)| *first != segment.sequence) {
                let next = segment.sequence.wrapping_add(1);
                self.newest.insert(pair, (self.all.len(), segment.sequence, next));
                self.all.push(Flow { router: self.router, port: segment.from_port, node, begun: at, last: None });
            }
            return;
        }
        let Some((flow, _, next)) = self.newest.get_mut(&pair) else { return };
        let end = segment.sequence.wrapping_add(segment.bytes);
        if segment.bytes > 0 && end.wrapping_sub(*next) as i32 > 0 {
            *next = end;
            self.all[*flow].last = Some(at);
        }
    }
}

/// What matters of a TCP segment.
struct Segment {
    from_port: u16,
    to: Ipv4Addr,
    sequence: u32,
    bytes: u32,
    begins: bool,
}

impl Segment {
    /// Of an Ethernet frame with IPv4.
    fn of(frame: &[u8]) -> Option<Self> {
        let ip = frame.get(14..).filter(|_| frame[12..14] == [8, 0])?;
        let header = usize::from(ip.first()? & 15) * 4;
        let tcp = ip.get(header..).filter(|tcp| tcp.len() >= 20)?;
        let two = |bytes: &[u8], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let headers = header + usize::from(tcp[12] >> 4) * 4;
        Some(Self {
            from_port: two(tcp, 0),
            to: Ipv4Addr::new(ip[16], ip[17], ip[18], ip[19]),
            sequence: u32::from(two(tcp, 4)) << 16 | u32::from(two(tcp, 6)),
            bytes: u32::try_from(usize::from(two(ip, 2)).checked_sub(headers)?).ok()?,
            begins: tcp[13] & 2 != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 12);

    /// A frame with a segment of `bytes` bytes; what is in them is cut off, as in a capture.
    fn frame(port: u16, sequence: u32, flags: u8, bytes: u16) -> Vec<u8> {
        let mut frame = vec![0; 54];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[16..18].copy_from_slice(&(40 + bytes).to_be_bytes());
        frame[30..34].copy_from_slice(&NODE.octets());
        frame[34..36].copy_from_slice(&port.to_be_bytes());
        frame[38..42].copy_from_slice(&sequence.to_be_bytes());
        frame[46] = 0x50;
        frame[47] = flags;
        frame
    }

    fn seen(packets: &[(i64, Vec<u8>)]) -> Vec<Flow> {
        let mut file = [0xa1b2_c3d4_u32.to_ne_bytes().as_slice(), &[0; 20]].concat();
        for (at, packet) in packets {
            for word in [(at / 1_000_000) as u32, (at % 1_000_000) as u32, packet.len() as u32, 1500] {
                file.extend(word.to_ne_bytes());
            }
            file.extend(packet);
        }
        let mut flows = Flows::new(1, vec![Ipv4Addr::LOCALHOST, NODE]);
        assert!(read(file.as_slice(), |at, packet| flows.see(at, packet)).is_err(), "it ends with the file");
        flows.all
    }

    fn flow(port: u16, begun: i64, last: Option<i64>) -> Flow {
        Flow { router: 1, port, node: 1, begun, last }
    }

    #[test]
    fn what_is_new_counts_and_what_is_repeated_does_not() {
        let top = u32::MAX - 10;
        let packets = [
            (5_000_001, frame(700, top, 2, 0)),
            (5_000_002, frame(700, top, 2, 0)),
            (5_000_003, frame(700, top.wrapping_add(1), 16, 30)),
            (5_000_004, frame(701, 9, 2, 0)),
            (5_000_005, frame(700, top.wrapping_add(1), 16, 30)),
            (5_000_006, frame(700, top.wrapping_add(31), 16, 0)),
        ];
        assert_eq!(seen(&packets), [flow(700, 5_000_001, Some(5_000_003)), flow(701, 5_000_004, None)]);
    }

    #[test]
    fn a_port_that_is_used_again_is_another_connection() {
        let packets =
            [(1, frame(7, 50, 2, 0)), (2, frame(7, 51, 16, 1)), (3, frame(7, 4, 2, 0)), (4, frame(7, 5, 24, 1))];
        assert_eq!(seen(&packets), [flow(7, 1, Some(2)), flow(7, 3, Some(4))]);
    }

    #[test]
    fn anything_else_is_passed_over() {
        let mut short = frame(7, 50, 2, 0);
        short.truncate(40);
        let other = frame(7, 50, 2, 0).into_iter().map(|byte| byte.wrapping_add(1)).collect();
        assert_eq!(seen(&[(1, short), (2, other), (3, vec![]), (4, frame(7, 51, 16, 9))]), []);
    }
}
