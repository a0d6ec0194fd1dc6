//! Disks on a real Ceph, through gateway, worker and companion, against real initiators.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_rbd::testing::Ceph;
use rig::rbd::*;
use rig::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_initiator_writes_to_its_clone_and_reads_it_over_its_golden_image() {
    let content = pattern(DISK_BYTES as usize);
    let site = RbdSite::new(&Ceph::shared(), &content).await;
    let ((_, mine, clone), (_, other, _)) = (site.export().await, site.export().await);
    let portal = site.gateway.portal;
    let source = site.folder.path().join("local/source.raw");
    assert_same(portal, &mine, &source).await;
    // Across an object's end; a whole object to zero; the disk's last octets; and more than one request is for.
    let commands = [
        "write -P 0x55 4128768 131072",
        "write -z 8M 4M",
        "write -P 0x66 18873856 512",
        "write -P 0x77 12M 3M",
        "flush",
    ];
    let written = qemu_io(portal, &mine, &commands).await;
    assert!(written.status.success() && !text(&written).contains("failed"), "{}", text(&written));
    let mut expected = content;
    expected[4_128_768..4_128_768 + 131_072].fill(0x55);
    expected[8 << 20..12 << 20].fill(0);
    expected[18_873_856..].fill(0x66);
    expected[12 << 20..15 << 20].fill(0x77);
    let changed = site.folder.path().join("expected.raw");
    std::fs::write(&changed, &expected).unwrap();
    assert_same(portal, &mine, &changed).await;
    assert_same(portal, &other, &source).await;
    assert!(site.on_ceph(&clone, 0, expected.len()) == expected);
    let status = site.gateway.status().await;
    let moved = status.exports.iter().find(|export| export.target == mine.target).unwrap();
    assert!(moved.read_bytes >= DISK_BYTES && moved.written_bytes >= 3 << 20, "{moved:?}");
    site.gateway.stop().await;
}
