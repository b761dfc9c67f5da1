//! Bytes sent to a deposed leader.
//!
//! A router says in its log when it takes up which session, and when the leader has changed for it. From then on nothing may
//! leave it on what was a session of the leader before. (That it knows late, because it is cut off, is another matter: what
//! comes of that is checked by what clients were told.)

use std::collections::BTreeMap;

use chrono::DateTime;

use super::{Findings, Kind};
use crate::files::LOG_TIME;
use crate::wire::Flow;

/// By how much the kernel's time of a packet and that of a line may differ.
const CLOCKS: i64 = 5_000;

/// `logs`: what each router has written, in order.
pub(crate) fn check(flows: &[Flow], logs: &[String], findings: &mut Findings) {
    let mut by_port: BTreeMap<(usize, u16), Vec<&Flow>> = BTreeMap::new();
    for flow in flows {
        by_port.entry((flow.router, flow.port)).or_default().push(flow);
    }
    let (mut sessions, mut cases) = (0, Vec::new());
    for (router, log) in logs.iter().enumerate() {
        let mut open: Vec<&Flow> = Vec::new();
        for (at, text) in log.lines().filter_map(timed) {
            if text.starts_with("INFO: session begins port=read-write ") {
                // The last connection that began before it on the port by which the server knows it.
                let flows = seen_as(text).and_then(|port| by_port.get(&(router, port)));
                open.extend(flows.and_then(|flows| flows.iter().rfind(|flow| flow.begun <= at)));
            } else if text.starts_with("INFO: leadership changed") {
                sessions += open.len();
                for flow in open.drain(..) {
                    let Some(last) = flow.last.filter(|last| *last > at + CLOCKS) else { continue };
                    let late = (last - at) as f64 / 1e3;
                    let (port, node) = (flow.port, flow.node + 1);
                    let case = format!(
                        "router {} sent to node {node} from port {port} until {late:.1} ms after {text}",
                        router + 1
                    );
                    cases.push((last, case));
                }
            }
        }
    }
    findings
        .notes
        .push(format!("{sessions} sessions on read-write ports were looked at for bytes to a deposed leader"));
    let count = cases.len();
    if let Some((_, first)) = cases.into_iter().min() {
        findings.violation(Kind::SentToDeposed, None, format!("{count} sessions; the first: {first}"));
    }
}

/// A line with its time, in microseconds of wall time.
fn timed(line: &str) -> Option<(i64, &str)> {
    let (time, text) = line.split_once(' ')?;
    Some((DateTime::parse_from_str(time, LOG_TIME).ok()?.timestamp_micros(), text))
}

/// The router's port of a session's connection to its server.
fn seen_as(text: &str) -> Option<u16> {
    text.split_once(" seen_as=")?.1.split(' ').next()?.rsplit_once(':')?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::sample::kinds;
    use super::*;

    const LOG: &str = "\
2026-11-22T12:00:00.000000+00:00 INFO: leadership changed leader=pg1 sessions_ended=0
2026-11-22T12:00:01.000000+00:00 INFO: session begins port=read-write client=10.77.0.1:9 member=pg1 server=10.77.0.11:5432 seen_as=10.77.0.31:700
2026-11-22T12:00:01.500000+00:00 INFO: session begins port=read-only client=10.77.0.1:9 member=pg2 server=10.77.0.12:5432 seen_as=10.77.0.31:701
something without a time
2026-11-22T12:00:03.000000+00:00 INFO: leadership changed sessions_ended=1
";

    /// Connections from ports, begun and last sent on at milliseconds after noon.
    fn found(flows: &[(u16, i64, i64)]) -> Vec<Kind> {
        let noon = DateTime::parse_from_rfc3339("2026-11-22T12:00:00Z").unwrap().timestamp_micros();
        let flow = |(port, begun, last): &(u16, i64, i64)| Flow {
            router: 0,
            port: *port,
            node: 0,
            begun: noon + begun * 1000,
            last: Some(noon + last * 1000),
        };
        let flows: Vec<Flow> = flows.iter().map(flow).collect();
        let mut findings = Findings::default();
        check(&flows, &[LOG.to_owned()], &mut findings);
        kinds(&findings)
    }

    #[test]
    fn nothing_leaves_after_the_leader_has_changed() {
        assert_eq!(found(&[(700, 900, 2999)]), []);
        assert_eq!(found(&[(700, 900, 3004)]), [], "two clocks");
        assert_eq!(found(&[(700, 900, 3010)]), [Kind::SentToDeposed]);
    }

    #[test]
    fn only_sessions_of_the_leader_and_only_their_own_connection_count() {
        assert_eq!(found(&[(701, 900, 3010)]), [], "read-only");
        assert_eq!(found(&[(702, 900, 3010)]), [], "nobody's, as the router's own questions are");
        assert_eq!(found(&[(700, 100, 200), (700, 900, 2000), (700, 3500, 4000)]), [], "the port is used again later");
        assert_eq!(found(&[(700, 100, 200), (700, 900, 3100)]), [Kind::SentToDeposed]);
    }
}
