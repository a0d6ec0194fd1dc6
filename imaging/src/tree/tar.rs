//! Tar files (POSIX.1-2017 pax, and GNU's long names), read one entry after the other.

use super::TreeError;
use std::collections::BTreeMap;
use std::io::{self, Read};

const BLOCK: usize = 512;
/// Of an extended header: names, and the attributes of one file.
const MAX_EXTENDED_BYTES: u64 = 1 << 20;
/// What we keep of a file's extended attributes.
const CAPABILITY: &str = "SCHILY.xattr.security.capability";

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file, whose octets follow.
    File,
    /// A folder.
    Folder,
    /// A symbolic link to this.
    Symlink(Vec<u8>),
    /// Another name of this entry.
    Hardlink(Vec<u8>),
    /// A device with major and minor number, or neither: a character device, a block device, a FIFO.
    Device(Device),
}

/// A device or FIFO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// A character device.
    Character(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A FIFO.
    Fifo,
}

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name as written; not to be trusted.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Octets that follow, of a file.
    pub size: u64,
    /// Permission bits, with set-id and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// `security.capability`, if it has one.
    pub capability: Option<Vec<u8>>,
}

/// Reads entries from a stream.
#[derive(Debug)]
pub struct Reader<R> {
    stream: R,
    /// Octets of the entry that were not read yet, and the padding behind them.
    rest: u64,
    padding: u64,
}

impl<R: Read> Reader<R> {
    /// Reads a tar file from `stream`.
    pub fn new(stream: R) -> Self {
        Self { stream, rest: 0, padding: 0 }
    }

    /// The next entry; `None` at the end. What was not read of the last is skipped.
    ///
    /// # Errors
    /// The stream fails, or is no tar file.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TreeError> {
        let (mut pax, mut long_name, mut long_link) = (BTreeMap::new(), None, None);
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let size = number(&header[124..136])?;
            match header[156] {
                b'x' => pax = parse_pax(&self.extended(size)?)?,
                b'g' => drop(self.extended(size)?),
                b'L' => long_name = Some(until_nul(&self.extended(size)?).to_vec()),
                b'K' => long_link = Some(until_nul(&self.extended(size)?).to_vec()),
                flag => {
                    let entry = entry(&header, flag, size, &pax, (long_name, long_link))?;
                    self.begin(entry.size);
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// Reads the octets of the entry.
    ///
    /// # Errors
    /// The stream fails, or ends before the entry does.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.rest).unwrap_or(usize::MAX).min(buffer.len());
        let got = self.stream.read(&mut buffer[..most])?;
        if got == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.rest -= got as u64;
        Ok(got)
    }

    /// The stream, wherever it is.
    pub fn into_inner(self) -> R {
        self.stream
    }

    fn begin(&mut self, size: u64) {
        self.rest = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
    }

    /// The next header block; `None` at two of zeros, or where the stream ends between entries.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, TreeError> {
        let skip = self.rest + self.padding;
        let skipped = io::copy(&mut (&mut self.stream).take(skip), &mut io::sink()).map_err(failed)?;
        (self.rest, self.padding) = (0, 0);
        if skipped < skip {
            return Err(TreeError::Tar("it ends within an entry".to_owned()));
        }
        let mut header = [0; BLOCK];
        let mut got = 0;
        while got < BLOCK {
            match self.stream.read(&mut header[got..]).map_err(failed)? {
                0 if got == 0 => return Ok(None),
                0 => return Err(TreeError::Tar("it ends within a header".to_owned())),
                more => got += more,
            }
        }
        if header.iter().all(|octet| *octet == 0) {
            return Ok(None);
        }
        let sum: u64 = header
            .iter()
            .enumerate()
            .map(|(at, octet)| if (148..156).contains(&at) { 32 } else { u64::from(*octet) })
            .sum();
        if number(&header[148..156])? != sum {
            return Err(TreeError::Tar("a header's checksum is wrong".to_owned()));
        }
        Ok(Some(header))
    }

    fn extended(&mut self, size: u64) -> Result<Vec<u8>, TreeError> {
        if size > MAX_EXTENDED_BYTES {
            return Err(TreeError::TooMuch("1 MiB of extended header for one file"));
        }
        self.begin(size);
        let mut bytes = Vec::new();
        (&mut self.stream).take(size).read_to_end(&mut bytes).map_err(failed)?;
        self.rest -= bytes.len() as u64;
        if self.rest > 0 { Err(TreeError::Tar("it ends within an extended header".to_owned())) } else { Ok(bytes) }
    }
}

fn failed(cause: io::Error) -> TreeError {
    TreeError::Tar(cause.to_string())
}

fn entry(
    header: &[u8; BLOCK],
    flag: u8,
    size: u64,
    pax: &BTreeMap<String, Vec<u8>>,
    long: (Option<Vec<u8>>, Option<Vec<u8>>),
) -> Result<Entry, TreeError> {
    let said = |key: &str, otherwise: u64| match pax.get(key) {
        Some(value) => decimal(value),
        None => Ok(otherwise),
    };
    let narrow = |value: u64| u32::try_from(value).map_err(|_| TreeError::Tar(format!("{value} is too large")));
    let link = pax.get("linkpath").cloned().or(long.1).unwrap_or_else(|| until_nul(&header[157..257]).to_vec());
    let numbers = || Ok::<_, TreeError>((narrow(number(&header[329..337])?)?, narrow(number(&header[337..345])?)?));
    let kind = match flag {
        0 | b'0' | b'7' => Kind::File,
        b'1' => Kind::Hardlink(link),
        b'2' => Kind::Symlink(link),
        b'3' => numbers().map(|(major, minor)| Kind::Device(Device::Character(major, minor)))?,
        b'4' => numbers().map(|(major, minor)| Kind::Device(Device::Block(major, minor)))?,
        b'5' => Kind::Folder,
        b'6' => Kind::Device(Device::Fifo),
        other => return Err(TreeError::Tar(format!("it has an entry of type {}", char::from(other).escape_debug()))),
    };
    let size = if kind == Kind::File { said("size", size)? } else { 0 };
    let mtime = match pax.get("mtime") {
        // The fraction is left out.
        Some(value) => {
            value.split(|octet| *octet == b'.').next().and_then(|whole| text(whole)?.parse().ok()).unwrap_or(0)
        }
        None => i64::try_from(number(&header[136..148])?).unwrap_or(0),
    };
    Ok(Entry {
        path: pax.get("path").cloned().or(long.0).unwrap_or_else(|| ustar_path(header)),
        kind,
        size,
        mode: narrow(number(&header[100..108])? & 0o7777)?,
        uid: narrow(said("uid", number(&header[108..116])?)?)?,
        gid: narrow(said("gid", number(&header[116..124])?)?)?,
        mtime,
        capability: pax.get(CAPABILITY).cloned(),
    })
}

fn ustar_path(header: &[u8; BLOCK]) -> Vec<u8> {
    let (name, prefix) = (until_nul(&header[..100]), until_nul(&header[345..500]));
    if &header[257..263] == b"ustar\0" && !prefix.is_empty() { [prefix, b"/", name].concat() } else { name.to_vec() }
}

/// Octal text, or GNU's big-endian number behind a set bit.
fn number(field: &[u8]) -> Result<u64, TreeError> {
    let bad = || TreeError::Tar("a header has a number that is none".to_owned());
    if field[0] & 0x80 != 0 {
        let (high, low) = field.split_at(field.len().saturating_sub(8));
        if high.iter().enumerate().any(|(at, octet)| *octet & if at == 0 { 0x7f } else { 0xff } != 0) {
            return Err(bad());
        }
        let low = low.iter().fold(0, |value: u64, octet| value << 8 | u64::from(*octet));
        return Ok(if high.is_empty() { low & !(1 << 63) } else { low });
    }
    let digits = text(until_nul(field)).ok_or_else(bad)?.trim_matches(' ');
    if digits.is_empty() { Ok(0) } else { u64::from_str_radix(digits, 8).map_err(|_| bad()) }
}

fn decimal(value: &[u8]) -> Result<u64, TreeError> {
    let parsed = text(value).and_then(|digits| digits.parse().ok());
    parsed.ok_or_else(|| TreeError::Tar("an extended header has a number that is none".to_owned()))
}

/// `LENGTH KEY=VALUE\n`, over and over.
fn parse_pax(mut bytes: &[u8]) -> Result<BTreeMap<String, Vec<u8>>, TreeError> {
    let bad = || TreeError::Tar("an extended header is malformed".to_owned());
    let mut records = BTreeMap::new();
    while !bytes.is_empty() {
        let space = bytes.iter().take(20).position(|octet| *octet == b' ').ok_or_else(bad)?;
        let length: usize = text(&bytes[..space]).and_then(|digits| digits.parse().ok()).ok_or_else(bad)?;
        if length <= space + 1 || length > bytes.len() || bytes[length - 1] != b'\n' {
            return Err(bad());
        }
        let record = &bytes[space + 1..length - 1];
        let equals = record.iter().position(|octet| *octet == b'=').ok_or_else(bad)?;
        records.insert(text(&record[..equals]).ok_or_else(bad)?.to_owned(), record[equals + 1..].to_vec());
        bytes = &bytes[length..];
    }
    Ok(records)
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|octet| *octet == 0).next().unwrap_or_default()
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}
