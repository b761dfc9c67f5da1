//! What the router says to a client itself: an ErrorResponse with an SQLSTATE and a sentence without addresses.

use bytes::BytesMut;
use pgwire::messages::Message;
use pgwire::messages::response::ErrorResponse;

use crate::startup::Malformed;

/// A refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No server could take the session in time (`cannot_connect_now`).
    NoServer,
    /// The router is going away (`cannot_connect_now`: another router, or the same one later, will do).
    ShuttingDown,
    /// The server is about to stop for a planned switchover (`admin_shutdown`, as the server itself would say).
    Switchover,
    /// The router ends (`admin_shutdown`, as by a server that ends).
    Closing,
    /// Too many connections wait already (`too_many_connections`).
    TooManyHeld,
    /// The client's address has as many connections as it may have (`too_many_connections`).
    TooManyOfClient,
    /// The client asks for a target that there is not (`invalid_parameter_value`).
    UnknownTarget,
    /// A proxy that is to tell its client's address does not (`protocol_violation`).
    NoProxyHeader,
    /// The first packet is none (`protocol_violation`, or `feature_not_supported` for another version).
    Malformed(Malformed),
    /// The port takes encrypted sessions only (`invalid_authorization_specification`, as by `pg_hba.conf`).
    PlainText,
    /// The client spoke before its SSLRequest or GSSENCRequest was answered (`protocol_violation`).
    EarlyData,
    /// The first packet did not come in time (`protocol_violation`).
    TooSlow,
}

impl Refusal {
    /// The SQLSTATE.
    pub fn sqlstate(self) -> &'static str {
        match self {
            Refusal::NoServer | Refusal::ShuttingDown => "57P03",
            Refusal::Switchover | Refusal::Closing => "57P01",
            Refusal::TooManyHeld | Refusal::TooManyOfClient => "53300",
            Refusal::UnknownTarget => "22023",
            Refusal::PlainText => "28000",
            Refusal::Malformed(Malformed::Version(..)) => "0A000",
            Refusal::Malformed(_) | Refusal::NoProxyHeader | Refusal::EarlyData | Refusal::TooSlow => "08P01",
        }
    }

    /// The sentence.
    pub fn sentence(self) -> String {
        match self {
            Refusal::NoServer => "no server is available for this connection at the moment; try again".into(),
            Refusal::ShuttingDown => "the router is shutting down; connect again".into(),
            Refusal::Switchover => "terminating connection due to a planned switchover; connect again".into(),
            Refusal::Closing => "terminating connection because the router is shutting down; connect again".into(),
            Refusal::TooManyHeld => "too many connections are waiting for a server already".into(),
            Refusal::TooManyOfClient => "too many connections from this address".into(),
            Refusal::UnknownTarget => "trunkline.target must be leader, replica, sync, async or any".into(),
            Refusal::Malformed(what) => what.to_string(),
            Refusal::NoProxyHeader => "a PROXY protocol header is expected from this address".into(),
            Refusal::PlainText => "connections without TLS are not accepted here".into(),
            Refusal::EarlyData => "received data before the answer to an encryption request".into(),
            Refusal::TooSlow => "no complete startup packet was received in time".into(),
        }
    }

    /// As a reason in metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Refusal::NoServer => "no_server",
            Refusal::ShuttingDown => "shutdown",
            Refusal::Switchover => "switchover",
            Refusal::Closing => "drained",
            Refusal::TooManyHeld => "too_many_held",
            Refusal::TooManyOfClient => "too_many_of_client",
            Refusal::UnknownTarget => "unknown_target",
            Refusal::Malformed(_) => "malformed",
            Refusal::NoProxyHeader => "no_proxy_header",
            Refusal::PlainText => "plain_text",
            Refusal::EarlyData => "early_data",
            Refusal::TooSlow => "too_slow",
        }
    }

    /// The ErrorResponse, ready to be sent.
    pub fn packet(self) -> Vec<u8> {
        let field = |code: u8, text: &str| (code, text.to_owned());
        let response = ErrorResponse::new(vec![
            field(b'S', "FATAL"),
            field(b'V', "FATAL"),
            field(b'C', self.sqlstate()),
            field(b'M', &self.sentence()),
        ]);
        let mut bytes = BytesMut::new();
        // Encoding into memory fails on nothing that is possible here; an empty answer is a plain close.
        response.encode(&mut bytes).map(|()| bytes.to_vec()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_error_responses() {
        for refusal in [
            Refusal::NoServer,
            Refusal::Switchover,
            Refusal::Closing,
            Refusal::TooManyHeld,
            Refusal::TooManyOfClient,
            Refusal::UnknownTarget,
            Refusal::Malformed(Malformed::Length),
            Refusal::Malformed(Malformed::Version(2, 0)),
            Refusal::EarlyData,
            Refusal::PlainText,
            Refusal::NoProxyHeader,
            Refusal::TooSlow,
            Refusal::ShuttingDown,
        ] {
            let packet = refusal.packet();
            assert_eq!(packet[0], b'E');
            let length = u32::from_be_bytes([packet[1], packet[2], packet[3], packet[4]]);
            assert_eq!(length as usize + 1, packet.len());
            let text = String::from_utf8_lossy(&packet);
            assert!(text.contains(&format!("\0C{}\0", refusal.sqlstate())), "{text:?}");
            assert!(text.ends_with("\0\0"), "{text:?}");
        }
    }
}
