//! What is counted. Names and labels are part of the interface: dashboards and alert rules use them.

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// All metrics of a router, in a registry of their own.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    /// Connections accepted, by port.
    pub accepted: IntCounterVec,
    /// Sessions with a server, by port and member; set when asked for.
    pub sessions: IntGaugeVec,
    /// Connections, with a server or without, by port; set when asked for.
    pub connections: IntGaugeVec,
    /// Servers that a new session may go to, by port; set when asked for.
    pub candidates: IntGaugeVec,
    /// How far a standby is behind, by member, where known; set when asked for.
    pub lag_bytes: IntGaugeVec,
    /// The same in time.
    pub lag_seconds: GaugeVec,
    /// The bounds that are in force, by name; set when asked for.
    pub limits: GaugeVec,
    /// Those of a port, by port and name; set when asked for.
    pub port_limits: GaugeVec,
    /// Sessions that just talk, on threads of their own; set when asked for.
    pub settled: IntGauge,
    /// Connections to a server that does not lead yet; set when asked for.
    pub ahead: IntGauge,
    /// Connections that wait for a server; set when asked for.
    pub held: IntGauge,
    /// How long they waited, by port and outcome (`served`, `expired`, `client_gone`, `full`,
    /// `shutdown`, `early_data`).
    pub hold_seconds: HistogramVec,
    /// Connects to servers, by member and result (`ok`, `refused`, `timeout`, `abandoned`, `error`).
    pub connects: IntCounterVec,
    /// How long successful connects took, by member.
    pub connect_seconds: HistogramVec,
    /// Bytes relayed, by port, member and direction (`to_server`, `to_client`).
    pub bytes: IntCounterVec,
    /// Connections that ended, by port, member (empty: they had no server) and reason.
    pub ended: IntCounterVec,
    /// Cancel requests, by port and result (`known`, `forwarded`, `no_server`, `limited`).
    pub cancels: IntCounterVec,
    /// Failed `accept` calls.
    pub accept_errors: IntCounter,
    /// Seconds since the DCS last confirmed what is known; set when asked for.
    pub knowledge_age: Gauge,
    /// 1 while the DCS confirms what is known.
    pub confirmed: IntGauge,
    /// 1 while a new leader waits for this router; set when asked for.
    pub registered: IntGauge,
    /// 1 while there is a server for writes.
    pub writable: IntGauge,
    /// How long there was no server for writes, per event.
    pub outage_seconds: Histogram,
    /// How long the last such event was.
    pub last_outage: Gauge,
    /// Times that the configuration was read again, by result (`applied`, `unchanged`, `refused`).
    pub reloads: IntCounterVec,
    /// 1 while the configuration file is wrong, so that the one before is in force.
    pub config_refused: IntGauge,
    /// Sessions taken over from another process.
    pub adopted: IntCounter,
    /// Changes of leadership seen.
    pub leader_changes: IntCounter,
    /// Planned stops that leaders have announced.
    pub resignations: IntCounter,
    /// Revision of the DCS that the routes were made of.
    pub revision: IntGauge,
}

/// Counters of the bytes of a port's sessions on one member.
#[derive(Debug, Clone)]
pub struct Meter {
    to_server: IntCounter,
    to_client: IntCounter,
}

impl Meter {
    /// Bytes from the client to the server.
    pub fn up(&self, bytes: u64) {
        self.to_server.inc_by(bytes);
    }

    /// Bytes from the server to the client.
    pub fn down(&self, bytes: u64) {
        self.to_client.inc_by(bytes);
    }
}

impl Metrics {
    /// Everything at zero. Fails only for two metrics of one name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let r = &registry;
        let opts = |name: &str, help: &str| Opts::new(format!("trunkline_router_{name}"), help);
        let histogram = |name: &str, help: &str| HistogramOpts::from(opts(name, help));
        let waits = vec![0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
        let metrics = Self {
            accepted: add(r, IntCounterVec::new(opts("accepted_total", "Connections accepted."), &["port"]))?,
            sessions: add(r, IntGaugeVec::new(opts("sessions", "Sessions with a server."), &["port", "member"]))?,
            connections: add(
                r,
                IntGaugeVec::new(opts("connections", "Connections, with a server or without."), &["port"]),
            )?,
            candidates: add(
                r,
                IntGaugeVec::new(opts("candidates", "Servers that a new session may go to."), &["port"]),
            )?,
            lag_bytes: add(r, IntGaugeVec::new(opts("lag_bytes", "Bytes that a standby is behind."), &["member"]))?,
            lag_seconds: add(
                r,
                GaugeVec::new(opts("lag_seconds", "How long the leader has had what a standby lacks."), &["member"]),
            )?,
            limits: add(r, GaugeVec::new(opts("limit", "The bounds that are in force."), &["limit"]))?,
            port_limits: add(
                r,
                GaugeVec::new(opts("port_limit", "The bounds of a port that are in force."), &["port", "limit"]),
            )?,
            settled: add(
                r,
                IntGauge::with_opts(opts("settled", "Sessions that just talk, on threads that do nothing else.")),
            )?,
            ahead: add(r, IntGauge::with_opts(opts("ahead", "Connections to a server that does not lead yet.")))?,
            held: add(r, IntGauge::with_opts(opts("held", "Connections that wait for a server.")))?,
            hold_seconds: add(
                r,
                HistogramVec::new(
                    histogram("hold_seconds", "How long connections waited for a server.").buckets(waits.clone()),
                    &["port", "outcome"],
                ),
            )?,
            connects: add(
                r,
                IntCounterVec::new(opts("connects_total", "Connects to servers."), &["member", "result"]),
            )?,
            connect_seconds: add(
                r,
                HistogramVec::new(
                    histogram("connect_seconds", "How long connects to servers took.")
                        .buckets(vec![0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05, 0.25, 1.0]),
                    &["member"],
                ),
            )?,
            bytes: add(r, IntCounterVec::new(opts("bytes_total", "Bytes relayed."), &["port", "member", "direction"]))?,
            ended: add(
                r,
                IntCounterVec::new(
                    opts("ended_total", "Connections that ended, and why."),
                    &["port", "member", "reason"],
                ),
            )?,
            cancels: add(r, IntCounterVec::new(opts("cancels_total", "Cancel requests."), &["port", "result"]))?,
            accept_errors: add(r, IntCounter::with_opts(opts("accept_errors_total", "Failed accepts.")))?,
            knowledge_age: add(
                r,
                Gauge::with_opts(opts(
                    "knowledge_age_seconds",
                    "Time since the DCS last confirmed what is known; -1 if it never did.",
                )),
            )?,
            confirmed: add(r, IntGauge::with_opts(opts("confirmed", "1 while the DCS confirms what is known.")))?,
            registered: add(
                r,
                IntGauge::with_opts(opts("registered", "1 while a new leader waits for this router (router_lease).")),
            )?,
            writable: add(r, IntGauge::with_opts(opts("writable", "1 while there is a server for writes.")))?,
            outage_seconds: add(
                r,
                Histogram::with_opts(
                    histogram("outage_seconds", "How long there was no server for writes, per event.").buckets(waits),
                ),
            )?,
            last_outage: add(
                r,
                Gauge::with_opts(opts("last_outage_seconds", "How long there was no server for writes the last time.")),
            )?,
            reloads: add(
                r,
                IntCounterVec::new(opts("reloads_total", "Times that the configuration was read again."), &["result"]),
            )?,
            config_refused: add(
                r,
                IntGauge::with_opts(opts("config_refused", "1 while the file is wrong and the one before in force.")),
            )?,
            adopted: add(r, IntCounter::with_opts(opts("adopted_total", "Sessions taken over from another process.")))?,
            leader_changes: add(
                r,
                IntCounter::with_opts(opts(
                    "leader_changes_total",
                    "Leaders that sessions were led to, one after the other.",
                )),
            )?,
            resignations: add(
                r,
                IntCounter::with_opts(opts("resignations_total", "Planned stops that leaders have announced.")),
            )?,
            revision: add(r, IntGauge::with_opts(opts("revision", "Revision of the DCS that the routes show.")))?,
            registry: registry.clone(),
        };
        metrics.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        Ok(metrics)
    }

    /// The byte counters of sessions of `port` on `member`.
    pub fn meter(&self, port: &str, member: &str) -> Meter {
        Meter {
            to_server: self.bytes.with_label_values(&[port, member, "to_server"]),
            to_client: self.bytes.with_label_values(&[port, member, "to_client"]),
        }
    }

    /// Everything in Prometheus' text format.
    pub fn render(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

fn add<C: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> prometheus::Result<C> {
    let metric = made?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_registers_and_renders() {
        let metrics = Metrics::new().unwrap();
        metrics.meter("rw", "a").up(7);
        metrics.ended.with_label_values(&["rw", "a", "client"]).inc();
        let text = metrics.render().unwrap();
        assert!(
            text.contains("trunkline_router_bytes_total{direction=\"to_server\",member=\"a\",port=\"rw\"} 7"),
            "{text}"
        );
        assert!(text.contains("trunkline_router_ended_total{member=\"a\",port=\"rw\",reason=\"client\"} 1"), "{text}");
    }
}
