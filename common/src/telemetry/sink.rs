//! Where lines go: a bounded queue, and a thread that writes them to standard error or a file.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use trunkline_config::local::Log;

use super::TelemetryError;

/// The sending end; cheap to clone.
#[derive(Clone)]
pub(super) struct Sink {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

enum Message {
    Line(Vec<u8>),
    /// Everything before this is written: say so.
    Flush(SyncSender<()>),
}

impl Sink {
    /// Lines go to `patroni.log` in `dir`, or to standard error.
    pub(super) fn start(log: &Log) -> Result<Self, TelemetryError> {
        let target = match &log.dir {
            Some(dir) => Target::File(LogFile::open(dir.join("patroni.log"), log)?),
            None => Target::Stderr,
        };
        let (queue, lines) = sync_channel(log.max_queue_size);
        let dropped = Arc::new(AtomicU64::new(0));
        let seen = dropped.clone();
        let thread = std::thread::Builder::new().name("log".to_owned());
        thread.spawn(move || write_all(target, &lines, &seen)).map_err(TelemetryError::Thread)?;
        Ok(Self { queue, dropped })
    }

    pub(super) fn flush(&self, limit: Duration) {
        let (done, wait) = sync_channel(1);
        if self.queue.try_send(Message::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(limit);
        }
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Write for Sink {
    /// One call is one line (tracing-subscriber writes an event at once).
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Message::Line(line.to_vec())) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Target {
    Stderr,
    File(LogFile),
}

fn write_all(mut target: Target, lines: &Receiver<Message>, dropped: &AtomicU64) {
    let mut told = 0;
    while let Ok(message) = lines.recv() {
        // There is nobody to tell if the log itself cannot be written.
        let mut write = |line: &[u8]| match &mut target {
            Target::Stderr => drop(io::stderr().write_all(line)),
            Target::File(file) => drop(file.write(line)),
        };
        match message {
            Message::Line(line) => {
                let lost = dropped.load(Ordering::Relaxed);
                if lost > told {
                    write(format!("(the log could not keep up: {} lines were dropped)\n", lost - told).as_bytes());
                    told = lost;
                }
                write(&line);
            }
            Message::Flush(done) => drop(done.try_send(())),
        }
    }
}

/// A file that is moved aside when it is full: `patroni.log.1` is the youngest of the old ones.
struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    limit: u64,
    old_files: usize,
    mode: Option<u32>,
}

impl LogFile {
    fn open(path: PathBuf, log: &Log) -> Result<Self, TelemetryError> {
        let opened = append(&path, log.mode).and_then(|file| Ok((file.metadata()?.len(), file)));
        // As with Python's handler, either of them being 0 means that there is no end.
        let limit = if log.file_num == 0 || log.file_size == 0 { u64::MAX } else { log.file_size };
        match opened {
            Ok((size, file)) => Ok(Self { path, file, size, limit, old_files: log.file_num, mode: log.mode }),
            Err(source) => Err(TelemetryError::File { path, source }),
        }
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.size > 0 && self.size.saturating_add(line.len() as u64) > self.limit {
            self.rotate()?;
        }
        self.size += line.len() as u64;
        self.file.write_all(line)
    }

    fn rotate(&mut self) -> io::Result<()> {
        let old = |number: usize| PathBuf::from(format!("{}.{number}", self.path.display()));
        for number in (1..self.old_files).rev() {
            let _ = std::fs::rename(old(number), old(number + 1));
        }
        std::fs::rename(&self.path, old(1))?;
        self.file = append(&self.path, self.mode)?;
        self.size = 0;
        Ok(())
    }
}

fn append(path: &Path, mode: Option<u32>) -> io::Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    if let Some(mode) = mode {
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(dir: &Path) -> Log {
        Log { dir: Some(dir.to_owned()), ..Log::default() }
    }

    #[test]
    fn lines_reach_the_file_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = Sink::start(&to(dir.path())).unwrap();
        for number in 0..100 {
            writeln!(sink, "{number}").unwrap();
        }
        sink.flush(Duration::from_secs(5));
        let text = std::fs::read_to_string(dir.path().join("patroni.log")).unwrap();
        let numbers: String = (0..100).map(|number| format!("{number}\n")).collect();
        assert_eq!(text, numbers);
        assert_eq!(sink.dropped(), 0);
    }

    #[test]
    fn a_blocked_log_stops_nobody() {
        let (queue, lines) = sync_channel(2);
        let mut sink = Sink { queue, dropped: Arc::default() };
        for _ in 0..5 {
            sink.write_all(b"x").unwrap();
        }
        assert_eq!(sink.dropped(), 3);
        sink.flush(Duration::from_millis(1));
        drop(lines);
        sink.write_all(b"after the end").unwrap();
    }

    #[test]
    fn full_files_are_moved_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("patroni.log");
        let log = Log { file_size: 10, file_num: 2, mode: Some(0o640), ..Log::default() };
        let mut file = LogFile::open(path.clone(), &log).unwrap();
        for number in 0..20 {
            file.write(format!("line {number:02}\n").as_bytes()).unwrap();
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!((read("patroni.log").as_str(), read("patroni.log.1").as_str()), ("line 19\n", "line 18\n"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1 + 2);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        let mut again = LogFile::open(path.clone(), &log).unwrap();
        again.write(b"more\n").unwrap();
        assert_eq!(read("patroni.log.1"), "line 19\n", "what was there counts");
        let mut endless = LogFile::open(path, &Log { file_num: 0, ..log }).unwrap();
        (0..20).for_each(|_| endless.write(b"more\n").unwrap());
        assert_eq!(read("patroni.log").lines().count(), 21);
    }

    #[test]
    fn says_which_file_cannot_be_written() {
        let error = Sink::start(&to(Path::new("/nonexistent/dir"))).err().unwrap().to_string();
        assert!(error.contains("/nonexistent/dir/patroni.log"), "{error}");
    }
}
