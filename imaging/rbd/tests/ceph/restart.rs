//! The OSD is killed under a disk.

use crate::site::MIB;
use assay_rbd::name::{ImageKind, ImageName};
use assay_rbd::testing::{Ceph, ObjectStore};
use assay_rbd::{Cluster, Connection, DEFAULT_OBJECT_ORDER, Patience};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

#[test]
fn a_disk_waits_for_its_osd_and_goes_on_where_the_control_plane_gives_up() {
    let mut ceph = Ceph::start(ObjectStore::Bluestore);
    let (namespace, pool) = ceph.new_namespace(&ceph.admin());
    let name = ImageName::numbered(ImageKind::Disk, 1);
    pool.create_image(name, 8 * MIB, DEFAULT_OBJECT_ORDER).unwrap();
    let (connection, pool_name) = (ceph.admin_connection(), ceph.pool_name());
    let connect = |patience| {
        let cluster = Cluster::connect(&Connection { patience, ..connection.clone() }).unwrap();
        cluster.namespace(&pool_name, &namespace).unwrap()
    };
    let export = connect(Patience::EXPORT).open_image(name).unwrap();
    let hasty = Patience { osd: Some(Duration::from_secs(1)), ..Patience::CONTROL };
    let control = connect(hasty).open_read_only(name, None).unwrap();
    export.write_at(0, b"acknowledged").unwrap();
    export.flush().unwrap();

    ceph.kill_osd();
    let (done, wait) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| done.send(export.write_at(4 * MIB, b"waited for")).unwrap());
        // The control plane's request is later than the disk's and over before it.
        let gave_up = control.read_at(0, &mut [0; 12]).unwrap_err();
        assert!(gave_up.is_no_answer(), "{gave_up:?}");
        assert_eq!(
            wait.recv_timeout(Duration::ZERO).unwrap_err(),
            RecvTimeoutError::Timeout,
            "it answered without an OSD"
        );
        ceph.start_osd();
        wait.recv_timeout(Duration::from_secs(60)).expect("the disk goes on").unwrap();
    });
    let mut content = [0; 12];
    export.read_at(0, &mut content).unwrap();
    assert_eq!(&content, b"acknowledged");
    let mut content = [0; 10];
    let anew = connect(Patience::CONTROL).open_read_only(name, None).unwrap();
    anew.read_at(4 * MIB, &mut content).unwrap();
    assert_eq!(&content, b"waited for");
}
