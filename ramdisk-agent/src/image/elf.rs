//! What an ELF file needs beside itself: shared libraries of programs (`DT_NEEDED`), other modules of kernel modules
//! (`depends=` in `.modinfo`).

use object::elf::{DT_NEEDED, FileHeader64};
use object::read::elf::{Dyn as _, FileHeader as _};
use object::{Endianness, Object as _, ObjectSection as _};

/// Not a readable ELF file.
#[derive(Debug, thiserror::Error)]
#[error("reading an ELF file")]
pub struct ElfError(#[from] object::Error);

/// Names of the shared libraries that `file` is linked to.
///
/// # Errors
/// If it is not a 64-bit ELF file.
pub fn needed_libraries(file: &[u8]) -> Result<Vec<String>, ElfError> {
    let header = FileHeader64::<Endianness>::parse(file)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, file)?;
    let Some((entries, strings)) = sections.dynamic(endian, file)? else {
        return Ok(Vec::new());
    };
    let strings = sections.strings(endian, file, strings)?;
    let mut names = Vec::new();
    for entry in entries {
        if entry.tag(endian) == DT_NEEDED {
            names.push(String::from_utf8_lossy(entry.string(endian, strings)?).into_owned());
        }
    }
    Ok(names)
}

/// Names of the modules that the kernel module `file` needs loaded before it.
///
/// # Errors
/// If it is not an ELF file, as a compressed module is not.
pub fn module_dependencies(file: &[u8]) -> Result<Vec<String>, ElfError> {
    let object = object::File::parse(file)?;
    let Some(section) = object.section_by_name(".modinfo") else {
        return Ok(Vec::new());
    };
    let info = section.data()?;
    let depends = info.split(|&b| b == 0).filter_map(|field| field.strip_prefix(b"depends="));
    Ok(depends
        .flat_map(|names| names.split(|&b| b == b','))
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    #[test]
    fn a_program_names_its_libraries() {
        let names = needed_libraries(&fs::read("/bin/sh").unwrap()).unwrap();
        assert!(names.iter().any(|name| name == "libc.so.6"), "{names:?}");
    }

    proptest! {
        #[test]
        fn never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), elf: bool) {
            if elf && bytes.len() > 8 {
                bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
            }
            let _ = needed_libraries(&bytes);
            let _ = module_dependencies(&bytes);
        }
    }
}
