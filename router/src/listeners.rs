//! The sockets that the router listens on: opened at the start, opened and closed when the configuration changes, handed
//! over to the next process.
//!
//! By TCP every thread has a socket of its own for every address, among which the kernel spreads the connections: a
//! session never changes its thread. Each socket that listens is accepted from, or is closed: whoever is in the queue of one
//! that is not would wait there for ever. So a process that takes over accepts from all sockets of an address that it is
//! given, also if they are more than its threads, its own new ones listen when it begins, and the one before closes its copies.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};
use trunkline_config::router::{Listen, Port};

use crate::crypto::Crypto;
use crate::handover::Adopted;
use crate::port::Listening;
use crate::router::Router;
use crate::socket::{Address, Bound};

/// Sockets that a thread has not begun to accept from yet.
const QUEUE: usize = 4_096;

/// Sockets of an earlier process, by [`key`].
pub type Inherited = BTreeMap<String, OwnedFd>;

/// All listening sockets.
#[derive(Debug)]
pub struct Listeners {
    router: Arc<Router>,
    threads: Vec<mpsc::Sender<Work>>,
    next: AtomicUsize,
    /// The threads accept.
    begun: AtomicBool,
    /// By address as the configuration means it: the same one can be written in several ways.
    open: Mutex<BTreeMap<Address, Open>>,
}

/// The port that an address belongs to, which a change of the configuration may change.
pub type Slot = Arc<RwLock<Arc<Listening>>>;

/// What a thread is given to do.
#[derive(Debug)]
pub enum Work {
    /// Accept.
    Accept(Opened),
    /// Go on with a session of another process.
    Resume(Box<Adopted>),
}

/// A socket that a thread shall accept from.
#[derive(Debug)]
pub struct Opened {
    /// The socket.
    pub bound: Bound,
    /// Its port.
    pub slot: Slot,
    /// When to stop.
    pub closed: watch::Receiver<bool>,
}

/// An address that is listened on.
#[derive(Debug)]
struct Open {
    /// As it is written.
    listen: Listen,
    /// With the port that the kernel has chosen, where it shall.
    address: Address,
    /// One for each thread at least, for handing over.
    sockets: Vec<Bound>,
    slot: Slot,
    close: watch::Sender<bool>,
}

impl Listeners {
    /// Listens nowhere; what it will open goes to the receivers, one for each thread.
    pub fn new(router: Arc<Router>, threads: usize) -> (Self, Vec<mpsc::Receiver<Work>>) {
        let (threads, receivers) = (0..threads.max(1)).map(|_| mpsc::channel(QUEUE)).unzip();
        let (next, begun) = (AtomicUsize::new(0), AtomicBool::new(false));
        (Self { router, threads, next, begun, open: Mutex::default() }, receivers)
    }

    /// The threads accept from now on, so that clients may connect.
    ///
    /// # Errors
    /// An address, and why nobody can listen there.
    pub fn begin(&self) -> io::Result<()> {
        let open = self.open.lock();
        self.begun.store(true, Ordering::Relaxed);
        for open in open.values() {
            let listened = open.sockets.iter().try_for_each(Bound::listen);
            listened.map_err(|error| cant_listen(&open.slot.read().settings(), &open.listen, &error))?;
        }
        Ok(())
    }

    /// Listens for exactly these ports from now on, or from when it [begins](Self::begin). What cannot be listened on leaves
    /// everything as it was. Sessions are not touched.
    ///
    /// # Errors
    /// The port and why.
    pub fn apply(&self, ports: &[Port], mut inherited: Inherited) -> io::Result<()> {
        let read =
            |port: &Port| Crypto::of(port).map_err(|error| io::Error::other(format!("port '{}': {error}", port.name)));
        let crypto = ports.iter().map(read).collect::<io::Result<Vec<_>>>()?;
        let mut open = self.open.lock();
        let wanted = resolve(ports, &open)?;
        let own: Vec<Address> = open
            .values()
            .map(|open| open.address.clone())
            .chain(inherited.keys().filter_map(|key| address_of(key)))
            .collect();
        let mut bound = Vec::new();
        for (address, (port, listen)) in wanted.iter().filter(|(address, _)| !open.contains_key(address)) {
            let sockets = self.bind(address, &own, &mut inherited);
            bound.push((*port, *listen, address, sockets.map_err(|error| cant_listen(port, listen, &error))?));
        }
        if self.begun.load(Ordering::Relaxed) {
            for (port, listen, _, (_, sockets, _)) in &bound {
                sockets.iter().try_for_each(Bound::listen).map_err(|error| cant_listen(port, listen, &error))?;
            }
        }
        // Nothing can fail any more.
        let listening: BTreeMap<&str, Arc<Listening>> = ports
            .iter()
            .zip(crypto)
            .map(|(port, crypto)| (port.name.as_str(), self.router.listening(port, crypto)))
            .collect();
        for (address, (port, listen)) in &wanted {
            if let (Some(open), Some(listening)) = (open.get_mut(address), listening.get(port.name.as_str())) {
                open.listen = (*listen).clone();
                *open.slot.write() = listening.clone();
                tune(port, &open.sockets);
            }
        }
        for (port, listen, key, (address, sockets, copies)) in bound {
            let Some(listening) = listening.get(port.name.as_str()) else { continue };
            let (slot, close) = (Slot::new(RwLock::new(listening.clone())), watch::Sender::new(false));
            tune(port, &copies);
            for (thread, bound) in self.threads.iter().cycle().zip(sockets) {
                let opened = Opened { bound, slot: slot.clone(), closed: close.subscribe() };
                // Full only if a thread has hung for thousands of changes; its share of connections hangs as well then.
                let _ = thread.try_send(Work::Accept(opened));
            }
            let threads = self.threads.len();
            info!(port = port.name, %address, target = port.target.as_str(), threads, "listening");
            open.insert(key.clone(), Open { listen: listen.clone(), address, sockets: copies, slot, close });
        }
        open.retain(|address, open| {
            let keep = wanted.contains_key(address);
            if !keep {
                info!(port = &*open.slot.read().name, address = %open.address, "not listening any more");
                open.close.send_replace(true);
            }
            keep
        });
        let gone = self.router.ports().into_iter().filter(|port| !listening.contains_key(&*port.name));
        gone.for_each(|port| self.router.forget(&port.name));
        Ok(())
    }

    /// Every socket that is inherited, or as many more as it takes for each thread to have one; and a copy of each. `own`: where
    /// this process listens, or the one before; what is not wanted any more of that is closed later.
    fn bind(
        &self,
        address: &Address,
        own: &[Address],
        inherited: &mut Inherited,
    ) -> io::Result<(Address, Vec<Bound>, Vec<Bound>)> {
        let mut address = address.clone();
        let threads = self.threads.len();
        let mut sockets: Vec<Bound> = (0..)
            .map_while(|number| inherited.remove(&key(&address, number)))
            .map(|fd| Bound::inherited(&address, fd))
            .collect();
        match sockets.first() {
            None if own.iter().any(|own| own.overlaps(&address)) => sockets = Bound::beside(&address, threads)?,
            None => sockets = Bound::new(&address, threads)?,
            Some(first) => {
                // More threads than before.
                let more: io::Result<Vec<Bound>> =
                    (sockets.len()..threads).map(|_| Bound::share(&address, first)).collect();
                sockets.extend(more?);
            }
        }
        if let Some(first) = sockets.first() {
            address = first.address()?;
        }
        let copies = sockets.iter().map(Bound::try_clone).collect::<io::Result<_>>()?;
        Ok((address, sockets, copies))
    }

    /// Every socket, by its [`key`], for the next process.
    ///
    /// # Errors
    /// Out of file descriptors.
    pub fn copies(&self) -> io::Result<Inherited> {
        let open = self.open.lock();
        let of = |open: &Open| -> io::Result<Vec<(String, OwnedFd)>> {
            let copy = |(number, socket): (usize, &Bound)| Ok((key(&open.address, number), socket.try_clone()?.into()));
            open.sockets.iter().enumerate().map(copy).collect()
        };
        Ok(open.values().map(of).collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// Listens nowhere any more, once the threads have let go as well: clients don't wait for a process that ends. Where another
    /// one has a copy of a socket, that goes on listening.
    pub fn close(&self) {
        self.open.lock().clear();
    }

    /// Gives a session of another process to one thread after the other; waits while that one is busy. Not for use inside a
    /// runtime.
    pub fn resume(&self, adopted: Adopted) {
        let thread = self.next.fetch_add(1, Ordering::Relaxed) % self.threads.len();
        if let Some(thread) = self.threads.get(thread) {
            // A thread that is gone has taken the process with it.
            let _ = thread.blocking_send(Work::Resume(Box::new(adopted)));
        }
    }

    /// Where a port listens, ports that the kernel has chosen included.
    pub fn addresses(&self) -> Vec<(Arc<str>, Address)> {
        self.open.lock().values().map(|open| (open.slot.read().name.clone(), open.address.clone())).collect()
    }
}

/// Where each port listens. What is open under the same words is not looked up again.
///
/// # Errors
/// A name has no address, or two ports have the same one.
fn resolve<'p>(
    ports: &'p [Port],
    open: &BTreeMap<Address, Open>,
) -> io::Result<BTreeMap<Address, (&'p Port, &'p Listen)>> {
    let mut wanted: BTreeMap<Address, (&Port, &Listen)> = BTreeMap::new();
    for (port, listen) in ports.iter().flat_map(|port| port.listen.iter().map(move |listen| (port, listen))) {
        let known = open.iter().find(|(_, open)| open.listen == *listen).map(|(address, _)| Ok(address.clone()));
        let address =
            known.unwrap_or_else(|| Address::of(listen)).map_err(|error| cant_listen(port, listen, &error))?;
        if let Some((other, as_written)) = wanted.insert(address, (port, listen)) {
            let taken = io::Error::other(format!("that is {as_written} of port '{}'", other.name));
            return Err(cant_listen(port, listen, &taken));
        }
    }
    Ok(wanted)
}

fn cant_listen(port: &Port, listen: &Listen, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("port '{}' can't listen on {listen}: {error}", port.name))
}

/// Sets what accepted connections inherit. Where the kernel refuses it, they work without.
fn tune(port: &Port, sockets: &[Bound]) {
    for error in sockets.iter().filter_map(|socket| socket.tune(port.client_silence).err()) {
        warn!(port = port.name, %error, "socket options refused");
    }
}

/// How a socket is named to the next process.
fn key(address: &Address, number: usize) -> String {
    format!("{address}#{number}")
}

/// The address that a socket with this name is bound to, if that is one of TCP.
fn address_of(key: &str) -> Option<Address> {
    key.rsplit_once('#')?.0.parse().ok().map(Address::Tcp)
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpStream};

    use trunkline_config::router::{Limits, Target};

    use super::*;

    /// A process with so many threads, which has not begun.
    fn process(threads: usize, ports: &[Port], inherited: Inherited) -> (Listeners, Vec<mpsc::Receiver<Work>>) {
        let (listeners, threads) = Listeners::new(Router::new(Limits::default()).unwrap(), threads);
        listeners.apply(ports, inherited).unwrap();
        (listeners, threads)
    }

    fn port(name: &str, address: SocketAddr) -> Port {
        Port::new(name, Listen::Tcp(address.to_string()), Target::Leader)
    }

    fn address(listeners: &Listeners) -> SocketAddr {
        match listeners.addresses().remove(0).1 {
            Address::Tcp(address) => address,
            Address::Unix(path) => panic!("{path:?}"),
        }
    }

    /// How many of so many connections each thread accepts.
    fn accept(threads: &mut [mpsc::Receiver<Work>], connections: usize) -> Vec<usize> {
        let listeners: Vec<Vec<_>> = threads
            .iter_mut()
            .map(|thread| {
                let listener = |work: Work| match work {
                    Work::Accept(Opened { bound: Bound::Tcp(listener), .. }) => listener,
                    other => panic!("{other:?}"),
                };
                std::iter::from_fn(|| thread.try_recv().ok().map(listener)).collect()
            })
            .collect();
        let mut accepted = vec![0; threads.len()];
        // They are there as soon as the kernel has got round to it.
        for _ in 0..1_000 {
            for (listeners, accepted) in listeners.iter().zip(&mut accepted) {
                *accepted += listeners.iter().flat_map(|one| std::iter::from_fn(|| one.accept().ok())).count();
            }
            if accepted.iter().sum::<usize>() == connections {
                return accepted;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("{accepted:?} of {connections}");
    }

    #[test]
    fn nobody_waits_in_a_queue_after_an_upgrade_to_other_threads() {
        for (before, after) in [(4, 1), (4, 3), (2, 4)] {
            let (old, of_old) = process(before, &[port("rw", "127.0.0.1:0".parse().unwrap())], Inherited::new());
            old.begin().unwrap();
            let at = address(&old);
            let (new, mut of_new) = process(after, &[port("rw", at)], old.copies().unwrap());
            new.begin().unwrap();
            old.close();
            drop(of_old);
            let clients: Vec<TcpStream> = (0..64).map(|_| TcpStream::connect(at).unwrap()).collect();
            let accepted = accept(&mut of_new, clients.len());
            assert!(accepted.iter().all(|accepted| *accepted > 0), "{before} to {after}: {accepted:?}");
        }
    }

    #[test]
    fn nobody_waits_for_a_process_that_has_not_begun() {
        let (old, mut of_old) = process(1, &[port("rw", "127.0.0.1:0".parse().unwrap())], Inherited::new());
        assert!(TcpStream::connect(address(&old)).is_err(), "there are threads, but none accepts");
        old.begin().unwrap();
        let at = address(&old);
        let (new, _of_new) = process(4, &[port("rw", at)], old.copies().unwrap());
        let clients: Vec<TcpStream> = (0..64).map(|_| TcpStream::connect(at).unwrap()).collect();
        assert_eq!(accept(&mut of_old, clients.len()), [clients.len()]);
        drop(new);
    }

    #[test]
    fn nobody_can_connect_to_a_port_that_the_next_process_does_not_have() {
        let [one, two] = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
        let (old, of_old) = process(2, &[port("one", one), port("two", two)], Inherited::new());
        old.begin().unwrap();
        let (new, mut of_new) = process(2, &[port("one", one)], old.copies().unwrap());
        new.begin().unwrap();
        assert!(TcpStream::connect(two).is_ok(), "as long as the old one is in charge");
        old.close();
        drop(of_old);
        assert!(TcpStream::connect(two).is_err());
        let _client = TcpStream::connect(one).unwrap();
        accept(&mut of_new, 1);
    }
}
