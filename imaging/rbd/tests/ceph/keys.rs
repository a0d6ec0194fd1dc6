//! What the holder of a stolen key can do, and when it ends.

use crate::site::{MIB, Site, Tools};
use assay_rbd::keys::{self, Capabilities, Release, control_capabilities};
use assay_rbd::name::{CephKey, CephUser, ImageKind, ImageName, PoolName};
use assay_rbd::{Cluster, DEFAULT_OBJECT_ORDER, RbdError};
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

fn issue(site: &Site, name: &str, disk: ImageName) -> (CephUser, CephKey) {
    let user = CephUser::new(&format!("{name}-{}", site.namespace)).unwrap();
    let key = keys::issue(&site.cluster, &user, &site.scope(disk)).unwrap();
    (user, key)
}

#[test]
fn a_key_reads_and_writes_its_clone_and_reads_the_parent_through_it() {
    let site = Site::new();
    let disk = site.disk(1);
    let (user, key) = issue(&site, "export", disk);
    assert_eq!(keys::issue(&site.cluster, &user, &site.scope(disk)).unwrap(), key, "asked again, the same key");
    let clone = site.as_holder(&user, &key, &site.namespace).open_image(disk).unwrap();
    let mut content = [0; 1024];
    clone.read_at(10 * MIB, &mut content).unwrap();
    assert_eq!(content, [0x5a; 1024]);
    clone.write_at(10 * MIB + 512, &[1; 512]).unwrap();
    clone.write_zeroes(0, 4 * MIB).unwrap();
    clone.discard(12 * MIB, 4 * MIB).unwrap();
    clone.flush().unwrap();
    clone.read_at(10 * MIB, &mut content).unwrap();
    assert_eq!(content, [[0x5a; 512], [1; 512]].concat()[..]);
    clone.read_at(0, &mut content).unwrap();
    assert_eq!(content, [0; 1024]);
    drop(clone);
    // And again, once there is something of its own.
    let clone = site.as_holder(&user, &key, &site.namespace).open_image(disk).unwrap();
    clone.read_at(10 * MIB, &mut content).unwrap();
    assert_eq!(content, [[0x5a; 512], [1; 512]].concat()[..]);
}

#[test]
fn a_stolen_key_opens_no_image_but_its_own() {
    let site = Site::new();
    let (disk, sibling) = (site.disk(1), site.disk(2));
    let (user, key) = issue(&site, "stolen", disk);
    let denied = |what: &str, error: RbdError| assert!(error.is_denied(), "{what}: {error:?}");
    let own = site.as_holder(&user, &key, &site.namespace);
    denied("opening a sibling", own.open_image(sibling).unwrap_err());
    denied("reading a sibling", own.open_read_only(sibling, None).unwrap_err());
    denied("listing", own.images().unwrap_err());
    denied("listing the trash", own.trash().unwrap_err());
    denied("making an image", own.create_image(ImageName::numbered(ImageKind::Disk, 3), MIB, 22).unwrap_err());
    denied("removing itself", own.remove_image(disk).unwrap_err());
    let golden = site.as_holder(&user, &key, &site.golden_namespace);
    denied("opening the golden image by name", golden.open_image(site.golden).unwrap_err());
    denied("listing the golden image's namespace", golden.images().unwrap_err());
    let again = (&golden, site.golden, &site.snapshot);
    let more = ImageName::numbered(ImageKind::Disk, 4);
    denied("making another clone", own.clone_image(again, more, DEFAULT_OBJECT_ORDER).unwrap_err());
    assert_eq!(site.pool.images().unwrap().len(), 2);
}

/// Below librbd, object by object, as an attacker would.
#[test]
fn a_stolen_key_reads_and_writes_no_object_but_its_own() {
    let site = Site::new();
    let (disk, sibling) = (site.disk(1), site.disk(2));
    site.pool.open_image(sibling).unwrap().write_at(0, b"the sibling's").unwrap();
    let (user, key) = issue(&site, "stolen", disk);
    let tools = Tools::new(&site.ceph, &user, &key);
    std::fs::write(tools.folder().join("in"), "overwritten").unwrap();
    let (own_id, sibling_id, golden_id) = (site.scope(disk).id, site.scope(sibling).id, site.parent().id);
    let data = |id: &_| format!("rbd_data.{id}.0000000000000000");
    let (own, other, golden) = (site.namespace.as_str(), site.golden_namespace.as_str(), "images");
    let pool = golden;

    // The tool works with this key: what it may, it does.
    tools.rados(pool, own, &["put", &data(&own_id), "in"]).unwrap();
    tools.rados(pool, other, &["get", &data(&golden_id), "out"]).unwrap();

    let (sibling_data, golden_data) = (data(&sibling_id), data(&golden_id));
    let (sibling_header, golden_header) = (format!("rbd_header.{sibling_id}"), format!("rbd_header.{golden_id}"));
    let new_id = format!("rbd_id.{}", ImageName::numbered(ImageKind::Disk, 9));
    let (own_name, unheard_of) = (format!("rbd_id.{disk}"), "rbd_data.00000000cafe.0000000000000000".to_owned());
    let refused: [(&str, &[&str]); 24] = [
        (own, &["get", &sibling_data, "out"]),
        (own, &["put", &sibling_data, "in"]),
        (own, &["rm", &sibling_data]),
        (own, &["stat", &sibling_data]),
        (own, &["listomapvals", &sibling_header]),
        (own, &["setomapval", &sibling_header, "size", "0"]),
        (own, &["listwatchers", &sibling_header]),
        (own, &["get", &format!("rbd_id.{sibling}"), "out"]),
        (own, &["put", &own_name, "in"]),
        (own, &["put", &new_id, "in"]),
        (own, &["put", &unheard_of, "in"]),
        (own, &["listomapvals", "rbd_directory"]),
        (own, &["setomapval", "rbd_directory", "name_x", "y"]),
        (own, &["ls"]),
        (other, &["put", &golden_data, "in"]),
        (other, &["append", &golden_data, "in"]),
        (other, &["rm", &golden_data]),
        (other, &["setomapval", &golden_header, "size", "0"]),
        (other, &["listomapvals", "rbd_directory"]),
        (other, &["listomapvals", "rbd_trash"]),
        (other, &["ls"]),
        ("", &["ls"]),
        ("", &["listomapvals", "rbd_namespace"]),
        ("", &["put", "rbd_info", "in"]),
    ];
    for (namespace, arguments) in refused {
        let said = tools.rados(pool, namespace, arguments).expect_err(&format!("{namespace} {arguments:?}"));
        assert!(said.contains("Operation not permitted"), "{namespace} {arguments:?}: {said}");
    }
    let mut content = [0; 13];
    site.pool.open_read_only(sibling, None).unwrap().read_at(0, &mut content).unwrap();
    assert_eq!(&content, b"the sibling's");
}

#[test]
fn a_stolen_key_orders_no_monitor_about() {
    let site = Site::new();
    let disk = site.disk(1);
    let (user, key) = issue(&site, "stolen", disk);
    let holder = Cluster::connect(&site.ceph.connection(user.clone(), key)).unwrap();
    let commands = [
        json!({"prefix": "osd blocklist", "blocklistop": "add", "addr": "127.0.0.1:0/1", "expire": 60.0}),
        json!({"prefix": "auth ls"}),
        json!({"prefix": "auth get", "entity": "client.admin"}),
        json!({"prefix": "auth get", "entity": user.entity()}),
        json!({"prefix": "auth caps", "entity": user.entity(), "caps": ["osd", "allow *"]}),
        json!({"prefix": "config set", "who": "global", "name": "auth_client_required", "value": "none"}),
        json!({"prefix": "config-key ls"}),
        json!({"prefix": "osd pool create", "pool": "mine", "pg_num": 8}),
        json!({"prefix": "osd pool mksnap", "pool": "images", "snap": "mine"}),
    ];
    for command in commands {
        let error = holder.mon_query(&command).expect_err(&command.to_string());
        assert!(error.is_denied(), "{command}: {error:?}");
    }
}

#[test]
fn a_key_does_not_reach_what_begins_as_its_own_does() {
    let site = Site::new();
    let disk = site.disk(1);
    let (user, key) = issue(&site, "prefix", disk);
    let (tools, own) = (Tools::new(&site.ceph, &user, &key), site.namespace.as_str());
    let admin = site.ceph.admin_connection();
    let administrator = Tools::new(&site.ceph, &admin.user, &admin.key);
    for holder in [&administrator, &tools] {
        std::fs::write(holder.folder().join("in"), "content").unwrap();
    }
    let id = site.scope(disk).id;
    // The trap: an object whose name goes on where the capability's prefix ends is reached. No image of ours has such a
    // name, since all names are of one length.
    let longer = format!("rbd_id.{disk}0");
    administrator.rados("images", own, &["put", &longer, "in"]).unwrap();
    tools.rados("images", own, &["get", &longer, "out"]).unwrap();
    assert_eq!(ImageName::parse(&format!("{disk}0")), None);
    // Ids are not of one length, so data is cut off by a dot.
    let longer = format!("rbd_data.{id}0.0000000000000000");
    administrator.rados("images", own, &["put", &longer, "in"]).unwrap();
    let read = tools.rados("images", own, &["get", &longer, "out"]);
    let written = tools.rados("images", own, &["append", &longer, "in"]);
    assert!(read.is_err() && written.is_err(), "{read:?} {written:?}");
}

/// librbd must write to a clone's header to watch it, so the key's holder can write anything there.
#[test]
fn a_clone_whose_header_was_made_to_name_another_parent_is_refused() {
    let site = Site::new();
    let victim = Site::new();
    let (disk, other) = (site.disk(1), victim.disk(1));
    let parent = site.parent();
    site.pool.open_read_only(disk, None).unwrap().check_parent(&parent).unwrap();
    let admin = site.ceph.admin_connection();
    let administrator = Tools::new(&site.ceph, &admin.user, &admin.key);
    let header = format!("rbd_header.{}", victim.scope(other).id);
    administrator.rados("images", victim.namespace.as_str(), &["getomapval", &header, "parent", "parent"]).unwrap();
    let (user, key) = issue(&site, "stolen", disk);
    let thief = Tools::new(&site.ceph, &user, &key);
    std::fs::copy(administrator.folder().join("parent"), thief.folder().join("parent")).unwrap();
    let header = format!("rbd_header.{}", site.scope(disk).id);
    let arguments = ["setomapval", &header, "parent", "--input-file", "parent"];
    thief.rados("images", site.namespace.as_str(), &arguments).unwrap();

    let clone = site.pool.open_read_only(disk, None).unwrap();
    let (linked, _) = clone.parent().unwrap().unwrap();
    assert_eq!(linked.namespace, victim.golden_namespace.as_str(), "the thief's clone is of the victim's image now");
    let refused = clone.check_parent(&parent).unwrap_err();
    assert!(matches!(refused, RbdError::WrongParent { .. }), "{refused}");
    // The thief itself gains nothing.
    assert!(site.as_holder(&user, &key, &site.namespace).open_image(disk).unwrap_err().is_denied());
}

#[test]
fn a_revoked_key_stops_a_live_writer_within_a_second() {
    let site = Site::new();
    let disk = site.disk(1);
    let (user, key) = issue(&site, "revoked", disk);
    let clone = site.as_holder(&user, &key, &site.namespace).open_image(disk).unwrap();
    let writing = AtomicBool::new(false);
    let (stopped, revoked, clients) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            loop {
                match clone.write_at(0, &[1; 4096]) {
                    Ok(()) => writing.store(true, Ordering::Release),
                    Err(error) => break (Instant::now(), error),
                }
            }
        });
        while !writing.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let revoked = Instant::now();
        let clients = keys::revoke(&site.cluster, &user, &site.pool, disk).unwrap();
        (writer.join().unwrap(), revoked, clients)
    });
    let (at, error) = stopped;
    assert!(error.is_blocklisted(), "{error:?}");
    let took = at.saturating_duration_since(revoked);
    println!("a writer was stopped {took:?} after the revocation began");
    assert!(took.as_secs_f64() < 1.0, "{took:?}");
    assert_eq!(clients.len(), 1);
    assert!(clone.read_at(0, &mut [0; 512]).unwrap_err().is_blocklisted());
    assert!(Cluster::connect(&site.ceph.connection(user.clone(), key)).unwrap_err().is_denied());
    keys::revoke(&site.cluster, &user, &site.pool, disk).unwrap();
    // The disk is as it was left, and whoever has the right opens it.
    site.pool.open_image(disk).unwrap().write_at(0, &[2; 512]).unwrap();
}

/// A thief that never opens the image the way librbd does is no watcher of it.
#[test]
fn a_session_that_watches_nothing_is_stopped_too() {
    let site = Site::new();
    let disk = site.disk(1);
    let (user, key) = issue(&site, "quiet", disk);
    let reader = site.as_holder(&user, &key, &site.namespace).open_read_only(disk, None).unwrap();
    reader.read_at(0, &mut [0; 512]).unwrap();
    assert_eq!(site.pool.open_read_only(disk, None).unwrap().watchers().unwrap(), Vec::<String>::new());
    let clients = keys::revoke(&site.cluster, &user, &site.pool, disk).unwrap();
    assert_eq!(clients.len(), 1);
    let begun = Instant::now();
    let error = loop {
        match reader.read_at(0, &mut [0; 512]) {
            Err(error) => break error,
            Ok(()) => assert!(begun.elapsed().as_secs() < 10, "it goes on reading"),
        }
    };
    assert!(error.is_blocklisted(), "{error:?}");
}

#[test]
fn a_spoilt_header_keeps_no_key_from_being_revoked() {
    let site = Site::new();
    let disk = site.disk(1);
    let (user, key) = issue(&site, "spoiler", disk);
    let clone = site.as_holder(&user, &key, &site.namespace).open_image(disk).unwrap();
    let tools = Tools::new(&site.ceph, &user, &key);
    let header = format!("rbd_header.{}", site.scope(disk).id);
    tools.rados("images", site.namespace.as_str(), &["setomapval", &header, "features", "spoilt"]).unwrap();
    assert!(site.pool.open_read_only(disk, None).is_err());
    let clients = keys::revoke(&site.cluster, &user, &site.pool, disk).unwrap();
    assert!(!clients.is_empty());
    let begun = Instant::now();
    while let Ok(()) = clone.write_at(0, &[1; 512]) {
        assert!(begun.elapsed().as_secs() < 10, "it goes on writing");
    }
    assert!(Cluster::connect(&site.ceph.connection(user, key)).unwrap_err().is_denied());
}

#[test]
fn the_release_is_one_that_keys_were_tried_on() {
    let site = Site::new();
    assert_eq!(Release::of(&site.cluster).unwrap(), Release::Pacific);
}

/// The store's tests show that it is enough.
#[test]
fn imagings_own_user_has_its_pool_and_the_users_of_exports_and_no_more() {
    let site = Site::new();
    let (pool, other) = (PoolName::new("own.pool").unwrap(), PoolName::new("ownxpool").unwrap());
    for pool in [&pool, &other] {
        site.ceph.create_pool(&site.cluster, pool);
    }
    let imaging = site.ceph.imaging(&pool);
    let image = ImageName::numbered(ImageKind::Golden, 1);
    imaging.pool(&pool).unwrap().create_image(image, MIB, DEFAULT_OBJECT_ORDER).unwrap();
    assert!(imaging.pool(&other).unwrap().create_image(image, MIB, DEFAULT_OBJECT_ORDER).unwrap_err().is_denied());

    let maps = "allow service mon r, allow service osd r";
    let own = "allow r class-read pool=own.pool namespace=\"\" object_prefix rbd_info, \
               allow rwx pool=own.pool namespace=p object_prefix rbd_data.1.";
    let make = |entity: &str, caps: [&str; 4]| {
        imaging.mon_command(&json!({"prefix": "auth get-or-create", "entity": entity, "caps": caps})).map(drop)
    };
    let export = format!("client.{}1", keys::EXPORT_USERS);
    make(&export, ["mon", maps, "osd", own]).unwrap();
    let denied = |what: &str, answer: Result<(), RbdError>| {
        let error = answer.expect_err(what);
        assert!(error.is_denied(), "{what}: {error:?}");
    };
    denied("another's name", make("client.somebody", ["mon", maps, "osd", own]));
    denied("monitors", make(&export, ["mon", "allow *", "osd", own]));
    let second = format!("client.{}2", keys::EXPORT_USERS);
    for elsewhere in [
        "allow *",
        "allow rwx",
        "profile rbd",
        "allow rwx pool=own.pool",
        "allow rwx pool=own.pool namespace=p",
        "allow rwx pool=ownxpool namespace=p object_prefix x",
        "allow rwx object_prefix \"x pool=own.pool namespace=p object_prefix x\"",
        &format!("{own}, allow rwx pool=ownxpool namespace=p object_prefix x"),
        &format!("{own}, allow rwx"),
        &format!("{own};allow rwx"),
    ] {
        denied(elsewhere, make(&second, ["mon", maps, "osd", elsewhere]));
    }
    let order = |command: serde_json::Value| imaging.mon_command(&command).map(drop);
    let victim = "127.0.0.1:0/4000000000";
    for refused in [
        json!({"prefix": "auth rm", "entity": "client.admin"}),
        json!({"prefix": "auth get", "entity": "client.admin"}),
        json!({"prefix": "auth ls"}),
        json!({"prefix": "auth caps", "entity": imaging.user().entity(), "caps": ["mon", "allow *"]}),
        json!({"prefix": "osd blocklist", "blocklistop": "add", "addr": "127.0.0.1"}),
        json!({"prefix": "osd blocklist", "blocklistop": "rm", "addr": victim}),
        json!({"prefix": "osd blocklist clear"}),
        json!({"prefix": "osd pool create", "pool": "mine", "pg_num": 8}),
        json!({"prefix": "osd out", "ids": ["0"]}),
        json!({"prefix": "config set", "who": "osd", "name": "debug_osd", "value": "0"}),
        json!({"prefix": "config-key ls"}),
    ] {
        denied(&refused.to_string(), order(refused.clone()));
    }
    keys::blocklist(&imaging, victim).unwrap();
    order(json!({"prefix": "auth rm", "entity": export})).unwrap();
}

/// The command that README.md gives whoever sets a site up.
#[test]
fn readme_gives_imagings_user_what_it_needs() {
    let readme = include_str!("../../../../README.md");
    let (_, command) = readme.split_once("ceph auth get-or-create client.imaging ").unwrap();
    let (command, _) = command.split_once("\n```").unwrap();
    let command = command.replace("\\\n", "").replace("\\\"", "\"");
    let Capabilities { mon, osd } = control_capabilities(Release::Pacific, &PoolName::new("images").unwrap());
    assert_eq!(command, format!("osd \"{osd}\" mon \"{mon}\""));
}
