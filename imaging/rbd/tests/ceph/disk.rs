//! A clone over its golden file, against a model.

use crate::site::{GOLDEN_BYTES, MIB, Site, golden_content};
use assay_rbd::keys;
use assay_rbd::name::{CephUser, ImageKind, ImageName};
use assay_rbd::{CloneDisk, GoldenFile, RbdError};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// The golden image's content in memory, which counts what is read of it.
#[derive(Debug)]
struct Golden {
    content: Vec<u8>,
    octets_read: AtomicU64,
}

impl Golden {
    fn new() -> Self {
        Self { content: golden_content(), octets_read: AtomicU64::new(0) }
    }
}

impl GoldenFile for &Golden {
    fn byte_len(&self) -> u64 {
        self.content.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.octets_read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        buffer.copy_from_slice(&self.content[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, buffer).map(|()| true)
    }

    fn is_mapped(&self, offset: u64, length: u64) -> io::Result<(bool, u64)> {
        let rest = &self.content[offset as usize..][..length as usize];
        let mapped = rest[0] != 0;
        let held = rest.iter().take_while(|octet| (**octet != 0) == mapped).count();
        Ok((mapped, held as u64))
    }

    fn data_ranges(&self) -> io::Result<Vec<Range<u64>>> {
        let (mut ranges, mut at) = (Vec::new(), 0);
        while at < self.byte_len() {
            let (mapped, octets) = self.is_mapped(at, self.byte_len() - at)?;
            ranges.extend(mapped.then_some(at..at + octets));
            at += octets;
        }
        Ok(ranges)
    }
}

#[test]
fn what_a_clone_never_wrote_is_read_from_the_file_alone() {
    let site = Site::new();
    // A file that says something else than Ceph does: so it is seen which of them was asked.
    let mut golden = Golden::new();
    golden.content.fill(0x77);
    let disk = CloneDisk::open(&site.pool, site.disk(1), &[site.parent()], &golden).unwrap();
    assert_eq!(disk.own_objects(), (0, 4));
    let mut content = vec![0; GOLDEN_BYTES as usize];
    disk.read_at(0, &mut content).unwrap();
    assert!(content.iter().all(|octet| *octet == 0x77));
    assert!(disk.try_read_at(4 * MIB, &mut content[..512]).unwrap());

    disk.write_at(8 * MIB - 1, &[1, 2]).unwrap();
    assert_eq!(disk.own_objects(), (2, 4));
    let mut part = [0; 4];
    disk.read_at(8 * MIB - 2, &mut part).unwrap();
    assert_eq!(part, [0, 1, 2, 0], "both objects are Ceph's, with the parent's content as Ceph has it");
    assert!(!disk.try_read_at(8 * MIB, &mut part).unwrap());
    assert!(disk.try_read_at(12 * MIB, &mut part).unwrap());
    disk.flush().unwrap();
}

#[test]
fn an_object_that_was_emptied_stays_empty_when_the_disk_is_opened_again() {
    let site = Site::new();
    let golden = Golden::new();
    let name = site.disk(1);
    let disk = CloneDisk::open(&site.pool, name, &[site.parent()], &golden).unwrap();
    disk.unmap(0, 4 * MIB).unwrap();
    drop(disk);
    // What librbd tells of would not do.
    assert_eq!(site.pool.open_read_only(name, None).unwrap().own_extents().unwrap(), []);
    // As an export does, with a key for this clone.
    let user = CephUser::new(&format!("export-{}", site.namespace)).unwrap();
    let key = keys::issue(&site.cluster, &user, &site.scope(name)).unwrap();
    let pool = site.as_holder(&user, &key, &site.namespace);
    let disk = CloneDisk::open(&pool, name, &[site.parent()], &golden).unwrap();
    assert_eq!(disk.own_objects(), (1, 4));
    let mut content = vec![1; 4 * MIB as usize];
    disk.read_at(0, &mut content).unwrap();
    assert!(content.iter().all(|octet| *octet == 0));
}

#[test]
fn a_disk_has_data_where_its_golden_image_has_and_where_it_was_written_to() {
    let site = Site::new();
    let golden = Golden::new();
    let layers = [site.parent()];
    let name = site.disk(1);
    let disk = CloneDisk::open(&site.pool, name, &layers, &golden).unwrap();
    assert_eq!(disk.data_ranges().unwrap(), [0..4 * MIB, 10 * MIB..12 * MIB], "the golden image's");
    // An object that is emptied, one that is written to a little beyond where its parent ends, and one that is copied up.
    disk.unmap(0, 4 * MIB).unwrap();
    disk.write_at(12 * MIB, &[1; 4096]).unwrap();
    disk.write_at(11 * MIB, &[1; 512]).unwrap();
    let expected = [8 * MIB..12 * MIB, 12 * MIB..12 * MIB + 4096];
    let check = |disk: &CloneDisk<&Golden>| {
        assert_eq!(disk.data_ranges().unwrap(), expected);
        assert_eq!(disk.is_mapped(512, 16 * MIB - 512).unwrap(), (false, 4 * MIB - 512), "to the object's end");
        assert_eq!(disk.is_mapped(4 * MIB, 100).unwrap(), (false, 100), "a hole of the golden image");
        assert_eq!(disk.is_mapped(9 * MIB, 7 * MIB).unwrap(), (true, 3 * MIB), "a copy of what was there");
        assert_eq!(disk.is_mapped(12 * MIB + 95, 4 * MIB - 95).unwrap(), (true, 4001));
        assert_eq!(disk.is_mapped(12 * MIB + 4096, MIB).unwrap(), (false, MIB));
        assert!(matches!(disk.is_mapped(16 * MIB, 1), Err(RbdError::OutOfRange { .. })));
    };
    check(&disk);
    drop(disk);
    let disk = CloneDisk::open(&site.pool, name, &layers, &golden).unwrap();
    check(&disk);
    disk.unmap(12 * MIB, 4096).unwrap();
    drop(disk);
    // What stands alone has no golden image's data.
    let image = site.pool.open_image(name).unwrap();
    image.flatten(&mut |_, _| std::ops::ControlFlow::Continue(())).unwrap();
    drop(image);
    let disk = CloneDisk::open(&site.pool, name, &layers, &golden).unwrap();
    let ranges = disk.data_ranges().unwrap();
    assert!(ranges.contains(&(8 * MIB..12 * MIB)) && ranges.iter().all(|range| range.start >= 4 * MIB), "{ranges:?}");
}

#[test]
fn another_parent_another_size_and_ranges_outside_are_refused() {
    let site = Site::new();
    let golden = Golden::new();
    let name = site.disk(1);
    let elsewhere = Site::new().parent();
    let refused = CloneDisk::open(&site.pool, name, &[elsewhere], &golden).unwrap_err();
    assert!(matches!(refused, RbdError::WrongParent { .. }), "{refused}");
    let short = Golden { content: vec![0; MIB as usize], octets_read: AtomicU64::new(0) };
    let refused = CloneDisk::open(&site.pool, name, &[site.parent()], &short).unwrap_err();
    assert!(matches!(refused, RbdError::Malformed { .. }), "{refused}");
    let disk = CloneDisk::open(&site.pool, name, &[site.parent()], &golden).unwrap();
    let outside = |answer: Result<(), RbdError>| assert!(matches!(answer, Err(RbdError::OutOfRange { .. })));
    outside(disk.read_at(GOLDEN_BYTES, &mut [0]));
    outside(disk.try_read_at(u64::MAX, &mut [0; 2]).map(drop));
    outside(disk.write_at(GOLDEN_BYTES - 1, &[0; 2]));
    outside(disk.unmap(u64::MAX, u64::MAX));
    disk.read_at(0, &mut []).unwrap();
    disk.write_at(GOLDEN_BYTES, &[]).unwrap();
    disk.unmap(0, 0).unwrap();
    assert_eq!(disk.own_objects(), (0, 4));
}

#[test]
fn a_flattened_disk_is_all_its_own() {
    let site = Site::new();
    let golden = Golden::new();
    let name = site.disk(1);
    let image = site.pool.open_image(name).unwrap();
    image.flatten(&mut |_, _| std::ops::ControlFlow::Continue(())).unwrap();
    drop(image);
    let disk = CloneDisk::open(&site.pool, name, &[site.parent()], &golden).unwrap();
    assert_eq!(disk.own_objects(), (4, 4));
    let mut content = vec![0; GOLDEN_BYTES as usize];
    disk.read_at(0, &mut content).unwrap();
    assert!(content == golden_content());
    assert_eq!(golden.octets_read.load(Ordering::Relaxed), 0);
    assert!(!disk.try_read_at(0, &mut content).unwrap());
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Unmap(u64, u64),
    Read(u64, u64),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..GOLDEN_BYTES, prop_oneof![0_u64..9000, 0..6 * MIB]);
    // Ranges that begin and end with an object are what erases it.
    let objects = || (0_u64..4, 1_u64..3).prop_map(|(first, count)| (first * 4 * MIB, count * 4 * MIB));
    let step = prop_oneof![
        4 => (range(), any::<u8>()).prop_map(|((at, length), octet)| Step::Write(at, length, octet)),
        2 => range().prop_map(|(at, length)| Step::Unmap(at, length)),
        2 => objects().prop_map(|(at, length)| Step::Unmap(at, length)),
        4 => range().prop_map(|(at, length)| Step::Read(at, length)),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..20)
}

#[test]
fn a_disk_holds_what_was_written_to_it_last_and_its_golden_image_otherwise() {
    let site = Site::new();
    let golden = Golden::new();
    let layers = [site.parent()];
    let next = std::cell::Cell::new(0);
    let config = Config { cases: 12, failure_persistence: None, max_shrink_iters: 40, ..Config::default() };
    TestRunner::new(config)
        .run(&(steps(), Just(())), |(steps, ())| {
            next.set(next.get() + 1);
            let name = ImageName::numbered(ImageKind::Disk, next.get());
            site.pool.clone_image((&site.golden_pool, site.golden, &site.snapshot), name, 22).unwrap();
            let mut disk = CloneDisk::open(&site.pool, name, &layers, &golden).unwrap();
            let mut model = golden_content();
            for step in steps.into_iter().chain([Step::Reopen]) {
                let within = |at: u64, length: u64| at as usize..(at + length).min(GOLDEN_BYTES) as usize;
                match step {
                    Step::Write(at, length, octet) => {
                        let range = within(at, length);
                        disk.write_at(at, &vec![octet; range.len()]).unwrap();
                        model[range].fill(octet);
                    }
                    Step::Unmap(at, length) => {
                        let range = within(at, length);
                        disk.unmap(at, range.len() as u64).unwrap();
                        model[range].fill(0);
                    }
                    Step::Read(at, length) => {
                        let range = within(at, length);
                        let mut content = vec![0; range.len()];
                        disk.read_at(at, &mut content).unwrap();
                        prop_assert!(content == model[range], "{at} {length}");
                    }
                    Step::Reopen => {
                        drop(disk);
                        disk = CloneDisk::open(&site.pool, name, &layers, &golden).unwrap();
                        let mut content = vec![0; GOLDEN_BYTES as usize];
                        disk.read_at(0, &mut content).unwrap();
                        prop_assert!(content == model);
                        for range in disk.data_ranges().unwrap() {
                            content[range.start as usize..range.end as usize].fill(0);
                        }
                        prop_assert!(content.iter().all(|octet| *octet == 0), "data where none are said to be");
                    }
                }
            }
            drop(disk);
            site.pool.remove_image(name).unwrap();
            Ok(())
        })
        .unwrap();
}
