//! The WAL's files: where the last checkpoint's record ends, needed to tell whether a shutdown checkpoint reached the new
//! primary, and what stands before a position.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use trunkline_common::{Lsn, TimelineId};

use super::control::ControlFile;

/// `SizeOfXLogShortPHD`, the header of each page, and `SizeOfXLogLongPHD`, of a segment's first.
const PAGE_HEADER: u64 = 24;
const SEGMENT_HEADER: u64 = 40;

/// The end of the last checkpoint record: where the next record would begin. `None` if it can't be read.
pub fn record_end(data_dir: &Path, control: &ControlFile) -> Option<Lsn> {
    let segment = u64::from(control.wal_segment_size);
    if segment == 0 || control.wal_block_size == 0 {
        return None;
    }
    let path = data_dir.join("pg_wal").join(file_name(control.timeline, control.checkpoint, segment));
    let file = File::open(path).ok()?;
    // xl_tot_len is the record's first field and never crosses a page: records are aligned to 8 bytes.
    let mut length = [0; 4];
    file.read_exact_at(&mut length, control.checkpoint.0 % segment).ok()?;
    let length = u32::from_le_bytes(length);
    // A checkpoint record is a little over 100 bytes; anything else means that this is not one.
    if !(24..=1024).contains(&length) {
        return None;
    }
    Some(end(control.checkpoint, u64::from(length), u64::from(control.wal_block_size), segment))
}

/// The last bytes of WAL before a position, and where they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tail {
    /// The name of the WAL file.
    pub file: String,
    /// Where they begin in that file.
    pub offset: u64,
    /// As they are in the file, headers of pages included.
    pub bytes: Vec<u8>,
}

/// The most bytes of a [`Tail`]: far more than what two servers write alike that know nothing of each other.
const TAIL: u64 = 64 << 10;

/// The WAL before `end`, as far back as its file or [`TAIL`] goes. `None` if it can't be read.
pub fn tail(data_dir: &Path, control: &ControlFile, timeline: TimelineId, end: Lsn) -> Option<Tail> {
    let segment = u64::from(control.wal_segment_size);
    let last = Lsn(end.0.checked_sub(1)?);
    let in_file = last.0.checked_rem(segment)? + 1;
    let length = in_file.min(TAIL);
    let (file, offset) = (file_name(timeline, last, segment), in_file - length);
    let mut bytes = vec![0; usize::try_from(length).ok()?];
    File::open(data_dir.join("pg_wal").join(&file)).ok()?.read_exact_at(&mut bytes, offset).ok()?;
    Some(Tail { file, offset, bytes })
}

/// The newest timeline whose history file is at hand.
pub fn newest_history(data_dir: &Path) -> Option<TimelineId> {
    let names = std::fs::read_dir(data_dir.join("pg_wal")).ok()?.flatten().map(|entry| entry.file_name());
    let timeline = |name: &OsStr| u32::from_str_radix(name.to_str()?.strip_suffix(".history")?, 16).ok();
    names.filter_map(|name| timeline(&name)).max().map(TimelineId)
}

/// The end of a record of `length` bytes that begins at `start`: page headers lie in between, and records are aligned.
fn end(start: Lsn, length: u64, block: u64, segment: u64) -> Lsn {
    let (mut at, mut left) = (start.0, length);
    // Each turn takes a page: bounded by the length.
    while left > block - at % block {
        let in_page = block - at % block;
        left -= in_page;
        at += in_page;
        at += if at % segment == 0 { SEGMENT_HEADER } else { PAGE_HEADER };
    }
    Lsn((at + left).next_multiple_of(8))
}

/// The WAL file that has the position.
pub fn file_name(timeline: TimelineId, at: Lsn, segment: u64) -> String {
    let number = at.0 / segment;
    let per_log = (1u64 << 32) / segment;
    format!("{:08X}{:08X}{:08X}", timeline.0, number / per_log, number % per_log)
}

/// The number of a WAL file, on whatever timeline; `None` for any other file.
pub fn number(name: &str, segment: u64) -> Option<u64> {
    let part = |at: usize| name.get(at..at + 8).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
    let read = |at| u64::from_str_radix(part(at)?, 16).ok();
    let (log, in_log) = (read(8)?, read(16)?);
    let per_log = (1u64 << 32).checked_div(segment)?;
    (name.len() == 24 && part(0).is_some() && in_log < per_log).then_some(log * per_log + in_log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_numbers() {
        let segment = 16 << 20;
        for at in [0, 0x0300_0028, 0x1_0300_0028, 0xff_ff00_0000] {
            let name = file_name(TimelineId(7), Lsn(at), segment);
            assert_eq!(number(&name, segment), Some(at / segment), "{name}");
        }
        for name in
            ["", "00000001.history", "00000001000000000000000g", "000000010000000000000100", "0000000100000000000000ä"]
        {
            assert_eq!(number(name, segment), None, "{name}");
        }
        assert_eq!(number("000000010000000000000001", 0), None);
    }

    #[test]
    fn records_end_aligned_and_across_pages() {
        let segment = 16 << 20;
        for (start, length, expected) in [
            (0x0300_0028, 114, 0x0300_00a0),
            // 16 bytes left in the page: header of the next one in between.
            (0x0300_1ff0, 114, 0x0300_2000 + 24 + 104),
            (0x03ff_fff0, 114, 0x0400_0000 + 40 + 104),
            (0x0300_1f88, 120, 0x0300_2000),
        ] {
            assert_eq!(end(Lsn(start), length, 8192, segment), Lsn(expected), "{start:x}");
        }
        assert_eq!(file_name(TimelineId(2), Lsn(0x1_0300_0028), segment), "000000020000000100000003");
        assert_eq!(file_name(TimelineId(1), Lsn(0x4300_0000), 1 << 30), "000000010000000000000001");
    }
}
