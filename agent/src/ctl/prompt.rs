//! Questions to the operator, worded and answered as click does it: on standard output, `[default]` and `: ` appended,
//! the end of the input aborts.

use std::io::{self, BufRead, IsTerminal, Write};

use super::error::{CtlError, Result, complain};

/// How often a question that got no usable answer is asked again: input from a program must not keep us here for ever.
const MAX_ASKED: usize = 100;

/// Writes a line to standard output.
pub(super) fn echo(text: impl AsRef<str>) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_ref().as_bytes())?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

/// Clears the screen, if standard output is one.
pub(super) fn clear_screen() -> Result<()> {
    let mut out = io::stdout().lock();
    if out.is_terminal() {
        out.write_all(b"\x1b[2J\x1b[1;1H")?;
    }
    Ok(())
}

/// A warning in the form of Patroni's log; on standard error, unless `LOGLEVEL` and its relatives ask for less.
pub(super) fn warning(text: &str) {
    let level = ["PATRONI_LOG_LEVEL", "PATRONI_LOGLEVEL", "LOGLEVEL"].iter().find_map(|name| std::env::var(name).ok());
    if level.is_some_and(|level| matches!(level.to_uppercase().as_str(), "ERROR" | "CRITICAL" | "FATAL")) {
        return;
    }
    let now = trunkline_common::Clock::wall(&trunkline_common::SystemClock);
    let now = now.with_timezone(&chrono::Local);
    let (time, millis) = (now.format("%Y-%m-%d %H:%M:%S"), now.timestamp_subsec_millis() % 1000);
    complain(&format!("{time},{millis:03} - WARNING - {text}"));
}

/// Asks for a text; `default` is what an empty answer means, without one the question is asked again.
pub(super) fn ask(question: &str, default: Option<&str>) -> Result<String> {
    ask_on(&mut io::stdin().lock(), &mut io::stdout().lock(), question, default)
}

/// Asks for yes or no; an empty answer is no.
pub(super) fn confirm(question: &str) -> Result<bool> {
    confirm_on(&mut io::stdin().lock(), &mut io::stdout().lock(), question)
}

/// Asks for a text that is not shown while it is typed; on standard error, so that standard output has the result alone.
pub(super) fn ask_hidden(question: &str) -> Result<String> {
    use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
    let stdin = io::stdin();
    let before = tcgetattr(&stdin).ok();
    if let Some(mut quiet) = before.clone() {
        quiet.local_modes -= LocalModes::ECHO;
        // Should it fail, the question is still worth asking: the operator sees what happens.
        let _ = tcsetattr(&stdin, OptionalActions::Flush, &quiet);
    }
    let answer = ask_on(&mut stdin.lock(), &mut io::stderr().lock(), question, None);
    if let Some(before) = before {
        let _ = tcsetattr(&stdin, OptionalActions::Flush, &before);
    }
    // The return key was not shown.
    complain("");
    answer
}

fn ask_on(input: &mut impl BufRead, out: &mut impl Write, question: &str, default: Option<&str>) -> Result<String> {
    let hint = default.map_or_else(String::new, |default| format!(" [{default}]"));
    for _ in 0..MAX_ASKED {
        let answer = answer(input, out, &format!("{question}{hint}: "))?;
        match default {
            _ if !answer.is_empty() => return Ok(answer),
            Some(default) => return Ok(default.to_owned()),
            None => {}
        }
    }
    Err(CtlError::Aborted)
}

fn confirm_on(input: &mut impl BufRead, out: &mut impl Write, question: &str) -> Result<bool> {
    for _ in 0..MAX_ASKED {
        match answer(input, out, &format!("{question} [y/N]: "))?.trim().to_lowercase().as_str() {
            "y" | "yes" => return Ok(true),
            "n" | "no" | "" => return Ok(false),
            _ => writeln!(out, "Error: invalid input")?,
        }
    }
    Err(CtlError::Aborted)
}

fn answer(input: &mut impl BufRead, out: &mut impl Write, question: &str) -> Result<String> {
    write!(out, "{question}")?;
    out.flush()?;
    let mut line = String::new();
    match input.read_line(&mut line) {
        Ok(0) | Err(_) => Err(CtlError::Aborted),
        Ok(_) => Ok(line.trim_end_matches(['\n', '\r']).to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(input: &str, default: Option<&str>) -> (String, Option<String>) {
        let mut out = Vec::new();
        let answer = ask_on(&mut input.as_bytes(), &mut out, "Candidate ['b'] ", default);
        (String::from_utf8(out).unwrap(), answer.ok())
    }

    #[test]
    fn a_default_is_shown_and_taken() {
        assert_eq!(asked("\n", Some("")), ("Candidate ['b']  []: ".into(), Some(String::new())));
        assert_eq!(asked("b\n", Some("a")), ("Candidate ['b']  [a]: ".into(), Some("b".into())));
        assert_eq!(asked("", Some("a")), ("Candidate ['b']  [a]: ".into(), None));
    }

    #[test]
    fn without_default_the_question_comes_again() {
        assert_eq!(asked("\nx\n", None), ("Candidate ['b'] : Candidate ['b'] : ".into(), Some("x".into())));
        assert_eq!(asked(&"\n".repeat(1000), None).1, None);
    }

    #[test]
    fn only_yes_is_yes() {
        let table = [("y\n", Some(true)), ("YES\n", Some(true)), ("n\n", Some(false)), ("\n", Some(false)), ("", None)];
        for (input, expected) in table {
            let mut out = Vec::new();
            assert_eq!(confirm_on(&mut input.as_bytes(), &mut out, "Sure?").ok(), expected, "{input:?}");
            assert_eq!(String::from_utf8(out).unwrap(), "Sure? [y/N]: ");
        }
        let mut out = Vec::new();
        assert_eq!(confirm_on(&mut "what\ny\n".as_bytes(), &mut out, "Sure?").ok(), Some(true));
        assert_eq!(String::from_utf8(out).unwrap(), "Sure? [y/N]: Error: invalid input\nSure? [y/N]: ");
    }
}
