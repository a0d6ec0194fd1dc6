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
        let mut uki = fs::read(&joined).map_err(failed)?;
        remove_date(&mut uki).ok_or_else(|| UkiError::Stub { path: self.stub.to_owned() })?;
        Ok(uki)
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

/// Clears what objcopy writes anew at each run: the time, and the checksum over it, which UEFI firmware does not read.
/// (Offsets: PE Format, "COFF File Header" and "Optional Header Windows-Specific Fields".)
fn remove_date(pe: &mut [u8]) -> Option<()> {
    let header = u32::from_le_bytes(pe.get(0x3c..0x40)?.try_into().ok()?);
    let header = usize::try_from(header).ok()?;
    for field in [header + 8, header + 24 + 64] {
        pe.get_mut(field..field + 4)?.fill(0);
    }
    Some(())
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
        assert_eq!(remove_date(&mut [0; 30]), None);
    }

    /// Needs systemd's stub (Debian package systemd-boot-efi) and objcopy (binutils).
    #[test]
    fn the_same_parts_make_the_same_octets_and_can_be_read_back() {
        let parts = Parts {
            stub: Path::new("/usr/lib/systemd/boot/efi/linuxx64.efi.stub"),
            os_release: "ID=test\n",
            command_line: "quiet",
            linux: &[0xaa; 5000],
            initrd: &[0xbb; 9001],
        };
        let scratch = tempfile::tempdir().unwrap();
        let first = parts.join(scratch.path()).unwrap();
        assert_eq!(first[0x88..0x8c], [0; 4], "the PE header still has a time");
        assert_eq!(first, parts.join(scratch.path()).unwrap());
        let pe = PeFile64::parse(first.as_slice()).unwrap();
        for (name, size) in [(".osrel", 8), (".cmdline", 5), (".initrd", 9001), (".linux", 5000)] {
            let section = pe.section_table().iter().find(|section| section.raw_name() == name.as_bytes()).unwrap();
            assert_eq!(section.virtual_size.get(LittleEndian), size, "{name}");
            assert_eq!(section.virtual_address.get(LittleEndian) % 4096, 0, "{name}");
        }
    }
}
