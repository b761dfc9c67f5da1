//! Ports for servers that are started here, and perhaps stopped and started again.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Result, bail};
use rand::Rng;

/// A block of ports below the range that the kernel gives to outgoing connections, so that nobody takes the port of a
/// server while it is down. The first port of a block is held as long as the block is ours.
#[derive(Debug)]
pub struct Ports {
    claim: TcpListener,
    used: AtomicU16,
}

impl Ports {
    const FIRST: u16 = 10_000;
    const SIZE: u16 = 40;
    const BLOCKS: u16 = 500;

    /// Takes a block.
    ///
    /// # Errors
    /// Every block is somebody's.
    pub fn claim() -> Result<Self> {
        let start = rand::rng().random_range(0..Self::BLOCKS);
        let blocks = (0..Self::BLOCKS).map(|i| Self::FIRST + (start + i) % Self::BLOCKS * Self::SIZE);
        for first in blocks {
            if let Ok(claim) = TcpListener::bind((Ipv4Addr::LOCALHOST, first)) {
                return Ok(Self { claim, used: AtomicU16::new(0) });
            }
        }
        bail!("no free ports on 127.0.0.1 from {} on", Self::FIRST)
    }

    /// The next port of the block that nobody listens on.
    ///
    /// # Errors
    /// The block is used up.
    pub fn next(&self) -> Result<u16> {
        let first = self.claim.local_addr()?.port();
        loop {
            let offset = self.used.fetch_add(1, Ordering::Relaxed) + 1;
            if offset >= Self::SIZE {
                bail!("all {} ports of this lab are used", Self::SIZE);
            }
            if TcpListener::bind((Ipv4Addr::LOCALHOST, first + offset)).is_ok() {
                return Ok(first + offset);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_distinct_and_two_blocks_never_overlap() {
        let (one, two) = (Ports::claim().unwrap(), Ports::claim().unwrap());
        let ports: std::collections::BTreeSet<u16> =
            (0..8).flat_map(|_| [one.next().unwrap(), two.next().unwrap()]).collect();
        assert_eq!(ports.len(), 16);
    }
}
