//! Text as Python and click make it, where scripts compare it.

pub(super) use crate::rest::json::{python_repr, python_str, quoted};
use chrono::{DateTime, FixedOffset, Local, NaiveDate, NaiveDateTime, NaiveTime, TimeZone, Utc};

/// `sync_standby` → `Sync Standby`.
pub(super) fn title_case(role: &str) -> String {
    let word = |word: &str| {
        let mut chars = word.chars();
        chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
    };
    role.split('_').map(word).collect::<Vec<_>>().join(" ")
}

/// `server_version` of a member's status: 150004 → `15.4`, 90624 → `9.6.24`.
pub(super) fn pg_version(number: i64) -> String {
    if number < 100_000 {
        format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100)
    } else {
        format!("{}.{}", number / 10_000, number % 100)
    }
}

/// `2031-05-01 10:30:16`.
pub(super) fn seconds_stamp(now: DateTime<Utc>) -> String {
    now.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S").to_string()
}

/// `2031-05-01 10:30:16.46883`: five digits, which scripts have learnt to expect.
pub(super) fn fine_stamp(now: DateTime<Utc>) -> String {
    let local = now.with_timezone(&Local);
    let fraction = local.timestamp_subsec_micros() % 1_000_000 / 10;
    format!("{}.{fraction:05}", local.format("%Y-%m-%d %H:%M:%S"))
}

/// An hour from now, as an example of how to write a time.
pub(super) fn next_hour(now: DateTime<Utc>) -> String {
    (now + chrono::TimeDelta::hours(1)).with_timezone(&Local).format("%Y-%m-%dT%H:%M").to_string()
}

/// Python's `isoformat(sep)`: microseconds only where there are some.
pub(super) fn isoformat(time: DateTime<FixedOffset>, separator: char) -> String {
    let fraction = if time.timestamp_subsec_micros() == 0 { "" } else { "%.6f" };
    time.format(&format!("%Y-%m-%d{separator}%H:%M:%S{fraction}%:z")).to_string()
}

/// Reads a schedule. `Ok(None)` is "now"; a time without offset is local, one without a date is today's.
///
/// # Errors
/// The text, where it is not a time: ISO 8601 with its usual liberties is understood.
pub(super) fn parse_schedule(text: &str, now: DateTime<Utc>) -> Result<Option<DateTime<FixedOffset>>, String> {
    let trimmed = text.trim();
    if trimmed.is_empty() || trimmed == "now" {
        return Ok(None);
    }
    let (local, offset) = split_offset(trimmed);
    let time = naive_time(local.trim(), now).and_then(|naive| match offset {
        Some(seconds) => FixedOffset::east_opt(seconds)?.from_local_datetime(&naive).single(),
        None => Local.from_local_datetime(&naive).earliest().map(|time| time.fixed_offset()),
    });
    time.map(Some).ok_or_else(|| text.to_owned())
}

/// Cuts `Z`, `UTC`, `+02`, `+0200` or `+02:00` off; seconds east.
fn split_offset(text: &str) -> (&str, Option<i32>) {
    if let Some(local) = ["UTC", "GMT", "Z", "z"].iter().find_map(|zone| text.strip_suffix(zone)) {
        return (local, Some(0));
    }
    // A sign in the time part is an offset; in the date part it is a hyphen.
    let Some(colon) = text.find(':') else { return (text, None) };
    let Some(at) = text[colon..].find(['+', '-']).map(|at| colon + at) else { return (text, None) };
    match offset_seconds(&text[at + 1..]) {
        Some(seconds) if text[at..].starts_with('-') => (&text[..at], Some(-seconds)),
        Some(seconds) => (&text[..at], Some(seconds)),
        None => (text, None),
    }
}

fn offset_seconds(text: &str) -> Option<i32> {
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<i32>().ok()).flatten();
    let (hours, minutes) = match (text.split_once(':'), text.len()) {
        (Some((hours, minutes)), _) => (number(hours)?, number(minutes)?),
        (None, 1 | 2) => (number(text)?, 0),
        (None, 4) => (number(text.get(..2)?)?, number(text.get(2..)?)?),
        _ => return None,
    };
    (hours < 24 && minutes < 60).then_some((hours * 60 + minutes) * 60)
}

fn naive_time(text: &str, now: DateTime<Utc>) -> Option<NaiveDateTime> {
    const DATES: [&str; 3] = ["%Y-%m-%d", "%Y/%m/%d", "%Y%m%d"];
    const TIMES: [&str; 3] = ["%H:%M:%S%.f", "%H:%M", "%H%M%S"];
    let text = text.replacen('T', " ", 1);
    let moment = |date: &str, time: &str| NaiveDateTime::parse_from_str(&text, &format!("{date} {time}")).ok();
    DATES
        .iter()
        .find_map(|date| TIMES.iter().find_map(|time| moment(date, time)))
        .or_else(|| {
            let date = DATES.iter().find_map(|date| NaiveDate::parse_from_str(&text, date).ok())?;
            Some(date.and_time(NaiveTime::MIN))
        })
        .or_else(|| {
            let time = TIMES[..2].iter().find_map(|time| NaiveTime::parse_from_str(&text, time).ok())?;
            Some(now.with_timezone(&Local).date_naive().and_time(time))
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 123_456_789).unwrap()
    }

    #[test]
    fn schedules_are_read_with_the_usual_liberties() {
        let table = [
            ("2031-01-01T00:00:00+00:00", "2031-01-01T00:00:00+00:00"),
            ("2031-01-01 00:00Z", "2031-01-01T00:00:00+00:00"),
            ("2031-01-01 00:00 UTC", "2031-01-01T00:00:00+00:00"),
            ("2023-05-29T04:32:31-3", "2023-05-29T04:32:31-03:00"),
            ("2023-05-29T04:32:31.5+0530", "2023-05-29T04:32:31.500000+05:30"),
            ("2023-05-29 04:32:31 +02:00", "2023-05-29T04:32:31+02:00"),
        ];
        for (text, expected) in table {
            let time = parse_schedule(text, now()).unwrap().unwrap();
            assert_eq!(isoformat(time, 'T'), expected, "{text}");
        }
        for text in ["2031-01-01T10:00", "2031-01-01", "10:30", "10:30:05"] {
            assert!(parse_schedule(text, now()).unwrap().is_some(), "{text}");
        }
        assert_eq!(parse_schedule("now", now()), Ok(None));
        assert_eq!(parse_schedule("", now()), Ok(None));
        for text in ["yesterday", "2031-13-01", "2031-01-01T10:00+99:99", "25:00", "é"] {
            assert_eq!(parse_schedule(text, now()), Err(text.to_owned()));
        }
    }

    #[test]
    fn stamps_have_five_digits() {
        assert!(fine_stamp(now()).ends_with(".12345"));
        assert_eq!(seconds_stamp(now()).len(), 19);
    }

    #[test]
    fn roles_and_versions() {
        for (role, text) in [("leader", "Leader"), ("standby_leader", "Standby Leader"), ("", "")] {
            assert_eq!(title_case(role), text);
        }
        for (number, text) in [(90624, "9.6.24"), (100_000, "10.0"), (150_018, "15.18")] {
            assert_eq!(pg_version(number), text);
        }
    }

    proptest! {
        #[test]
        fn no_schedule_panics(text: String) {
            let _ = parse_schedule(&text, now());
        }

        #[test]
        fn nothing_like_a_time_panics(text in "[-0-9TZ :+.]{0,30}") {
            let _ = parse_schedule(&text, now());
        }
    }
}
