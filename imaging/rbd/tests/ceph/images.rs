//! Images, snapshots, clones, namespaces.

use crate::site::{GOLDEN_BYTES, MIB, Site, Tools, golden_content};
use assay_rbd::name::{CephKey, CephUser, ImageKind, ImageName, Namespace, SnapshotName};
use assay_rbd::testing::Ceph;
use assay_rbd::{Cluster, Connection, DEFAULT_OBJECT_ORDER, Patience, RbdError};
use std::net::TcpListener;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

#[test]
fn an_image_is_made_written_read_and_removed() {
    let ceph = Ceph::shared();
    let cluster = ceph.admin();
    let (_, pool) = ceph.new_namespace(&cluster);
    let name = ImageName::numbered(ImageKind::Golden, 7);
    pool.create_image(name, 10 * MIB, DEFAULT_OBJECT_ORDER).unwrap();
    assert!(matches!(pool.create_image(name, MIB, DEFAULT_OBJECT_ORDER), Err(RbdError::Exists { .. })));
    let image = pool.open_image(name).unwrap();
    assert_eq!((image.byte_len(), image.object_bytes()), (10 * MIB, 4 * MIB));
    image.write_at(4 * MIB - 100, &[7; 200]).unwrap();
    let mut buffer = [1; 400];
    image.read_at(4 * MIB - 200, &mut buffer).unwrap();
    assert_eq!(buffer, [[0; 100], [7; 100], [7; 100], [0; 100]].concat()[..]);
    let extents = image.data_extents().unwrap();
    assert!(extents.iter().all(|extent| extent.end <= 4 * MIB + 100), "nothing behind what was written: {extents:?}");
    assert!(extents.iter().any(|extent| extent.contains(&(4 * MIB - 1))), "{extents:?}");

    image.write_zeroes(4 * MIB - 50, 100).unwrap();
    image.read_at(4 * MIB - 200, &mut buffer).unwrap();
    assert_eq!(buffer, [&[0; 100][..], &[7; 50], &[0; 100], &[7; 50], &[0; 100]].concat()[..]);
    image.discard(0, 10 * MIB).unwrap();
    assert_eq!(image.data_extents().unwrap(), []);

    image.set_metadata("assay.name", "debian-12").unwrap();
    assert_eq!(image.metadata("assay.name").unwrap().as_deref(), Some("debian-12"));
    assert_eq!(image.metadata("assay.none").unwrap(), None);
    image.flush().unwrap();
    drop(image);
    let other = ImageName::numbered(ImageKind::Golden, 8);
    pool.rename_image(name, other).unwrap();
    assert_eq!(pool.images().unwrap().iter().map(|(name, _)| *name).collect::<Vec<_>>(), [other]);
    assert!(pool.open_read_only(name, None).unwrap_err().is_not_found());
    pool.remove_image(other).unwrap();
    pool.remove_image(other).unwrap();
    assert_eq!(pool.images().unwrap(), []);
}

#[test]
fn what_librbd_would_assert_on_or_cut_off_is_answered_before_it() {
    let site = Site::new();
    let image = site.pool.open_image(site.disk(1)).unwrap();
    image.read_at(0, &mut []).unwrap();
    image.write_at(GOLDEN_BYTES, &[]).unwrap();
    image.write_zeroes(0, 0).unwrap();
    image.discard(GOLDEN_BYTES, 0).unwrap();
    let refused = |answer: Result<(), RbdError>| matches!(answer, Err(RbdError::OutOfRange { .. }));
    assert!(refused(image.read_at(GOLDEN_BYTES, &mut [0])));
    assert!(refused(image.read_at(u64::MAX, &mut [0; 2])));
    assert!(refused(image.write_at(GOLDEN_BYTES - 1, &[0; 2])));
    assert!(refused(image.write_zeroes(1, GOLDEN_BYTES)));
    assert!(refused(image.discard(u64::MAX, u64::MAX)));
    let snapshot = site.golden_pool.open_read_only(site.golden, Some(&site.snapshot)).unwrap();
    assert!(matches!(snapshot.write_at(0, &[1]), Err(RbdError::ReadOnly { .. })));
    assert!(matches!(snapshot.write_zeroes(0, 1), Err(RbdError::ReadOnly { .. })));
}

#[test]
fn a_clone_reads_its_parent_in_another_namespace_until_it_is_flattened() {
    let site = Site::new();
    let name = site.disk(1);
    let golden = site.golden_pool.open_read_only(site.golden, None).unwrap();
    let children = golden.children().unwrap();
    assert_eq!(children.len(), 1);
    assert_eq!((children[0].namespace.as_str(), children[0].name.clone()), (site.namespace.as_str(), name.to_string()));

    let clone = site.pool.open_image(name).unwrap();
    clone.check_parent(&site.parent()).unwrap();
    let mut content = vec![0; GOLDEN_BYTES as usize];
    clone.read_at(0, &mut content).unwrap();
    assert!(content == golden_content());
    assert_eq!(clone.own_extents().unwrap(), []);
    clone.write_at(5, &[1]).unwrap();
    let own = clone.own_extents().unwrap();
    assert_eq!((own.len(), own[0].clone()), (1, 0..4 * MIB), "whole objects");
    assert_eq!(clone.watchers().unwrap().len(), 1);

    let broken_off = clone.flatten(&mut |_, _| ControlFlow::Break(()));
    assert!(matches!(broken_off, Err(RbdError::BrokenOff { .. })), "{broken_off:?}");
    let mut told = Vec::new();
    clone
        .flatten(&mut |done, all| {
            told.push((done, all));
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(!told.is_empty());
    assert_eq!(clone.parent().unwrap(), None);
    clone.check_parent(&site.parent()).unwrap();
    assert_eq!(golden.children().unwrap(), []);
    clone.read_at(0, &mut content).unwrap();
    let mut expected = golden_content();
    expected[5] = 1;
    assert!(content == expected);
}

#[test]
fn a_snapshot_is_listed_read_and_removed() {
    let site = Site::new();
    let clone = site.pool.open_image(site.disk(1)).unwrap();
    let name = SnapshotName::new("before-upgrade").unwrap();
    clone.create_snapshot(&name).unwrap();
    assert_eq!(clone.create_snapshot(&name).unwrap_err().errno(), Some(17));
    clone.write_at(0, &[9; 512]).unwrap();
    assert_eq!(clone.snapshots().unwrap(), ["before-upgrade"]);
    let before = site.pool.open_read_only(ImageName::numbered(ImageKind::Disk, 1), Some(&name)).unwrap();
    let mut content = [0; 512];
    before.read_at(0, &mut content).unwrap();
    assert_eq!(content, [0xa5; 512]);
    drop(before);
    clone.remove_snapshot(&name).unwrap();
    clone.remove_snapshot(&name).unwrap();
    assert_eq!(clone.snapshots().unwrap(), Vec::<String>::new());
}

#[test]
fn a_clone_in_the_trash_is_gone_for_its_project_and_counts_for_its_parent() {
    let site = Site::new();
    let name = site.disk(1);
    site.pool.trash_image(name).unwrap();
    site.pool.trash_image(name).unwrap();
    assert_eq!(site.pool.images().unwrap(), []);
    let [(id, was)] = &site.pool.trash().unwrap()[..] else { panic!("not one in the trash") };
    assert_eq!(*was, name.to_string());
    let golden = site.golden_pool.open_read_only(site.golden, None).unwrap();
    assert!(golden.children().unwrap()[0].in_trash);
    site.pool.remove_from_trash(id).unwrap();
    assert_eq!(golden.children().unwrap(), []);
}

#[test]
fn namespaces_are_made_listed_and_removed_once_empty() {
    let site = Site::new();
    let pool = site.cluster.pool(&site.ceph.pool_name()).unwrap();
    pool.create_namespace(&site.namespace).unwrap();
    let fresh = Namespace::new("fresh").unwrap();
    pool.create_namespace(&fresh).unwrap();
    assert!(pool.namespaces().unwrap().contains(&fresh));
    pool.remove_namespace(&fresh).unwrap();
    pool.remove_namespace(&fresh).unwrap();
    assert!(!pool.namespaces().unwrap().contains(&fresh));
    assert_eq!(pool.remove_namespace(&site.golden_namespace).unwrap_err().errno(), Some(16), "it has an image");
}

/// Found by killing whoever made one.
#[test]
fn a_namespace_that_was_half_made_is_made_again() {
    let ceph = Ceph::shared();
    let cluster = ceph.admin();
    let (namespace, pool) = ceph.new_namespace(&cluster);
    let admin = ceph.admin_connection();
    let tools = Tools::new(&ceph, &admin.user, &admin.key);
    tools.rados("images", namespace.as_str(), &["rm", "rbd_directory"]).unwrap();
    let name = ImageName::numbered(ImageKind::Golden, 1);
    assert!(pool.create_image(name, MIB, DEFAULT_OBJECT_ORDER).is_err());
    cluster.pool(&ceph.pool_name()).unwrap().create_namespace(&namespace).unwrap();
    pool.create_image(name, MIB, DEFAULT_OBJECT_ORDER).unwrap();
}

#[test]
fn more_images_than_one_call_lists_are_all_listed() {
    let ceph = Ceph::shared();
    let (_, pool) = ceph.new_namespace(&ceph.admin());
    for number in 0..70 {
        pool.create_image(ImageName::numbered(ImageKind::Golden, number), MIB, DEFAULT_OBJECT_ORDER).unwrap();
    }
    assert_eq!(pool.images().unwrap().len(), 70);
}

#[test]
fn who_does_not_answer_or_know_the_key_is_given_up_in_time() {
    let ceph = Ceph::shared();
    let user = CephUser::new("admin").unwrap();
    let stranger = CephKey::new("AQAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==").unwrap();
    let refused = Cluster::connect(&ceph.connection(user.clone(), stranger.clone())).unwrap_err();
    assert!(refused.is_denied(), "{refused:?}");

    // Accepts connections and says nothing.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let patience = Patience { monitor: Duration::from_secs(1), osd: None };
    let monitors = vec![mute.local_addr().unwrap()];
    let begun = Instant::now();
    let refused = Cluster::connect(&Connection { monitors, user, key: stranger, patience }).unwrap_err();
    assert!(refused.is_no_answer(), "{refused:?}");
    assert!(begun.elapsed() < Duration::from_secs(30));
}
