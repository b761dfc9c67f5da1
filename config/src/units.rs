//! Durations and sizes of `router.yml`.

use std::time::Duration;

/// A day: no wait of a router is longer.
const LONGEST: f64 = 86_400.0;

/// `500ms`, `5s`, `1min`, `2h`, or a plain number of seconds, at most a day.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = number_and_unit(text)?;
    let factor = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "min" | "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    let seconds = number * factor;
    (seconds <= LONGEST).then(|| Duration::from_micros((seconds * 1e6).round() as u64))
}

/// A number of bytes, with `B`, `kB`, `MB`, `GB` or `TB` of 1024 each, in any case.
pub(crate) fn parse_bytes(text: &str) -> Option<u64> {
    let (number, unit) = number_and_unit(text)?;
    let power = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "kb" => 1,
        "mb" => 2,
        "gb" => 3,
        "tb" => 4,
        _ => return None,
    };
    let bytes = number * 1024f64.powi(power);
    (bytes <= 2f64.powi(62)).then_some(bytes.round() as u64)
}

fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number = text[..end].parse().ok()?;
    Some((number, text[end..].trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let cases = [
            ("500ms", Some(500)),
            ("5s", Some(5_000)),
            ("5", Some(5_000)),
            ("0.5", Some(500)),
            ("1min", Some(60_000)),
            ("2 h", Some(7_200_000)),
            ("0", Some(0)),
            ("-1s", None),
            ("5 apples", None),
            ("", None),
            ("25h", None),
            ("1.2.3", None),
            ("99999999999999999999999999", None),
        ];
        for (text, millis) in cases {
            assert_eq!(parse_duration(text), millis.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn sizes() {
        let cases = [
            ("16MB", Some(16 << 20)),
            ("1gb", Some(1 << 30)),
            ("100", Some(100)),
            ("1.5kB", Some(1536)),
            ("1 TB", Some(1 << 40)),
            ("-1", None),
            ("5s", None),
            ("é", None),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_bytes(text), bytes, "{text}");
        }
    }
}
