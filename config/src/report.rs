//! What is wrong with a configuration, and what is only remarkable: always all of it at once, each with its place.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

/// One error: where, what was found, what is allowed, what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// File, environment variable or DCS key that the value came from.
    pub source: String,
    /// Path of the key, such as `postgresql.listen`; empty for the document itself.
    pub path: String,
    /// The offending value as JSON, passwords masked; `None` where it is missing.
    pub value: Option<String>,
    /// What is wrong, or what is allowed.
    pub expected: String,
    /// What to do about it, where that is not obvious.
    pub remedy: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.source)?;
        match (&self.value, self.path.is_empty()) {
            (Some(value), false) => write!(f, "{} = {value}: ", self.path)?,
            (None, false) => write!(f, "{}: ", self.path)?,
            (Some(value), true) => write!(f, "{value}: ")?,
            (None, true) => {}
        }
        f.write_str(&self.expected)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

/// Something a person should know that hinders nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// File, environment variable or DCS key that it is about.
    pub source: String,
    /// Path of the key; empty for the whole.
    pub path: String,
    /// The sentence.
    pub message: String,
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.source)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// Every error of a configuration; never empty. `Display` gives one line for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors(pub Vec<Problem>);

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, problem) in self.0.iter().enumerate() {
            if position > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}

/// Which file or variable each value came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Origins {
    /// For what no layer has set, such as a missing key.
    pub fallback: String,
    by_path: BTreeMap<String, String>,
}

impl Origins {
    pub fn new(fallback: impl Into<String>) -> Self {
        Self { fallback: fallback.into(), by_path: BTreeMap::new() }
    }

    /// `source` has set the value at `path`.
    pub fn set(&mut self, path: String, source: &str) {
        self.by_path.insert(path, source.to_owned());
    }

    /// The source of the value at `path`: its own, or that of the nearest section around it.
    pub fn of(&self, path: &str) -> &str {
        let mut path = path;
        loop {
            if let Some(source) = self.by_path.get(path) {
                return source;
            }
            match path.rfind(['.', '[']) {
                Some(at) => path = &path[..at],
                None => return &self.fallback,
            }
        }
    }
}

/// Collects while a configuration is read.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub origins: Origins,
    problems: RefCell<Vec<Problem>>,
    notices: RefCell<Vec<Notice>>,
}

impl Report {
    pub fn new(origins: Origins) -> Self {
        Self { origins, ..Self::default() }
    }

    pub fn problem(&self, path: &str, value: Option<String>, expected: impl Into<String>, remedy: Option<String>) {
        let source = self.origins.of(path).to_owned();
        self.push(Problem { source, path: path.to_owned(), value, expected: expected.into(), remedy });
    }

    /// A value that is read twice is told once.
    pub fn push(&self, problem: Problem) {
        let mut problems = self.problems.borrow_mut();
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }

    pub fn notice(&self, path: &str, message: impl Into<String>) {
        let source = self.origins.of(path).to_owned();
        self.keep(Notice { source, path: path.to_owned(), message: message.into() });
    }

    /// A problem of a source as a whole.
    pub fn problem_of(&self, source: &str, expected: impl Into<String>) {
        let (source, expected) = (source.to_owned(), expected.into());
        self.push(Problem { source, path: String::new(), value: None, expected, remedy: None });
    }

    /// A notice about a source as a whole.
    pub fn notice_of(&self, source: &str, message: impl Into<String>) {
        self.keep(Notice { source: source.to_owned(), path: String::new(), message: message.into() });
    }

    fn keep(&self, notice: Notice) {
        let mut notices = self.notices.borrow_mut();
        if !notices.contains(&notice) {
            notices.push(notice);
        }
    }

    /// The notices, or every problem there was.
    pub fn finish(self) -> Result<Vec<Notice>, Errors> {
        let problems = self.problems.into_inner();
        if problems.is_empty() { Ok(self.notices.into_inner()) } else { Err(Errors(problems)) }
    }

    /// Where a bad value only means its default: every problem as a notice.
    pub fn into_notices(self) -> Vec<Notice> {
        let told = |problem: Problem| {
            let value = problem.value.map(|value| format!("{value} is ignored: ")).unwrap_or_default();
            let message = format!("{value}{}", problem.expected);
            Notice { source: problem.source, path: problem.path, message }
        };
        let mut notices = self.notices.into_inner();
        notices.extend(self.problems.into_inner().into_iter().map(told));
        notices
    }

    pub fn into_parts(self) -> (Vec<Problem>, Vec<Notice>) {
        (self.problems.into_inner(), self.notices.into_inner())
    }
}
