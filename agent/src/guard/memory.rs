//! The page that the agent and its guard share.
//!
//! It is memory without a file, so neither of them ever waits for a disk or for the other; it lives as long as one of them
//! does. An agent that starts finds the page of its predecessor through the guard that is still there.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use trunkline_common::Instant;

/// The memory's name, as `/proc/<pid>/fd` shows it.
pub(super) const NAME: &str = "trunkline-guard";

const SIZE: usize = 4096;

/// Tells this layout from others: raised with every change of it.
const MAGIC: u64 = u64::from_be_bytes(*b"trunkG01");

/// The words in it. Times are nanoseconds of the boot-time clock; 0 = none.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Memory {
    magic: AtomicU64,
    kill_at: AtomicU64,
    /// The pid of the guard that came up last.
    ready: AtomicU64,
    next_look: AtomicU64,
    kills: AtomicU64,
    /// Since the first layout; an earlier guard leaves it alone.
    address_until: AtomicU64,
}

impl Memory {
    /// A new page, with nothing to guard.
    pub fn create() -> io::Result<(OwnedFd, &'static Memory)> {
        let fd = rustix::fs::memfd_create(NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, SIZE as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let memory = map(&fd)?;
        memory.magic.store(MAGIC, Ordering::SeqCst);
        Ok((fd, memory))
    }

    /// A page that somebody else has made.
    pub fn open(fd: impl AsFd) -> io::Result<&'static Memory> {
        // Memory that can shrink would end whoever reads it.
        let sealed = rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK);
        if !sealed || rustix::fs::fstat(&fd)?.st_size < SIZE as i64 {
            return Err(io::Error::other("not the memory of a guard"));
        }
        let memory = map(fd)?;
        match memory.magic.load(Ordering::SeqCst) {
            MAGIC => Ok(memory),
            _ => Err(io::Error::other("the memory of another version's guard")),
        }
    }

    /// When the server has to be killed.
    pub fn kill_at(&self) -> Option<Instant> {
        time(&self.kill_at)
    }

    /// Sets when, and returns what it was.
    pub fn set_kill_at(&self, at: Option<Instant>) -> Option<Instant> {
        instant(self.kill_at.swap(at.map_or(0, nanos), Ordering::SeqCst))
    }

    /// The guard `pid` is up.
    pub fn set_ready(&self, pid: u32) {
        self.ready.store(pid.into(), Ordering::SeqCst);
    }

    /// Which guard came up last.
    pub fn ready(&self) -> u64 {
        self.ready.load(Ordering::SeqCst)
    }

    /// The guard sleeps until then.
    pub fn set_next_look(&self, at: Option<Instant>) {
        self.next_look.store(at.map_or(0, nanos), Ordering::SeqCst);
    }

    /// Until when the guard sleeps.
    pub fn next_look(&self) -> Option<Instant> {
        time(&self.next_look)
    }

    /// Until when the leader's address may be held here.
    pub fn address_until(&self) -> Option<Instant> {
        time(&self.address_until)
    }

    /// Sets until when, and returns what it was.
    pub fn set_address_until(&self, at: Option<Instant>) -> Option<Instant> {
        instant(self.address_until.swap(at.map_or(0, nanos), Ordering::SeqCst))
    }

    /// The address was given up because that time was over: there is none any more, unless it has been moved meanwhile.
    pub fn end_address(&self, at: Instant) {
        let _ = self.address_until.compare_exchange(nanos(at), 0, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// A deadline was met by killing what was still there.
    pub fn count_kill(&self) {
        self.kills.fetch_add(1, Ordering::SeqCst);
    }

    /// How often.
    pub fn kills(&self) -> u64 {
        self.kills.load(Ordering::SeqCst)
    }
}

/// Never unmapped: one page for each process's life.
#[allow(unsafe_code)]
fn map(fd: impl AsFd) -> io::Result<&'static Memory> {
    // SAFETY: a new mapping, of a file that is as long and can't shrink; it stays until the process ends. All access is
    // by atomics, for which any bytes are valid, and a page is aligned for them.
    unsafe {
        let page =
            rustix::mm::mmap(std::ptr::null_mut(), SIZE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)?;
        Ok(&*page.cast::<Memory>())
    }
}

fn time(word: &AtomicU64) -> Option<Instant> {
    instant(word.load(Ordering::SeqCst))
}

fn instant(nanos: u64) -> Option<Instant> {
    (nanos != 0).then(|| Instant::from_boot(Duration::from_nanos(nanos)))
}

/// A time as a word, never 0.
fn nanos(at: Instant) -> u64 {
    u64::try_from(at.since_boot().as_nanos()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_see_the_same_deadline() {
        let (fd, ours) = Memory::create().expect("memfd");
        let theirs = Memory::open(&fd).expect("opens");
        assert_eq!(theirs.kill_at(), None);
        let at = Instant::from_boot(Duration::from_millis(1234));
        assert_eq!(ours.set_kill_at(Some(at)), None);
        assert_eq!(theirs.kill_at(), Some(at));
        assert_eq!(theirs.set_kill_at(None), Some(at));
        assert_eq!(ours.kill_at(), None);
    }

    #[test]
    fn strange_memory_is_refused() {
        let open = rustix::fs::memfd_create(NAME, MemfdFlags::ALLOW_SEALING).expect("memfd");
        rustix::fs::ftruncate(&open, SIZE as u64).expect("grows");
        assert!(Memory::open(&open).is_err(), "it can shrink");
        rustix::fs::fcntl_add_seals(&open, SealFlags::SHRINK).expect("seals");
        assert!(Memory::open(&open).is_err(), "another layout");
        assert!(Memory::open(std::fs::File::open("/dev/null").expect("opens")).is_err());
    }
}
