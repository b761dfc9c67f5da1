//! An event as a line of text or JSON.

use std::fmt::{self, Write};

use chrono::{DateTime, Local};
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;
use trunkline_config::local::Log;

use crate::{Clock, SystemClock};

/// How events are written.
pub(super) struct Format {
    pub(super) style: PythonStyle,
    pub(super) of: Log,
}

impl<S, N> FormatEvent<S, N> for Format
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let function = ctx.lookup_current().map_or("", |span| span.metadata().name());
        let record = Record::new(event, function, SystemClock.wall().with_timezone(&Local));
        let record = record.dated(self.of.dateformat.as_deref());
        let line = if self.of.json { self.style.json(&record, &self.of) } else { self.style.text(&record) };
        writeln!(writer, "{line}")
    }
}

/// What Python's `LogRecord` knows of an event, as far as we know it.
pub(super) struct Record {
    at: DateTime<Local>,
    asctime: String,
    level: &'static str,
    message: String,
    fields: Map<String, Value>,
    target: String,
    file: String,
    line: u32,
    function: String,
}

impl Record {
    fn new(event: &Event<'_>, function: &str, at: DateTime<Local>) -> Self {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let meta = event.metadata();
        let level = match *meta.level() {
            Level::ERROR if fields.critical => "CRITICAL",
            Level::ERROR => "ERROR",
            Level::WARN => "WARNING",
            Level::INFO => "INFO",
            Level::DEBUG | Level::TRACE => "DEBUG",
        };
        Self {
            at,
            asctime: String::new(),
            level,
            message: fields.message,
            fields: fields.others,
            target: meta.target().to_owned(),
            file: meta.file().unwrap_or("").to_owned(),
            line: meta.line().unwrap_or(0),
            function: function.to_owned(),
        }
    }

    /// With its time as that format of strftime writes it, or as Patroni does.
    fn dated(mut self, format: Option<&str>) -> Self {
        let _ = write!(self.asctime, "{}", self.at.format(format.unwrap_or("%Y-%m-%d %H:%M:%S,%3f")));
        self
    }

    /// The message with the event's other fields behind it, on one line: what a peer or a client sends may hold line
    /// breaks, and must not be able to write lines of its own into the log.
    fn message(&self) -> String {
        let mut text = self.message.replace('\n', "\\n").replace('\r', "\\r");
        for (name, value) in &self.fields {
            let value = value.as_str().map_or_else(|| value.to_string(), |text| text.escape_debug().to_string());
            let _ = write!(text, " {name}={value}");
        }
        text
    }

    fn token(&self, name: &str) -> Option<String> {
        let last = |path: &str, separator: char| path.rsplit(separator).next().unwrap_or("").to_owned();
        Some(match name {
            "asctime" => self.asctime.clone(),
            "created" => format!("{}.{:06}", self.at.timestamp(), self.at.timestamp_subsec_micros()),
            "msecs" => self.at.timestamp_subsec_millis().to_string(),
            "levelname" => self.level.to_owned(),
            "levelno" => match self.level {
                "DEBUG" => "10",
                "INFO" => "20",
                "WARNING" => "30",
                "ERROR" => "40",
                _ => "50",
            }
            .to_owned(),
            "message" => self.message(),
            "name" => self.target.clone(),
            "process" => std::process::id().to_string(),
            "processName" => "MainProcess".to_owned(),
            "pathname" => self.file.clone(),
            "filename" => last(&self.file, '/'),
            "module" => last(&self.file, '/').trim_end_matches(".rs").to_owned(),
            "lineno" => self.line.to_string(),
            "funcName" => self.function.clone(),
            "threadName" => std::thread::current().name().unwrap_or("MainThread").to_owned(),
            _ => return None,
        })
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    critical: bool,
    others: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), &value) {
            ("message", Value::String(text)) => self.message.clone_from(text),
            ("critical", Value::Bool(critical)) => self.critical = *critical,
            // What the `log` bridge adds.
            (name, _) if name.starts_with("log.") => {}
            (name, _) => drop(self.others.insert(name.to_owned(), value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, Value::String(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}

/// A format of Python's logging module in its `%` style.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PythonStyle(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Token { name: String, width: usize, left: bool },
}

impl PythonStyle {
    /// Understands `%(name)s` with width and `-`, and `%%`; everything else is text.
    pub(super) fn parse(format: &str) -> Self {
        let mut pieces = Vec::new();
        let mut text = String::new();
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            text.push_str(&rest[..at]);
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix("%%") {
                text.push('%');
                rest = after;
            } else if let Some((token, after)) = token(rest) {
                if !text.is_empty() {
                    pieces.push(Piece::Text(std::mem::take(&mut text)));
                }
                pieces.push(token);
                rest = after;
            } else {
                text.push('%');
                rest = &rest[1..];
            }
        }
        text.push_str(rest);
        if !text.is_empty() {
            pieces.push(Piece::Text(text));
        }
        Self(pieces)
    }

    fn text(&self, record: &Record) -> String {
        let mut line = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => line.push_str(text),
                Piece::Token { name, width, left } => {
                    let value = record.token(name).unwrap_or_else(|| format!("%({name})s"));
                    let _ = if *left { write!(line, "{value:<width$}") } else { write!(line, "{value:>width$}") };
                }
            }
        }
        line
    }

    /// The format's tokens as members, then the event's fields and those that every line has.
    fn json(&self, record: &Record, log: &Log) -> String {
        let mut map = Map::new();
        for piece in &self.0 {
            let Piece::Token { name, .. } = piece else { continue };
            let value = match name.as_str() {
                "message" => Some(Value::from(record.message.clone())),
                "lineno" => Some(Value::from(record.line)),
                "process" => Some(Value::from(std::process::id())),
                name => record.token(name).map(Value::from),
            };
            if let Some(value) = value {
                map.insert(log.renamed.get(name).unwrap_or(name).clone(), value);
            }
        }
        for (name, value) in record.fields.iter().chain(&log.static_fields) {
            map.entry(name.clone()).or_insert_with(|| value.clone());
        }
        Value::Object(map).to_string()
    }
}

/// `%(name)-8s` at the beginning of `text`, and what follows it.
fn token(text: &str) -> Option<(Piece, &str)> {
    const WIDEST: usize = 200;
    let (name, rest) = text.strip_prefix("%(")?.split_once(')')?;
    let end = rest.find(|c: char| !(c.is_ascii_digit() || matches!(c, '-' | '.' | '+' | ' ' | '#')))?;
    let (flags, rest) = rest.split_at(end);
    let rest = rest.strip_prefix(['s', 'd', 'f', 'r', 'i'])?;
    let left = flags.starts_with('-');
    let digits = flags.trim_start_matches(['-', '+', ' ', '#']);
    let width = digits.split('.').next().and_then(|digits| digits.parse().ok()).unwrap_or(0);
    Some((Piece::Token { name: name.to_owned(), width: usize::min(width, WIDEST), left }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(message: &str) -> Record {
        let at = DateTime::parse_from_rfc3339("2031-05-01T10:00:00.123456+00:00").unwrap();
        Record {
            at: at.with_timezone(&Local),
            asctime: String::new(),
            level: "WARNING",
            message: message.to_owned(),
            fields: Map::from_iter([("key".to_owned(), "a\nb".into()), ("n".to_owned(), 5.into())]),
            target: "trunkline_agent::ha".to_owned(),
            file: "agent/src/ha/mod.rs".to_owned(),
            line: 12,
            function: "tick".to_owned(),
        }
        .dated(None)
    }

    #[test]
    fn writes_patronis_line() {
        let at = record("").token("asctime").unwrap();
        assert_eq!((at.len(), &at[19..]), (23, ",123"), "milliseconds behind a comma");
        assert_eq!(record("").dated(Some("%Y")).token("asctime").unwrap(), format!("{at}2031"));
        for (format, line) in [
            ("%(asctime)s %(levelname)s: %(message)s", format!("{at} WARNING: hello key=a\\nb n=5")),
            ("[%(levelname)-9s|%(levelname)8s] %(lineno)5d", "[WARNING  | WARNING]    12".to_owned()),
            ("%(name)s %(module)s %(filename)s %(funcName)s", "trunkline_agent::ha mod mod.rs tick".to_owned()),
            ("100%% %(nothing)s %(broken %s", "100% %(nothing)s %(broken %s".to_owned()),
            ("", String::new()),
        ] {
            assert_eq!(PythonStyle::parse(format).text(&record("hello")), line, "{format}");
        }
        let pid = std::process::id().to_string();
        assert_eq!(PythonStyle::parse("%(process)d").text(&record("")), pid);
    }

    #[test]
    fn a_message_is_one_line() {
        let line = PythonStyle::parse("%(message)s").text(&record("a\nb\r\nc"));
        assert_eq!(line, "a\\nb\\r\\nc key=a\\nb n=5");
    }

    #[test]
    fn writes_json() {
        let log = Log {
            renamed: [("levelname".to_owned(), "level".to_owned())].into(),
            static_fields: Map::from_iter([("site".to_owned(), "b".into())]),
            ..Log::default()
        };
        let line = PythonStyle::parse("%(levelname)s %(message)s %(lineno)d").json(&record("say \"x\"\n"), &log);
        let value: Value = serde_json::from_str(&line).unwrap();
        let expected = serde_json::json!({
            "level": "WARNING", "message": "say \"x\"\n", "lineno": 12, "key": "a\nb", "n": 5, "site": "b"
        });
        assert_eq!(value, expected);
        assert!(!line.contains('\n'));
    }

    proptest! {
        #[test]
        fn any_format_is_usable(format: String, message: String) {
            let line = PythonStyle::parse(&format).text(&record(&message));
            prop_assert!(line.len() <= 4000 + format.len() * (message.len() + 400));
        }
    }
}
