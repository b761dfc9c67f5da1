//! The way of a session that just talks: small messages, each sent on whole as soon as it has come.
//!
//! Some threads do nothing but that, for all such sessions: wait, receive, send, with what the kernel asks for and little beside it.
//! A session that waits there costs a few hundred bytes and no task. Whatever is not as simple takes it [back](Back) to the
//! runtime that it came from, with its bytes and what is known of its messages, where it goes on as if it had never been
//! here: an end, a connection that broke, a receiver that is too slow, a stream, a session that shall leave or end.
//!
//! Who ends a session from outside shuts its sockets down, wherever it is: nothing that is sent after that goes out.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Wake, Waker};

use parking_lot::Mutex;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use tracing::error;

use super::Carried;
use super::copy::BUFFER;
use crate::boundary::Trace;
use crate::metrics::Meter;
use crate::sessions::Session;

/// From so many bytes on without any answer, it is a stream.
const STREAM: u32 = 1 << 20;

/// Events that are taken at once.
const EVENTS: usize = 256;

/// That of the bell; all others are of sessions.
const BELL: u64 = u64::MAX;

/// Who takes a session back.
pub type TakeBack = Box<dyn FnOnce(Back) + Send>;

/// A session on its way here. Its sockets belong to no runtime.
pub struct Guest {
    /// The connection to the client.
    pub client: Arc<OwnedFd>,
    /// The connection to the server.
    pub server: Arc<OwnedFd>,
    /// The registration.
    pub session: Session,
    /// Where its bytes are counted.
    pub meter: Meter,
    /// What has passed, of the client and of the server, as long as all of it was seen.
    pub traces: Option<(Trace, Trace)>,
    /// Where it goes from here.
    pub take_back: TakeBack,
}

/// A session on its way back.
pub struct Back {
    /// The connection to the client.
    pub client: Arc<OwnedFd>,
    /// The connection to the server.
    pub server: Arc<OwnedFd>,
    /// The registration.
    pub session: Session,
    /// Where its bytes are counted.
    pub meter: Meter,
    /// What it takes along.
    pub carried: Carried,
    /// Why it did not stay.
    pub why: Why,
}

/// Why a session does not stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Somebody has to have a look: it may be over.
    Other,
    /// The source of a direction is broken, which reading it once more would not show.
    Broken(Direction),
    /// A direction streams.
    Streams(Direction),
}

/// Where bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

/// The threads, if there are any.
#[derive(Debug, Default)]
pub struct Lean {
    started: OnceLock<(Vec<Arc<Shared>>, NonZeroU32)>,
    /// A thread has failed: nobody comes any more.
    failed: AtomicBool,
}

/// What a thread shares with the others.
#[derive(Debug)]
struct Shared {
    epoll: OwnedFd,
    /// Written to when the thread shall look.
    bell: OwnedFd,
    /// Sessions on their way; `None`: the thread has ended.
    guests: Mutex<Option<Vec<Guest>>>,
    /// Somebody wants something of some session.
    called: AtomicBool,
    /// Sessions that are here.
    count: AtomicUsize,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").finish_non_exhaustive()
    }
}

impl Lean {
    /// Starts so many threads, once. A session may come `after` so many messages of its client that are each the answer to one
    /// of its server.
    ///
    /// # Errors
    /// There is no thread or file descriptor to be had.
    pub fn start(&self, threads: usize, after: NonZeroU32) -> io::Result<()> {
        let mut started = Vec::new();
        for number in 0..threads {
            let shared = Arc::new(Shared::new()?);
            let mut hall = Hall::new(shared.clone());
            let serve = move || {
                let error = hall.serve();
                error!(%error, "a thread for sessions that just talk has failed; they go on without it");
            };
            std::thread::Builder::new().name(format!("lean-{number}")).spawn(serve)?;
            started.push(shared);
        }
        // A second time is one too many, and those threads have nothing to do.
        let _ = self.started.set((started, after));
        Ok(())
    }

    /// When a session may come; `None`: never.
    pub fn after(&self) -> Option<NonZeroU32> {
        self.started.get().filter(|_| !self.failed.load(Ordering::Relaxed)).map(|(_, after)| *after)
    }

    /// Sessions that are here.
    pub fn sessions(&self) -> usize {
        self.started.get().map_or(0, |(threads, _)| threads.iter().map(|shared| shared.load()).sum())
    }

    /// A session comes, to the thread that has the fewest.
    pub fn enter(&self, guest: Guest) {
        let thread = self.started.get().and_then(|(threads, _)| threads.iter().min_by_key(|shared| shared.load()));
        let turned_away = match thread {
            Some(shared) => shared.enter(guest).err(),
            None => Some(Box::new(guest)),
        };
        if let Some(guest) = turned_away {
            self.failed.store(true, Ordering::Relaxed);
            guest.go_back(Vec::new(), Vec::new(), Why::Other);
        }
    }
}

impl Shared {
    fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &bell, EventData::new_u64(BELL), EventFlags::IN)?;
        let (guests, called, count) = (Mutex::new(Some(Vec::new())), AtomicBool::new(false), AtomicUsize::new(0));
        Ok(Self { epoll, bell, guests, called, count })
    }

    fn load(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// `Err`: nobody is here any more.
    fn enter(&self, guest: Guest) -> Result<(), Box<Guest>> {
        match &mut *self.guests.lock() {
            Some(guests) => guests.push(guest),
            None => return Err(Box::new(guest)),
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.ring_the_bell();
        Ok(())
    }

    fn ring_the_bell(&self) {
        // It is never full: the thread empties it.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.called.swap(true, Ordering::AcqRel) {
            self.ring_the_bell();
        }
    }
}

/// A thread, and all that are here.
struct Hall {
    shared: Arc<Shared>,
    waker: Waker,
    residents: Vec<Option<Box<Resident>>>,
    free: Vec<usize>,
    scratch: Box<[u8]>,
}

/// One that is here.
struct Resident {
    guest: Guest,
    /// Bytes to the server since it last said anything.
    unanswered_up: u32,
    /// The same of the client.
    unanswered_down: u32,
}

/// It does not stay, and some bytes of the direction that was looked at have not been sent.
struct Leaves(Why, Vec<u8>);

impl Hall {
    fn new(shared: Arc<Shared>) -> Self {
        let waker = Waker::from(shared.clone());
        Self { shared, waker, residents: Vec::new(), free: Vec::new(), scratch: vec![0; BUFFER].into() }
    }

    /// Until it fails.
    fn serve(&mut self) -> io::Error {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            events.clear();
            match epoll::wait(&self.shared.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return error.into(),
            }
            for event in &events {
                // By value: it is packed.
                let (data, flags) = (event.data, event.flags);
                match data.u64() {
                    BELL => self.look(),
                    place => {
                        let direction = if place & 1 == 0 { Direction::Up } else { Direction::Down };
                        self.relay((place >> 1) as usize, direction, flags);
                    }
                }
            }
        }
    }

    /// The bell was rung.
    fn look(&mut self) {
        let _ = rustix::io::read(&self.shared.bell, &mut [0; 8]);
        if self.shared.called.swap(false, Ordering::AcqRel) {
            (0..self.residents.len()).for_each(|place| self.ask(place));
        }
        let guests = self.shared.guests.lock().as_mut().map(std::mem::take);
        guests.into_iter().flatten().for_each(|guest| self.admit(guest));
    }

    fn admit(&mut self, guest: Guest) {
        let place = self.free.pop().unwrap_or_else(|| {
            self.residents.push(None);
            self.residents.len() - 1
        });
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        let watch = |socket: &OwnedFd, direction: Direction| {
            let data = EventData::new_u64((place as u64) << 1 | direction as u64);
            epoll::add(&self.shared.epoll, socket, data, flags)
        };
        let watched = watch(&guest.client, Direction::Up).and_then(|()| watch(&guest.server, Direction::Down));
        self.residents[place] = Some(Box::new(Resident { guest, unanswered_up: 0, unanswered_down: 0 }));
        match watched {
            Ok(()) => self.ask(place),
            // Out of memory, say.
            Err(_) => self.let_go(place, Direction::Up, Leaves(Why::Other, Vec::new())),
        }
    }

    /// Whether somebody wants something of it.
    fn ask(&mut self, place: usize) {
        let Some(resident) = &self.residents[place] else { return };
        let call = resident.guest.session.called(&self.waker);
        if call.leave || call.resign {
            self.let_go(place, Direction::Up, Leaves(Why::Other, Vec::new()));
        }
    }

    /// There is something to be received. Of one that has just left, or of the next one at its place, there may be nothing.
    fn relay(&mut self, place: usize, direction: Direction, flags: EventFlags) {
        let Some(Some(resident)) = self.residents.get_mut(place) else { return };
        let ends = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        if let Err(leaves) = resident.relay(direction, ends, &mut self.scratch) {
            self.let_go(place, direction, leaves);
        }
    }

    fn let_go(&mut self, place: usize, direction: Direction, Leaves(why, rest): Leaves) {
        let Some(resident) = self.residents.get_mut(place).and_then(Option::take) else { return };
        self.free.push(place);
        self.shared.count.fetch_sub(1, Ordering::Relaxed);
        for socket in [&resident.guest.client, &resident.guest.server] {
            // An error: it has never been there.
            let _ = epoll::delete(&self.shared.epoll, socket);
        }
        let (up, down) = match direction {
            Direction::Up => (rest, Vec::new()),
            Direction::Down => (Vec::new(), rest),
        };
        resident.guest.go_back(up, down, why);
    }
}

impl Drop for Hall {
    /// The thread ends, for whatever reason: nobody stays behind.
    fn drop(&mut self) {
        let waiting = self.shared.guests.lock().take();
        (0..self.residents.len()).for_each(|place| self.let_go(place, Direction::Up, Leaves(Why::Other, Vec::new())));
        for guest in waiting.into_iter().flatten() {
            self.shared.count.fetch_sub(1, Ordering::Relaxed);
            guest.go_back(Vec::new(), Vec::new(), Why::Other);
        }
    }
}

impl Resident {
    /// Moves what there is. As events tell of changes only, that has to be all of it. `ends`: behind that the source ends.
    fn relay(&mut self, direction: Direction, ends: bool, scratch: &mut [u8]) -> Result<(), Leaves> {
        let Guest { client, server, session, meter, traces, .. } = &mut self.guest;
        let (up, down) = (&mut self.unanswered_up, &mut self.unanswered_down);
        let (from, to, unanswered, answered) = match direction {
            Direction::Up => (&*client, &*server, up, down),
            Direction::Down => (&*server, &*client, down, up),
        };
        loop {
            let received = match rustix::net::recv(from, &mut *scratch, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Leaves(Why::Other, Vec::new())),
                Ok((received, _)) => received,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(_) => return Err(Leaves(Why::Broken(direction), Vec::new())),
            };
            let bytes = &scratch[..received];
            let moved = received as u64;
            match direction {
                Direction::Up => {
                    meter.up(moved);
                    session.moved(moved, 0);
                    traces.take_if(|(client, _)| !client.look(bytes));
                }
                Direction::Down => {
                    meter.down(moved);
                    session.moved(0, moved);
                    traces.take_if(|(_, server)| !server.look(bytes));
                }
            }
            *unanswered += received as u32;
            *answered = 0;
            // An error is found again by whoever tries the rest.
            let sent = rustix::net::send(to, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).unwrap_or(0);
            if sent < received {
                return Err(Leaves(Why::Other, bytes[sent..].to_vec()));
            }
            if *unanswered >= STREAM {
                return Err(Leaves(Why::Streams(direction), Vec::new()));
            }
            // A read that comes back short has emptied the socket, and what comes later is a new event.
            if received < scratch.len() && !ends {
                return Ok(());
            }
        }
    }
}

impl Guest {
    /// With what has been received and not been sent.
    fn go_back(mut self, up: Vec<u8>, down: Vec<u8>, why: Why) {
        let carried = Carried { up, down, traces: self.traces.take(), budget: None };
        let Guest { client, server, session, meter, take_back, .. } = self;
        take_back(Back { client, server, session, meter, carried, why });
    }
}
