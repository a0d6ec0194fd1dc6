//! Keys that open one clone, with its golden image for reading, and nothing else: what an export's process holds.
//!
//! Ceph's own `profile rbd` cannot say that: such a key lists its namespace, opens every image in it, and may blocklist
//! any client. So the capabilities are written out, object by object. Which objects librbd touches when it opens a clone
//! differs between releases, and capabilities that are too narrow or too wide look alike until tried; hence
//! [`Release`]: what was not shown by this crate's tests is refused.
//!
//! Two things these keys cannot keep from their holder, and whoever works on its disks must know:
//! * It can rewrite its own clone's header (librbd must write there to be a watcher), so also name another parent. It cannot
//!   read that parent, but somebody with more rights who opens the clone could be made to. [`crate::Image::check_parent`].
//! * A client that holds tickets needs no monitor for an hour (`auth_service_ticket_ttl`). [`revoke`] ends those that watch
//!   the image or talk to a monitor: every client that uses librbd or librados does both. One that was written to do
//!   neither keeps access to its one clone until its tickets end.

use crate::name::{CephKey, CephUser, ImageName, ImageObjectId, Namespace, PoolName};
use crate::{Cluster, Pool, RbdError};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Releases on which the capabilities were shown to be enough, and no more than that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// 16.2, as in Debian 12.
    Pacific,
}

impl Release {
    /// The release that the cluster requires of its OSDs.
    ///
    /// # Errors
    /// It is another one, or no monitor answers.
    pub fn of(cluster: &Cluster) -> Result<Self, RbdError> {
        let map = cluster.mon_query(&json!({"prefix": "osd dump", "format": "json"}))?;
        match map["require_osd_release"].as_str() {
            Some("pacific") => Ok(Self::Pacific),
            other => Err(RbdError::UnknownRelease { release: other.unwrap_or_default().to_owned() }),
        }
    }
}

/// What a key is cut to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// The pool of both images.
    pub pool: PoolName,
    /// The clone's namespace.
    pub namespace: Namespace,
    /// The clone.
    pub image: ImageName,
    /// Its id.
    pub id: ImageObjectId,
    /// All that it reads what it has not from: its parent first, the golden image last. None once it was flattened.
    pub golden: Vec<GoldenScope>,
}

/// An image that a key may read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoldenScope {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its id.
    pub id: ImageObjectId,
}

/// What a key may do, in Ceph's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// At the monitors.
    pub mon: String,
    /// At the OSDs.
    pub osd: String,
}

/// The capabilities that a scope comes to. Pure.
#[must_use]
pub fn capabilities(release: Release, scope: &Scope) -> Capabilities {
    let Release::Pacific = release;
    let Scope { pool, namespace, image, id, golden } = scope;
    let own = format!("pool={pool} namespace={namespace} object_prefix");
    // Where a name goes on, the prefix says so with its dot: ids are not all of one length.
    let mut grants = vec![
        // The pool's own object, in the default namespace: which features it has.
        format!("allow r class-read pool={pool} namespace=\"\" object_prefix rbd_info"),
        format!("allow r class-read {own} rbd_id.{image}"),
        // Is the namespace, or the image's mirroring, being changed just now?
        format!("allow class rbd dir_state_assert {own} rbd_directory"),
        format!("allow class rbd mirror_image_get {own} rbd_mirroring"),
        format!("allow rw class-read {own} rbd_header.{id}"),
        format!("allow rwx {own} rbd_data.{id}."),
    ];
    for GoldenScope { namespace, id } in golden {
        let parent = format!("pool={pool} namespace={namespace} object_prefix");
        grants.extend([
            // The parent's name by its id, there or in the trash.
            format!("allow class rbd dir_get_name {parent} rbd_directory"),
            format!("allow class rbd trash_get {parent} rbd_trash"),
            format!("allow r class-read {parent} rbd_header.{id}"),
            format!("allow r {parent} rbd_data.{id}."),
        ]);
    }
    Capabilities { mon: MAPS.to_owned(), osd: grants.join(", ") }
}

/// What users whose keys imaging makes are called: nobody else's may be so.
pub const EXPORT_USERS: &str = "assay-export-";
/// Both maps, without which a client waits for ever, but not the blocklist command that `profile rbd` has. The service `mon`
/// also lets its holder read the cluster's configuration and log, as any user of Ceph does; neither has keys.
const MAPS: &str = "allow service mon r, allow service osd r";

/// What imaging's own user needs, for a store in `pool`, and no more as far as the release can say it. Pure. It has the
/// pool; makes and removes users by names that begin with [`EXPORT_USERS`], whose capabilities at the OSDs are of the form
/// that [`capabilities`] has, in this pool alone; and has the OSDs refuse one client at a time, by its whole address, but
/// not take that back. What no capability of this release keeps from it:
///
/// * It can give such a user capabilities for managers and metadata servers beside: what may be given is said service by
///   service, and a service that is not spoken of is not looked at.
/// * It can blocklist any client of the cluster whose address it knows.
/// * It can end a monitor: what compares an argument with a pattern (here as in Ceph's own `profile rbd`) overflows that
///   one's stack if the argument is tens of thousands of octets long. Those of an export on the most layers are 6,000.
/// * It sees who is connected to the monitors, and of images in other pools which have clones of the first version.
#[must_use]
pub fn control_capabilities(release: Release, pool: &PoolName) -> Capabilities {
    let Release::Pacific = release;
    // A dot is the one character of a pool's name that means something in a pattern.
    let pool_pattern = pool.as_str().replace('.', "[.]");
    let grant = format!(
        "allow (rw?x?( class-read)?|class rbd [a-z_]+) pool={pool_pattern} namespace=(\"\"|[A-Za-z0-9._-]+) \
         object_prefix [a-z0-9._]+"
    );
    let grants = [
        MAPS.to_owned(),
        // Who uses a key that is to end.
        "allow command sessions".to_owned(),
        format!(
            "allow command \"auth get-or-create\" with entity prefix client.{EXPORT_USERS} caps_mon=\"{MAPS}\" \
             caps_osd regex '{grant}(, {grant})*'"
        ),
        format!("allow command \"auth rm\" with entity prefix client.{EXPORT_USERS}"),
        "allow command \"osd blocklist\" with blocklistop=add addr regex '[^/]+/[0-9]+'".to_owned(),
    ];
    // librbd looks for an image's clones of the first version in every pool.
    let osd = format!("allow rwx pool={pool}, allow class rbd get_children object_prefix rbd_children");
    Capabilities { mon: grants.join(", "), osd }
}

/// Makes a key cut to `scope`. Doing it again answers the same key.
///
/// # Errors
/// The user is there with other capabilities, the release is unknown, or no monitor answers.
pub fn issue(cluster: &Cluster, user: &CephUser, scope: &Scope) -> Result<CephKey, RbdError> {
    let capabilities = capabilities(Release::of(cluster)?, scope);
    let answer = cluster.mon_query(&json!({
        "prefix": "auth get-or-create",
        "entity": user.entity(),
        "caps": ["mon", capabilities.mon, "osd", capabilities.osd],
        "format": "json",
    }))?;
    let key = answer[0]["key"].as_str().unwrap_or_default();
    CephKey::new(key).map_err(|cause| RbdError::Malformed {
        object: format!("the monitor's answer to `auth get-or-create` for {}", user.entity()),
        detail: cause.to_string(),
    })
}

/// How long a client stays on the blocklist: longer than its tickets are good for.
const BLOCKLIST_SECONDS: u32 = 2 * 60 * 60;

/// Ends a key, and stops whoever uses it now: first the clients that have the image open or a session as that user, since
/// without a key they would go on; then the key; then whoever came in between. Doing it again changes nothing. When this
/// returns the monitors have decided, and OSDs hear within milliseconds. Answers the clients' addresses.
///
/// A clone whose header its holder has spoilt keeps nothing of this from being done, but for the list of its watchers.
///
/// # Errors
/// The monitors or OSDs do not answer; do it again then. (What could be done was done.)
pub fn revoke(cluster: &Cluster, user: &CephUser, pool: &Pool, image: ImageName) -> Result<Vec<String>, RbdError> {
    let mut stopped = BTreeSet::new();
    let watchers = pool.open_read_only(image, None).and_then(|image| image.watchers());
    let unknown = match watchers {
        Ok(watchers) => {
            stop(cluster, watchers, &mut stopped)?;
            None
        }
        Err(error) if error.is_no_answer() => Some(error),
        Err(error) if error.is_not_found() => None,
        Err(error) => {
            tracing::warn!(event = "disk.unreadable", image = %image, error = ?error, "revoking without its watchers");
            None
        }
    };
    stop(cluster, sessions(cluster, user)?, &mut stopped)?;
    cluster.mon_command(&json!({"prefix": "auth rm", "entity": user.entity()}))?;
    stop(cluster, sessions(cluster, user)?, &mut stopped)?;
    unknown.map_or_else(|| Ok(stopped.into_iter().collect()), Err)
}

/// But not ourselves, who may be looking at the image just now.
fn stop(cluster: &Cluster, clients: Vec<String>, stopped: &mut BTreeSet<String>) -> Result<(), RbdError> {
    let own = cluster.address()?;
    clients
        .into_iter()
        .filter(|client| *client != own && stopped.insert(client.clone()))
        .try_for_each(|client| blocklist(cluster, &client))
}

/// Has the OSDs carry out nothing more that a client sends.
///
/// # Errors
/// No monitor answers.
pub fn blocklist(cluster: &Cluster, client: &str) -> Result<(), RbdError> {
    let expire = f64::from(BLOCKLIST_SECONDS);
    let order = json!({"prefix": "osd blocklist", "blocklistop": "add", "addr": client, "expire": expire});
    cluster.mon_command(&order).map(drop)
}

/// Takes a client off the blocklist again. One that is not on it is no error.
///
/// # Errors
/// No monitor answers.
pub fn unblocklist(cluster: &Cluster, client: &str) -> Result<(), RbdError> {
    cluster.mon_command(&json!({"prefix": "osd blocklist", "blocklistop": "rm", "addr": client})).map(drop)
}

/// Addresses of a user's sessions with any monitor.
fn sessions(cluster: &Cluster, user: &CephUser) -> Result<Vec<String>, RbdError> {
    let map = cluster.mon_query(&json!({"prefix": "mon dump", "format": "json"}))?;
    let mut found = Vec::new();
    for monitor in map["mons"].as_array().into_iter().flatten().filter_map(|monitor| monitor["name"].as_str()) {
        let list = match cluster.mon_query_to(monitor, &json!({"prefix": "sessions", "format": "json"})) {
            // A monitor that is down has no sessions.
            Err(error) if error.is_no_answer() => continue,
            list => list?,
        };
        found.extend(addresses(&list, &user.entity()));
    }
    Ok(found)
}

/// The addresses of an entity's sessions in a monitor's list. Pure.
fn addresses(sessions: &Value, entity: &str) -> Vec<String> {
    let sessions = sessions.as_array().into_iter().flatten();
    let ours = sessions.filter(|session| session["entity_name"] == entity);
    let each = ours.flat_map(|session| session["addrs"]["addrvec"].as_array().into_iter().flatten());
    let text = each.filter_map(|addr| Some(format!("{}/{}", addr["addr"].as_str()?, addr["nonce"].as_u64()?)));
    text.collect()
}
