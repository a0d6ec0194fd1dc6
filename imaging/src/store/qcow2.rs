//! What a qcow2 file says of itself, read strictly before `imago` may open it: nothing that points at another file,
//! nothing encrypted, and no table whose size an attacker chose.
//!
//! The layout is QEMU's `docs/interop/qcow2.txt`; numbers are big endian.

/// Larger virtual disks are refused: 16 TiB.
pub const MAX_VIRTUAL_BYTES: u64 = 16 << 40;
/// Octets of header that [`check_header`] looks at.
pub const HEADER_BYTES: usize = 112;
/// As QEMU: 32 MiB of table. More than the disk needs is allowed, because saved machine state lies behind it.
const MAX_L1_ENTRIES: u64 = (32 << 20) / 8;
const MAGIC: u32 = 0x5146_49fb;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_KNOWN: u64 = 0x1f;

/// Why a qcow2 file is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Qcow2Refused {
    /// Shorter than a header.
    #[error("the file ends within its header")]
    Truncated,
    /// No magic.
    #[error("it is not a qcow2 file")]
    NotQcow2,
    /// Neither 2 nor 3.
    #[error("qcow2 version {0} is not 2 or 3")]
    Version(u32),
    /// It reads from another file.
    #[error("it has a backing file; flatten it first, with `qemu-img convert -O qcow2`")]
    BackingFile,
    /// Its data is in another file.
    #[error("its data is in an external file; flatten it first, with `qemu-img convert -O qcow2`")]
    DataFile,
    /// Needs a key.
    #[error("it is encrypted")]
    Encrypted,
    /// QEMU marked it so.
    #[error("it is marked corrupt; repair it first, with `qemu-img check -r all`")]
    Corrupt,
    /// We cannot read it.
    #[error("it uses {0}; convert it, with `qemu-img convert -O qcow2`")]
    Unsupported(&'static str),
    /// Its numbers make no sense.
    #[error("its header is malformed: {0}")]
    Malformed(&'static str),
}

/// Checks the header at the start of `bytes`, of a file of `file_bytes` octets; answers the virtual disk's size.
///
/// # Errors
/// See [`Qcow2Refused`].
pub fn check_header(bytes: &[u8], file_bytes: u64) -> Result<u64, Qcow2Refused> {
    if u32_at(bytes, 0)? != MAGIC {
        return Err(Qcow2Refused::NotQcow2);
    }
    let version = u32_at(bytes, 4)?;
    if !matches!(version, 2 | 3) {
        return Err(Qcow2Refused::Version(version));
    }
    if u64_at(bytes, 8)? != 0 || u32_at(bytes, 16)? != 0 {
        return Err(Qcow2Refused::BackingFile);
    }
    let cluster_bits = u32_at(bytes, 20)?;
    if !(9..=21).contains(&cluster_bits) {
        return Err(Qcow2Refused::Malformed("cluster size is not 512 octets to 2 MiB"));
    }
    let virtual_bytes = u64_at(bytes, 24)?;
    if virtual_bytes == 0 || virtual_bytes > MAX_VIRTUAL_BYTES {
        return Err(Qcow2Refused::Malformed("virtual size is not 1 octet to 16 TiB"));
    }
    if u32_at(bytes, 32)? != 0 {
        return Err(Qcow2Refused::Encrypted);
    }
    if version == 3 {
        check_features(u64_at(bytes, 72)?)?;
    }
    // One L1 entry spans a cluster of 8-octet L2 entries.
    let l1_entries = u64::from(u32_at(bytes, 36)?);
    let l1_needed = virtual_bytes.div_ceil(1 << (2 * cluster_bits - 3));
    let l1_offset = u64_at(bytes, 40)?;
    let cluster_bytes = 1_u64 << cluster_bits;
    if l1_entries < l1_needed || l1_entries > MAX_L1_ENTRIES {
        return Err(Qcow2Refused::Malformed("L1 table does not fit the virtual size"));
    }
    let refcounts = u64_at(bytes, 48)?;
    let refcount_bytes = u64::from(u32_at(bytes, 56)?).saturating_mul(cluster_bytes);
    let inside = |offset: u64, length: u64| {
        offset.is_multiple_of(cluster_bytes) && offset.checked_add(length).is_some_and(|end| end <= file_bytes)
    };
    if l1_offset == 0 || !inside(l1_offset, l1_entries * 8) {
        return Err(Qcow2Refused::Malformed("L1 table is not within the file"));
    }
    if !inside(refcounts, refcount_bytes) {
        return Err(Qcow2Refused::Malformed("refcount table is not within the file"));
    }
    Ok(virtual_bytes)
}

fn check_features(incompatible: u64) -> Result<(), Qcow2Refused> {
    if incompatible & INCOMPATIBLE_DATA_FILE != 0 {
        return Err(Qcow2Refused::DataFile);
    }
    if incompatible & INCOMPATIBLE_CORRUPT != 0 {
        return Err(Qcow2Refused::Corrupt);
    }
    if incompatible & INCOMPATIBLE_COMPRESSION != 0 {
        return Err(Qcow2Refused::Unsupported("a compression other than zlib"));
    }
    if incompatible & INCOMPATIBLE_EXTENDED_L2 != 0 {
        return Err(Qcow2Refused::Unsupported("extended L2 entries"));
    }
    if incompatible & !INCOMPATIBLE_KNOWN != 0 {
        return Err(Qcow2Refused::Unsupported("a feature that is not known here"));
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Qcow2Refused> {
    let field = bytes.get(at..at + 4).and_then(|field| field.try_into().ok());
    field.map(u32::from_be_bytes).ok_or(Qcow2Refused::Truncated)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, Qcow2Refused> {
    let field = bytes.get(at..at + 8).and_then(|field| field.try_into().ok());
    field.map(u64::from_be_bytes).ok_or(Qcow2Refused::Truncated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A version 3 header of a 1 GiB disk with 64 KiB clusters.
    fn good() -> Vec<u8> {
        let mut header = vec![0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| header[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC.to_be_bytes());
        put(4, &3_u32.to_be_bytes());
        put(20, &16_u32.to_be_bytes());
        put(24, &(1_u64 << 30).to_be_bytes());
        put(36, &2_u32.to_be_bytes());
        put(40, &0x3_0000_u64.to_be_bytes());
        put(48, &0x1_0000_u64.to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        header
    }

    fn changed(at: usize, field: &[u8]) -> Result<u64, Qcow2Refused> {
        let mut header = good();
        header[at..at + field.len()].copy_from_slice(field);
        check_header(&header, 1 << 20)
    }

    #[test]
    fn a_good_header_passes() {
        assert_eq!(check_header(&good(), 1 << 20), Ok(1 << 30));
    }

    #[test]
    fn whatever_points_elsewhere_is_refused() {
        assert_eq!(changed(8, &512_u64.to_be_bytes()), Err(Qcow2Refused::BackingFile));
        assert_eq!(changed(16, &9_u32.to_be_bytes()), Err(Qcow2Refused::BackingFile));
        assert_eq!(changed(72, &4_u64.to_be_bytes()), Err(Qcow2Refused::DataFile));
        assert_eq!(changed(32, &2_u32.to_be_bytes()), Err(Qcow2Refused::Encrypted));
        assert_eq!(
            changed(72, &(1_u64 << 40).to_be_bytes()).map_err(|e| matches!(e, Qcow2Refused::Unsupported(_))),
            Err(true)
        );
    }

    #[test]
    fn tables_stay_within_the_file_and_the_size() {
        assert!(changed(36, &u32::MAX.to_be_bytes()).is_err(), "a 32 GiB L1 table");
        assert!(changed(36, &1_u32.to_be_bytes()).is_err(), "too short for the disk");
        assert!(changed(40, &(1_u64 << 20).to_be_bytes()).is_err(), "behind the end");
        assert!(changed(40, &u64::MAX.to_be_bytes()).is_err());
        assert!(changed(56, &u32::MAX.to_be_bytes()).is_err());
        assert!(changed(24, &u64::MAX.to_be_bytes()).is_err());
        assert!(changed(20, &63_u32.to_be_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..160), magic in any::<bool>(), size in any::<u64>()) {
            if magic && bytes.len() >= 8 {
                bytes[..8].copy_from_slice(&good()[..8]);
            }
            if let Ok(virtual_bytes) = check_header(&bytes, size) {
                prop_assert!(virtual_bytes <= MAX_VIRTUAL_BYTES);
            }
        }
    }
}
