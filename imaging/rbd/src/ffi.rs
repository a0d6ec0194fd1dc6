//! The boundary to librados and librbd: every line of `unsafe` in Assay is in this file and in [`declarations`].
//!
//! Both libraries are loaded when first needed, so that the binary runs without Ceph, and never unloaded: their threads
//! outlive any handle. What leaves this file is safe: handles that close themselves and keep
//! alive what they were made from, slices, and error numbers. Both libraries serialise calls on one handle themselves,
//! so handles are shared between threads.

#![allow(unsafe_code, reason = "librbd is C; the rest of the crate is written against the safe handles of this module")]

mod declarations;

use crate::RbdError;
use declarations::{
    Api, Handle, ImageInfo, ImageSpec, LinkedImageSpec, Rbd, SnapInfo, SnapSpec, TrashInfo, Watcher, api,
};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ops::ControlFlow;
use std::ptr::{null, null_mut};
use std::sync::Arc;

/// A positive error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

impl Errno {
    pub(crate) const NOT_FOUND: Self = Self(2);
    pub(crate) const EXISTS: Self = Self(17);
    const RANGE: Self = Self(34);
    pub(crate) const CANCELED: Self = Self(125);
}

/// Octets of a method's answer: a list of some hundred thousand clones.
const MOST_ANSWER: usize = 16 << 20;

fn check(answer: impl Into<i64>) -> Result<u64, Errno> {
    let answer = answer.into();
    u64::try_from(answer).map_err(|_| Errno(i32::try_from(-answer).unwrap_or(i32::MAX)))
}

fn check_octets(answer: isize) -> Result<u64, Errno> {
    check(i64::try_from(answer).unwrap_or(i64::MIN))
}

/// The text at `pointer`, which may be null.
///
/// # Safety
/// It is null or a C string.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

/// Loads both libraries.
pub(crate) fn load() -> Result<(), RbdError> {
    api().map(drop)
}

/// A connection to a cluster, or the preparation of one.
pub(crate) struct ClusterHandle {
    api: &'static Api,
    rados: Handle,
}

// SAFETY: librados locks its handles itself; any thread may call.
unsafe impl Send for ClusterHandle {}
// SAFETY: as above.
unsafe impl Sync for ClusterHandle {}

/// What a monitor answered.
pub(crate) struct MonAnswer {
    pub(crate) output: Vec<u8>,
    pub(crate) status: String,
}

impl ClusterHandle {
    /// Prepares a connection as `user` (`client.…`). No configuration file or environment is read.
    pub(crate) fn new(user: &CStr) -> Result<Self, RbdError> {
        let api = api()?;
        let mut rados = null_mut();
        // SAFETY: the strings live through the call, and `rados` is where the handle goes.
        let answer = unsafe { (api.rados.rados_create2)(&raw mut rados, c"ceph".as_ptr(), user.as_ptr(), 0) };
        check(answer).map_err(RbdError::ceph("preparing a connection as", user.to_string_lossy()))?;
        Ok(Self { api, rados })
    }

    pub(crate) fn set(&self, option: &CStr, value: &CStr) -> Result<(), Errno> {
        // SAFETY: the handle is live; librados copies both strings.
        check(unsafe { (self.api.rados.rados_conf_set)(self.rados, option.as_ptr(), value.as_ptr()) }).map(drop)
    }

    pub(crate) fn connect(&self) -> Result<(), Errno> {
        // SAFETY: the handle is live.
        check(unsafe { (self.api.rados.rados_connect)(self.rados) }).map(drop)
    }

    pub(crate) fn wait_for_latest_osd_map(&self) -> Result<(), Errno> {
        // SAFETY: the handle is live.
        check(unsafe { (self.api.rados.rados_wait_for_latest_osdmap)(self.rados) }).map(drop)
    }

    /// This client's address, as librados writes it.
    pub(crate) fn address(&self) -> Result<String, Errno> {
        let mut address = null_mut();
        // SAFETY: the handle is live; librados allocates the text, which is freed once.
        unsafe {
            check((self.api.rados.rados_getaddrs)(self.rados, &raw mut address))?;
            let found = text(address);
            (self.api.rados.rados_buffer_free)(address);
            Ok(found)
        }
    }

    /// Carries out a command on any monitor, or on the one that is named.
    pub(crate) fn mon_command(&self, monitor: Option<&CStr>, command: &CStr) -> (Result<(), Errno>, MonAnswer) {
        let (mut output, mut output_len, mut status, mut status_len) = (null_mut(), 0, null_mut(), 0);
        let mut commands = [command.as_ptr()];
        let (commands, rados) = (commands.as_mut_ptr(), &self.api.rados);
        let results = (&raw mut output, &raw mut output_len, &raw mut status, &raw mut status_len);
        // SAFETY: one command that lives through the call, no input, and four places for what librados allocates.
        let answer = unsafe {
            match monitor {
                None => (rados.rados_mon_command)(
                    self.rados,
                    commands,
                    1,
                    null(),
                    0,
                    results.0,
                    results.1,
                    results.2,
                    results.3,
                ),
                Some(name) => (rados.rados_mon_command_target)(
                    self.rados,
                    name.as_ptr(),
                    commands,
                    1,
                    null(),
                    0,
                    results.0,
                    results.1,
                    results.2,
                    results.3,
                ),
            }
        };
        let take = |buffer: *mut c_char, length: usize| {
            if buffer.is_null() {
                return Vec::new();
            }
            // SAFETY: librados gave this buffer with this length; it is freed once, here.
            unsafe {
                let bytes = std::slice::from_raw_parts(buffer.cast::<u8>(), length).to_vec();
                (rados.rados_buffer_free)(buffer);
                bytes
            }
        };
        let (output, status) = (take(output, output_len), take(status, status_len));
        (check(answer).map(drop), MonAnswer { output, status: String::from_utf8_lossy(&status).into_owned() })
    }
}

impl Drop for ClusterHandle {
    fn drop(&mut self) {
        // SAFETY: the handle is live, whatever was made from it is gone (it holds an `Arc` of us), and nobody uses it after.
        unsafe { (self.api.rados.rados_shutdown)(self.rados) }
    }
}

/// A pool, seen in one namespace.
pub(crate) struct PoolHandle {
    api: &'static Api,
    io: Handle,
    cluster: Arc<ClusterHandle>,
}

// SAFETY: an I/O context's settings are changed only before it is shared; librados locks the rest.
unsafe impl Send for PoolHandle {}
// SAFETY: as above.
unsafe impl Sync for PoolHandle {}

/// How an image or a clone is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Making {
    /// Objects have two to this power octets.
    pub(crate) order: u8,
}

const OPTION_FEATURES: c_int = 1;
const OPTION_ORDER: c_int = 2;
const OPTION_CLONE_FORMAT: c_int = 12;
/// `RBD_FEATURE_LAYERING`.
pub(crate) const LAYERING: u64 = 1;
/// `RBD_FEATURE_OPERATIONS`: the image is, or has, a clone of the second version.
pub(crate) const OPERATIONS: u64 = 1 << 8;

/// An image or a clone elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Linked {
    pub(crate) pool: String,
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) in_trash: bool,
}

impl Linked {
    /// # Safety
    /// librbd filled it.
    unsafe fn from_raw(raw: &LinkedImageSpec) -> Self {
        // SAFETY: librbd fills every string or leaves it null.
        unsafe {
            Self {
                pool: text(raw.pool_name),
                namespace: text(raw.pool_namespace),
                id: text(raw.image_id),
                name: text(raw.image_name),
                in_trash: raw.trash,
            }
        }
    }
}

impl PoolHandle {
    pub(crate) fn new(cluster: &Arc<ClusterHandle>, pool: &CStr, namespace: &CStr) -> Result<Self, Errno> {
        let (api, mut io) = (cluster.api, null_mut());
        // SAFETY: the handle and the strings are live, and `io` is where the new handle goes.
        unsafe {
            check((api.rados.rados_ioctx_create)(cluster.rados, pool.as_ptr(), &raw mut io))?;
            (api.rados.rados_ioctx_set_namespace)(io, namespace.as_ptr());
        }
        Ok(Self { api, io, cluster: Arc::clone(cluster) })
    }

    /// The same pool, seen in another namespace.
    pub(crate) fn in_namespace(&self, pool: &CStr, namespace: &CStr) -> Result<Self, Errno> {
        Self::new(&self.cluster, pool, namespace)
    }

    /// A function that takes the pool and a name.
    fn named(&self, function: unsafe extern "C" fn(Handle, *const c_char) -> c_int, name: &CStr) -> Result<(), Errno> {
        // SAFETY: only called with functions of this group whose second argument is a name; both are live.
        check(unsafe { function(self.io, name.as_ptr()) }).map(drop)
    }

    pub(crate) fn init(&self) -> Result<(), Errno> {
        // SAFETY: the handle is live.
        check(unsafe { (self.api.rbd.rbd_pool_init)(self.io, false) }).map(drop)
    }

    pub(crate) fn create_namespace(&self, name: &CStr) -> Result<(), Errno> {
        self.named(self.api.rbd.rbd_namespace_create, name)
    }

    pub(crate) fn remove_namespace(&self, name: &CStr) -> Result<(), Errno> {
        self.named(self.api.rbd.rbd_namespace_remove, name)
    }

    pub(crate) fn namespaces(&self) -> Result<Vec<String>, Errno> {
        let mut names = vec![0_u8; 4096];
        loop {
            let mut length = names.len();
            let buffer = names.as_mut_ptr().cast();
            // SAFETY: librbd writes at most `length` octets and says how many it wrote or wants.
            match check(unsafe { (self.api.rbd.rbd_namespace_list)(self.io, buffer, &raw mut length) }) {
                Err(Errno::RANGE) => names.resize(length.max(names.len() * 2), 0),
                Err(errno) => return Err(errno),
                Ok(_) => {
                    names.truncate(length);
                    let each = names.split(|octet| *octet == 0).filter(|name| !name.is_empty());
                    return Ok(each.map(|name| String::from_utf8_lossy(name).into_owned()).collect());
                }
            }
        }
    }

    /// Names and ids of all images.
    pub(crate) fn images(&self) -> Result<Vec<(String, String)>, Errno> {
        let empty = || ImageSpec { id: null_mut(), name: null_mut() };
        // SAFETY: librbd fills as many entries as it says.
        let read = |raw: &ImageSpec| unsafe { (text(raw.name), text(raw.id)) };
        let rbd = &self.api.rbd;
        // SAFETY: `list` calls with room for `count` entries; what was filled is given back once.
        let call = |buffer, count| unsafe { (rbd.rbd_list2)(self.io, buffer, count) };
        // SAFETY: as above.
        list(empty, call, read, |buffer, count| unsafe { (rbd.rbd_image_spec_list_cleanup)(buffer, count) })
    }

    /// Ids and names of what is in the trash.
    pub(crate) fn trash(&self) -> Result<Vec<(String, String)>, Errno> {
        let empty =
            || TrashInfo { id: null_mut(), name: null_mut(), source: 0, deletion_time: 0, deferment_end_time: 0 };
        // SAFETY: librbd fills as many entries as it says.
        let read = |raw: &TrashInfo| unsafe { (text(raw.id), text(raw.name)) };
        let rbd = &self.api.rbd;
        // SAFETY: `list` calls with room for `count` entries; what was filled is given back once.
        let call = |buffer, count| unsafe { (rbd.rbd_trash_list)(self.io, buffer, count) };
        // SAFETY: as above.
        list(empty, call, read, |buffer, count| unsafe { (rbd.rbd_trash_list_cleanup)(buffer, count) })
    }

    pub(crate) fn create(&self, name: &CStr, byte_len: u64, making: Making) -> Result<(), Errno> {
        let options = Options::new(self.api, making, false)?;
        // SAFETY: handles and name are live.
        check(unsafe { (self.api.rbd.rbd_create4)(self.io, name.as_ptr(), byte_len, options.options) }).map(drop)
    }

    /// Clones `parent`, which is in `from`, to `name` here.
    pub(crate) fn clone_image(
        &self,
        from: &Self,
        parent: &CStr,
        snapshot: &CStr,
        name: &CStr,
        making: Making,
    ) -> Result<(), Errno> {
        let options = Options::new(self.api, making, true)?;
        let (parent, snapshot, name) = (parent.as_ptr(), snapshot.as_ptr(), name.as_ptr());
        // SAFETY: handles and names are live.
        check(unsafe { (self.api.rbd.rbd_clone3)(from.io, parent, snapshot, self.io, name, options.options) }).map(drop)
    }

    pub(crate) fn remove(&self, name: &CStr) -> Result<(), Errno> {
        self.named(self.api.rbd.rbd_remove, name)
    }

    pub(crate) fn move_to_trash(&self, name: &CStr) -> Result<(), Errno> {
        // SAFETY: handle and name are live.
        check(unsafe { (self.api.rbd.rbd_trash_move)(self.io, name.as_ptr(), 0) }).map(drop)
    }

    pub(crate) fn remove_from_trash(&self, id: &CStr) -> Result<(), Errno> {
        // SAFETY: handle and id are live.
        check(unsafe { (self.api.rbd.rbd_trash_remove)(self.io, id.as_ptr(), true) }).map(drop)
    }

    /// Writes all of a small RADOS object.
    pub(crate) fn write_object(&self, object: &CStr, data: &[u8]) -> Result<(), Errno> {
        let write = self.api.rados.rados_write_full;
        // SAFETY: handle, name and data are live.
        check(unsafe { write(self.io, object.as_ptr(), data.as_ptr().cast(), data.len()) }).map(drop)
    }

    /// The first 64 KiB of a RADOS object.
    pub(crate) fn read_object(&self, object: &CStr) -> Result<Option<Vec<u8>>, Errno> {
        let (mut data, read) = (vec![0; 64 * 1024], self.api.rados.rados_read);
        // SAFETY: handle and name are live; librados writes at most as much as there is room for.
        match check(unsafe { read(self.io, object.as_ptr(), data.as_mut_ptr().cast(), data.len(), 0) }) {
            Ok(length) => {
                data.truncate(usize::try_from(length).unwrap_or(0));
                Ok(Some(data))
            }
            Err(Errno::NOT_FOUND) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// The pool's number.
    pub(crate) fn id(&self) -> i64 {
        // SAFETY: the handle is live.
        unsafe { (self.api.rados.rados_ioctx_get_id)(self.io) }
    }

    /// Has an object's OSD call a method of the class `rbd` on it, and answers what that said.
    pub(crate) fn call(&self, object: &CStr, method: &CStr, input: &[u8]) -> Result<Vec<u8>, Errno> {
        let (mut output, exec) = (vec![0_u8; 4096], self.api.rados.rados_exec);
        loop {
            // SAFETY: handle, names and input are live; librados writes at most as much as there is room for.
            let answer = check(unsafe {
                let (room, length) = (output.as_mut_ptr().cast(), output.len());
                let (from, octets) = (input.as_ptr().cast(), input.len());
                exec(self.io, object.as_ptr(), c"rbd".as_ptr(), method.as_ptr(), from, octets, room, length)
            });
            match answer {
                Err(Errno::RANGE) if output.len() < MOST_ANSWER => output.resize(output.len() * 8, 0),
                Err(errno) => return Err(errno),
                Ok(length) => {
                    output.truncate(usize::try_from(length).unwrap_or(0));
                    return Ok(output);
                }
            }
        }
    }

    /// Removes a RADOS object.
    pub(crate) fn remove_object(&self, object: &CStr) -> Result<(), Errno> {
        self.named(self.api.rados.rados_remove, object)
    }

    /// Whether the RADOS object is there.
    pub(crate) fn has_object(&self, object: &CStr) -> Result<bool, Errno> {
        Ok(self.object_bytes(object)?.is_some())
    }

    /// Octets of an object, if it is there.
    pub(crate) fn object_bytes(&self, object: &CStr) -> Result<Option<u64>, Errno> {
        let (mut size, mut modified) = (0, 0);
        // SAFETY: handle and name are live, and both places are there.
        match check(unsafe { (self.api.rados.rados_stat)(self.io, object.as_ptr(), &raw mut size, &raw mut modified) })
        {
            Ok(_) => Ok(Some(size)),
            Err(Errno::NOT_FOUND) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}

impl Drop for PoolHandle {
    fn drop(&mut self) {
        // SAFETY: the handle is live, and whatever was made from it is gone (it holds an `Arc` of us).
        unsafe { (self.api.rados.rados_ioctx_destroy)(self.io) }
    }
}

/// Calls a function that fills an array, with more room until all fits, and gives back what it allocated. Functions that
/// answer nothing but success say in `count` how many there are.
fn list<Raw, Item>(
    empty: impl Fn() -> Raw,
    call: impl Fn(*mut Raw, *mut usize) -> c_int,
    read: impl Fn(&Raw) -> Item,
    give_back: impl Fn(*mut Raw, usize),
) -> Result<Vec<Item>, Errno> {
    let mut entries: Vec<Raw> = Vec::new();
    entries.resize_with(64, &empty);
    loop {
        let mut count = entries.len();
        match check(call(entries.as_mut_ptr(), &raw mut count)) {
            Err(Errno::RANGE) => {
                let room = count.max(entries.len() * 2);
                entries.resize_with(room, &empty);
            }
            Err(errno) => return Err(errno),
            Ok(answer) => {
                // `rbd_list_children3` and `rbd_trash_list` answer the count, the others 0; all set `count`.
                let filled = count.min(entries.len());
                debug_assert!(answer == 0 || usize::try_from(answer) == Ok(filled));
                let items = entries[..filled].iter().map(read).collect();
                give_back(entries.as_mut_ptr(), filled);
                return Ok(items);
            }
        }
    }
}

/// Options of an image to be made, destroyed when dropped.
struct Options {
    api: &'static Api,
    options: Handle,
}

impl Options {
    fn new(api: &'static Api, making: Making, clone: bool) -> Result<Self, Errno> {
        let mut options = null_mut();
        // SAFETY: `options` is where the handle goes.
        unsafe { (api.rbd.rbd_image_options_create)(&raw mut options) };
        let made = Self { api, options };
        made.set(OPTION_FEATURES, LAYERING)?;
        made.set(OPTION_ORDER, u64::from(making.order))?;
        if clone {
            made.set(OPTION_CLONE_FORMAT, 2)?;
        }
        Ok(made)
    }

    fn set(&self, option: c_int, value: u64) -> Result<(), Errno> {
        // SAFETY: the handle is live.
        check(unsafe { (self.api.rbd.rbd_image_options_set_uint64)(self.options, option, value) }).map(drop)
    }
}

impl Drop for Options {
    fn drop(&mut self) {
        // SAFETY: the handle is live and not used after.
        unsafe { (self.api.rbd.rbd_image_options_destroy)(self.options) }
    }
}

/// An open image.
pub(crate) struct ImageHandle {
    image: Handle,
    pool: Arc<PoolHandle>,
}

// SAFETY: librbd locks its images itself; any thread may call.
unsafe impl Send for ImageHandle {}
// SAFETY: as above.
unsafe impl Sync for ImageHandle {}

/// How to find an image.
#[derive(Debug, Clone, Copy)]
pub(crate) enum By<'a> {
    Name(&'a CStr),
    /// Also in the trash. For reading only.
    Id(&'a CStr),
}

impl ImageHandle {
    pub(crate) fn open(
        pool: &Arc<PoolHandle>,
        by: By<'_>,
        snapshot: Option<&CStr>,
        writable: bool,
    ) -> Result<Self, Errno> {
        let (rbd, io, mut image) = (&pool.api.rbd, pool.io, null_mut());
        let snapshot = snapshot.map_or(null(), CStr::as_ptr);
        // SAFETY: handle and names are live, a null snapshot is the image itself, `image` is where the handle goes.
        check(unsafe {
            match by {
                By::Name(name) if writable => (rbd.rbd_open)(io, name.as_ptr(), &raw mut image, snapshot),
                By::Name(name) => (rbd.rbd_open_read_only)(io, name.as_ptr(), &raw mut image, snapshot),
                By::Id(id) => (rbd.rbd_open_by_id_read_only)(io, id.as_ptr(), &raw mut image, snapshot),
            }
        })?;
        Ok(Self { image, pool: Arc::clone(pool) })
    }

    fn rbd(&self) -> &'static Rbd {
        &self.pool.api.rbd
    }

    pub(crate) fn byte_len(&self) -> Result<u64, Errno> {
        let mut size = 0;
        // SAFETY: the handle is live.
        check(unsafe { (self.rbd().rbd_get_size)(self.image, &raw mut size) }).map(|_| size)
    }

    pub(crate) fn features(&self) -> Result<u64, Errno> {
        let mut features = 0;
        // SAFETY: the handle is live.
        check(unsafe { (self.rbd().rbd_get_features)(self.image, &raw mut features) }).map(|_| features)
    }

    pub(crate) fn object_bytes(&self) -> Result<u64, Errno> {
        let mut info = ImageInfo {
            size: 0,
            object_bytes: 0,
            objects: 0,
            order: 0,
            block_name_prefix: [0; 24],
            parent_pool: 0,
            parent_name: [0; 96],
        };
        // SAFETY: the handle is live and the structure has the size that is said.
        check(unsafe { (self.rbd().rbd_stat)(self.image, &raw mut info, size_of::<ImageInfo>()) })?;
        Ok(info.object_bytes)
    }

    /// A function that writes a C string into a buffer.
    fn short_text(&self, function: unsafe extern "C" fn(Handle, *mut c_char, usize) -> c_int) -> Result<String, Errno> {
        let mut buffer = [0_u8; 256];
        // SAFETY: the handle is live and the buffer has the size that is said.
        check(unsafe { function(self.image, buffer.as_mut_ptr().cast(), buffer.len()) })?;
        Ok(CStr::from_bytes_until_nul(&buffer).unwrap_or_default().to_string_lossy().into_owned())
    }

    pub(crate) fn id(&self) -> Result<String, Errno> {
        self.short_text(self.rbd().rbd_get_id)
    }

    /// What its data objects' names start with.
    pub(crate) fn data_prefix(&self) -> Result<String, Errno> {
        self.short_text(self.rbd().rbd_get_block_name_prefix)
    }

    /// Looks at a snapshot from now on, whatever became of its name.
    pub(crate) fn set_snapshot(&self, id: u64) -> Result<(), Errno> {
        // SAFETY: the handle is live.
        check(unsafe { (self.rbd().rbd_snap_set_by_id)(self.image, id) }).map(drop)
    }

    /// Its parent and the parent's snapshot.
    pub(crate) fn parent(&self) -> Result<Option<(Linked, u64)>, Errno> {
        let mut image = empty_link();
        let mut snapshot = SnapSpec { id: 0, namespace_type: 0, name: null_mut() };
        // SAFETY: the handle is live; librbd fills both structures on success, and they are cleaned up once.
        unsafe {
            match check((self.rbd().rbd_get_parent)(self.image, &raw mut image, &raw mut snapshot)) {
                Err(Errno::NOT_FOUND) => return Ok(None),
                answer => answer?,
            };
            let found = (Linked::from_raw(&image), snapshot.id);
            (self.rbd().rbd_linked_image_spec_cleanup)(&raw mut image);
            (self.rbd().rbd_snap_spec_cleanup)(&raw mut snapshot);
            Ok(Some(found))
        }
    }

    /// Clones of the snapshot that it is open at, or of all its snapshots.
    pub(crate) fn children(&self) -> Result<Vec<Linked>, Errno> {
        let rbd = self.rbd();
        // SAFETY: librbd fills as many entries as it says.
        let read = |raw: &LinkedImageSpec| unsafe { Linked::from_raw(raw) };
        // SAFETY: `list` calls with room for `count` entries; what was filled is given back once.
        let call = |buffer, count| unsafe { (rbd.rbd_list_children3)(self.image, buffer, count) };
        // SAFETY: as above.
        list(empty_link, call, read, |buffer, count| unsafe { (rbd.rbd_linked_image_spec_list_cleanup)(buffer, count) })
    }

    pub(crate) fn watchers(&self) -> Result<Vec<String>, Errno> {
        let rbd = self.rbd();
        let empty = || Watcher { addr: null_mut(), id: 0, cookie: 0 };
        // SAFETY: librbd fills as many entries as it says.
        let read = |raw: &Watcher| unsafe { text(raw.addr) };
        // SAFETY: `list` calls with room for `count` entries; what was filled is given back once.
        let call = |buffer, count| unsafe { (rbd.rbd_watchers_list)(self.image, buffer, count) };
        // SAFETY: as above.
        list(empty, call, read, |buffer, count| unsafe { (rbd.rbd_watchers_list_cleanup)(buffer, count) })
    }

    pub(crate) fn snapshots(&self) -> Result<Vec<String>, Errno> {
        let mut entries: Vec<SnapInfo> = Vec::new();
        let mut room: c_int = 64;
        loop {
            entries.resize_with(usize::try_from(room).unwrap_or(0) + 1, || SnapInfo { id: 0, size: 0, name: null() });
            // SAFETY: there is room for `room` entries and the null name that ends them.
            match check(unsafe { (self.rbd().rbd_snap_list)(self.image, entries.as_mut_ptr(), &raw mut room) }) {
                Err(Errno::RANGE) => {}
                Err(errno) => return Err(errno),
                Ok(count) => {
                    let filled = usize::try_from(count).unwrap_or(0).min(entries.len());
                    // SAFETY: librbd filled as many, and ended them with a null name unless there are none.
                    let names = entries[..filled].iter().map(|entry| unsafe { text(entry.name) }).collect();
                    if filled > 0 {
                        // SAFETY: as above; given back once.
                        unsafe { (self.rbd().rbd_snap_list_end)(entries.as_mut_ptr()) };
                    }
                    return Ok(names);
                }
            }
        }
    }

    pub(crate) fn create_snapshot(&self, name: &CStr) -> Result<(), Errno> {
        // SAFETY: handle and name are live.
        check(unsafe { (self.rbd().rbd_snap_create)(self.image, name.as_ptr()) }).map(drop)
    }

    pub(crate) fn remove_snapshot(&self, name: &CStr) -> Result<(), Errno> {
        // SAFETY: handle and name are live.
        check(unsafe { (self.rbd().rbd_snap_remove)(self.image, name.as_ptr()) }).map(drop)
    }

    pub(crate) fn set_metadata(&self, key: &CStr, value: &CStr) -> Result<(), Errno> {
        // SAFETY: the handle and both strings are live.
        check(unsafe { (self.rbd().rbd_metadata_set)(self.image, key.as_ptr(), value.as_ptr()) }).map(drop)
    }

    pub(crate) fn metadata(&self, key: &CStr) -> Result<Option<String>, Errno> {
        let mut value = vec![0_u8; 4096];
        loop {
            let (mut length, buffer) = (value.len(), value.as_mut_ptr().cast());
            // SAFETY: handle and key are live; librbd writes at most `length` octets.
            match check(unsafe { (self.rbd().rbd_metadata_get)(self.image, key.as_ptr(), buffer, &raw mut length) }) {
                Err(Errno::NOT_FOUND) => return Ok(None),
                Err(Errno::RANGE) => value.resize(length.max(value.len() * 2), 0),
                Err(errno) => return Err(errno),
                Ok(_) => {
                    let text = CStr::from_bytes_until_nul(&value).unwrap_or_default();
                    return Ok(Some(text.to_string_lossy().into_owned()));
                }
            }
        }
    }

    /// Copies all of the parent's that it has not. `progress` may break it off.
    pub(crate) fn flatten(&self, progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>) -> Result<(), Errno> {
        type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;
        extern "C" fn trampoline(done: u64, of: u64, argument: *mut c_void) -> c_int {
            // SAFETY: `argument` is the reference below, which lives through the call; librbd calls one at a time.
            let progress = unsafe { &mut *argument.cast::<Progress<'_>>() };
            if progress(done, of).is_break() { -Errno::CANCELED.0 } else { 0 }
        }
        let mut progress: Progress<'_> = progress;
        let argument = (&raw mut progress).cast();
        // SAFETY: the handle is live, and `argument` is what `trampoline` takes.
        check(unsafe { (self.rbd().rbd_flatten_with_progress)(self.image, trampoline, argument) }).map(drop)
    }

    /// Fills `buffer`. The range is within the image, and not empty.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<u64, Errno> {
        // SAFETY: the handle is live, and librbd writes at most as much as the buffer has.
        check_octets(unsafe { (self.rbd().rbd_read)(self.image, offset, buffer.len(), buffer.as_mut_ptr().cast()) })
    }

    /// The range is within the image, and not empty.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<u64, Errno> {
        // SAFETY: the handle is live, and librbd copies the data before it answers.
        check_octets(unsafe { (self.rbd().rbd_write)(self.image, offset, data.len(), data.as_ptr().cast()) })
    }

    /// The range is within the image, and not empty.
    pub(crate) fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        // SAFETY: the handle is live.
        check(unsafe { (self.rbd().rbd_discard)(self.image, offset, length) }).map(drop)
    }

    /// The range is within the image, and not empty.
    pub(crate) fn write_zeroes(&self, offset: u64, length: usize) -> Result<(), Errno> {
        // SAFETY: the handle is live.
        check_octets(unsafe { (self.rbd().rbd_write_zeroes)(self.image, offset, length, 0, 0) }).map(drop)
    }

    pub(crate) fn flush(&self) -> Result<(), Errno> {
        // SAFETY: the handle is live.
        check(unsafe { (self.rbd().rbd_flush)(self.image) }).map(drop)
    }

    /// Extents that hold data (or, where the flag is false, that were discarded), in order.
    pub(crate) fn extents(
        &self,
        byte_len: u64,
        include_parent: bool,
        whole_objects: bool,
    ) -> Result<Vec<(u64, u64, bool)>, Errno> {
        extern "C" fn collect(offset: u64, length: usize, exists: c_int, argument: *mut c_void) -> c_int {
            // SAFETY: `argument` is the vector below, which lives through the call; librbd calls one at a time.
            let extents = unsafe { &mut *argument.cast::<Vec<(u64, u64, bool)>>() };
            extents.push((offset, length as u64, exists != 0));
            0
        }
        let mut extents: Vec<(u64, u64, bool)> = Vec::new();
        let argument = (&raw mut extents).cast();
        let (parent, whole) = (u8::from(include_parent), u8::from(whole_objects));
        let diff = self.rbd().rbd_diff_iterate2;
        // SAFETY: the handle is live, no first snapshot means from the beginning, `argument` is what `collect` takes.
        check(unsafe { diff(self.image, null(), 0, byte_len, parent, whole, collect, argument) })?;
        extents.sort_unstable();
        Ok(extents)
    }
}

impl Drop for ImageHandle {
    fn drop(&mut self) {
        // SAFETY: the handle is live and not used after. What it answers changes nothing: whoever needs to know flushed.
        let _ = unsafe { (self.rbd().rbd_close)(self.image) };
    }
}

fn empty_link() -> LinkedImageSpec {
    LinkedImageSpec {
        pool_id: 0,
        pool_name: null_mut(),
        pool_namespace: null_mut(),
        image_id: null_mut(),
        image_name: null_mut(),
        trash: false,
    }
}

/// A C string of a text that has no NUL by construction (a checked name, or JSON).
pub(crate) fn c(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}
