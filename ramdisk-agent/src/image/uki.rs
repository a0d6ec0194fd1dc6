//! Joins systemd's UEFI stub, kernel, initrd and command line to one PE executable (UAPI.5, "Unified Kernel Image"), so
//! that firmware measures all of it.

use super::{ImageError, ToolError, read, run};
use object::LittleEndian;
use object::read::pe::PeFile64;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Sections of a PE image start at a multiple of this.
const SECTION_ALIGNMENT: u64 = 4096;

/// Room for an initrd and kernel of any size; far above the stub's own end.
const MAX_STUB_END: u64 = 16 * 1024 * 1024;

/// What goes into a UKI.
#[derive(Debug)]
pub struct Parts<'a> {
    /// systemd's stub for this machine type.
    pub stub: &'a Path,
    /// os-release(5) of the image.
    pub os_release: &'a str,
    /// The command line for a start without one.
    pub command_line: &'a str,
    /// The kernel.
    pub linux: &'a [u8],
    /// The initrd, compressed.
    pub initrd: &'a [u8],
}

impl Parts<'_> {
    /// Joins them. Intermediate files go below `scratch`, and away again.
    ///
    /// # Errors
    /// See [`UkiError`].
    pub fn join(&self, scratch: &Path) -> Result<Vec<u8>, UkiError> {
        let failed = |source| UkiError::Scratch { path: scratch.to_owned(), source };
        let directory = tempfile::tempdir_in(scratch).map_err(failed)?;
        let stub = read(self.stub).map_err(Box::new)?;
        let mut address = end_of(&stub).ok_or_else(|| UkiError::Stub { path: self.stub.to_owned() })?;
        let mut objcopy = Command::new("objcopy");
        let sections = [
            (".osrel", self.os_release.as_bytes()),
            (".cmdline", self.command_line.as_bytes()),
            (".initrd", self.initrd),
            (".linux", self.linux),
        ];
        for (name, content) in sections {
            let file = directory.path().join(&name[1..]);
            fs::write(&file, content).map_err(failed)?;
            objcopy.arg("--add-section").arg(format!("{name}={}", file.display()));
            objcopy.arg("--change-section-vma").arg(format!("{name}={address:#x}"));
            address = (address + content.len() as u64).next_multiple_of(SECTION_ALIGNMENT);
        }
        let joined = directory.path().join("joined");
        run(objcopy.arg(self.stub).arg(&joined))?;
        fs::read(&joined).map_err(failed)
    }
}

/// Checks that a command line can be passed on by iPXE and measured as computed: words of printable ASCII with single
/// blanks between them, and nothing that iPXE's scripts would read as their own.
///
/// # Errors
/// [`UkiError::CommandLine`].
pub fn check_command_line(line: &str) -> Result<(), UkiError> {
    let plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'$' | b'\\' | b'"' | b'\'' | b'#' | b'&' | b'|' | b';');
    let words = !line.is_empty() && line.split(' ').all(|word| !word.is_empty() && word.bytes().all(plain));
    if words && line.len() <= 1024 { Ok(()) } else { Err(UkiError::CommandLine { line: line.to_owned() }) }
}

/// Why there is no UKI.
#[derive(Debug, thiserror::Error)]
pub enum UkiError {
    /// Not a stub.
    #[error("joining the UKI: {} is not a UEFI stub", path.display())]
    Stub {
        /// Its file.
        path: PathBuf,
    },
    /// Not a command line to measure.
    #[error("the command line `{line}` is not made of plain words with single blanks between them")]
    CommandLine {
        /// What it is.
        line: String,
    },
    /// No room for intermediate files.
    #[error("joining the UKI: using {}", path.display())]
    Scratch {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("joining the UKI")]
    Read(#[from] Box<ImageError>),
    /// objcopy failed.
    #[error("joining the UKI")]
    Tool(#[from] ToolError),
}

/// The first free address after the stub's own sections.
fn end_of(stub: &[u8]) -> Option<u64> {
    let pe = PeFile64::parse(stub).ok()?;
    let base = pe.nt_headers().optional_header.image_base.get(LittleEndian);
    let ends = pe.section_table().iter().map(|section| {
        let size = section.virtual_size.get(LittleEndian).max(section.size_of_raw_data.get(LittleEndian));
        u64::from(section.virtual_address.get(LittleEndian)) + u64::from(size)
    });
    let end = ends.max()?.next_multiple_of(SECTION_ALIGNMENT);
    (end < MAX_STUB_END).then_some(base + end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_are_plain_words() {
        check_command_line(crate::image::DEFAULT_COMMAND_LINE).unwrap();
        for bad in ["", " a", "a ", "a  b", "a\tb", "a\nb", "${x}", "a;b", "a&&b", "ä", &"x".repeat(1025)] {
            assert!(check_command_line(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn what_is_no_executable_is_no_stub() {
        assert_eq!(end_of(b"MZ"), None);
        assert_eq!(end_of(&[]), None);
    }
}
