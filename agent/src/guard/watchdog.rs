//! The kernel watchdog: resets the machine when nobody has proven the lease for too long.
//!
//! It is opened when there is a deadline and closed in order ("magic close") when there is none. Each renewal is one
//! keepalive, with a timeout that ends before the lease does. A device may take its time, so a thread talks to it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tracing::{info, warn};
use trunkline_common::{Clock, Instant, SystemClock};
use trunkline_config::local::{self, WatchdogDriver, WatchdogMode};

/// How long an agent that ends waits for the device to be closed in order.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// Linux's watchdog interface, or a model of it.
trait Device: Send {
    /// The machine is reset that many seconds after the last keepalive; what the device made of it.
    fn set_timeout(&mut self, seconds: i32) -> io::Result<i32>;
    /// Counts from now.
    fn keepalive(&mut self) -> io::Result<()>;
    /// Stops counting; an error where it may go on.
    fn close(self: Box<Self>) -> io::Result<()>;
}

type Open = Box<dyn Fn() -> io::Result<Box<dyn Device>> + Send>;

/// The watchdog of this machine.
#[derive(Debug)]
pub(super) struct Watchdog {
    required: bool,
    shared: Arc<Shared>,
    ended: Mutex<Receiver<()>>,
}

/// With the thread that talks to the device.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    ordered: Condvar,
}

#[derive(Debug)]
struct State {
    works: Result<(), String>,
    /// The end of the lease; `None`: nobody counts.
    until: Option<Instant>,
    /// The device has not been told that yet. Only the last word counts: it may be slow, and need none of those before.
    ordered: bool,
    ending: bool,
    /// When the keepalive that it is at has taken too long.
    slow_at: Option<Instant>,
}

impl Watchdog {
    /// By the `watchdog` section. Nothing is opened yet: that would start the clock.
    pub fn start(settings: &local::Watchdog) -> io::Result<Self> {
        let usable = match settings.mode {
            WatchdogMode::Off => Err("switched off".to_owned()),
            _ => rustix::fs::access(&settings.device, rustix::fs::Access::WRITE_OK)
                .map_err(|error| format!("{}: {}", settings.device.display(), io::Error::from(error))),
        };
        let (device, driver) = (settings.device.clone(), settings.driver);
        Self::with(settings, usable, Box::new(move || open(&device, driver)))
    }

    fn with(settings: &local::Watchdog, usable: Result<(), String>, open: Open) -> io::Result<Self> {
        let required = settings.mode == WatchdogMode::Required;
        if let (Err(why), true) = (&usable, required) {
            warn!("the watchdog is required but does not work, so this node will not lead: {why}");
        }
        let on = settings.mode != WatchdogMode::Off && (required || usable.is_ok());
        let state = State { works: usable, until: None, ordered: false, ending: false, slow_at: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), ordered: Condvar::new() });
        let (running, ended) = sync_channel::<()>(0);
        if on {
            let keeper = Keeper { open, device: None, timeout: 0, required, margin: settings.safety_margin };
            let told = shared.clone();
            let keep = move || {
                keeper.run(&told);
                drop(running);
            };
            std::thread::Builder::new().name("watchdog".to_owned()).spawn(keep)?;
        }
        Ok(Self { required, shared, ended: Mutex::new(ended) })
    }

    /// The lease lasts until then. Only a later end is a proof, and worth a keepalive.
    pub fn arm(&self, until: Instant) {
        let mut state = self.shared.state.lock();
        if state.until.is_none_or(|before| until > before) {
            state.until = Some(until);
            state.ordered = true;
            self.shared.ordered.notify_one();
        }
    }

    /// Nobody counts.
    pub fn disarm(&self) {
        let mut state = self.shared.state.lock();
        if state.until.take().is_some() {
            state.ordered = true;
            self.shared.ordered.notify_one();
        }
    }

    /// Whether it works, or why not.
    pub fn works(&self) -> Result<(), String> {
        let state = self.shared.state.lock();
        match state.slow_at {
            Some(at) if at <= SystemClock.now() => Err("it has not answered for a third of its timeout".to_owned()),
            _ => state.works.clone(),
        }
    }

    /// Whether it counts.
    pub fn is_armed(&self) -> bool {
        self.shared.state.lock().until.is_some()
    }

    /// Why this node may not lead.
    pub fn missing(&self) -> Option<String> {
        self.works().err().filter(|_| self.required)
    }

    /// The agent ends: what was ordered is done first.
    pub fn end(&self) {
        self.shared.state.lock().ending = true;
        self.shared.ordered.notify_one();
        let _ = self.ended.lock().recv_timeout(CLOSE_LIMIT);
    }
}

impl Shared {
    /// Waits for the next order; `None`: there will be none.
    fn next(&self) -> Option<Option<Instant>> {
        let mut state = self.state.lock();
        while !state.ordered {
            if state.ending {
                return None;
            }
            self.ordered.wait(&mut state);
        }
        state.ordered = false;
        Some(state.until)
    }
}

/// What the thread has.
struct Keeper {
    open: Open,
    device: Option<Box<dyn Device>>,
    timeout: i32,
    required: bool,
    margin: i64,
}

impl Keeper {
    fn run(mut self, shared: &Shared) {
        while let Some(until) = shared.next() {
            let Some(until) = until else {
                self.close();
                continue;
            };
            let now = SystemClock.now();
            let seconds = timeout(until.since(now), self.margin);
            let slow_at = now + Duration::from_secs(seconds.unsigned_abs().into()) / 3;
            shared.state.lock().slow_at = Some(slow_at);
            let works = self.keep(seconds);
            let late = SystemClock.now().since(slow_at);
            if !late.is_zero() && works.is_ok() {
                warn!("a keepalive of the watchdog took {late:.0?} longer than a third of its {seconds} s");
            }
            let mut state = shared.state.lock();
            state.slow_at = None;
            if state.works != works {
                match &works {
                    Ok(()) => info!("the watchdog resets this machine {} s after the last renewal", self.timeout),
                    Err(why) => warn!("the watchdog does not work: {why}"),
                }
                state.works = works;
            }
        }
        // Where there still is a deadline the device goes on counting, as the guard does.
    }

    /// A keepalive: the machine is reset after so many seconds without another one.
    fn keep(&mut self, seconds: i32) -> Result<(), String> {
        if seconds < 1 {
            let advice = "choose a longer ttl, or safety_margin -1 for half of ttl";
            return Err(format!("safety_margin leaves no time of the lease: {advice}"));
        }
        let fresh = self.device.is_none();
        let mut device = match self.device.take() {
            Some(device) => device,
            None => (self.open)().map_err(|error| error.to_string())?,
        };
        if fresh || seconds != self.timeout {
            let set = device.set_timeout(seconds);
            match set {
                // Renewals come ten times in a lease, and one of them may be late.
                Ok(actual) if actual.saturating_mul(3) < seconds => {
                    close(device);
                    return Err(format!(
                        "it counts {actual} s instead of {seconds}: a late renewal would reset this machine"
                    ));
                }
                Ok(actual) if actual <= seconds || !self.required => {
                    if actual > seconds {
                        warn!("the watchdog counts {actual} s instead of {seconds}: longer than the lease");
                    }
                    self.timeout = seconds;
                }
                Ok(actual) => {
                    close(device);
                    return Err(format!("it counts {actual} s instead of {seconds}, which is longer than the lease"));
                }
                Err(error) => {
                    close(device);
                    return Err(format!("its timeout can't be set: {error}"));
                }
            }
        }
        let kept = device.keepalive().map_err(|error| format!("it takes no keepalive: {error}"));
        self.device = Some(device);
        kept
    }

    fn close(&mut self) {
        if let Some(device) = self.device.take() {
            close(device);
        }
    }
}

fn close(device: Box<dyn Device>) {
    if let Err(error) = device.close() {
        warn!("the watchdog could not be closed in order, and may reset this machine: {error}");
    }
}

/// Whole seconds that end `margin` seconds before the lease, to the nearest second but never after it; -1: half of it.
fn timeout(left: Duration, margin: i64) -> i32 {
    let wanted = match u64::try_from(margin) {
        Ok(margin) => left.saturating_sub(Duration::from_secs(margin)),
        Err(_) => left / 2,
    };
    let nearest = (wanted + Duration::from_millis(500)).as_secs().min(left.as_secs());
    i32::try_from(nearest).unwrap_or(i32::MAX).min(65_534)
}

/// `/dev/watchdog`.
struct Kernel(File);

/// A pipe that tells a test what a device would be told (Patroni's `testing` driver).
struct Pipe(File);

fn open(path: &Path, driver: WatchdogDriver) -> io::Result<Box<dyn Device>> {
    let file = File::options().write(true).open(path);
    let file = file.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    Ok(match driver {
        WatchdogDriver::Kernel => Box::new(Kernel(file)),
        WatchdogDriver::Testing => Box::new(Pipe(file)),
    })
}

impl Device for Pipe {
    fn set_timeout(&mut self, seconds: i32) -> io::Result<i32> {
        self.0.write_all(format!("Ctimeout={seconds}\n").as_bytes())?;
        Ok(seconds)
    }

    fn keepalive(&mut self) -> io::Result<()> {
        self.0.write_all(b"1")
    }

    fn close(mut self: Box<Self>) -> io::Result<()> {
        self.0.write_all(b"V")
    }
}

impl Device for Kernel {
    #[allow(unsafe_code)]
    fn set_timeout(&mut self, seconds: i32) -> io::Result<i32> {
        /// `_IOWR('W', 6, int)`
        const WDIOC_SETTIMEOUT: u32 = 0xc004_5706;
        let mut value: libc::c_int = seconds;
        // SAFETY: the request reads and writes one int, which outlives the call.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), WDIOC_SETTIMEOUT as _, &raw mut value) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
    }

    fn keepalive(&mut self) -> io::Result<()> {
        self.0.write_all(b"1")
    }

    fn close(mut self: Box<Self>) -> io::Result<()> {
        // The last keepalive, too: whoever has to look after a machine that will be reset has all the time there is.
        self.0.write_all(b"V")?;
        match self.options()? & WDIOF_MAGICCLOSE {
            0 => Err(io::Error::other("its driver can't be told to stop (no magic close)")),
            _ => Ok(()),
        }
    }
}

/// A `V` before the end of the connection stops the device, unless the kernel was told to let no way out (`nowayout`).
const WDIOF_MAGICCLOSE: u32 = 0x0100;

/// `struct watchdog_info` of `linux/watchdog.h`.
#[repr(C)]
#[derive(Default)]
struct Info {
    options: u32,
    firmware_version: u32,
    identity: [u8; 32],
}

impl Kernel {
    /// What the driver can do.
    #[allow(unsafe_code)]
    fn options(&self) -> io::Result<u32> {
        /// `_IOR('W', 0, struct watchdog_info)`
        const WDIOC_GETSUPPORT: u32 = 0x8028_5700;
        let mut info = Info::default();
        // SAFETY: the request writes one `watchdog_info`, which outlives the call.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), WDIOC_GETSUPPORT as _, &raw mut info) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(info.options) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Notes what is done to it.
    struct Fake(Arc<Mutex<Vec<String>>>, std::ops::RangeInclusive<i32>);

    impl Device for Fake {
        fn set_timeout(&mut self, seconds: i32) -> io::Result<i32> {
            self.0.lock().push(format!("timeout {seconds}"));
            Ok(seconds.clamp(*self.1.start(), *self.1.end()))
        }

        fn keepalive(&mut self) -> io::Result<()> {
            self.0.lock().push("keepalive".to_owned());
            Ok(())
        }

        fn close(self: Box<Self>) -> io::Result<()> {
            self.0.lock().push("close".to_owned());
            Ok(())
        }
    }

    fn settings(mode: WatchdogMode, safety_margin: i64) -> local::Watchdog {
        local::Watchdog { mode, safety_margin, ..local::Watchdog::default() }
    }

    fn fake(settings: &local::Watchdog, least: i32) -> (Watchdog, Arc<Mutex<Vec<String>>>) {
        fake_within(settings, least..=i32::MAX)
    }

    fn fake_within(
        settings: &local::Watchdog,
        counts: std::ops::RangeInclusive<i32>,
    ) -> (Watchdog, Arc<Mutex<Vec<String>>>) {
        let done: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = done.clone();
        let open: Open = Box::new(move || Ok(Box::new(Fake(seen.clone(), counts.clone()))));
        (Watchdog::with(settings, Ok(()), open).expect("thread"), done)
    }

    /// Waits: a thread does it.
    fn until(what: impl Fn() -> bool) {
        let deadline = SystemClock.now() + Duration::from_secs(10);
        while !what() {
            assert!(SystemClock.now() < deadline, "not in time");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn lease() -> Instant {
        SystemClock.now() + Duration::from_millis(10_900)
    }

    #[test]
    fn renewals_are_keepalives_and_the_end_is_a_magic_close() {
        let (watchdog, done) = fake(&settings(WatchdogMode::Automatic, 5), 1);
        let end = lease();
        watchdog.arm(end);
        watchdog.arm(end);
        watchdog.arm(end - Duration::from_secs(1));
        until(|| done.lock().len() == 2);
        watchdog.arm(end + Duration::from_millis(1));
        until(|| done.lock().len() == 3);
        assert!(watchdog.is_armed());
        watchdog.disarm();
        watchdog.disarm();
        watchdog.end();
        assert_eq!(*done.lock(), ["timeout 6", "keepalive", "keepalive", "close"]);
        assert_eq!((watchdog.works(), watchdog.missing(), watchdog.is_armed()), (Ok(()), None, false));
    }

    #[test]
    fn a_pipe_is_told_what_a_device_would_be() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let driver = WatchdogDriver::Testing;
        let settings = local::Watchdog { device: file.path().into(), driver, ..settings(WatchdogMode::Required, 5) };
        let watchdog = Watchdog::start(&settings).expect("thread");
        let told = || std::fs::read_to_string(file.path()).expect("told");
        watchdog.arm(lease());
        until(|| told().ends_with('1'));
        watchdog.disarm();
        watchdog.end();
        assert_eq!(told(), "Ctimeout=6\n1V");
    }

    #[test]
    fn a_slow_device_does_not_work_and_misses_no_end() {
        let settings = settings(WatchdogMode::Required, 0);
        let (done, busy): (Arc<Mutex<Vec<String>>>, Arc<Mutex<()>>) = Default::default();
        let (seen, waits) = (done.clone(), busy.clone());
        let open: Open = Box::new(move || {
            drop(waits.lock());
            Ok(Box::new(Fake(seen.clone(), 1..=i32::MAX)))
        });
        let watchdog = Watchdog::with(&settings, Ok(()), open).expect("thread");
        let slow = busy.lock();
        let begun = SystemClock.now();
        for i in 0..10 {
            watchdog.arm(begun + Duration::from_millis(2000 + i));
        }
        assert_eq!(watchdog.missing(), None);
        until(|| watchdog.missing().is_some());
        let took = SystemClock.now().since(begun);
        assert!(took >= Duration::from_millis(333), "a third of one second or two is not over after {took:?}");
        watchdog.disarm();
        drop(slow);
        watchdog.end();
        assert_eq!((watchdog.missing(), done.lock().last().map(String::as_str)), (None, Some("close")));
    }

    #[test]
    fn an_agent_that_ends_with_a_deadline_leaves_it_counting() {
        let (watchdog, done) = fake(&settings(WatchdogMode::Automatic, -1), 1);
        watchdog.arm(lease());
        watchdog.end();
        assert_eq!(*done.lock(), ["timeout 5", "keepalive"]);
    }

    #[test]
    fn one_that_counts_too_long_is_good_enough_unless_it_is_required() {
        for (mode, missing) in [(WatchdogMode::Automatic, false), (WatchdogMode::Required, true)] {
            let (watchdog, done) = fake(&settings(mode, 5), 60);
            watchdog.arm(lease());
            watchdog.end();
            assert_eq!(watchdog.missing().is_some(), missing);
            assert_eq!(done.lock().last().map(String::as_str), Some(if missing { "close" } else { "keepalive" }));
        }
    }

    #[test]
    fn one_that_counts_too_short_is_not_used() {
        for (most, used) in [(2, true), (1, false)] {
            let (watchdog, done) = fake_within(&settings(WatchdogMode::Required, 5), 1..=most);
            watchdog.arm(lease());
            watchdog.end();
            assert_eq!(watchdog.missing().is_none(), used);
            assert_eq!(done.lock().last().map(String::as_str), Some(if used { "keepalive" } else { "close" }));
        }
    }

    #[test]
    fn what_is_no_watchdog_says_so() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let settings = local::Watchdog { device: file.path().into(), ..settings(WatchdogMode::Required, 5) };
        let watchdog = Watchdog::start(&settings).expect("thread");
        assert_eq!(watchdog.missing(), None, "it is there and can be written to");
        watchdog.arm(lease());
        watchdog.end();
        let why = watchdog.missing().expect("refused");
        assert!(why.contains("timeout can't be set"), "{why}");

        let absent = local::Watchdog { device: "/dev/nothing".into(), ..settings };
        assert!(Watchdog::start(&absent).expect("thread").missing().is_some());
        let automatic = local::Watchdog { mode: WatchdogMode::Automatic, ..absent };
        let watchdog = Watchdog::start(&automatic).expect("no thread");
        assert!(watchdog.missing().is_none() && watchdog.works().is_err());
    }

    #[test]
    fn one_that_may_go_on_counting_says_so() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let device = open(file.path(), WatchdogDriver::Kernel).expect("opened");
        assert!(device.close().is_err(), "nothing has said that it stops");
        assert_eq!(std::fs::read_to_string(file.path()).expect("told"), "V");
        assert_eq!(size_of::<Info>(), 0x28, "as the request says");
    }

    #[test]
    fn the_timeout_ends_before_the_lease() {
        let times = |left, margin| timeout(Duration::from_millis(left), margin);
        assert_eq!((times(29_990, 5), times(29_400, 5), times(29_990, -1), times(4_990, -1)), (25, 24, 15, 2));
        assert_eq!((times(4_990, 5), times(0, -1), times(4_990, 0)), (0, 0, 4), "never after its end");
    }
}
