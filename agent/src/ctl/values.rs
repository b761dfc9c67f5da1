//! Values of PostgreSQL as Python shows what psycopg2 makes of them.

use serde_json::{Number, Value};
use tokio_postgres::types::{Kind, Type};

/// Deepest array that is read: PostgreSQL's own limit.
const MAX_DIMENSIONS: usize = 6;

/// A value as Python has it: what it prints differs from PostgreSQL's text for a few types.
pub(super) fn python_value(text: Option<&str>, of: Option<&Type>) -> Value {
    let Some(text) = text else { return Value::Null };
    let typed = match of {
        Some(&Type::BOOL) => Some(Value::Bool(text == "t")),
        Some(&(Type::INT2 | Type::INT4 | Type::INT8 | Type::OID)) => text.parse::<i64>().ok().map(Value::from),
        Some(&(Type::FLOAT4 | Type::FLOAT8)) => float(text),
        Some(&(Type::JSON | Type::JSONB)) => serde_json::from_str(text).ok(),
        Some(&(Type::TIMESTAMP | Type::TIMESTAMPTZ)) => Some(timestamp(text).into()),
        Some(&Type::INTERVAL) => interval(text).map(Value::from),
        Some(of) => array_element(of).and_then(|element| array(text, &element)),
        None => None,
    };
    typed.unwrap_or_else(|| text.into())
}

fn float(text: &str) -> Option<Value> {
    match text {
        "NaN" => Some("nan".into()),
        "Infinity" => Some("inf".into()),
        "-Infinity" => Some("-inf".into()),
        text => Number::from_f64(text.parse().ok()?).map(Value::Number),
    }
}

/// Python writes all six digits of a fraction, and minutes in an offset.
fn timestamp(text: &str) -> String {
    let Some((date, time)) = text.split_once(' ') else { return text.to_owned() };
    let (clock, offset) = match time.find(['+', '-']) {
        Some(at) => time.split_at(at),
        None => (time, ""),
    };
    let clock = match clock.split_once('.') {
        Some((whole, fraction)) => format!("{whole}.{fraction:0<6}"),
        None => clock.to_owned(),
    };
    let minutes = if offset.len() == 3 { ":00" } else { "" };
    format!("{date} {clock}{offset}{minutes}")
}

/// Python's `str(timedelta)`; `None` where the text is not of `intervalstyle` postgres. Years count 365 days, months 30.
fn interval(text: &str) -> Option<String> {
    let mut micros: i128 = 0;
    let mut words = text.split(' ');
    while let Some(word) = words.next() {
        if word.contains(':') {
            micros += clock(word)?;
            continue;
        }
        let days = match words.next()?.trim_end_matches('s') {
            "year" => 365,
            "mon" => 30,
            "day" => 1,
            _ => return None,
        };
        micros += i128::from(word.parse::<i64>().ok()?) * days * DAY;
    }
    let (days, rest) = (micros.div_euclid(DAY), micros.rem_euclid(DAY));
    let days = match days {
        0 => String::new(),
        1 | -1 => format!("{days} day, "),
        _ => format!("{days} days, "),
    };
    let (seconds, fraction) = (rest / 1_000_000, rest % 1_000_000);
    let fraction = if fraction == 0 { String::new() } else { format!(".{fraction:06}") };
    Some(format!("{days}{}:{:02}:{:02}{fraction}", seconds / 3600, seconds / 60 % 60, seconds % 60))
}

/// Microseconds.
const DAY: i128 = 86_400_000_000;

/// `-HH:MM:SS.ffffff` in microseconds.
fn clock(text: &str) -> Option<i128> {
    let (sign, text) = match text.strip_prefix('-') {
        Some(text) => (-1, text),
        None => (1, text.trim_start_matches('+')),
    };
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let mut parts = whole.split(':').map(|part| part.parse::<u32>().ok().map(i128::from));
    let (hours, minutes, seconds) = (parts.next()??, parts.next()??, parts.next()??);
    let fraction: i128 = format!("{fraction:0<6}").get(..6)?.parse::<u32>().ok()?.into();
    Some(sign * (((hours * 60 + minutes) * 60 + seconds) * 1_000_000 + fraction))
}

/// The types whose arrays psycopg2 reads as lists, as far as they are shown alike here.
fn array_element(of: &Type) -> Option<Type> {
    let Kind::Array(element) = of.kind() else { return None };
    let known = [
        Type::BOOL,
        Type::INT2,
        Type::INT4,
        Type::INT8,
        Type::FLOAT4,
        Type::FLOAT8,
        Type::TEXT,
        Type::VARCHAR,
        Type::NAME,
        Type::BPCHAR,
    ];
    known.contains(element).then(|| element.clone())
}

/// PostgreSQL's array text: `{a,"b c",NULL,{…}}`.
fn array(text: &str, element: &Type) -> Option<Value> {
    let mut chars = text.chars().peekable();
    let value = array_level(&mut chars, element, 1)?;
    chars.next().is_none().then_some(value)
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

fn array_level(chars: &mut Chars<'_>, element: &Type, depth: usize) -> Option<Value> {
    if chars.next()? != '{' || depth > MAX_DIMENSIONS {
        return None;
    }
    let mut items = Vec::new();
    if chars.next_if_eq(&'}').is_some() {
        return Some(Value::Array(items));
    }
    loop {
        items.push(match chars.peek()? {
            '{' => array_level(chars, element, depth + 1)?,
            '"' => python_value(Some(&quoted_item(chars)?), Some(element)),
            _ => plain_item(chars, element),
        });
        match chars.next()? {
            ',' => {}
            '}' => return Some(Value::Array(items)),
            _ => return None,
        }
    }
}

fn quoted_item(chars: &mut Chars<'_>) -> Option<String> {
    let mut item = String::new();
    chars.next();
    loop {
        match chars.next()? {
            '"' => return Some(item),
            '\\' => item.push(chars.next()?),
            c => item.push(c),
        }
    }
}

fn plain_item(chars: &mut Chars<'_>, element: &Type) -> Value {
    let mut item = String::new();
    while let Some(c) = chars.next_if(|c| !matches!(c, ',' | '}')) {
        item.push(c);
    }
    python_value(Some(&item).filter(|item| *item != "NULL").map(String::as_str), Some(element))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn cells_are_pythons() {
        let table = [
            (Some("t"), Some(Type::BOOL), json!(true)),
            (Some("t"), Some(Type::TEXT), json!("t")),
            (Some("t"), None, json!("t")),
            (None, Some(Type::BOOL), json!(null)),
            (Some("5"), Some(Type::INT4), json!(5)),
            (Some("5"), Some(Type::FLOAT8), json!(5.0)),
            (Some("NaN"), Some(Type::FLOAT8), json!("nan")),
            (Some("1.50"), Some(Type::NUMERIC), json!("1.50")),
            (Some(r#"{"a": 1}"#), Some(Type::JSONB), json!({"a": 1})),
            (Some("2031-05-01 10:30:00.5+00"), Some(Type::TIMESTAMPTZ), json!("2031-05-01 10:30:00.500000+00:00")),
            (Some("2031-05-01 10:30:00"), Some(Type::TIMESTAMP), json!("2031-05-01 10:30:00")),
            (Some("2031-05-01 10:30:00+05:30"), Some(Type::TIMESTAMPTZ), json!("2031-05-01 10:30:00+05:30")),
            (Some("{1,NULL,{2}}"), Some(Type::INT4_ARRAY), json!([1, null, [2]])),
            (Some(r#"{a,"b \"c\",","NULL",NULL}"#), Some(Type::TEXT_ARRAY), json!(["a", "b \"c\",", "NULL", null])),
            (Some("{}"), Some(Type::BOOL_ARRAY), json!([])),
            (Some("{t,f}"), Some(Type::BOOL_ARRAY), json!([true, false])),
            (Some("{t"), Some(Type::BOOL_ARRAY), json!("{t")),
            (Some("{a}"), Some(Type::UUID_ARRAY), json!("{a}")),
            (Some("00:00:05.5"), Some(Type::INTERVAL), json!("0:00:05.500000")),
            (Some("1 day 02:03:04"), Some(Type::INTERVAL), json!("1 day, 2:03:04")),
            (Some("1 year 2 mons -3 days"), Some(Type::INTERVAL), json!("422 days, 0:00:00")),
            (Some("-00:00:01"), Some(Type::INTERVAL), json!("-1 day, 23:59:59")),
            (Some("infinity"), Some(Type::TIMESTAMP), json!("infinity")),
        ];
        for (text, of, expected) in table {
            assert_eq!(python_value(text, of.as_ref()), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[-{}\",\\\\a0-9:. NUL]{0,40}") {
            for of in [Type::TEXT_ARRAY, Type::INTERVAL, Type::TIMESTAMPTZ, Type::FLOAT8, Type::JSON] {
                let _ = python_value(Some(&text), Some(&of));
            }
        }
    }
}
