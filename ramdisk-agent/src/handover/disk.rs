//! The tenant's disk on the node: finding it after the log-in, its root file system, a read-only mount, and letting
//! go of it. The edge to `/sys/block` and `mount(2)`.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep};

const DISK_LIMIT: Duration = Duration::from_secs(30);
const PARTITION_LIMIT: Duration = Duration::from_secs(15);
const POLL_INTERVAL: Duration = Duration::from_millis(50);

const SYS_BLOCK: &str = "/sys/block";
const MOUNT_POINT: &str = "/run/assay-root";

/// A SCSI disk that came through iSCSI.
#[derive(Debug)]
pub struct IscsiDisk {
    name: String,
}

impl IscsiDisk {
    /// Waits until the kernel shows the disk with this logical unit number.
    ///
    /// # Errors
    /// [`DiskError::NoDisk`] after the time limit.
    pub async fn wait_for(lun: u16) -> Result<Self, DiskError> {
        poll(DISK_LIMIT, || find(Path::new(SYS_BLOCK), lun))
            .await
            .map(|name| Self { name })
            .ok_or(DiskError::NoDisk { lun })
    }

    /// The kernel's name for it, like `sda`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until one of its partitions, or the whole disk, holds an ext4 file system.
    ///
    /// # Errors
    /// [`DiskError::NoRoot`] after the time limit.
    pub async fn wait_for_root(&self) -> Result<RootPartition, DiskError> {
        poll(PARTITION_LIMIT, || self.partitions().into_iter().find_map(|name| RootPartition::probe(&name)))
            .await
            .ok_or_else(|| DiskError::NoRoot { disk: self.name.clone() })
    }

    /// Makes the kernel forget the disk, so that nothing is written to it and nobody waits for it while the tenant's
    /// kernel starts.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn delete(self) -> Result<(), DiskError> {
        let path = Path::new(SYS_BLOCK).join(&self.name).join("device/delete");
        fs::write(&path, "1").map_err(|source| DiskError::Delete { disk: self.name, source })
    }

    /// Partitions, largest first (a root file system is larger than an EFI system partition), then the disk itself.
    fn partitions(&self) -> Vec<String> {
        let sys = Path::new(SYS_BLOCK).join(&self.name);
        let size = |name: &str| {
            let text = fs::read_to_string(sys.join(name).join("size")).unwrap_or_default();
            text.trim().parse::<u64>().unwrap_or_default()
        };
        let entries = fs::read_dir(&sys).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries
            .filter(|entry| entry.path().join("partition").exists())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort_by_key(|name| (std::cmp::Reverse(size(name)), name.clone()));
        names.push(self.name.clone());
        names
    }
}

/// An ext4 file system that is expected to hold the tenant's root.
#[derive(Debug)]
pub struct RootPartition {
    device: PathBuf,
    superblock: Ext4Superblock,
}

impl RootPartition {
    fn probe(name: &str) -> Option<Self> {
        let device = Path::new("/dev").join(name);
        let mut block = [0; Ext4Superblock::BYTES];
        let mut file = File::open(&device).ok()?;
        file.seek(SeekFrom::Start(Ext4Superblock::OFFSET)).ok()?;
        file.read_exact(&mut block).ok()?;
        Some(Self { device, superblock: Ext4Superblock::parse(&block)? })
    }

    /// How a kernel command line names it: by label if it has one, else by UUID.
    #[must_use]
    pub fn source(&self) -> String {
        match &self.superblock.label {
            Some(label) => format!("LABEL={label}"),
            None => format!("UUID={}", self.superblock.uuid),
        }
    }

    /// Mounts it read-only, without replaying its journal: the tenant's kernel does that.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn mount(&self) -> Result<Mounted, DiskError> {
        let failed = |source: io::Error| DiskError::Mount { device: self.device.clone(), source };
        fs::create_dir_all(MOUNT_POINT).map_err(failed)?;
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some(&self.device), MOUNT_POINT, Some("ext4"), flags, Some("noload"))
            .map_err(|errno| failed(errno.into()))?;
        Ok(Mounted { path: PathBuf::from(MOUNT_POINT) })
    }
}

/// A mounted file system, unmounted when dropped.
#[derive(Debug)]
pub struct Mounted {
    path: PathBuf,
}

impl Mounted {
    /// Where.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(errno) = umount2(&self.path, MntFlags::MNT_DETACH) {
            tracing::warn!(event = "agent.unmount_failed", "unmounting {}: {errno}", self.path.display());
        }
    }
}

/// What we need of an ext4 superblock (kernel documentation, "ext4 Data Structures", section 4.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ext4Superblock {
    /// `s_volume_name`, if it has one that a command line can carry.
    pub label: Option<String>,
    /// `s_uuid`, as text.
    pub uuid: String,
}

impl Ext4Superblock {
    /// Where it stands on the partition.
    pub const OFFSET: u64 = 1024;
    /// Its size.
    pub const BYTES: usize = 1024;

    const MAGIC: [u8; 2] = 0xef53_u16.to_le_bytes();

    /// Reads it; nothing if this is not ext4.
    #[must_use]
    pub fn parse(block: &[u8; Self::BYTES]) -> Option<Self> {
        if block[0x38..0x3a] != Self::MAGIC {
            return None;
        }
        let uuid = hex::encode(&block[0x68..0x78]);
        let uuid = [&uuid[..8], &uuid[8..12], &uuid[12..16], &uuid[16..20], &uuid[20..]].join("-");
        let name = &block[0x78..0x88];
        let name = &name[..name.iter().position(|&b| b == 0).unwrap_or(name.len())];
        let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let label = (!name.is_empty() && name.iter().all(plain)).then(|| String::from_utf8_lossy(name).into_owned());
        Some(Self { label, uuid })
    }
}

/// Why there is no root file system.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The kernel shows no disk.
    #[error("waiting for the tenant's disk: no iSCSI disk with LUN {lun} appeared within {} s", DISK_LIMIT.as_secs())]
    NoDisk {
        /// Which one.
        lun: u16,
    },
    /// Nothing that we can read on it.
    #[error("looking for the tenant's root file system: no ext4 on {disk} or its partitions within {} s", PARTITION_LIMIT.as_secs())]
    NoRoot {
        /// The disk.
        disk: String,
    },
    /// It cannot be mounted.
    #[error("mounting {} read-only", device.display())]
    Mount {
        /// The device.
        device: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel keeps it.
    #[error("letting go of the disk {disk}")]
    Delete {
        /// The disk.
        disk: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A disk's `/sys/block` entry is a link through its iSCSI session, and its `device` is named host:channel:target:lun.
fn find(sys_block: &Path, lun: u16) -> Option<String> {
    let suffix = format!(":{lun}");
    fs::read_dir(sys_block).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        let is_iscsi = fs::read_link(&path).ok()?.to_string_lossy().contains("/session");
        let device = fs::read_link(path.join("device")).ok()?;
        let is_lun = device.file_name()?.to_string_lossy().ends_with(&suffix);
        (is_iscsi && is_lun).then(|| entry.file_name().to_string_lossy().into_owned())
    })
}

async fn poll<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        sleep(POLL_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;
    use std::process::Command;

    #[test]
    fn reads_what_mkfs_writes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let uuid = "01234567-89ab-cdef-0123-456789abcdef";
        let made = Command::new("/sbin/mkfs.ext4")
            .args(["-q", "-L", "tenant-root", "-U", uuid])
            .arg(file.path())
            .arg("1M")
            .status()
            .unwrap();
        assert!(made.success());
        let bytes = fs::read(file.path()).unwrap();
        let superblock = Ext4Superblock::parse(bytes[1024..2048].try_into().unwrap()).unwrap();
        assert_eq!(superblock, Ext4Superblock { label: Some("tenant-root".to_owned()), uuid: uuid.to_owned() });
    }

    #[test]
    fn a_label_that_would_change_a_command_line_is_not_used() {
        let mut block = [0; Ext4Superblock::BYTES];
        assert_eq!(Ext4Superblock::parse(&block), None);
        block[0x38..0x3a].copy_from_slice(&Ext4Superblock::MAGIC);
        block[0x78..0x80].copy_from_slice(b"a init=b");
        assert_eq!(Ext4Superblock::parse(&block).unwrap().label, None);
    }

    #[test]
    fn finds_the_iscsi_disk_among_others() {
        let sys = tempfile::tempdir().unwrap();
        for (name, bus, unit) in [
            ("sda", "pci0/ata1", "0:0:0:0"),
            ("sdb", "platform/host2/session1", "2:0:0:1"),
            ("sdc", "platform/host3/session2", "3:0:0:0"),
        ] {
            let unit_path = sys.path().join("devices").join(bus).join(unit);
            let disk = unit_path.join("block").join(name);
            fs::create_dir_all(&disk).unwrap();
            symlink(&unit_path, disk.join("device")).unwrap();
            fs::create_dir_all(sys.path().join("block")).unwrap();
            symlink(&disk, sys.path().join("block").join(name)).unwrap();
        }
        assert_eq!(find(&sys.path().join("block"), 0).as_deref(), Some("sdc"));
        assert_eq!(find(&sys.path().join("block"), 1).as_deref(), Some("sdb"));
        assert_eq!(find(&sys.path().join("block"), 7), None);
    }

    proptest! {
        #[test]
        fn superblocks_never_panic(bytes in proptest::collection::vec(any::<u8>(), Ext4Superblock::BYTES), magic: bool) {
            let mut block: [u8; Ext4Superblock::BYTES] = bytes.try_into().unwrap();
            if magic {
                block[0x38..0x3a].copy_from_slice(&Ext4Superblock::MAGIC);
            }
            let _ = Ext4Superblock::parse(&block);
        }
    }
}
