//! The log of a whole process (logging is set up once per process).

use tracing::{debug, error, info, warn};
use trunkline_common::telemetry::{self, TelemetryError};
use trunkline_config::local::Log;

#[test]
fn logs_as_patroni_does() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log { dir: Some(dir.path().to_owned()), ..Log::default() };
    let unknown = Log { dateformat: Some("%Q".to_owned()), ..log.clone() };
    assert!(matches!(telemetry::init(&unknown), Err(TelemetryError::DateFormat(_))));
    let telemetry = telemetry::init(&log).unwrap();
    debug!("not yet");
    info!("no action. I am ({}), the leader with the lock", "pg-a");
    warn!(key = "/service/demo/config", "malformed");
    error!(critical = true, "out of here");
    telemetry.set_level("DEBUG").unwrap();
    debug!("now");
    telemetry.set_level("ERROR").unwrap();
    warn!("not any more");
    error!("{}", "two\nlines");
    assert!(matches!(telemetry.set_level("LOUD"), Err(TelemetryError::Level(_))));
    assert!(matches!(telemetry::init(&log), Err(TelemetryError::Again)));
    drop(telemetry);

    let text = std::fs::read_to_string(dir.path().join("patroni.log")).unwrap();
    let mut said = Vec::new();
    for line in text.lines() {
        let (time, rest) = line.split_at(23);
        let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect();
        assert_eq!(shape, "9999-99-99 99:99:99,999", "{line}");
        said.push(rest);
    }
    let expected = [
        " INFO: no action. I am (pg-a), the leader with the lock",
        " WARNING: malformed key=/service/demo/config",
        " CRITICAL: out of here",
        " DEBUG: now",
        " ERROR: two\\nlines",
    ];
    assert_eq!(said, expected);
}
