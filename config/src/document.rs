//! The merged document: files, with the environment over them, and where each value came from.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::env::{self, Env};
use crate::explain::Layer;
use crate::report::{Origins, Problem, Report};
use crate::{merge, yaml};

/// Reads a file, or every `*.yml` and `*.yaml` of a directory in the order of their names, and lays the environment over it.
/// Without a file: `PATRONI_CONFIGURATION` alone, else the environment alone. What is wrong goes to the report.
pub(crate) fn load(path: Option<&Path>, env: &Env) -> (Map<String, Value>, Report) {
    let (document, found) = read(path, env);
    document.finish(path.filter(|_| !found))
}

/// The same layer by layer, the lowest first.
pub(crate) fn layers(path: Option<&Path>, env: &Env) -> Vec<Layer> {
    read(path, env).0.layers
}

/// The document, and whether there was anything at `path`.
fn read(path: Option<&Path>, env: &Env) -> (Document, bool) {
    let mut document = Document::new(path);
    let found = path.is_some_and(|path| document.read_path(path));
    match env.get("PATRONI_CONFIGURATION") {
        Some(text) if !found => document.lay_text("PATRONI_CONFIGURATION", text),
        _ => document.lay_environment(env),
    }
    (document, found)
}

struct Document {
    layers: Vec<Layer>,
    map: Map<String, Value>,
    origins: Origins,
    problems: Vec<Problem>,
    /// Source and sentence.
    notices: Vec<(String, String)>,
}

impl Document {
    fn new(path: Option<&Path>) -> Self {
        let fallback = path.map_or("environment".to_owned(), |path| path.display().to_string());
        Self {
            layers: Vec::new(),
            map: Map::new(),
            origins: Origins::new(fallback),
            problems: Vec::new(),
            notices: Vec::new(),
        }
    }

    /// Whether there was anything at `path`.
    fn read_path(&mut self, path: &Path) -> bool {
        let files = match files_of(path) {
            Ok(files) => files,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
            Err(error) => {
                self.problem(&path.display().to_string(), format!("cannot be read: {error}"));
                return true;
            }
        };
        if files.is_empty() {
            self.problem(&path.display().to_string(), "the directory has no *.yml or *.yaml file");
        }
        for file in files {
            let source = file.display().to_string();
            match fs::read(&file) {
                Ok(bytes) => match String::from_utf8(bytes) {
                    Ok(text) => self.lay_text(&source, &text),
                    Err(error) => self.problem(&source, format!("is not UTF-8 text: {error}")),
                },
                Err(error) => self.problem(&source, format!("cannot be read: {error}")),
            }
        }
        true
    }

    fn lay_text(&mut self, source: &str, text: &str) {
        match yaml::from_str_lenient(text) {
            Ok((value, complaint)) => {
                if let Some(complaint) = complaint {
                    self.notices.push((source.to_owned(), format!("{complaint}; the last value counts")));
                }
                match value {
                    Value::Object(layer) => self.lay(source, &layer),
                    Value::Null => {}
                    _ => self.problem(source, "must be a map of sections (key: value) at its top"),
                }
            }
            Err(error) => self.problem(source, format!("is not valid YAML: {error}")),
        }
    }

    fn lay_environment(&mut self, env: &Env) {
        let layer = env::layer(env);
        merge::patch(&mut self.map, &layer.map);
        self.layers.push(Layer { name: "environment".to_owned(), map: layer.map });
        for (path, variable) in &layer.origins {
            self.origins.set(path.clone(), variable);
        }
        self.problems.extend(layer.problems);
        let unknown = |variable: String| (variable, "no such variable is known; ignored".to_owned());
        self.notices.extend(layer.unknown.into_iter().map(unknown));
    }

    fn lay(&mut self, source: &str, layer: &Map<String, Value>) {
        merge::patch(&mut self.map, layer);
        self.layers.push(Layer { name: format!("file {source}"), map: layer.clone() });
        mark(&mut self.origins, "", layer, source);
    }

    fn problem(&mut self, source: &str, expected: impl Into<String>) {
        let (source, expected) = (source.to_owned(), expected.into());
        self.problems.push(Problem { source, path: String::new(), value: None, expected, remedy: None });
    }

    /// `absent` is a file that was named but is not there: nothing to start with, unless the environment says enough.
    fn finish(mut self, absent: Option<&Path>) -> (Map<String, Value>, Report) {
        if let Some(path) = absent {
            let source = path.display().to_string();
            if self.map.is_empty() && self.problems.is_empty() {
                self.problem(&source, "no such file, and no PATRONI_* variable is set");
            } else {
                self.origins.fallback = "environment".to_owned();
                self.notices.push((source, "no such file; the environment alone is used".to_owned()));
            }
        } else if self.map.is_empty() && self.problems.is_empty() {
            let source = self.origins.fallback.clone();
            self.problem(&source, "the configuration is empty");
        }
        let report = Report::new(self.origins);
        self.problems.into_iter().for_each(|problem| report.push(problem));
        self.notices.into_iter().for_each(|(source, message)| report.notice_of(&source, message));
        (self.map, report)
    }
}

fn files_of(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yml" || extension == "yaml") && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn mark(origins: &mut Origins, path: &str, layer: &Map<String, Value>, source: &str) {
    for (key, value) in layer {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        if let Value::Object(inner) = value {
            mark(origins, &path, inner, source);
        }
        origins.set(path, source);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn errors(report: Report) -> String {
        report.finish().map(|_| String::new()).unwrap_or_else(|errors| errors.to_string())
    }

    #[test]
    fn later_files_of_a_directory_lie_over_earlier_ones() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("a.yml"), "scope: a\nrestapi: {listen: 'x:1', certfile: c}\n").expect("written");
        fs::write(dir.path().join("b.yaml"), "restapi: {listen: 'y:2', certfile: null}\n").expect("written");
        fs::write(dir.path().join("c.txt"), "scope: c").expect("written");
        let env = [("PATRONI_NAME", "n")].into_iter().collect();
        let (map, report) = load(Some(dir.path()), &env);
        assert_eq!(Value::Object(map), json!({"scope": "a", "restapi": {"listen": "y:2"}, "name": "n"}));
        assert!(report.origins.of("scope").ends_with("a.yml"));
        assert!(report.origins.of("restapi.listen").ends_with("b.yaml"));
        assert_eq!(report.origins.of("name"), "PATRONI_NAME");
    }

    #[test]
    fn sources_in_their_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let absent = dir.path().join("absent.yml");
        let env: Env = [("PATRONI_CONFIGURATION", "scope: whole"), ("PATRONI_SCOPE", "one")].into_iter().collect();
        assert_eq!(load(None, &env).0["scope"], "whole");
        assert_eq!(load(Some(&absent), &env).0["scope"], "whole");
        let env: Env = [("PATRONI_SCOPE", "one")].into_iter().collect();
        assert_eq!(load(Some(&absent), &env).0["scope"], "one");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("p.yml");
        let name = file.display();
        let none = Env::default();
        assert_eq!(
            errors(load(Some(&file), &none).1),
            format!("{name}: no such file, and no PATRONI_* variable is set")
        );
        assert!(errors(load(Some(dir.path()), &none).1).ends_with("the directory has no *.yml or *.yaml file"));
        let cases: [(&[u8], &str); 4] = [
            (b"- a\n", "must be a map of sections (key: value) at its top"),
            (b"", "the configuration is empty"),
            (b"a: [", "is not valid YAML: "),
            (b"\xff\xfe", "is not UTF-8 text: "),
        ];
        for (bytes, expected) in cases {
            fs::write(&file, bytes).expect("written");
            let message = errors(load(Some(&file), &none).1);
            assert!(message.starts_with(&format!("{name}: {expected}")), "{message}");
        }
        assert_eq!(errors(load(None, &none).1), "environment: the configuration is empty");
    }

    #[test]
    fn a_repeated_key_is_a_notice() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("p.yml");
        fs::write(&file, "scope: a\nscope: b\n").expect("written");
        let (map, report) = load(Some(&file), &Env::default());
        assert_eq!(map["scope"], "b");
        let notices = report.finish().expect("no error");
        assert!(notices[0].message.ends_with("the last value counts"), "{notices:?}");
    }
}
