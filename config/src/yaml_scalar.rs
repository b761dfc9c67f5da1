//! What a plain YAML scalar means to PyYAML, which reads the files that Patroni users have (YAML 1.1 with its own quirks:
//! `on` is a boolean, `y` is not; `0700` is octal; `1e3` is text, as its exponent has no sign).

/// The type that PyYAML's safe loader gives a plain scalar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Null,
    Bool(bool),
    Int,
    Float,
    /// Base 60 numbers, dates, `<<` and `=`: read as text here, but quoted when written.
    Exotic,
    Text,
}

/// Classifies a plain scalar.
pub(crate) fn kind(text: &str) -> Kind {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Kind::Null,
        "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => return Kind::Bool(true),
        "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => return Kind::Bool(false),
        "<<" | "=" => return Kind::Exotic,
        _ => {}
    }
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if is_int(unsigned) {
        return Kind::Int;
    }
    // Of a number that begins with its point, PyYAML takes no sign.
    let pointed = text != unsigned && unsigned.starts_with('.') && !matches!(unsigned, ".inf" | ".Inf" | ".INF");
    if (is_float(unsigned) && !pointed) || (text == unsigned && matches!(text, ".nan" | ".NaN" | ".NAN")) {
        return Kind::Float;
    }
    if is_sexagesimal(unsigned) || is_date(text) {
        return Kind::Exotic;
    }
    Kind::Text
}

fn all(text: &str, allowed: impl Fn(u8) -> bool) -> bool {
    !text.is_empty() && text.bytes().all(allowed)
}

fn digit_or_underscore(byte: u8) -> bool {
    byte.is_ascii_digit() || byte == b'_'
}

fn is_int(unsigned: &str) -> bool {
    if unsigned == "0" {
        return true;
    }
    if let Some(digits) = unsigned.strip_prefix("0b") {
        return all(digits, |b| matches!(b, b'0' | b'1' | b'_'));
    }
    if let Some(digits) = unsigned.strip_prefix("0x") {
        return all(digits, |b| b.is_ascii_hexdigit() || b == b'_');
    }
    if let Some(digits) = unsigned.strip_prefix('0') {
        return all(digits, |b| matches!(b, b'0'..=b'7' | b'_'));
    }
    unsigned.starts_with(|c: char| c.is_ascii_digit()) && all(unsigned, digit_or_underscore)
}

fn is_float(unsigned: &str) -> bool {
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") {
        return true;
    }
    let Some((whole, rest)) = unsigned.split_once('.') else { return false };
    if whole.starts_with('_') || !whole.bytes().all(digit_or_underscore) {
        return false;
    }
    let (fraction, exponent) = match rest.find(['e', 'E']) {
        Some(at) => (&rest[..at], Some(&rest[at + 1..])),
        None => (rest, None),
    };
    let fraction_fits = if whole.is_empty() {
        fraction.starts_with(|c: char| c.is_ascii_digit()) && all(fraction, digit_or_underscore)
    } else {
        fraction.bytes().all(digit_or_underscore)
    };
    // PyYAML wants a sign in an exponent.
    let exponent_fits =
        exponent.is_none_or(|e| e.strip_prefix(['-', '+']).is_some_and(|digits| all(digits, |b| b.is_ascii_digit())));
    fraction_fits && exponent_fits
}

fn is_sexagesimal(unsigned: &str) -> bool {
    let mut parts = unsigned.split(':');
    let Some(first) = parts.next() else { return false };
    if !(first.starts_with(|c: char| c.is_ascii_digit()) && all(first, digit_or_underscore)) {
        return false;
    }
    let rest: Vec<&str> = parts.collect();
    let Some((last, middle)) = rest.split_last() else { return false };
    let sixty = |part: &str| match part.len() {
        1 => all(part, |b| b.is_ascii_digit()),
        2 => matches!(part.as_bytes(), [b'0'..=b'5', b'0'..=b'9']),
        _ => false,
    };
    let last_whole = last.split_once('.').map_or(*last, |(whole, _)| whole);
    let last_fraction = last.split_once('.').is_none_or(|(_, fraction)| fraction.bytes().all(digit_or_underscore));
    middle.iter().all(|part| sixty(part)) && sixty(last_whole) && last_fraction
}

/// Whatever begins as a date does: too much is quoted rather than too little.
fn is_date(text: &str) -> bool {
    let mut parts = text.splitn(3, '-');
    let mut digits = |lengths: &[usize]| {
        parts.next().is_some_and(|part| {
            let digits = part.bytes().take_while(u8::is_ascii_digit).count();
            lengths.contains(&digits)
        })
    };
    digits(&[4]) && digits(&[1, 2]) && digits(&[1, 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_scalars_mean_what_they_mean_to_pyyaml() {
        let cases = [
            ("on", Kind::Bool(true)),
            ("No", Kind::Bool(false)),
            ("oN", Kind::Text),
            ("y", Kind::Text),
            ("n", Kind::Text),
            ("~", Kind::Null),
            ("0700", Kind::Int),
            ("08", Kind::Text),
            ("1_000", Kind::Int),
            ("-0x1f", Kind::Int),
            ("0o17", Kind::Text),
            ("0b101", Kind::Int),
            ("1e3", Kind::Text),
            ("1.5e3", Kind::Text),
            ("1.5e+3", Kind::Float),
            ("1.", Kind::Float),
            (".5", Kind::Float),
            ("-.5", Kind::Text),
            (".", Kind::Text),
            ("-.inf", Kind::Float),
            ("-.nan", Kind::Text),
            ("22:30", Kind::Exotic),
            ("127.0.0.1:5432", Kind::Text),
            ("2026-01-02", Kind::Exotic),
            ("128MB", Kind::Text),
            ("é", Kind::Text),
        ];
        for (text, expected) in cases {
            assert_eq!(kind(text), expected, "{text}");
        }
    }
}
