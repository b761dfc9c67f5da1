//! Values of PostgreSQL's settings: numbers with units, booleans, and whether two spellings mean the same.

/// A setting's value to a boolean: the words that Patroni takes, in any case.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "on" | "true" | "yes" | "1" => Some(true),
        "off" | "false" | "no" | "0" => Some(false),
        _ => None,
    }
}

/// A whole number in `unit` (`pg_settings.unit`, such as `8kB`, `ms`). Decimal, octal and hexadecimal as C writes them;
/// fractions are rounded; a unit in the text is converted, and is an error where the setting has none.
pub fn parse_int(text: &str, unit: Option<&str>) -> Option<i64> {
    let text = text.trim();
    if let Some((whole, rest)) = leading_integer(text)
        && !rest.starts_with(['.', 'e', 'E'])
        && rest.trim().is_empty()
    {
        return Some(whole);
    }
    let (number, rest) = match leading_integer(text) {
        Some((whole, rest)) if !rest.starts_with(['.', 'e', 'E']) => (whole as f64, rest),
        _ => leading_real(text)?,
    };
    let rounded = in_unit(number, rest.trim(), unit)?.round_ties_even();
    (rounded.abs() < 2f64.powi(63)).then_some(rounded as i64)
}

/// A real number in `unit`.
pub fn parse_real(text: &str, unit: Option<&str>) -> Option<f64> {
    let (number, rest) = leading_real(text.trim())?;
    in_unit(number, rest.trim(), unit)
}

/// Whether the value `current` of `pg_settings.setting` and the configured one mean the same for a setting of type
/// `vartype` (`bool`, `integer`, `real`, `enum`, `string`) and unit `unit`. `current` is in that unit already.
pub fn equal(vartype: &str, unit: Option<&str>, current: &str, configured: &str) -> bool {
    match vartype {
        "bool" => same(parse_bool(current), parse_bool(configured)),
        "integer" => same(parse_int(current, None), parse_int(configured, unit)),
        "real" => same(parse_real(current, None), parse_real(configured, unit)),
        "enum" => current.eq_ignore_ascii_case(configured),
        _ => current == configured,
    }
}

fn same<T: PartialEq>(a: Option<T>, b: Option<T>) -> bool {
    a.is_some() && a == b
}

/// A value of `pg_settings.setting` with the largest unit that shows it without loss: `16384` of `8kB` is `128MB`.
pub fn human(vartype: &str, unit: Option<&str>, value: &str) -> String {
    let shown = match (vartype, unit) {
        ("integer", Some(unit)) => parse_int(value, None).filter(|v| *v != 0).and_then(|v| human_int(v, unit)),
        ("real", Some(unit)) => parse_real(value, None).filter(|v| *v != 0.0).and_then(|v| human_real(v, unit)),
        _ => None,
    };
    shown.unwrap_or_else(|| value.to_owned())
}

fn human_int(value: i64, unit: &str) -> Option<String> {
    let (multiple, unit) = multiple_of(unit);
    let value = i128::from(value) * multiple as i128;
    let base = factor(unit)?;
    family(unit)?.iter().find_map(|(name, factor)| {
        let times = (factor / base) as i128;
        (times <= 1 || value % times == 0).then(|| format!("{}{name}", if times <= 1 { value } else { value / times }))
    })
}

fn human_real(value: f64, unit: &str) -> Option<String> {
    let (multiple, unit) = multiple_of(unit);
    let base = value * multiple * factor(unit)?;
    let family = family(unit)?;
    let exact = family.iter().map(|(name, factor)| (base / factor, *name)).find(|(v, _)| *v > 0.0 && is_whole(*v));
    let (value, name) = exact.or_else(|| family.last().map(|(name, factor)| (base / factor, *name)))?;
    Some(format!("{value}{name}"))
}

fn is_whole(value: f64) -> bool {
    value.round() != 0.0 && ((value.round() / value) - 1.0).abs() <= 1e-8
}

const SPACE: &[(&str, f64)] =
    &[("TB", 1_099_511_627_776.0), ("GB", 1_073_741_824.0), ("MB", 1_048_576.0), ("kB", 1024.0), ("B", 1.0)];

/// In microseconds.
const TIME: &[(&str, f64)] = &[("d", 86_400e6), ("h", 3600e6), ("min", 60e6), ("s", 1e6), ("ms", 1e3), ("us", 1.0)];

fn family(unit: &str) -> Option<&'static [(&'static str, f64)]> {
    [SPACE, TIME].into_iter().find(|family| family.iter().any(|(name, _)| *name == unit))
}

fn factor(unit: &str) -> Option<f64> {
    family(unit)?.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor)
}

/// `8kB` is 8 and `kB`; a bare unit is one of it.
fn multiple_of(unit: &str) -> (f64, &str) {
    match leading_integer(unit) {
        Some((multiple, rest)) if multiple > 0 => (multiple as f64, rest),
        _ => (1.0, unit),
    }
}

/// PostgreSQL rounds a number with a unit to a multiple of the next smaller unit, where there is one.
fn in_unit(number: f64, written: &str, unit: Option<&str>) -> Option<f64> {
    if written.is_empty() {
        return Some(number);
    }
    let (multiple, base) = multiple_of(unit?);
    let family = family(base)?;
    let at = family.iter().position(|(name, _)| *name == written)?;
    let size = factor(base)? * multiple;
    let value = number * family[at].1 / size;
    match family.get(at + 1) {
        Some((_, smaller)) => {
            let step = smaller / factor(base)?;
            Some((value / step).round_ties_even() * step)
        }
        None => Some(value),
    }
}

fn leading_integer(text: &str) -> Option<(i64, &str)> {
    let (negative, unsigned) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let hex = unsigned.strip_prefix("0x").or_else(|| unsigned.strip_prefix("0X"));
    let (radix, digits) = match hex {
        Some(digits) if digits.starts_with(|c: char| c.is_ascii_hexdigit()) => (16, digits),
        _ if octal(unsigned) => (8, unsigned),
        _ => (10, unsigned),
    };
    let end = digits.find(|c: char| !c.is_digit(radix)).unwrap_or(digits.len());
    let magnitude = i64::from_str_radix(&digits[..end], radix).ok()?;
    Some((if negative { -magnitude } else { magnitude }, &digits[end..]))
}

/// A zero, then octal digits only, up to what is no digit.
fn octal(unsigned: &str) -> bool {
    let end = unsigned.find(|c: char| !c.is_ascii_digit()).unwrap_or(unsigned.len());
    unsigned.starts_with('0') && unsigned[..end].bytes().all(|b| b < b'8')
}

fn leading_real(text: &str) -> Option<(f64, &str)> {
    let bytes = text.as_bytes();
    let digits = |from: usize| bytes[from..].iter().take_while(|b| b.is_ascii_digit()).count();
    let start = usize::from(matches!(bytes.first(), Some(b'-' | b'+')));
    let whole = digits(start);
    let mut end = start + whole;
    if bytes.get(end) == Some(&b'.') {
        let fraction = digits(end + 1);
        if whole + fraction > 0 {
            end += 1 + fraction;
        }
    }
    if end == start {
        return None;
    }
    if matches!(bytes.get(end), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(end + 1), Some(b'-' | b'+')));
        let from = end + 1 + sign;
        let exponent = if from <= bytes.len() { digits(from) } else { 0 };
        if exponent > 0 {
            end = from + exponent;
        }
    }
    let number: f64 = text[..end].parse().ok()?;
    number.is_finite().then_some((number, &text[end..]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn whole_numbers() {
        let cases = [
            ("1", None, Some(1)),
            (" 0x400 MB ", Some("16384kB"), Some(64)),
            ("1MB", Some("kB"), Some(1024)),
            ("1000 ms", Some("s"), Some(1)),
            ("1TB", Some("GB"), Some(1024)),
            ("128MB", Some("8kB"), Some(16384)),
            ("nonsense", None, None),
            ("5s", None, None),
            ("6GB", Some("16MB"), Some(384)),
            ("4097.4kB", Some("kB"), Some(4097)),
            ("4097.5kB", Some("kB"), Some(4098)),
            ("070", None, Some(56)),
            ("1e3", None, Some(1000)),
            ("-1", None, Some(-1)),
            ("1gb", Some("MB"), None),
            ("30s", Some("ms"), Some(30_000)),
            ("5min", Some("s"), Some(300)),
            ("9223372036854775808", None, None),
            ("", None, None),
            (".", None, None),
            ("0x", None, None),
            ("1e999", None, None),
            ("é", None, None),
        ];
        for (text, unit, expected) in cases {
            assert_eq!(parse_int(text, unit), expected, "{text} in {unit:?}");
        }
    }

    #[test]
    fn equality() {
        let cases = [
            ("enum", None, "remote_write", "REMOTE_WRITE", true),
            ("string", None, "remote_write", "REMOTE_WRITE", false),
            ("real", None, "1e-06", "0.000001", true),
            ("integer", Some("MB"), "6GB", "6GB", false),
            ("integer", None, "6GB", "6GB", false),
            ("integer", Some("16384kB"), "64", " 0x400 MB ", true),
            ("integer", Some("2MB"), "524288", "1TB", true),
            ("integer", Some("8kB"), "16384", "128MB", true),
            ("integer", Some("8kB"), "16384", "127MB", false),
            ("integer", Some("kB"), "4098", "4097.5kB", true),
            ("bool", None, "on", "True", true),
            ("bool", None, "on", "off", false),
            ("bool", None, "on", "maybe", false),
        ];
        for (vartype, unit, current, configured, expected) in cases {
            assert_eq!(
                equal(vartype, unit, current, configured),
                expected,
                "{vartype} {unit:?} {current} {configured}"
            );
        }
    }

    #[test]
    fn human_units() {
        let cases = [
            ("integer", Some("8kB"), "16384", "128MB"),
            ("integer", Some("kB"), "1025", "1025kB"),
            ("integer", Some("kB"), "1024", "1MB"),
            ("integer", Some("256MB"), "4", "1GB"),
            ("integer", Some("ms"), "5", "5ms"),
            ("integer", Some("s"), "300", "5min"),
            ("integer", None, "100", "100"),
            ("integer", Some("8kB"), "-1", "-8kB"),
            ("real", Some("ms"), "4.2", "4200us"),
            ("real", Some("ms"), "2.5", "2500us"),
            ("bool", None, "on", "on"),
            ("integer", Some("MB"), "", ""),
        ];
        for (vartype, unit, value, expected) in cases {
            assert_eq!(human(vartype, unit, value), expected, "{vartype} {unit:?} {value}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "[-+0-9.eExkMGB ms]{0,24}|.{0,12}", unit in "[0-9]{0,3}(kB|MB|ms|s|x)?") {
            let _ = (parse_int(&text, Some(&unit)), parse_real(&text, Some(&unit)), human("integer", Some(&unit), &text));
            let _ = (human("real", Some(&unit), &text), equal("integer", Some(&unit), &text, &text));
        }
    }
}
