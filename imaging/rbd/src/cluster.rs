//! A connection to a cluster, and its pools seen in one namespace each.
//!
//! Everything blocks. Calls on one connection may be made by any number of threads at once: a thread is one request in
//! flight, which is what an export's few dozen outstanding commands need. (librbd's asynchronous calls would save the
//! threads and cost callbacks from C into Rust, with buffers that outlive their callers.)

use crate::ffi::{By, ClusterHandle, Errno, ImageHandle, LAYERING, Making, OPERATIONS, PoolHandle, c};
use crate::name::{CephKey, CephUser, ImageName, ImageObjectId, Namespace, PoolName, SnapshotName};
use crate::{Image, RbdError};
use serde_json::Value;
use std::ffi::CString;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroize as _;

/// Whom to connect to, as whom.
#[derive(Debug, Clone)]
pub struct Connection {
    /// The monitors, by their messenger v2 addresses.
    pub monitors: Vec<SocketAddr>,
    /// The user.
    pub user: CephUser,
    /// The user's key.
    pub key: CephKey,
    /// How long to wait for what does not answer.
    pub patience: Patience,
}

/// How long calls wait for a cluster that does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For a monitor, when connecting and for commands.
    pub monitor: Duration,
    /// For an OSD. `None` waits for as long as it takes: a node whose disk's OSD restarts waits, and then goes on, where an
    /// error would make its file system read-only. Whoever waits like that is stopped by ending its process.
    pub osd: Option<Duration>,
}

impl Patience {
    /// For the control plane: every call ends.
    pub const CONTROL: Self = Self { monitor: Duration::from_secs(10), osd: Some(Duration::from_secs(30)) };
    /// For an export.
    pub const EXPORT: Self = Self { monitor: Duration::from_secs(10), osd: None };
}

/// A cluster, connected to.
#[derive(Clone)]
pub struct Cluster {
    handle: Arc<ClusterHandle>,
    user: CephUser,
}

impl Cluster {
    /// Connects. Neither `/etc/ceph` nor the environment is read, and nothing is written: no log, no admin socket.
    ///
    /// # Errors
    /// Ceph's libraries are not installed, no monitor answers in time, or the key is not the user's.
    pub fn connect(connection: &Connection) -> Result<Self, RbdError> {
        let Connection { monitors, user, key, patience } = connection;
        let handle = ClusterHandle::new(&c(&user.entity()))?;
        let addresses: Vec<String> = monitors.iter().map(|address| format!("v2:{address}")).collect();
        let seconds = |duration: Duration| duration.as_secs().max(1).to_string();
        let options = [
            ("mon_host", addresses.join(",")),
            ("client_mount_timeout", seconds(patience.monitor)),
            ("rados_mon_op_timeout", seconds(patience.monitor)),
            ("rados_osd_op_timeout", patience.osd.map_or_else(|| "0".to_owned(), seconds)),
            // A monitor that asks for no authentication is not ours.
            ("auth_client_required", "cephx".to_owned()),
            // A completed write has left this process: its end loses nothing.
            ("rbd_cache", "false".to_owned()),
            // Whoever has an image open while it is snapshotted is us.
            ("rbd_default_snapshot_quiesce_mode", "skip".to_owned()),
            // What an older release would read from a file or say to one.
            ("keyring", String::new()),
            ("log_file", String::new()),
            ("log_to_stderr", "false".to_owned()),
            ("err_to_stderr", "false".to_owned()),
            ("log_to_syslog", "false".to_owned()),
            ("admin_socket", String::new()),
            ("crash_dir", String::new()),
        ];
        for (option, value) in options {
            handle.set(&c(option), &c(&value)).map_err(RbdError::ceph("setting the option", option))?;
        }
        let mut secret = c(key.expose()).into_bytes_with_nul();
        let kept = CString::from_vec_with_nul(secret.clone()).unwrap_or_default();
        let set = handle.set(c"key", &kept);
        secret.zeroize();
        kept.into_bytes_with_nul().zeroize();
        set.map_err(RbdError::ceph("setting the key of", user))?;
        let whom = || format!("{} as {}", addresses.join(","), user.entity());
        handle.connect().map_err(|errno| RbdError::ceph("connecting to the Ceph monitors", whom())(errno))?;
        Ok(Self { handle: Arc::new(handle), user: user.clone() })
    }

    /// As whom it is connected.
    #[must_use]
    pub fn user(&self) -> &CephUser {
        &self.user
    }

    /// This client's address, as the blocklist takes it.
    ///
    /// # Errors
    /// librados refuses.
    pub fn address(&self) -> Result<String, RbdError> {
        let address = self.handle.address().map_err(RbdError::ceph("reading the address of", &self.user))?;
        // `v2:10.0.0.1:0/123`, or without its type.
        let bare = ["v2:", "v1:", "any:"].iter().find_map(|kind| address.strip_prefix(kind));
        Ok(bare.unwrap_or(&address).to_owned())
    }

    /// Has a monitor carry out a command (`prefix` and arguments), and answers its output.
    ///
    /// # Errors
    /// The monitor refuses, or does not answer in time.
    pub fn mon_command(&self, command: &Value) -> Result<Vec<u8>, RbdError> {
        self.command(None, command)
    }

    /// The same, by the monitor of that name.
    ///
    /// # Errors
    /// The monitor refuses, or does not answer in time.
    pub fn mon_command_to(&self, monitor: &str, command: &Value) -> Result<Vec<u8>, RbdError> {
        self.command(Some(monitor), command)
    }

    fn command(&self, monitor: Option<&str>, command: &Value) -> Result<Vec<u8>, RbdError> {
        let (done, answer) = self.handle.mon_command(monitor.map(c).as_deref(), &c(&command.to_string()));
        if let Err(errno) = done {
            // Without its arguments, which may be secrets.
            let prefix = command["prefix"].as_str().unwrap_or_default();
            let object = format!("`{prefix}`: {}", answer.status.trim());
            return Err(RbdError::ceph("carrying out the monitor command", object)(errno));
        }
        Ok(answer.output)
    }

    /// [`Cluster::mon_command`] whose output is JSON.
    ///
    /// # Errors
    /// As there, or it is none.
    pub fn mon_query(&self, command: &Value) -> Result<Value, RbdError> {
        parse(command, &self.mon_command(command)?)
    }

    /// [`Cluster::mon_command_to`] whose output is JSON.
    ///
    /// # Errors
    /// As there, or it is none.
    pub fn mon_query_to(&self, monitor: &str, command: &Value) -> Result<Value, RbdError> {
        parse(command, &self.mon_command_to(monitor, command)?)
    }

    /// Waits until this client knows what the monitors last decided of OSDs, pools and blocklisted clients.
    ///
    /// # Errors
    /// No monitor answers in time.
    pub fn wait_for_latest_map(&self) -> Result<(), RbdError> {
        self.handle.wait_for_latest_osd_map().map_err(RbdError::ceph("waiting for the OSD map as", &self.user))
    }

    /// A pool, in its default namespace: for making namespaces.
    ///
    /// # Errors
    /// There is no such pool.
    pub fn pool(&self, name: &PoolName) -> Result<Pool, RbdError> {
        self.open_pool(name, None)
    }

    /// A pool, in a namespace. That there is one of that name is not checked.
    ///
    /// # Errors
    /// There is no such pool.
    pub fn namespace(&self, pool: &PoolName, namespace: &Namespace) -> Result<Pool, RbdError> {
        self.open_pool(pool, Some(namespace))
    }

    fn open_pool(&self, name: &PoolName, namespace: Option<&Namespace>) -> Result<Pool, RbdError> {
        let handle = PoolHandle::new(&self.handle, &c(name.as_str()), &c(namespace.map_or("", Namespace::as_str)))
            .map_err(RbdError::ceph("opening the pool", name))?;
        Ok(Pool { handle: Arc::new(handle), name: name.clone(), namespace: namespace.cloned() })
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("user", &self.user).finish_non_exhaustive()
    }
}

fn parse(command: &Value, output: &[u8]) -> Result<Value, RbdError> {
    serde_json::from_slice(output).map_err(|cause| RbdError::Malformed {
        object: format!("the monitor's answer to `{}`", command["prefix"].as_str().unwrap_or_default()),
        detail: format!("is no JSON: {cause}"),
    })
}

/// An image somewhere in the cluster, as another one's header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLink {
    /// Its pool.
    pub pool: String,
    /// Its namespace; empty is the default one.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The id that librbd gave it.
    pub id: String,
    /// It was moved to the trash.
    pub in_trash: bool,
}

impl fmt::Display for ImageLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.pool, self.namespace, self.name)
    }
}

/// Objects of 4 MiB, as librbd has by default: few enough to ask after each when a clone is opened.
pub const DEFAULT_OBJECT_ORDER: u8 = 22;

/// A pool in one namespace: where images are.
#[derive(Clone)]
pub struct Pool {
    handle: Arc<PoolHandle>,
    name: PoolName,
    namespace: Option<Namespace>,
}

impl Pool {
    /// The pool's name.
    #[must_use]
    pub fn name(&self) -> &PoolName {
        &self.name
    }

    /// The namespace; `None` is the pool's default one.
    #[must_use]
    pub fn namespace(&self) -> Option<&Namespace> {
        self.namespace.as_ref()
    }

    /// The same pool, seen in another namespace.
    ///
    /// # Errors
    /// The pool is gone.
    pub fn in_namespace(&self, namespace: &Namespace) -> Result<Self, RbdError> {
        let handle = self.handle.in_namespace(&c(self.name.as_str()), &c(namespace.as_str()));
        let handle = handle.map_err(RbdError::ceph("opening the pool", &self.name))?;
        Ok(Self { handle: Arc::new(handle), name: self.name.clone(), namespace: Some(namespace.clone()) })
    }

    /// The same, for a namespace that is only known by what Ceph calls it, which may be none of ours.
    pub(crate) fn beside(&self, namespace: &str) -> Result<Self, RbdError> {
        let handle = self.handle.in_namespace(&c(self.name.as_str()), &c(namespace));
        let handle = handle.map_err(RbdError::ceph("opening the pool", &self.name))?;
        Ok(Self { handle: Arc::new(handle), name: self.name.clone(), namespace: Namespace::new(namespace).ok() })
    }

    /// `pool/namespace/image`.
    pub(crate) fn path(&self, image: impl fmt::Display) -> String {
        format!("{self}/{image}")
    }

    pub(crate) fn handle(&self) -> &Arc<PoolHandle> {
        &self.handle
    }

    /// Makes the pool one of RBD images. Doing it again changes nothing.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn init(&self) -> Result<(), RbdError> {
        self.handle.init().map_err(RbdError::ceph("initialising the pool", &self.name))
    }

    /// Makes a namespace, unless it is there.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn create_namespace(&self, namespace: &Namespace) -> Result<(), RbdError> {
        let name = c(namespace.as_str());
        let made = match self.handle.create_namespace(&name) {
            // Ceph lists a namespace before it has a directory: whoever died between left one that takes no images.
            Err(Errno::EXISTS) => match self.in_namespace(namespace)?.handle.has_object(c"rbd_directory") {
                Ok(true) => Ok(()),
                Ok(false) => self.handle.remove_namespace(&name).and_then(|()| self.handle.create_namespace(&name)),
                Err(errno) => Err(errno),
            },
            made => made,
        };
        made.map_err(RbdError::ceph("creating the namespace", self.path(namespace)))
    }

    /// Removes a namespace, which must have no images. That there is none is no error.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn remove_namespace(&self, namespace: &Namespace) -> Result<(), RbdError> {
        match self.handle.remove_namespace(&c(namespace.as_str())) {
            Ok(()) | Err(Errno::NOT_FOUND) => Ok(()),
            Err(errno) => Err(RbdError::ceph("removing the namespace", self.path(namespace))(errno)),
        }
    }

    /// The pool's namespaces. Those whose names are not ours to have are left out.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn namespaces(&self) -> Result<Vec<Namespace>, RbdError> {
        let names = self.handle.namespaces().map_err(RbdError::ceph("listing the namespaces of", &self.name))?;
        Ok(names.iter().filter_map(|name| Namespace::new(name).ok()).collect())
    }

    /// The images of this namespace that are ours, with the ids that librbd gave them.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn images(&self) -> Result<Vec<(ImageName, String)>, RbdError> {
        let images = self.handle.images().map_err(RbdError::ceph("listing the images of", self))?;
        Ok(images.into_iter().filter_map(|(name, id)| Some((ImageName::parse(&name)?, id))).collect())
    }

    /// Writes a small note beside the images.
    pub(crate) fn write_note(&self, name: &str, text: &str) -> Result<(), RbdError> {
        self.handle.write_object(&c(name), text.as_bytes()).map_err(RbdError::ceph("writing", self.path(name)))
    }

    /// Reads a small note.
    pub(crate) fn read_note(&self, name: &str) -> Result<Option<String>, RbdError> {
        let note = self.handle.read_object(&c(name)).map_err(RbdError::ceph("reading", self.path(name)))?;
        Ok(note.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Whether an image of that name is in this namespace's directory, which is what counts.
    pub(crate) fn has_image(&self, name: ImageName) -> Result<bool, RbdError> {
        Ok(self.images()?.iter().any(|(found, _)| *found == name))
    }

    /// Removes the object by which a name that is in no directory is found: a making or renaming that died leaves it. It
    /// leads to nothing, or to an image that has another name.
    pub(crate) fn forget_name(&self, name: ImageName) -> Result<(), RbdError> {
        match self.handle.remove_object(&c(&format!("rbd_id.{name}"))) {
            Ok(()) | Err(Errno::NOT_FOUND) => Ok(()),
            Err(errno) => Err(RbdError::ceph("forgetting the name", self.path(name))(errno)),
        }
    }

    /// Makes an empty image with layering and nothing else.
    ///
    /// # Errors
    /// There is one, or Ceph refuses.
    pub fn create_image(&self, name: ImageName, byte_len: u64, object_order: u8) -> Result<(), RbdError> {
        match self.handle.create(&c(&name.to_string()), byte_len, Making { order: object_order }) {
            Err(Errno::EXISTS) => Err(RbdError::Exists { object: self.path(name) }),
            made => made.map_err(RbdError::ceph("creating the image", self.path(name))),
        }
    }

    /// Clones a snapshot of an image, which may be in another namespace, to `name` here, with layering and nothing else:
    /// with an exclusive lock, a clone whose writer was killed opens again only after half a minute, or never.
    ///
    /// # Errors
    /// There is one of that name, the parent is missing, or Ceph refuses.
    pub fn clone_image(
        &self,
        parent: (&Self, ImageName, &SnapshotName),
        name: ImageName,
        object_order: u8,
    ) -> Result<(), RbdError> {
        let (from, image, snapshot) = parent;
        let (parent, at, to) = (c(&image.to_string()), c(snapshot.as_str()), c(&name.to_string()));
        match self.handle.clone_image(&from.handle, &parent, &at, &to, Making { order: object_order }) {
            Err(Errno::EXISTS) => Err(RbdError::Exists { object: self.path(name) }),
            made => made.map_err(RbdError::ceph("cloning", format!("{} to {}", from.path(image), self.path(name)))),
        }
    }

    /// Removes an image and its data: time in proportion to its size. That there is none is no error.
    ///
    /// # Errors
    /// It has snapshots, somebody has it open, or Ceph refuses.
    pub fn remove_image(&self, name: ImageName) -> Result<(), RbdError> {
        match self.handle.remove(&c(&name.to_string())) {
            Ok(()) | Err(Errno::NOT_FOUND) => Ok(()),
            Err(errno) => Err(RbdError::ceph("removing the image", self.path(name))(errno)),
        }
    }

    /// Moves an image to the trash: at once, whatever its size. That there is none is no error.
    ///
    /// # Errors
    /// Somebody has it open, or Ceph refuses.
    pub fn trash_image(&self, name: ImageName) -> Result<(), RbdError> {
        match self.handle.move_to_trash(&c(&name.to_string())) {
            Ok(()) | Err(Errno::NOT_FOUND) => Ok(()),
            Err(errno) => Err(RbdError::ceph("moving to the trash", self.path(name))(errno)),
        }
    }

    /// Ids, and the names that they had, of the images in this namespace's trash.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn trash(&self) -> Result<Vec<(String, String)>, RbdError> {
        self.handle.trash().map_err(RbdError::ceph("listing the trash of", self))
    }

    /// Removes an image in the trash and its data.
    ///
    /// # Errors
    /// It has clones still, or Ceph refuses.
    pub fn remove_from_trash(&self, id: &str) -> Result<(), RbdError> {
        let removed = self.handle.remove_from_trash(&c(id));
        removed.map_err(RbdError::ceph("removing from the trash", self.path(id)))
    }

    /// Opens an image for writing. Whoever has it open so is found by [`Image::watchers`].
    ///
    /// # Errors
    /// There is none, it has features that we do not give, or Ceph refuses.
    pub fn open_image(&self, name: ImageName) -> Result<Image, RbdError> {
        self.open(name, None, true)
    }

    /// Opens an image, or one of its snapshots, for reading.
    ///
    /// # Errors
    /// There is none, or Ceph refuses.
    pub fn open_read_only(&self, name: ImageName, snapshot: Option<&SnapshotName>) -> Result<Image, RbdError> {
        self.open(name, snapshot, false)
    }

    fn open(&self, name: ImageName, snapshot: Option<&SnapshotName>, writable: bool) -> Result<Image, RbdError> {
        let object = self.path(name);
        let (text, at) = (c(&name.to_string()), snapshot.map(|snapshot| c(snapshot.as_str())));
        let handle = ImageHandle::open(&self.handle, By::Name(&text), at.as_deref(), writable)
            .map_err(RbdError::ceph("opening the image", &object))?;
        let features = handle.features().map_err(RbdError::ceph("reading the features of", &object))?;
        if features & !OPERATIONS != LAYERING {
            let detail = format!("has the features {features:#x}; ours have layering alone");
            return Err(RbdError::Malformed { object, detail });
        }
        Image::new(handle, object, writable)
    }

    /// Opens an image, or one of its snapshots, by its id, for reading, also in the trash.
    ///
    /// # Errors
    /// There is none, or Ceph refuses.
    pub fn open_by_id(&self, id: &ImageObjectId, snapshot: Option<u64>) -> Result<Image, RbdError> {
        let object = self.path(id);
        let handle = ImageHandle::open(&self.handle, By::Id(&c(id.as_str())), None, false)
            .map_err(RbdError::ceph("opening the image with the id", &object))?;
        if let Some(snapshot) = snapshot {
            handle.set_snapshot(snapshot).map_err(RbdError::ceph("opening a snapshot of", &object))?;
        }
        Image::new(handle, object, false)
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.name, self.namespace.as_ref().map_or("", Namespace::as_str))
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({self})")
    }
}
