//! An image as the octets of a file: raw, or qcow2 laid out so that any part of it can be made at any time. So an export
//! that was broken off goes on at any octet, and nothing is ever written on this side.
//!
//! ```text
//! cluster 0     header
//! then          refcount table, refcount blocks, L1 table, L2 tables of what has data, the data
//! ```
//!
//! Clusters are 64 KiB; one that is known to be zero is not there. That is known of golden images by their hash trees, and
//! of layers by what their files have: so the first octet can be given at once, however large the image is. The layout is QEMU's `docs/interop/qcow2.txt`, version 3; numbers
//! are big endian.

use super::StoreError;
use super::device::BlockDevice;
use assay_wire::imaging::ImageFormat;
use std::ops::Range;
use std::sync::Arc;

const CLUSTER_BYTES: u64 = CLUSTER_LEN as u64;
const CLUSTER_LEN: usize = 64 * 1024;
/// Entries of 8 octets in a cluster: of an L1, an L2 or the refcount table.
const ENTRIES: u64 = CLUSTER_BYTES / 8;
/// Counts of 16 bits in a refcount block.
const COUNTS: u64 = CLUSTER_BYTES / 2;
/// The entry's cluster has one reference.
const COPIED: u64 = 1 << 63;
const HEADER_BYTES: u32 = 104;

/// An image in a format, ready to be read from any offset.
#[derive(Debug)]
pub struct Exported {
    device: Arc<dyn BlockDevice>,
    qcow2: Option<Layout>,
}

impl Exported {
    /// Prepares an export. For qcow2 the store is asked where there may be data; none is read.
    ///
    /// # Errors
    /// The store does not say.
    pub fn new(device: Arc<dyn BlockDevice>, format: ImageFormat) -> Result<Self, StoreError> {
        let qcow2 = match format {
            ImageFormat::Raw => None,
            ImageFormat::Qcow2 => Some(Layout::of(device.byte_len(), data_clusters(&device.data_ranges()?))),
        };
        Ok(Self { device, qcow2 })
    }

    /// Octets of the file.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.qcow2.as_ref().map_or(self.device.byte_len(), Layout::file_bytes)
    }

    /// Fills `buffer` from `offset` of the file.
    ///
    /// # Errors
    /// A block cannot be read. The range must be within the file.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        let Some(layout) = &self.qcow2 else { return Ok(self.device.read_at(offset, buffer)?) };
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let within = at % CLUSTER_BYTES;
            let length = usize::try_from(CLUSTER_BYTES - within).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at_mut(length);
            match layout.cluster(at / CLUSTER_BYTES) {
                Cluster::Data(guest) => self.read_guest(guest * CLUSTER_BYTES + within, part)?,
                Cluster::Table(table) => {
                    let within = usize::try_from(within).unwrap_or(usize::MAX);
                    part.copy_from_slice(&table[within..within + length]);
                }
            }
            (at, rest) = (at + length as u64, after);
        }
        Ok(())
    }

    /// With zeros behind the disk's end, which need not be a cluster's.
    fn read_guest(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        let within = usize::try_from(self.device.byte_len().saturating_sub(offset)).unwrap_or(usize::MAX);
        let (content, padding) = buffer.split_at_mut(within.min(buffer.len()));
        padding.fill(0);
        Ok(self.device.read_at(offset, content)?)
    }
}

/// The numbers of the clusters that these ranges touch.
fn data_clusters(ranges: &[Range<u64>]) -> Vec<u64> {
    let of = |range: &Range<u64>| range.start / CLUSTER_BYTES..range.end.div_ceil(CLUSTER_BYTES);
    let mut clusters: Vec<u64> = ranges.iter().flat_map(of).collect();
    clusters.dedup();
    clusters
}

/// Where everything is in a qcow2 file.
#[derive(Debug)]
struct Layout {
    byte_len: u64,
    /// Guest clusters that have data, in order; as they are in the file.
    data: Vec<u64>,
    /// Numbers of the L2 tables that are there, in order.
    tables: Vec<u64>,
    refcount_table: u64,
    refcount_blocks: u64,
    l1: u64,
}

enum Cluster {
    Table(Vec<u8>),
    /// A guest cluster.
    Data(u64),
}

impl Layout {
    fn of(byte_len: u64, data: Vec<u64>) -> Self {
        let mut tables: Vec<u64> = data.iter().map(|cluster| cluster / ENTRIES).collect();
        tables.dedup();
        let l1 = byte_len.div_ceil(CLUSTER_BYTES).div_ceil(ENTRIES).div_ceil(ENTRIES).max(1);
        let rest = 1 + l1 + (tables.len() + data.len()) as u64;
        // The counts count their own clusters too: grow until they fit.
        let (mut refcount_table, mut refcount_blocks) = (1, 1);
        loop {
            let needed = (rest + refcount_table + refcount_blocks).div_ceil(COUNTS);
            let table = needed.div_ceil(ENTRIES);
            if (refcount_table, refcount_blocks) == (table, needed) {
                return Self { byte_len, data, tables, refcount_table, refcount_blocks, l1 };
            }
            (refcount_table, refcount_blocks) = (table, needed);
        }
    }

    fn file_bytes(&self) -> u64 {
        self.clusters() * CLUSTER_BYTES
    }

    fn clusters(&self) -> u64 {
        self.data_start() + self.data.len() as u64
    }

    fn l1_start(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks
    }

    fn l2_start(&self) -> u64 {
        self.l1_start() + self.l1
    }

    fn data_start(&self) -> u64 {
        self.l2_start() + self.tables.len() as u64
    }

    /// What is in a cluster of the file.
    fn cluster(&self, number: u64) -> Cluster {
        let offset = |cluster: u64| cluster * CLUSTER_BYTES;
        let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        if number >= self.data_start() {
            return Cluster::Data(self.data[index(number - self.data_start())]);
        }
        let table = if number == 0 {
            self.header()
        } else if number <= self.refcount_table {
            let first = (number - 1) * ENTRIES;
            let block = |at: u64| if at < self.refcount_blocks { offset(1 + self.refcount_table + at) } else { 0 };
            words((first..first + ENTRIES).map(block))
        } else if number < self.l1_start() {
            let first = (number - 1 - self.refcount_table) * COUNTS;
            let counts = (first..first + COUNTS).map(|cluster| u16::from(cluster < self.clusters()));
            counts.flat_map(u16::to_be_bytes).collect()
        } else if number < self.l2_start() {
            let first = (number - self.l1_start()) * ENTRIES;
            let table =
                |at: u64| self.tables.binary_search(&at).map_or(0, |at| COPIED | offset(self.l2_start() + at as u64));
            words((first..first + ENTRIES).map(table))
        } else {
            let first = self.tables[index(number - self.l2_start())] * ENTRIES;
            let data =
                |at: u64| self.data.binary_search(&at).map_or(0, |at| COPIED | offset(self.data_start() + at as u64));
            words((first..first + ENTRIES).map(data))
        };
        Cluster::Table(table)
    }

    fn header(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(CLUSTER_LEN);
        let mut put32 = |values: &[u32]| values.iter().for_each(|value| header.extend_from_slice(&value.to_be_bytes()));
        let split = |value: u64| [(value >> 32) as u32, (value & 0xffff_ffff) as u32];
        let l1_entries = self.byte_len.div_ceil(CLUSTER_BYTES).div_ceil(ENTRIES);
        // Magic, version, no backing file, cluster size.
        put32(&[0x5146_49fb, 3, 0, 0, 0, CLUSTER_LEN.trailing_zeros()]);
        put32(&split(self.byte_len));
        // Not encrypted; L1 table; refcount table.
        put32(&[0, u32::try_from(l1_entries).unwrap_or(u32::MAX)]);
        put32(&split(self.l1_start() * CLUSTER_BYTES));
        put32(&split(CLUSTER_BYTES));
        // Clusters of the refcount table; no snapshots; no features; refcounts of 2^4 bits; the header's length.
        put32(&[u32::try_from(self.refcount_table).unwrap_or(u32::MAX), 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, HEADER_BYTES]);
        header.resize(CLUSTER_LEN, 0);
        header
    }
}

fn words(values: impl Iterator<Item = u64>) -> Vec<u8> {
    values.flat_map(u64::to_be_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::super::device::DeviceError;
    use super::super::qcow2::check_header;
    use super::*;

    #[test]
    fn the_refcounts_count_themselves() {
        for clusters in [0, 1, 32_700, 32_764, 32_765, 32_766, 70_000] {
            let layout = Layout::of((clusters + 5) * CLUSTER_BYTES - 512, (0..clusters).collect());
            assert!(layout.clusters() <= layout.refcount_blocks * COUNTS, "{clusters}");
            assert!(layout.refcount_blocks <= layout.refcount_table * ENTRIES, "{clusters}");
            assert!((layout.refcount_blocks - 1) * COUNTS < layout.clusters(), "{clusters}: none too many");
        }
    }

    #[test]
    fn clusters_are_those_that_ranges_touch() {
        assert!(data_clusters(&[]).is_empty());
        let ranges =
            [0..1, 4096..CLUSTER_BYTES, CLUSTER_BYTES - 1..CLUSTER_BYTES + 1, 5 * CLUSTER_BYTES..7 * CLUSTER_BYTES];
        assert_eq!(data_clusters(&ranges), [0, 1, 5, 6]);
    }

    /// Eight TiB with one block in the middle, of which nothing may be read but that.
    #[derive(Debug)]
    struct Sparse;

    const MIDDLE: u64 = 4 << 40;

    impl BlockDevice for Sparse {
        fn byte_len(&self) -> u64 {
            2 * MIDDLE
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
            assert!((MIDDLE..MIDDLE + CLUSTER_BYTES).contains(&offset), "read at {offset}");
            buffer.fill(7);
            Ok(())
        }
        fn try_read_at(&self, _: u64, _: &mut [u8]) -> Result<bool, DeviceError> {
            Ok(false)
        }
        fn data_ranges(&self) -> Result<Vec<Range<u64>>, DeviceError> {
            Ok(std::iter::once(MIDDLE..MIDDLE + 1).collect())
        }
        fn flush(&self) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    #[test]
    fn a_large_sparse_image_is_not_read_before_its_export_begins() {
        let file = Exported::new(Arc::new(Sparse), ImageFormat::Qcow2).unwrap();
        let mut octets = vec![0; usize::try_from(file.byte_len()).unwrap()];
        file.read_at(0, &mut octets).unwrap();
        assert_eq!(check_header(&octets[..112], file.byte_len()), Ok(2 * MIDDLE));
        assert_eq!(octets.iter().filter(|octet| **octet == 7).count(), CLUSTER_LEN);
        assert!(octets.len() < 20 * CLUSTER_LEN, "{} octets", octets.len());
    }

    #[test]
    fn our_own_check_takes_the_header() {
        for byte_len in [512, CLUSTER_BYTES + 512, 1 << 40] {
            let layout = Layout::of(byte_len, vec![0]);
            assert_eq!(check_header(&layout.header()[..112], layout.file_bytes()), Ok(byte_len));
        }
    }
}
