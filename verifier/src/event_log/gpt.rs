//! `UEFI_GPT_DATA` (PFP 1.06, section 10.2.8): a disk's partition table as firmware measured it. Counts and sizes are
//! compared with what is there, and no more partitions are read than a table has.

use super::data::{Guid, utf16};
use assay_tpm::reader::{DecodeError, Order, Reader};
use serde::Serialize;

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// What it is for.
    pub kind: Guid,
    /// Which it is.
    pub id: Guid,
    /// Its first block.
    pub first_block: u64,
    /// Its last block.
    pub last_block: u64,
    /// Its name.
    pub name: String,
}

/// The disk's GUID and its partitions.
pub(super) fn decode(data: &[u8]) -> Result<(Guid, Vec<Partition>), DecodeError> {
    let mut reader = Reader::new("UEFI_GPT_DATA", data, Order::Little);
    let header = reader.bytes(HEADER_BYTES)?;
    if !header.starts_with(b"EFI PART") {
        return Err(reader.value("UEFIPartitionHeader signature", header[0]));
    }
    let disk = Guid(array_at(header, 56));
    let entry_bytes = usize::try_from(u32::from_le_bytes(array_at(header, 84))).unwrap_or(usize::MAX);
    let count = reader.u64()?;
    if count > MAX_PARTITIONS {
        return Err(reader.value("NumberOfPartitions", count));
    }
    if !(ENTRY_BYTES..=MAX_ENTRY_BYTES).contains(&entry_bytes) {
        return Err(reader.value("SizeOfPartitionEntry", u32::try_from(entry_bytes).unwrap_or(u32::MAX)));
    }
    let mut partitions = Vec::new();
    for _ in 0..count {
        let entry = reader.bytes(entry_bytes)?;
        partitions.push(Partition {
            kind: Guid(array_at(entry, 0)),
            id: Guid(array_at(entry, 16)),
            first_block: u64::from_le_bytes(array_at(entry, 32)),
            last_block: u64::from_le_bytes(array_at(entry, 40)),
            name: utf16(&entry[56..ENTRY_BYTES]).trim_end_matches('\0').to_owned(),
        });
    }
    reader.finish()?;
    Ok((disk, partitions))
}

/// The octets at `at`, which the caller knows to be there.
fn array_at<const N: usize>(octets: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&octets[at..at + N]);
    array
}

const HEADER_BYTES: usize = 92;
const ENTRY_BYTES: usize = 128;
const MAX_ENTRY_BYTES: usize = 4096;
/// As many as any tool makes room for.
const MAX_PARTITIONS: u64 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn table(count: u64, entry_bytes: u32) -> Vec<u8> {
        let mut data = vec![0; HEADER_BYTES];
        data[..8].copy_from_slice(b"EFI PART");
        data[84..88].copy_from_slice(&entry_bytes.to_le_bytes());
        data.extend(count.to_le_bytes());
        let mut entry = vec![0x11; 56];
        entry.extend("root".encode_utf16().flat_map(u16::to_le_bytes));
        entry.resize(128, 0);
        data.extend(entry);
        data
    }

    #[test]
    fn b7_a_table_is_read_and_one_that_lies_is_none() {
        let (_, partitions) = decode(&table(1, 128)).unwrap();
        assert_eq!((partitions.len(), partitions[0].name.as_str()), (1, "root"));
        for (count, entry) in [(2, 128), (u64::MAX, 128), (0, 128), (1, 0), (1, 127), (1, u32::MAX), (1, 129)] {
            assert!(decode(&table(count, entry)).is_err(), "{count} partitions of {entry} octets");
        }
    }
}
