//! When a peer that does not answer any more is given up.
//!
//! One that has nothing to acknowledge is asked by keepalive. As long as something waits for it, Linux asks by sending that
//! again or, where the peer has closed its window, by probes of the window; but goes on with it for a quarter of an hour.
//! `TCP_USER_TIMEOUT` is no remedy for that: it also ends the connection of a peer that is alive, answers every probe, and
//! reads nothing for a while (tcp_probe_timer; seen on 6.18), as a server does whose COPY waits for a lock, or a client that takes its
//! time with each row. So the connections of sessions are looked at now and then ([`is_over`]), at no cost to what passes.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use rustix::net::sockopt;

/// Probes of an idle peer without an answer after which it is given up.
const PROBES: u32 = 3;

/// Questions in a row without an answer of a peer for which something waits: one may get lost.
const ASKED: u8 = 2;

/// Idle peers that acknowledge nothing for `silence` are given up. What is accepted from a listening socket inherits that.
///
/// # Errors
/// The kernel refuses an option.
pub fn keepalive(socket: impl AsFd, silence: Option<Duration>) -> io::Result<()> {
    // A listening socket may have been told something else before.
    sockopt::set_socket_keepalive(&socket, silence.is_some())?;
    let Some(silence) = silence else { return Ok(()) };
    let (idle, interval) = probes(silence);
    sockopt::set_tcp_keepidle(&socket, idle)?;
    sockopt::set_tcp_keepintvl(&socket, interval)?;
    Ok(sockopt::set_tcp_keepcnt(&socket, PROBES)?)
}

/// When the first probe is sent, and the distance of the others; the kernel counts whole seconds.
fn probes(silence: Duration) -> (Duration, Duration) {
    let interval = (silence.as_secs() / 8).max(1);
    let idle = silence.as_secs().saturating_sub(interval * u64::from(PROBES)).max(1);
    (Duration::from_secs(idle), Duration::from_secs(interval))
}

/// Whether something waits for the peer of a connection, and it has answered nothing at all for `silence`.
///
/// That it has been asked matters: each question comes after twice the time of the one before, up to two minutes, so that also of a
/// peer that answers all of them nothing is heard for longer. For the same reason one that had not read for a while is known
/// to be gone only after three times that while, four minutes at most.
pub fn is_over(connection: impl AsFd, silence: Duration) -> bool {
    // A unix socket has none of that.
    let Some(info) = tcp_info(connection) else { return false };
    let heard = info.tcpi_last_ack_recv.min(info.tcpi_last_data_recv);
    // Probes of an idle peer are counted as well, but have nothing to back off from.
    let asked = if info.tcpi_backoff > 0 { info.tcpi_retransmits.max(info.tcpi_probes) } else { 0 };
    asked >= ASKED && Duration::from_millis(heard.into()) >= silence
}

#[allow(unsafe_code)]
fn tcp_info(connection: impl AsFd) -> Option<libc::tcp_info> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    let (fd, place) = (connection.as_fd().as_raw_fd(), info.as_mut_ptr().cast());
    // SAFETY: the kernel writes up to `length` bytes, which are there; of integers as these are, any bytes will do.
    unsafe {
        let outcome = libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, place, &mut length);
        (outcome == 0).then(|| info.assume_init())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_noticed_in_its_time() {
        for (silence, expected) in [(4, (1, 1)), (8, (5, 1)), (20, (14, 2)), (60, (39, 7))] {
            let (idle, interval) = probes(Duration::from_secs(silence));
            assert_eq!((idle.as_secs(), interval.as_secs()), expected, "{silence}");
            assert_eq!(idle + interval * PROBES, Duration::from_secs(silence));
        }
    }

    #[test]
    fn what_the_kernel_says_of_a_connection_is_understood() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let info = tcp_info(&client).unwrap();
        assert!(info.tcpi_state == 1 && info.tcpi_snd_mss > 0, "ESTABLISHED, as linux/tcp_states.h has it");
        assert!(info.tcpi_backoff == 0 && !is_over(&server, Duration::ZERO), "nothing waits");
        let (unix, _end) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(tcp_info(&unix).is_none() && !is_over(&unix, Duration::ZERO));
    }
}
