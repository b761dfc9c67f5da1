//! Schedules: reading a time as people write it, writing it as Python does.

use chrono::{DateTime, FixedOffset, NaiveDateTime, Utc};

/// Why a schedule is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BadSchedule {
    /// Whose local time?
    NoOffset,
    /// Too late.
    Past,
    /// Not a time.
    Unparsable,
}

impl BadSchedule {
    /// The answer's status code.
    pub fn status(self) -> u16 {
        match self {
            Self::NoOffset => 400,
            Self::Past | Self::Unparsable => 422,
        }
    }

    /// The answer's sentence.
    pub fn sentence(self, action: &str) -> String {
        match self {
            Self::NoOffset => format!("the time of a scheduled {action} needs a UTC offset"),
            Self::Past => format!("a {action} can't be scheduled for the past"),
            Self::Unparsable => "not a time: write it like 2031-05-01T10:00:00+00:00".to_owned(),
        }
    }
}

/// Reads a future time with offset: ISO 8601 with its usual liberties (a space for `T`, no seconds, `Z`, `UTC`, `+0200`).
pub(crate) fn parse_schedule(text: &str, now: DateTime<Utc>) -> Result<DateTime<FixedOffset>, BadSchedule> {
    let time = with_offset(text.trim())?;
    if time < now { Err(BadSchedule::Past) } else { Ok(time) }
}

fn with_offset(text: &str) -> Result<DateTime<FixedOffset>, BadSchedule> {
    const DATES: [&str; 2] = ["%Y-%m-%d", "%Y%m%d"];
    const TIMES: [&str; 4] = ["%H:%M:%S%.f", "%H:%M", "%H%M%S", "%H%M"];
    // The separator only: "UTC" has a T as well.
    let after_date = text.find(|c: char| !c.is_ascii_digit() && c != '-').filter(|at| text[*at..].starts_with('T'));
    let text = after_date.map_or(text.to_owned(), |at| format!("{} {}", &text[..at], &text[at + 1..]));
    let zulu = ["UTC", "GMT", "Z", "z"].iter().find_map(|zone| text.strip_suffix(zone));
    let numeric = zulu.map_or_else(|| text.clone(), |local| format!("{}+00:00", local.trim_end()));
    let formats = || DATES.iter().flat_map(|date| TIMES.iter().map(move |time| format!("{date} {time}")));
    for format in formats() {
        for offset in ["%#z", " %#z"] {
            if let Ok(time) = DateTime::parse_from_str(&numeric, &format!("{format}{offset}")) {
                return Ok(time);
            }
        }
    }
    let naive = formats().any(|format| NaiveDateTime::parse_from_str(&text, &format).is_ok());
    Err(if naive { BadSchedule::NoOffset } else { BadSchedule::Unparsable })
}

/// Python's `isoformat()`: microseconds only where there are some.
pub(crate) fn isoformat(time: DateTime<FixedOffset>) -> String {
    let fraction = if time.timestamp_subsec_micros() == 0 { "" } else { "%.6f" };
    time.format(&format!("%Y-%m-%dT%H:%M:%S{fraction}%:z")).to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<String, BadSchedule> {
        parse_schedule(text, DateTime::from_timestamp(1_800_000_000, 0).unwrap()).map(isoformat)
    }

    #[test]
    fn reads_the_usual_forms() {
        let table = [
            ("2031-05-01T10:00:00+00:00", "2031-05-01T10:00:00+00:00"),
            ("2031-05-01T10:00:00.5+02:00", "2031-05-01T10:00:00.500000+02:00"),
            ("2031-05-01 10:00:00Z", "2031-05-01T10:00:00+00:00"),
            ("2031-05-01 10:00 UTC", "2031-05-01T10:00:00+00:00"),
            ("2031-05-01T10:00+0200", "2031-05-01T10:00:00+02:00"),
            ("2031-05-01T10:00:00-07", "2031-05-01T10:00:00-07:00"),
            ("20310501T100000Z", "2031-05-01T10:00:00+00:00"),
        ];
        for (text, expected) in table {
            assert_eq!(parse(text), Ok(expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn says_what_is_wrong() {
        let table = [
            ("2031-05-01T10:00:00", BadSchedule::NoOffset),
            ("2031-05-01 10:00", BadSchedule::NoOffset),
            ("2001-05-01T10:00:00Z", BadSchedule::Past),
            ("", BadSchedule::Unparsable),
            ("Z", BadSchedule::Unparsable),
            ("tomorrow", BadSchedule::Unparsable),
            ("2031-13-01T10:00:00Z", BadSchedule::Unparsable),
        ];
        for (text, expected) in table {
            assert_eq!(parse(text), Err(expected), "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text: String) {
            let _ = parse(&text);
        }
    }
}
