//! The lease log: leases in memory are what counts, and this file brings them back after a restart.
//!
//! One line a lease, `mac address until_ms checksum`, appended before the reply leaves. `write` is enough
//! against a killed process; against a killed machine the file is synced by [`LeaseLog::sync`], which the DHCP task
//! calls once a second at most: losing a second of leases costs a client at worst another address, because the
//! records it came from are isolation's. A line that is torn, or damaged, is skipped and counted, never guessed at.

use super::lease::AddressLease;
use ring::digest::{SHA256, digest};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

/// An open lease log.
#[derive(Debug)]
pub struct LeaseLog {
    path: PathBuf,
    file: File,
    /// Octets of whole lines: where the next line begins.
    length: u64,
    unsynced: bool,
}

/// What was doing when the log failed.
#[derive(Debug, thiserror::Error)]
#[error("{doing} the lease log {path}")]
pub struct LeaseLogError {
    doing: &'static str,
    path: PathBuf,
    #[source]
    cause: io::Error,
}

/// What a log held when it was opened.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// The leases that had not run out; of two of one client the one that runs longer comes later.
    pub leases: Vec<AddressLease>,
    /// Lines that made no sense.
    pub damaged: usize,
}

impl LeaseLog {
    /// Opens the log, reads what is still good and rewrites the file with only that: into a new file that then takes
    /// the old one's place, so that a crash leaves one or the other.
    ///
    /// # Errors
    /// The folder or the file cannot be used.
    pub fn open(path: &Path, now_ms: i64) -> Result<(Self, Restored), LeaseLogError> {
        let failed = |doing| move |cause| LeaseLogError { doing, path: path.to_owned(), cause };
        let mut bytes = Vec::new();
        match File::open(path) {
            Ok(file) => {
                file.take(MAX_LOG_BYTES).read_to_end(&mut bytes).map_err(failed("reading"))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("opening")(error)),
        }
        let restored = parse(&bytes, now_ms);
        let text: String = restored.leases.iter().map(line).collect();
        let fresh = path.with_extension("new");
        let rewrite = || -> io::Result<File> {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            // The file still held by the name `fresh` is appended to from now on; after the rename its name is `path`.
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&fresh)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&fresh, path)?;
            Ok(file)
        };
        let file = rewrite().map_err(failed("rewriting"))?;
        Ok((Self { path: path.to_owned(), file, length: text.len() as u64, unsynced: false }, restored))
    }

    /// Appends one lease. If it cannot be written whole the file is cut back to its last whole line.
    ///
    /// # Errors
    /// The disk is full or broken. The lease must then not be confirmed to the client.
    pub fn append(&mut self, lease: &AddressLease) -> Result<(), LeaseLogError> {
        let line = line(lease);
        if let Err(cause) = self.file.write_all(line.as_bytes()) {
            use std::io::Seek as _;
            let cut = self.file.set_len(self.length).and_then(|()| self.file.seek(io::SeekFrom::Start(self.length)));
            if let Err(error) = cut {
                tracing::error!(event = "dhcp.lease_log_torn", path = %self.path.display(), %error);
            }
            return Err(LeaseLogError { doing: "appending to", path: self.path.clone(), cause });
        }
        self.length += line.len() as u64;
        self.unsynced = true;
        Ok(())
    }

    /// Makes what was appended survive a power failure. A file that has outgrown its content many times over is
    /// rewritten.
    ///
    /// # Errors
    /// The disk is broken or full; what was there stays.
    pub fn sync(&mut self, now_ms: i64) -> Result<(), LeaseLogError> {
        if !std::mem::take(&mut self.unsynced) {
            return Ok(());
        }
        self.file.sync_data().map_err(|cause| LeaseLogError { doing: "syncing", path: self.path.clone(), cause })?;
        if self.length > MAX_LOG_BYTES / 2 {
            let path = self.path.clone();
            (*self, _) = Self::open(&path, now_ms)?;
        }
        Ok(())
    }
}

/// Reads a log's lines. Public for fuzzing: whoever can write the file chose its bytes.
#[must_use]
pub fn parse(bytes: &[u8], now_ms: i64) -> Restored {
    let mut by_address = HashMap::new();
    let mut damaged = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        match parse_line(line) {
            // A later line supersedes an earlier one of the same address, also by ending its lease.
            Some(lease) => {
                by_address.insert(lease.address, lease);
            }
            None => damaged += 1,
        }
    }
    let mut leases: Vec<AddressLease> = by_address.into_values().filter(|lease| lease.until_ms > now_ms).collect();
    leases.sort_by_key(|lease| (lease.until_ms, lease.address));
    Restored { leases, damaged }
}

fn line(lease: &AddressLease) -> String {
    let mut line = format!("{} {} {} ", lease.mac, lease.address, lease.until_ms);
    let checksum = checksum(&line);
    line.push_str(&checksum);
    line.push('\n');
    line
}

fn parse_line(line: &[u8]) -> Option<AddressLease> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (body, sum) = line.split_at_checked(line.len().checked_sub(CHECKSUM_DIGITS)?)?;
    if checksum(body) != sum {
        return None;
    }
    let mut words = body.strip_suffix(' ')?.split(' ');
    let (mac, address, until_ms) = (words.next()?, words.next()?, words.next()?);
    let lease =
        AddressLease { mac: mac.parse().ok()?, address: address.parse().ok()?, until_ms: until_ms.parse().ok()? };
    words.next().is_none().then_some(lease)
}

fn checksum(text: &str) -> String {
    let mut sum = hex::encode(digest(&SHA256, text.as_bytes()));
    sum.truncate(CHECKSUM_DIGITS);
    sum
}

/// Ends of lines are told from torn ones by this many hexadecimal digits of SHA-256.
const CHECKSUM_DIGITS: usize = 8;
/// More than a million lines; what is beyond is not read.
const MAX_LOG_BYTES: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lease(host: u16, until_ms: i64) -> AddressLease {
        let [high, low] = host.to_be_bytes();
        let mac = assay_wire::net::MacAddr::new([2, 0, 0, 0, high, low]).unwrap();
        AddressLease { address: std::net::Ipv4Addr::new(10, 0, high, low), mac, until_ms }
    }

    fn open(path: &Path, now_ms: i64) -> (LeaseLog, Restored) {
        LeaseLog::open(path, now_ms).unwrap()
    }

    #[test]
    fn row_10_leases_come_back_until_they_run_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state/leases");
        let (mut log, restored) = open(&path, 0);
        assert_eq!(restored, Restored::default());
        for until in [100, 200, 300] {
            log.append(&lease(1, until)).unwrap();
        }
        log.append(&lease(2, 150)).unwrap();
        log.append(&lease(3, 500)).unwrap();
        log.append(&lease(3, 60)).unwrap();
        log.sync(0).unwrap();
        assert_eq!(open(&path, 60).1.leases, [lease(2, 150), lease(1, 300)], "the third was released");
        assert_eq!(open(&path, 150).1.leases, [lease(1, 300)]);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1, "rewritten with what is good");
    }

    #[test]
    fn row_10_killed_at_any_byte_only_the_torn_line_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("leases");
        let whole: String = (1..=3).map(|host| line(&lease(host, 1000))).collect();
        let line_bytes = whole.len() / 3;
        for length in 0..=whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let (mut log, restored) = open(&path, 0);
            assert_eq!(restored.leases.len(), length / line_bytes, "cut at {length}");
            assert_eq!(restored.damaged, usize::from(length % line_bytes != 0));
            log.append(&lease(9, 1000)).unwrap();
            assert!(open(&path, 0).1.leases.contains(&lease(9, 1000)), "cut at {length}");
        }
    }

    #[test]
    fn row_10_a_full_disk_is_an_error_and_leaves_whole_lines() {
        // /dev/full takes no octet; there is nothing to cut back either.
        let file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut log = LeaseLog { path: "/dev/full".into(), file, length: 0, unsynced: false };
        let error = log.append(&lease(1, 1)).unwrap_err();
        assert_eq!(error.to_string(), "appending to the lease log /dev/full");
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("No space left"));
    }

    #[test]
    fn row_10_sixty_thousand_leases_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("leases");
        let text: String = (0..60_000).map(|host| line(&lease(host, 1000))).collect();
        std::fs::write(&path, text).unwrap();
        assert_eq!(open(&path, 0).1.leases.len(), 60_000);
    }

    #[test]
    fn a_folder_that_cannot_be_used_is_named() {
        let error = LeaseLog::open(Path::new("/proc/nowhere/leases"), 0).unwrap_err();
        assert_eq!(error.to_string(), "rewriting the lease log /proc/nowhere/leases");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes, 0);
        }

        #[test]
        fn lines_round_trip_and_a_changed_octet_is_noticed(host in 1_u16..1000, until in 1_i64..i64::MAX, at in 0_usize..30, bit in 0_u8..7) {
            let mut bytes = line(&lease(host, until)).into_bytes();
            prop_assert_eq!(parse(&bytes, 0).leases, vec![lease(host, until)]);
            bytes[at] ^= 1 << bit;
            prop_assert!(parse(&bytes, 0).leases.is_empty());
        }
    }
}
