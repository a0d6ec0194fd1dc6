//! Functions and structures of librados and librbd, declared by hand from Ceph's `librados.h` and `librbd.h` (16.2; the C
//! interface is stable, and newer releases only add to it), and the loading of both.

use crate::RbdError;
use libloading::Library;
use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

pub(super) type Handle = *mut c_void;
pub(super) type ProgressCallback = extern "C" fn(u64, u64, *mut c_void) -> c_int;
pub(super) type DiffCallback = extern "C" fn(u64, usize, c_int, *mut c_void) -> c_int;

#[repr(C)]
pub(super) struct ImageSpec {
    pub(super) id: *mut c_char,
    pub(super) name: *mut c_char,
}

#[repr(C)]
pub(super) struct LinkedImageSpec {
    pub(super) pool_id: i64,
    pub(super) pool_name: *mut c_char,
    pub(super) pool_namespace: *mut c_char,
    pub(super) image_id: *mut c_char,
    pub(super) image_name: *mut c_char,
    pub(super) trash: bool,
}

#[repr(C)]
pub(super) struct SnapSpec {
    pub(super) id: u64,
    pub(super) namespace_type: c_int,
    pub(super) name: *mut c_char,
}

#[repr(C)]
pub(super) struct SnapInfo {
    pub(super) id: u64,
    pub(super) size: u64,
    pub(super) name: *const c_char,
}

#[repr(C)]
pub(super) struct TrashInfo {
    pub(super) id: *mut c_char,
    pub(super) name: *mut c_char,
    pub(super) source: c_int,
    pub(super) deletion_time: i64,
    pub(super) deferment_end_time: i64,
}

#[repr(C)]
pub(super) struct Watcher {
    pub(super) addr: *mut c_char,
    pub(super) id: i64,
    pub(super) cookie: u64,
}

macro_rules! functions {
    ($($group:ident { $($name:ident($($argument:ty),*) $(-> $answer:ty)?;)* })*) => {
        $(
            pub(super) struct $group { $(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $answer)?,)* }

            impl $group {
                fn load(library: &Library) -> Result<Self, libloading::Error> {
                    Ok(Self { $($name: {
                        let name = concat!(stringify!($name), "\0").as_bytes();
                        // SAFETY: the type is the function's in Ceph's headers, and the library is never unloaded.
                        *unsafe { library.get::<unsafe extern "C" fn($($argument),*) $(-> $answer)?>(name)? }
                    },)* })
                }
            }
        )*
    };
}

functions! {
    Rados {
        rados_create2(*mut Handle, *const c_char, *const c_char, u64) -> c_int;
        rados_conf_set(Handle, *const c_char, *const c_char) -> c_int;
        rados_connect(Handle) -> c_int;
        rados_shutdown(Handle);
        rados_mon_command(Handle, *mut *const c_char, usize, *const c_char, usize, *mut *mut c_char, *mut usize, *mut *mut c_char, *mut usize) -> c_int;
        rados_mon_command_target(Handle, *const c_char, *mut *const c_char, usize, *const c_char, usize, *mut *mut c_char, *mut usize, *mut *mut c_char, *mut usize) -> c_int;
        rados_buffer_free(*mut c_char);
        rados_wait_for_latest_osdmap(Handle) -> c_int;
        rados_getaddrs(Handle, *mut *mut c_char) -> c_int;
        rados_write_full(Handle, *const c_char, *const c_char, usize) -> c_int;
        rados_read(Handle, *const c_char, *mut c_char, usize, u64) -> c_int;
        rados_ioctx_create(Handle, *const c_char, *mut Handle) -> c_int;
        rados_ioctx_set_namespace(Handle, *const c_char);
        rados_ioctx_destroy(Handle);
        rados_ioctx_get_id(Handle) -> i64;
        rados_exec(Handle, *const c_char, *const c_char, *const c_char, *const c_char, usize, *mut c_char, usize) -> c_int;
        rados_remove(Handle, *const c_char) -> c_int;
        rados_stat(Handle, *const c_char, *mut u64, *mut i64) -> c_int;
    }
    Rbd {
        rbd_pool_init(Handle, bool) -> c_int;
        rbd_namespace_create(Handle, *const c_char) -> c_int;
        rbd_namespace_remove(Handle, *const c_char) -> c_int;
        rbd_namespace_list(Handle, *mut c_char, *mut usize) -> c_int;
        rbd_list2(Handle, *mut ImageSpec, *mut usize) -> c_int;
        rbd_image_spec_list_cleanup(*mut ImageSpec, usize);
        rbd_image_options_create(*mut Handle);
        rbd_image_options_destroy(Handle);
        rbd_image_options_set_uint64(Handle, c_int, u64) -> c_int;
        rbd_create4(Handle, *const c_char, u64, Handle) -> c_int;
        rbd_clone3(Handle, *const c_char, *const c_char, Handle, *const c_char, Handle) -> c_int;
        rbd_remove(Handle, *const c_char) -> c_int;
        rbd_trash_move(Handle, *const c_char, u64) -> c_int;
        rbd_trash_list(Handle, *mut TrashInfo, *mut usize) -> c_int;
        rbd_trash_list_cleanup(*mut TrashInfo, usize);
        rbd_trash_remove(Handle, *const c_char, bool) -> c_int;
        rbd_open(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
        rbd_open_read_only(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
        rbd_open_by_id_read_only(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
        rbd_close(Handle) -> c_int;
        rbd_get_size(Handle, *mut u64) -> c_int;
        rbd_get_id(Handle, *mut c_char, usize) -> c_int;
        rbd_get_features(Handle, *mut u64) -> c_int;
        rbd_get_block_name_prefix(Handle, *mut c_char, usize) -> c_int;
        rbd_stat(Handle, *mut ImageInfo, usize) -> c_int;
        rbd_get_parent(Handle, *mut LinkedImageSpec, *mut SnapSpec) -> c_int;
        rbd_linked_image_spec_cleanup(*mut LinkedImageSpec);
        rbd_snap_spec_cleanup(*mut SnapSpec);
        rbd_list_children3(Handle, *mut LinkedImageSpec, *mut usize) -> c_int;
        rbd_linked_image_spec_list_cleanup(*mut LinkedImageSpec, usize);
        rbd_snap_create(Handle, *const c_char) -> c_int;
        rbd_snap_remove(Handle, *const c_char) -> c_int;
        rbd_snap_set_by_id(Handle, u64) -> c_int;
        rbd_snap_list(Handle, *mut SnapInfo, *mut c_int) -> c_int;
        rbd_snap_list_end(*mut SnapInfo);
        rbd_flatten_with_progress(Handle, ProgressCallback, *mut c_void) -> c_int;
        rbd_read(Handle, u64, usize, *mut c_char) -> isize;
        rbd_write(Handle, u64, usize, *const c_char) -> isize;
        rbd_discard(Handle, u64, u64) -> c_int;
        rbd_write_zeroes(Handle, u64, usize, c_int, c_int) -> isize;
        rbd_flush(Handle) -> c_int;
        rbd_diff_iterate2(Handle, *const c_char, u64, u64, u8, u8, DiffCallback, *mut c_void) -> c_int;
        rbd_watchers_list(Handle, *mut Watcher, *mut usize) -> c_int;
        rbd_watchers_list_cleanup(*mut Watcher, usize);
        rbd_metadata_set(Handle, *const c_char, *const c_char) -> c_int;
        rbd_metadata_get(Handle, *const c_char, *mut c_char, *mut usize) -> c_int;
    }
}

#[repr(C)]
pub(super) struct ImageInfo {
    pub(super) size: u64,
    pub(super) object_bytes: u64,
    pub(super) objects: u64,
    pub(super) order: c_int,
    pub(super) block_name_prefix: [c_char; 24],
    pub(super) parent_pool: i64,
    pub(super) parent_name: [c_char; 96],
}

pub(super) struct Api {
    pub(super) rados: Rados,
    pub(super) rbd: Rbd,
    _libraries: (Library, Library),
}

/// Loads both libraries, once.
pub(super) fn api() -> Result<&'static Api, RbdError> {
    static API: OnceLock<Api> = OnceLock::new();
    if let Some(api) = API.get() {
        return Ok(api);
    }
    let librados = load("librados.so.2", "librados2")?;
    let librbd = load("librbd.so.1", "librbd1")?;
    let failed = |library, package| move |source| RbdError::Library { library, package, source };
    let rados = Rados::load(&librados).map_err(failed("librados.so.2", "librados2"))?;
    let rbd = Rbd::load(&librbd).map_err(failed("librbd.so.1", "librbd1"))?;
    Ok(API.get_or_init(|| Api { rados, rbd, _libraries: (librados, librbd) }))
}

fn load(library: &'static str, package: &'static str) -> Result<Library, RbdError> {
    // SAFETY: Ceph's libraries have initialisers without preconditions, and are what the system's linker finds.
    unsafe { Library::new(library) }.map_err(|source| RbdError::Library { library, package, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_is_named_with_its_package() {
        let Err(refused) = load("libnone-such.so.9", "librbd1") else { panic!("there is such a library") };
        let said = refused.to_string();
        assert!(said.contains("libnone-such.so.9") && said.contains("librbd1"), "{said}");
    }
}
