//! Logs as Patroni writes them: the same line, levels and `log.format` tokens, so that existing parsers go on working.
//!
//! Lines go through a bounded queue to a thread of their own, as in Patroni: a blocked standard error or a full disk must
//! not stop the HA loop. What does not fit into the queue is dropped and counted.

mod format;
mod sink;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use chrono::format::{Item, StrftimeItems};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{fmt, reload};
use trunkline_config::local::Log;

use self::format::{Format, PythonStyle};
use self::sink::Sink;

/// Libraries that say much at debug that helps nobody here.
const QUIET: [&str; 8] = ["h2", "hyper", "hyper_util", "tonic", "tower", "rustls", "reqwest", "mio"];

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The log file cannot be written.
    #[error("log.dir: {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The thread that writes cannot be started.
    #[error("the log cannot be written: {0}")]
    Thread(io::Error),
    /// Not one of Python's level names.
    #[error("log.level: '{0}' is none of DEBUG, INFO, WARNING, ERROR, CRITICAL")]
    Level(String),
    /// Not a format of strftime.
    #[error("log.dateformat: '{0}' is no format of strftime")]
    DateFormat(String),
    /// Somebody else has set up logging in this process.
    #[error("logging is set up already")]
    Again,
}

/// The running log. Dropping it writes what is still queued.
pub struct Telemetry {
    sink: Sink,
    /// Replaces the filter; false if there is none any more.
    replace: Box<dyn Fn(Targets) -> bool + Send + Sync>,
}

/// Sets up logging for the process. `RUST_LOG` (`info,trunkline_agent=debug`), where set, is used instead of `log.level`.
pub fn init(log: &Log) -> Result<Telemetry, TelemetryError> {
    let level = Level::parse(&log.level)?;
    if let Some(format) = log.dateformat.as_ref().filter(|format| StrftimeItems::new(format).any(|i| i == Item::Error))
    {
        return Err(TelemetryError::DateFormat(format.clone()));
    }
    let sink = Sink::start(log)?;
    let format = Format { style: PythonStyle::parse(&log.format), of: log.clone() };
    let writer = sink.clone();
    let of_environment = std::env::var("RUST_LOG").ok().and_then(|text| text.parse().ok());
    let (filter, handle) = reload::Layer::new(of_environment.unwrap_or_else(|| level.filter()));
    let lines = fmt::layer().with_ansi(false).event_format(format).with_writer(move || writer.clone());
    let subscriber = tracing_subscriber::registry().with(filter).with(lines);
    subscriber.try_init().map_err(|_| TelemetryError::Again)?;
    Ok(Telemetry { sink, replace: Box::new(move |filter| handle.reload(filter).is_ok()) })
}

impl Telemetry {
    /// Changes the level, after a reload of the configuration.
    pub fn set_level(&self, level: &str) -> Result<(), TelemetryError> {
        let filter = Level::parse(level)?.filter();
        if (self.replace)(filter) { Ok(()) } else { Err(TelemetryError::Again) }
    }

    /// Waits until everything logged so far is written, at most a second: for an end by `std::process::exit`.
    pub fn flush(&self) {
        self.sink.flush(Duration::from_secs(1));
    }

    /// Lines dropped because the queue was full.
    pub fn dropped(&self) -> u64 {
        self.sink.dropped()
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Python's levels. `CRITICAL` is an error event with the field `critical = true`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Debug,
    Info,
    Warning,
    Error,
}

impl Level {
    /// Python's names in any case, with its aliases.
    fn parse(name: &str) -> Result<Self, TelemetryError> {
        match name.to_ascii_uppercase().as_str() {
            "DEBUG" | "NOTSET" => Ok(Level::Debug),
            "INFO" => Ok(Level::Info),
            "WARNING" | "WARN" => Ok(Level::Warning),
            // Nothing here says what is critical but not an error: the two filters are one.
            "ERROR" | "CRITICAL" | "FATAL" => Ok(Level::Error),
            _ => Err(TelemetryError::Level(name.to_owned())),
        }
    }

    fn filter(self) -> Targets {
        let level = match self {
            Level::Debug => LevelFilter::DEBUG,
            Level::Info => LevelFilter::INFO,
            Level::Warning => LevelFilter::WARN,
            Level::Error => LevelFilter::ERROR,
        };
        let quiet = QUIET.map(|library| (library, level.min(LevelFilter::INFO)));
        Targets::new().with_default(level).with_targets(quiet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_pythons() {
        for name in ["DEBUG", "info", "Warning", "WARN", "ERROR", "CRITICAL"] {
            assert!(Level::parse(name).is_ok(), "{name}");
        }
        let error = Level::parse("LOUD").unwrap_err().to_string();
        assert!(error.contains("log.level") && error.contains("LOUD"), "{error}");
    }

    #[test]
    fn libraries_are_quiet_at_debug_and_never_louder_than_ourselves() {
        let says = |level: Level, target, what| level.filter().would_enable(target, &what);
        assert!(says(Level::Debug, "trunkline_agent::ha", tracing::Level::DEBUG));
        assert!(
            !says(Level::Debug, "h2::client", tracing::Level::DEBUG) && says(Level::Debug, "h2", tracing::Level::INFO)
        );
        assert!(!says(Level::Warning, "h2", tracing::Level::INFO) && says(Level::Warning, "h2", tracing::Level::WARN));
        assert!(!says(Level::Info, "trunkline_agent", tracing::Level::DEBUG));
    }
}
