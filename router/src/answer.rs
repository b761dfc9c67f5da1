//! What a server says first.
//!
//! A server that is about to stop, or has not quite started, accepts connections and refuses them with
//! `cannot_connect_now`. Nothing has come of the session by then, so it can wait for a better server, as if the connect had
//! been refused. And who has asked for encryption and is denied it still has no session: only the start-up packet that
//! follows begins one.

use std::future::poll_fn;
use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::startup::Packet;
use crate::wire::Tls;
use crate::{sasl, socket};

/// The longest ErrorResponse that is looked into.
const LOOK: usize = 1_024;

/// A server's first word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Everything from here on is between client and server.
    Begun,
    /// `N`: no encryption. The client may go on in plain text, or close. This byte is not kept.
    Denied,
    /// The server takes no sessions now (`57P03`).
    NotNow,
    /// The server has closed, or its connection broke.
    Gone,
}

/// Waits for the answer to `packet`, for as long as the server takes. What is read is kept in `said`.
pub async fn first(server: &TcpStream, packet: Packet, said: &mut Vec<u8>) -> Answer {
    loop {
        match verdict(said, packet) {
            Some(Answer::Denied) => {
                said.remove(0);
                return Answer::Denied;
            }
            Some(answer) => return answer,
            None => {}
        }
        let mut piece = [0; LOOK];
        match poll_fn(|cx| socket::poll_read(cx, server, &mut piece)).await {
            Ok(bytes @ 1..) => said.extend_from_slice(&piece[..bytes]),
            // How one that does not know direct TLS says so: the client has to hear that, and another server would say no more.
            Ok(0) if packet == Packet::DirectTls => return Answer::Begun,
            Ok(0) | Err(_) => return Answer::Gone,
        }
    }
}

/// Sends `request` and waits for the answer, where TLS with the server begins here. What is read is kept in `said`.
pub async fn first_in_tls(tls: &mut Tls, request: &[u8], packet: Packet, said: &mut Vec<u8>) -> Answer {
    let exchange = async {
        tls.write_all(request).await?;
        tls.flush().await?;
        loop {
            let mut piece = [0; LOOK];
            let bytes = tls.read(&mut piece).await?;
            said.extend_from_slice(&piece[..bytes]);
            match verdict(said, packet) {
                _ if bytes == 0 => return Ok(Answer::Gone),
                Some(answer) => return Ok(answer),
                None => {}
            }
        }
    };
    let answered: io::Result<Answer> = exchange.await;
    answered.unwrap_or(Answer::Gone)
}

/// Reads on until the server has asked for authentication, and leaves the offer of channel binding out of that.
pub async fn without_binding(tls: &mut Tls, said: &mut Vec<u8>) {
    let mut piece = [0; LOOK];
    while said.len() < LOOK {
        if let Some(unbound) = sasl::without_binding(said) {
            *said = unbound;
            return;
        }
        match tls.read(&mut piece).await {
            Ok(bytes @ 1..) => said.extend_from_slice(&piece[..bytes]),
            // The relay finds the same.
            Ok(0) | Err(_) => return,
        }
    }
}

/// What the bytes so far mean; `None`: too few to tell.
fn verdict(seen: &[u8], packet: Packet) -> Option<Answer> {
    match seen {
        [] => None,
        [b'N', ..] if packet.awaits_answer() => Some(Answer::Denied),
        [b'E', rest @ ..] if matches!(packet, Packet::Startup { .. }) => {
            let (length, fields) = rest.split_first_chunk::<4>()?;
            let length = u32::from_be_bytes(*length) as usize;
            if fields.len() + 4 < length && seen.len() < LOOK {
                return None;
            }
            let refuses = fields.split(|byte| *byte == 0).any(|field| field == b"C57P03");
            Some(if refuses { Answer::NotNow } else { Answer::Begun })
        }
        _ => Some(Answer::Begun),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reply::Refusal;

    #[test]
    fn first_words() {
        let startup = Packet::Startup { minor: 0 };
        let (not_now, full) = (Refusal::NoServer.packet(), Refusal::TooManyHeld.packet());
        for (seen, packet, expected) in [
            (&b""[..], startup, None),
            (b"R\0\0\0\x08\0\0\0\0", startup, Some(Answer::Begun)),
            (b"v\0\0", startup, Some(Answer::Begun)),
            (&not_now, startup, Some(Answer::NotNow)),
            (&not_now[..3], startup, None),
            (&not_now[..not_now.len() - 1], startup, None),
            (&full, startup, Some(Answer::Begun)),
            (b"Nothing", startup, Some(Answer::Begun)),
            (b"N", Packet::SslRequest, Some(Answer::Denied)),
            (b"N", Packet::GssEncRequest, Some(Answer::Denied)),
            (b"S", Packet::SslRequest, Some(Answer::Begun)),
            (b"E", Packet::SslRequest, Some(Answer::Begun)),
        ] {
            assert_eq!(verdict(seen, packet), expected, "{seen:?} to {packet:?}");
        }
        let endless = [b"E\x7f\xff\xff\xff".to_vec(), vec![b'x'; LOOK]].concat();
        assert_eq!(verdict(&endless[..LOOK], startup), Some(Answer::Begun), "not looked at for ever");
    }
}
