//! The agent's images that the lab boots: the good one as `make agent-image` built it, and a copy with one byte changed.

use crate::error::{LabError, Result};
use object::read::pe::PeFile64;
use object::{Object as _, ObjectSection as _};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Name of the ramdisk as it was built.
pub const GOOD: &str = "agent";
/// Name of the ramdisk with one byte changed.
pub const TAMPERED: &str = "tampered";

/// The ramdisks of a lab.
#[derive(Debug, Clone)]
pub struct Ramdisks {
    good: PathBuf,
    tampered: PathBuf,
    /// Reference Values of the good one: what `assay policy learn` wants.
    pub reference_values: PathBuf,
    /// Nodes that get the tampered one.
    pub tampered_nodes: Vec<String>,
    /// The folder that golden images may be imported from.
    pub image_folder: PathBuf,
}

impl Ramdisks {
    /// Takes the agent's image from `built` (as `make agent-image` leaves it) and makes the tampered copy in `folder`.
    ///
    /// # Errors
    /// The image is missing, or is no UKI.
    pub fn prepare(built: &Path, folder: &Path, image_folder: PathBuf, tampered_nodes: Vec<String>) -> Result<Self> {
        let good = built.join("agent.efi");
        let reference_values = built.join("reference-values.json");
        let missing = |path: &Path| LabError::io(format!("reading {} (run `make agent-image`)", path.display()));
        let uki = fs::read(&good).map_err(missing(&good))?;
        if !reference_values.exists() {
            return Err(missing(&reference_values)(std::io::ErrorKind::NotFound.into()));
        }
        fs::create_dir_all(folder).map_err(LabError::io(format!("making {}", folder.display())))?;
        let tampered = folder.join("tampered.efi");
        let changed = tamper(uki)
            .map_err(|problem| LabError::unexpected(format!("changing one byte of {}", good.display()), problem))?;
        fs::write(&tampered, changed).map_err(LabError::io(format!("writing {}", tampered.display())))?;
        Ok(Self { good, tampered, reference_values, tampered_nodes, image_folder })
    }

    /// netboot's `ramdisks`.
    pub(crate) fn tables(&self) -> Value {
        let table = |name: &str, path: &Path| json!({ "name": name, "path": path, "reference": self.reference_values });
        json!([table(GOOD, &self.good), table(TAMPERED, &self.tampered)])
    }

    /// netboot's `node_ramdisks`.
    pub(crate) fn overrides(&self) -> Value {
        let entries = self.tampered_nodes.iter().map(|node| (node.clone(), Value::from(TAMPERED)));
        Value::Object(entries.collect::<Map<_, _>>())
    }
}

/// Changes one bit of one letter in the UKI's description of its operating system. It still boots: nothing reads that
/// section but the firmware's and the stub's measurements.
fn tamper(mut uki: Vec<u8>) -> std::result::Result<Vec<u8>, String> {
    let (offset, size) = {
        let file = PeFile64::parse(&*uki).map_err(|error| error.to_string())?;
        let section = file.section_by_name(".osrel").ok_or("it has no .osrel section")?;
        section.file_range().ok_or("its .osrel section is not in the file")?
    };
    let start = usize::try_from(offset).map_err(|_| "its .osrel section is out of reach")?;
    let size = usize::try_from(size).map_err(|_| "its .osrel section is out of reach")?;
    let section = uki.get_mut(start..start.saturating_add(size)).ok_or("its .osrel section is cut short")?;
    let letter = section.iter_mut().rev().find(|byte| byte.is_ascii_alphabetic()).ok_or("its .osrel has no letter")?;
    *letter ^= 1;
    Ok(uki)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_uki_is_not_tampered_with() {
        assert!(tamper(b"MZ".to_vec()).is_err());
        // A real PE file without the section: the stub that UKIs begin with.
        let stub = fs::read("/usr/lib/systemd/boot/efi/linuxx64.efi.stub").unwrap();
        assert!(tamper(stub).unwrap_err().contains(".osrel"));
    }

    #[test]
    fn exactly_one_byte_of_a_uki_changes() {
        let folder = tempfile::tempdir().unwrap();
        let (osrel, uki) = (folder.path().join("osrel"), folder.path().join("uki.efi"));
        fs::write(&osrel, "ID=assay\nVERSION_ID=1\n").unwrap();
        let done = std::process::Command::new("objcopy")
            .arg("--add-section")
            .arg(format!(".osrel={}", osrel.display()))
            .args(["--change-section-vma", ".osrel=0x20000"])
            .arg("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
            .arg(&uki)
            .status()
            .unwrap();
        assert!(done.success());
        let before = fs::read(&uki).unwrap();
        let after = tamper(before.clone()).unwrap();
        let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        assert_eq!((before.len(), changed), (after.len(), 1));
    }
}
