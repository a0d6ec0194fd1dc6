//! The kernel's runtime measurement list, for evidence: new entries only, and only as many octets as evidence may carry.
//!
//! Entries are told apart by their sizes and not looked into: judging is the verifier's. The list only grows while the
//! kernel runs, so the reader remembers where it stopped, and begins again from the start when it is asked for less.

use assay_wire::evidence::{ImaList, MAX_IMA_ENTRY_BYTES, MAX_IMA_LIST_BYTES};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};
use std::path::PathBuf;

/// Where the kernel shows its list, once securityfs is mounted.
pub const MEASUREMENTS: &str = "/sys/kernel/security/ima/binary_runtime_measurements";

/// Why the list cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ImaReadError {
    /// The file cannot be read.
    #[error("reading the measurement list {}", path.display())]
    Io {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// What is there is no list.
    #[error("reading the measurement list {}: entry {entry} is not one: {problem}", path.display())]
    NoEntry {
        /// Its path.
        path: PathBuf,
        /// Which entry.
        entry: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// A reader of the list that knows where it was.
#[derive(Debug)]
pub struct MeasurementReader {
    path: PathBuf,
    stopped: Position,
}

/// Between two entries.
#[derive(Debug, Clone, Copy, Default)]
struct Position {
    entry: u64,
    offset: u64,
}

impl MeasurementReader {
    /// A reader of the list at `path`: [`MEASUREMENTS`] but in tests.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), stopped: Position::default() }
    }

    /// The entries from `first_entry` on, as many as evidence may carry: the others are for the next evidence. None if
    /// the kernel keeps no list. A list that is shorter than it was begins where it ends, with nothing.
    ///
    /// # Errors
    /// The file cannot be read, or holds something else.
    pub fn read_from(&mut self, first_entry: u64) -> Result<Option<ImaList>, ImaReadError> {
        let io = |source| ImaReadError::Io { path: self.path.clone(), source };
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
        };
        let mut at = if self.stopped.entry <= first_entry { self.stopped } else { Position::default() };
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, file);
        reader.seek(SeekFrom::Start(at.offset)).map_err(io)?;
        let mut entry = Vec::new();
        let mut entries = Vec::new();
        let mut start = at;
        loop {
            entry.clear();
            match read_entry(&mut reader, &mut entry) {
                Ok(false) => break,
                Ok(true) => {}
                Err(EntryError::Io(source)) => return Err(io(source)),
                Err(EntryError::Not(problem)) => {
                    return Err(ImaReadError::NoEntry { path: self.path.clone(), entry: at.entry, problem });
                }
            }
            if at.entry >= first_entry {
                if entries.len() + entry.len() > MAX_IMA_LIST_BYTES {
                    break;
                }
                entries.extend_from_slice(&entry);
            }
            at = Position { entry: at.entry + 1, offset: at.offset + entry.len() as u64 };
            if at.entry <= first_entry {
                start = at;
            }
        }
        // What was sent may have to be sent again, if the answer was lost: remembered is where it began.
        self.stopped = start;
        Ok(Some(ImaList { first_entry: start.entry, entries }))
    }
}

enum EntryError {
    Io(io::Error),
    Not(&'static str),
}

/// Reads one entry's octets into `entry`; says whether there was one. The kernel shows whole entries only, so an end
/// within one is an error.
fn read_entry(reader: &mut impl Read, entry: &mut Vec<u8>) -> Result<bool, EntryError> {
    take(reader, entry, PCR_BYTES)?;
    match entry.len() {
        0 => return Ok(false),
        PCR_BYTES => {}
        _ => return Err(EntryError::Not("it ends early")),
    }
    take_all(reader, entry, SHA1_BYTES)?;
    let name = take_sized(reader, entry, MAX_TEMPLATE_NAME_BYTES, "its template's name is too long")?;
    if entry[name..] == *b"ima" {
        take_all(reader, entry, SHA1_BYTES)?;
        take_sized(reader, entry, MAX_LEGACY_NAME_BYTES, "its name is too long")?;
    } else {
        let used = entry.len() + SIZE_BYTES;
        take_sized(reader, entry, MAX_IMA_ENTRY_BYTES.saturating_sub(used), "it is too large for evidence")?;
    }
    Ok(true)
}

/// Four octets of size, little-endian, and that many octets; gives where they begin.
fn take_sized(
    reader: &mut impl Read,
    entry: &mut Vec<u8>,
    limit: usize,
    problem: &'static str,
) -> Result<usize, EntryError> {
    take_all(reader, entry, SIZE_BYTES)?;
    let size = entry.last_chunk().map_or(u32::MAX, |size| u32::from_le_bytes(*size));
    let begins = entry.len();
    match usize::try_from(size) {
        Ok(size) if size <= limit => take_all(reader, entry, size)?,
        Ok(_) | Err(_) => return Err(EntryError::Not(problem)),
    }
    Ok(begins)
}

fn take_all(reader: &mut impl Read, entry: &mut Vec<u8>, count: usize) -> Result<(), EntryError> {
    let wanted = entry.len() + count;
    take(reader, entry, count)?;
    if entry.len() == wanted { Ok(()) } else { Err(EntryError::Not("it ends early")) }
}

/// Up to `count` octets, fewer only at the end.
fn take(reader: &mut impl Read, entry: &mut Vec<u8>, count: usize) -> Result<(), EntryError> {
    reader.by_ref().take(count as u64).read_to_end(entry).map(|_| ()).map_err(EntryError::Io)
}

const PCR_BYTES: usize = 4;
const SHA1_BYTES: usize = 20;
const SIZE_BYTES: usize = 4;
/// `MAX_TEMPLATE_NAME_LEN` of the kernel's restoring of lists.
const MAX_TEMPLATE_NAME_BYTES: usize = 255;
/// `IMA_EVENT_NAME_LEN_MAX`.
const MAX_LEGACY_NAME_BYTES: usize = 255;
const BUFFER_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use std::io::Write as _;

    fn sized(octets: &[u8]) -> Vec<u8> {
        [&u32::try_from(octets.len()).unwrap().to_le_bytes()[..], octets].concat()
    }

    fn header(template: &[u8]) -> Vec<u8> {
        [&10u32.to_le_bytes()[..], &[7; 20], &sized(template)].concat()
    }

    fn ng(path: &str, padding: usize) -> Vec<u8> {
        let digest = [&b"sha256:\0"[..], &[1; 32]].concat();
        let path = [path.as_bytes(), &vec![b'x'; padding], &[0]].concat();
        [header(b"ima-ng"), sized(&[sized(&digest), sized(&path)].concat())].concat()
    }

    fn legacy(path: &str) -> Vec<u8> {
        [header(b"ima"), vec![1; 20], sized(path.as_bytes())].concat()
    }

    struct List {
        file: tempfile::NamedTempFile,
        entries: Vec<Vec<u8>>,
    }

    impl List {
        fn of(entries: Vec<Vec<u8>>) -> Self {
            let mut list = Self { file: tempfile::NamedTempFile::new().unwrap(), entries: Vec::new() };
            list.grow(entries);
            list
        }

        fn grow(&mut self, entries: Vec<Vec<u8>>) {
            self.file.write_all(&entries.concat()).unwrap();
            self.entries.extend(entries);
        }

        fn from(&self, first: usize) -> ImaList {
            ImaList { first_entry: first as u64, entries: self.entries[first..].concat() }
        }

        fn reader(&self) -> MeasurementReader {
            MeasurementReader::new(self.file.path())
        }
    }

    #[test]
    fn only_new_entries_travel_and_lost_ones_travel_again() {
        let mut list = List::of(vec![ng("boot_aggregate", 0), legacy("/init"), ng("/usr/bin/ls", 0)]);
        let mut reader = list.reader();
        assert_eq!(reader.read_from(0).unwrap().unwrap(), list.from(0));
        assert_eq!(reader.read_from(3).unwrap().unwrap(), list.from(3));
        list.grow(vec![ng("/usr/bin/cat", 0), legacy("/bin/sh")]);
        assert_eq!(reader.read_from(3).unwrap().unwrap(), list.from(3));
        assert_eq!(reader.read_from(3).unwrap().unwrap(), list.from(3), "the answer was lost");
        assert_eq!(reader.read_from(1).unwrap().unwrap(), list.from(1), "another verifier knows less");
        assert_eq!(reader.read_from(4).unwrap().unwrap(), list.from(4));
    }

    #[test]
    fn evidence_carries_no_more_than_it_may_and_the_rest_next_time() {
        let list = List::of((0..20).map(|_| ng("/a", 200 << 10)).collect());
        let mut reader = list.reader();
        let mut first = 0;
        let mut read = Vec::new();
        loop {
            let part = reader.read_from(first).unwrap().unwrap();
            assert_eq!(part.first_entry, first);
            assert!(part.entries.len() <= MAX_IMA_LIST_BYTES);
            if part.entries.is_empty() {
                break;
            }
            first += (part.entries.len() / list.entries[0].len()) as u64;
            read.extend(part.entries);
        }
        assert_eq!(read, list.entries.concat());
    }

    #[test]
    fn a_kernel_without_ima_has_no_list_and_a_shorter_one_shows() {
        let folder = tempfile::tempdir().unwrap();
        assert!(MeasurementReader::new(folder.path().join("none")).read_from(0).unwrap().is_none());
        let list = List::of(vec![ng("boot_aggregate", 0)]);
        let part = list.reader().read_from(5).unwrap().unwrap();
        assert_eq!(part, ImaList { first_entry: 1, entries: Vec::new() });
    }

    #[test]
    fn what_is_no_list_is_named_by_its_entry() {
        let whole = [ng("boot_aggregate", 0), ng("/usr/bin/ls", 0)];
        let cut = whole.concat()[..whole.concat().len() - 1].to_vec();
        let mut endless = header(b"ima-ng");
        endless.extend([0xff; 4]);
        let unnamed = [&[0; 24][..], &[0xff; 4]].concat();
        for (octets, entry) in [(cut, 1), (endless, 0), (unnamed, 0), (vec![10, 0], 0)] {
            let list = List::of(vec![octets]);
            let error = list.reader().read_from(0).unwrap_err();
            assert!(matches!(error, ImaReadError::NoEntry { entry: found, .. } if found == entry), "{error}");
        }
    }

    #[test]
    fn the_list_of_this_machine_is_read_where_there_is_one() {
        let Ok(file) = std::fs::read(MEASUREMENTS) else {
            eprintln!("skipped: {MEASUREMENTS} cannot be read here");
            return;
        };
        let read = MeasurementReader::new(MEASUREMENTS).read_from(0).unwrap().unwrap();
        // It may have grown between the two.
        assert!(read.entries.starts_with(&file[..file.len().min(MAX_IMA_LIST_BYTES / 2)]));
    }
}
