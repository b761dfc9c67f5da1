//! Prometheus: a registry per program, passed around, never global.

use prometheus::process_collector::ProcessCollector;
use prometheus::{Registry, TextEncoder};

/// The content type of [`text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A registry that knows this process's CPU time, memory and file descriptors.
pub fn registry() -> Registry {
    let registry = Registry::new();
    if let Err(error) = registry.register(Box::new(ProcessCollector::for_self())) {
        tracing::debug!("no metrics of the process: {error}");
    }
    registry
}

/// Everything registered, in the text format.
pub fn text(registry: &Registry) -> String {
    TextEncoder::new().encode_to_string(&registry.gather()).unwrap_or_else(|error| {
        tracing::debug!("metrics could not be written: {error}");
        String::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_the_text_format() {
        let registry = registry();
        let sessions = prometheus::IntGaugeVec::new(prometheus::opts!("sessions", "Sessions."), &["port"]).unwrap();
        registry.register(Box::new(sessions.clone())).unwrap();
        sessions.with_label_values(&["rw \"1\""]).set(3);
        let text = text(&registry);
        assert!(text.contains("# TYPE sessions gauge\nsessions{port=\"rw \\\"1\\\"\"} 3\n"), "{text}");
        assert!(text.contains("process_open_fds "), "{text}");
    }
}
