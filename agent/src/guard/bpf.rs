//! A program in the kernel that lets packets out of a cgroup until a time, by bpf(2).
//!
//! It needs Linux 5.8 and CAP_BPF with CAP_NET_ADMIN. The program stays attached as long as the cgroup, or a socket that
//! was made in it, exists: longer than any process of ours.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags};
use trunkline_common::Instant;

const MAP_CREATE: libc::c_long = 0;
const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;

const MAP_TYPE_ARRAY: u32 = 2;
const F_MMAPABLE: u32 = 1 << 10;
const PROG_TYPE_CGROUP_SKB: u32 = 8;
const CGROUP_INET_EGRESS: u32 = 1;
/// `bpf_ktime_get_boot_ns`
const KTIME_GET_BOOT_NS: i32 = 125;
const PSEUDO_MAP_VALUE: u8 = 2;

/// No end.
const OPEN: u64 = u64::MAX;

const PAGE: usize = 4096;

/// What lets the packets of one cgroup's sockets out, until a time. Moving it is one store.
#[derive(Debug)]
pub(super) struct Gate {
    until: NonNull<AtomicU64>,
}

// SAFETY: it points to an atomic in a mapping that is this gate's alone and lives as long.
#[allow(unsafe_code)]
unsafe impl Send for Gate {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Gate {}

impl Gate {
    /// A gate for the cgroup `dir`, in the place of the one that it has, if any. [`Gate::set`] says what `until` is.
    pub fn attach(dir: &Path, until: Option<Instant>) -> io::Result<Self> {
        let said =
            |what: &'static str| move |error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
        let cgroup = File::open(dir)?;
        let map = create_map().map_err(said("no BPF map"))?;
        let gate = Self { until: map_value(&map)? };
        gate.set(until);
        let program = load_program(&map).map_err(said("the BPF program can't be loaded"))?;
        // Exclusive, so that a new one replaces the old one in one step; those of parents are run beside it.
        let attach = Attach {
            target_fd: cgroup.as_raw_fd(),
            attach_bpf_fd: program.as_raw_fd(),
            attach_type: CGROUP_INET_EGRESS,
            ..Attach::default()
        };
        bpf(PROG_ATTACH, &attach).map_err(said("the BPF program can't be attached"))?;
        Ok(gate)
    }

    /// Shut from `until` on; `None`: open.
    pub fn set(&self, until: Option<Instant>) {
        let nanos = until.map(|until| u64::try_from(until.since_boot().as_nanos()).unwrap_or(OPEN));
        self.word().store(nanos.unwrap_or(OPEN), Ordering::SeqCst);
    }

    /// Whether it is shut at `now`.
    pub fn is_shut(&self, now: Instant) -> bool {
        u128::from(self.word().load(Ordering::SeqCst)) <= now.since_boot().as_nanos()
    }

    #[allow(unsafe_code)]
    fn word(&self) -> &AtomicU64 {
        // SAFETY: mapped as long as self lives, aligned, and only accessed by atomics.
        unsafe { self.until.as_ref() }
    }
}

impl Drop for Gate {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the mapping was made for this gate, and nobody else has its address.
        let _ = unsafe { rustix::mm::munmap(self.until.as_ptr().cast(), PAGE) };
    }
}

fn create_map() -> io::Result<OwnedFd> {
    let attributes =
        MapCreate { map_type: MAP_TYPE_ARRAY, key_size: 4, value_size: 8, max_entries: 1, map_flags: F_MMAPABLE };
    bpf_fd(MAP_CREATE, &attributes)
}

#[allow(unsafe_code)]
fn map_value(map: &OwnedFd) -> io::Result<NonNull<AtomicU64>> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping of an array map, whose memory is at least a page and never shrinks.
    let page = unsafe { rustix::mm::mmap(std::ptr::null_mut(), PAGE, access, MapFlags::SHARED, map.as_fd(), 0)? };
    NonNull::new(page.cast()).ok_or_else(|| io::Error::other("mapped to nowhere"))
}

/// `bpf_ktime_get_boot_ns() < *map ? pass : drop`
fn load_program(map: &OwnedFd) -> io::Result<OwnedFd> {
    const CALL: u8 = 0x85;
    const MOV_X: u8 = 0xbf;
    const MOV_K: u8 = 0xb7;
    const LOAD_IMM64: u8 = 0x18;
    const LOAD_U64: u8 = 0x79;
    const JUMP_IF_LESS: u8 = 0xad;
    const EXIT: u8 = 0x95;
    let code = [
        op(CALL, 0, 0, 0, KTIME_GET_BOOT_NS),
        op(MOV_X, 6, 0, 0, 0),
        op(LOAD_IMM64, 1, PSEUDO_MAP_VALUE, 0, map.as_raw_fd()),
        op(0, 0, 0, 0, 0),
        op(LOAD_U64, 1, 1, 0, 0),
        op(MOV_K, 0, 0, 0, 1),
        op(JUMP_IF_LESS, 6, 1, 1, 0),
        op(MOV_K, 0, 0, 0, 0),
        op(EXIT, 0, 0, 0, 0),
    ];
    let license = c"Dual MIT/GPL";
    let attributes = ProgLoad {
        prog_type: PROG_TYPE_CGROUP_SKB,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        prog_name: *b"trunkline_fence\0",
        expected_attach_type: CGROUP_INET_EGRESS,
        ..ProgLoad::default()
    };
    bpf_fd(PROG_LOAD, &attributes)
}

/// One instruction as the kernel reads it.
fn op(code: u8, to: u8, from: u8, offset: i16, value: i32) -> [u8; 8] {
    let ([o0, o1], [v0, v1, v2, v3]) = (offset.to_ne_bytes(), value.to_ne_bytes());
    let registers = if cfg!(target_endian = "little") { to | from << 4 } else { to << 4 | from };
    [code, registers, o0, o1, v0, v1, v2, v3]
}

// Prefixes of the kernel's `union bpf_attr`; what is not given is zero.

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct Attach {
    target_fd: i32,
    attach_bpf_fd: i32,
    attach_type: u32,
    attach_flags: u32,
}

#[allow(unsafe_code)]
fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads as many bytes as it is told, of a structure without padding; what it points to outlives
    // the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[allow(unsafe_code)]
fn bpf_fd<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it (close-on-exec, as all of bpf(2)'s) and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use trunkline_common::{Clock, SystemClock};

    use super::super::cgroup::{self, Place};
    use super::*;

    /// A program in the cgroup sends all the time; the last byte comes before the deadline, and moving that lets it go on.
    /// What was held back is never let out to a gate that is taken away with its cgroup.
    #[test]
    #[allow(unsafe_code)]
    fn nothing_leaves_after_the_deadline() {
        let dir = tempfile::tempdir().expect("temp dir");
        let made = Place::find(dir.path()).and_then(|place| {
            let cgroup = place.create()?;
            Ok((Gate::attach(&cgroup, None)?, cgroup))
        });
        let (gate, cgroup) = match made {
            Ok(made) => made,
            Err(error) => return println!("SKIPPED: an egress fence: {error}"),
        };
        let listener = TcpListener::bind("127.0.0.1:0").expect("listens");
        let port = listener.local_addr().expect("address").port();
        let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port}; while :; do echo x >&3; sleep 0.002; done");
        let mut command = Command::new("bash");
        command.args(["-c", &script]).stderr(Stdio::null());
        let door = cgroup::door(&cgroup).expect("door");
        // SAFETY: one system call between fork and exec.
        unsafe { command.pre_exec(move || Ok(rustix::io::write(&door, b"0").map(drop)?)) };
        let mut sender = command.spawn().expect("bash");
        let (mut stream, _) = listener.accept().expect("connects");
        stream.set_read_timeout(Some(Duration::from_millis(700))).expect("timeout");
        let mut last_within = |limit: Duration| {
            let (mut last, end) = (None, SystemClock.now() + limit);
            while SystemClock.now() < end && stream.read(&mut [0; 64]).is_ok_and(|read| read > 0) {
                last = Some(SystemClock.now());
            }
            last
        };

        assert!(last_within(Duration::from_millis(100)).is_some(), "it is open");
        let until = SystemClock.now() + Duration::from_millis(200);
        gate.set(Some(until));
        let last = last_within(Duration::from_secs(1)).expect("open until then");
        // Read a moment after it was sent.
        assert!(last < until + Duration::from_millis(100), "{:?} after the deadline", last.since(until));
        assert!(gate.is_shut(SystemClock.now()));
        println!("the last byte came {:?} before the deadline", until.since(last));
        gate.set(Some(SystemClock.now() + Duration::from_secs(3)));
        assert!(last_within(Duration::from_secs(2)).is_some(), "the deadline was moved");

        gate.set(Some(SystemClock.now()));
        std::thread::sleep(Duration::from_millis(50));
        sender.kill().and_then(|()| sender.wait()).expect("ends");
        // Its `sleep` may be there for a moment.
        let limit = SystemClock.now() + Duration::from_secs(10);
        while let Err(error) = std::fs::remove_dir(&cgroup) {
            assert!(SystemClock.now() < limit, "{}: {error}", cgroup.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(gate);
        last_within(Duration::from_millis(100));
        assert_eq!(last_within(Duration::from_millis(2500)), None, "a dead sender's bytes came through");
    }
}
