//! Confinement: what a worker gives up before it reads a node's first byte. Whoever takes it over has one export's open
//! files, its connections, and a socket to the gateway that is believed in nothing else; and no way to more. The steps are
//! its companion's, too ([`crate::rbd_disk`]).
//!
//! Only called while the process has one thread: users, capabilities, Landlock and seccomp are a thread's own, and
//! threads inherit them.

use super::message::{Confinement, MESSAGE_FDS, WorkerOrder};
use super::system_calls;
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, NetPort, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetError,
    RulesetStatus, Scope,
};
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Pid, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};
use std::io;

/// Everything that a worker may have allocated: small threads, what the engine bounds for each session, and room.
const BASE_MEMORY_BYTES: u64 = 96 << 20;
const SESSION_MEMORY_BYTES: u64 = 24 << 20;
/// Maps and checksums of a disk, far below this.
const DISK_BYTES_A_MEMORY_BYTE: u64 = 4096;
/// Descriptors: its own, and two for each connection.
const BASE_DESCRIPTORS: u64 = 96;
/// Threads and processes of its user; other workers may have the same one.
const TASKS: u64 = 1024;

/// Why a worker does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfineError {
    /// A system call that always works on a kernel that will do.
    #[error("{doing}")]
    Call {
        /// What for.
        doing: &'static str,
        /// Why not.
        source: Errno,
    },
    /// Landlock failed.
    #[error("restricting itself with Landlock")]
    Landlock(#[from] RulesetError),
    /// The kernel has none.
    #[error("the kernel does not enforce Landlock: it is too old, or started without it")]
    NoLandlock,
    /// seccomp failed.
    #[error("filtering its system calls")]
    Seccomp(#[from] system_calls::FilterError),
    /// Somebody left descriptors open.
    #[error("looking at its open descriptors")]
    Descriptors(#[source] io::Error),
    /// Somebody left descriptors open.
    #[error("{0} descriptors are open beside standard input, output and error and the disk's files")]
    Inherited(usize),
    /// The gateway died in between.
    #[error("the gateway is gone")]
    Orphan,
}

/// Gives everything up that `order` does not need. `files`: descriptors that came with it.
pub(super) fn confine(order: &WorkerOrder, files: usize, gateway: Option<Pid>) -> Result<Confinement, ConfineError> {
    check_descriptors(files)?;
    let own_user = give_up_privileges(order.uid)?;
    // After the change of user, which would take it back.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("tying itself to the gateway"))?;
    if rustix::process::getppid() != gateway {
        return Err(ConfineError::Orphan);
    }
    limit_resources(order, own_user)?;
    let landlock_whole = restrict_files_and_network([])?;
    #[cfg(feature = "failpoints")]
    if order.without_seccomp {
        return Ok(Confinement { own_user, landlock_whole });
    }
    system_calls::filter()?;
    Ok(Confinement { own_user, landlock_whole })
}

/// Becomes another user, if one is given and that is allowed, which is answered; gives up all capabilities, and the way to
/// any others.
pub(crate) fn give_up_privileges(uid: Option<u32>) -> Result<bool, ConfineError> {
    drop_bounding_set();
    let own_user = uid.is_some_and(|uid| become_user(uid).is_ok());
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(failed("dropping all capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("giving up new privileges"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("forbidding core dumps"))?;
    Ok(own_user)
}

fn failed(doing: &'static str) -> impl FnOnce(Errno) -> ConfineError {
    move |source| ConfineError::Call { doing, source }
}

/// Closes what whoever started the gateway left open to all its descendants. Before this process has opened anything.
pub(crate) fn close_inherited() {
    let Ok(listed) = std::fs::read_dir("/proc/self/fd") else { return };
    let open: Vec<i32> = listed.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for descriptor in open.into_iter().filter(|descriptor| *descriptor > 2) {
        // The one that listed them is closed already.
        let _not_open = nix::unistd::close(descriptor);
    }
}

/// A descriptor that was left open would be a way out.
pub(crate) fn check_descriptors(files: usize) -> Result<(), ConfineError> {
    let listed = std::fs::read_dir("/proc/self/fd").map_err(ConfineError::Descriptors)?;
    // Among them the one that lists them.
    let open = listed.count();
    let expected = 3 + files + 1;
    if open > expected { Err(ConfineError::Inherited(open - expected)) } else { Ok(()) }
}

/// As far as it is allowed, which it is with `CAP_SETPCAP` only; without, the set gives nothing to who may not exec.
fn drop_bounding_set() {
    let _none_is_left_to_use = rustix::thread::clear_ambient_capability_set();
    for capability in CapabilitySet::all().iter() {
        // An older kernel does not know the newest.
        let _as_far_as_allowed = rustix::thread::remove_capability_from_bounding_set(capability);
    }
}

fn become_user(id: u32) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
}

fn limit_resources(order: &WorkerOrder, own_user: bool) -> Result<(), ConfineError> {
    let sessions = u64::from(order.limits.sessions);
    let memory = BASE_MEMORY_BYTES + sessions * SESSION_MEMORY_BYTES + order.disk.byte_len() / DISK_BYTES_A_MEMORY_BYTE;
    // The disk's files may come anew, with a layer more each time.
    let descriptors = BASE_DESCRIPTORS + MESSAGE_FDS as u64 + 4 * sessions + 2 * u64::from(order.limits.half_open);
    // The gateway's own user has other processes, whose number is not this one's to judge.
    let tasks = own_user.then_some(TASKS);
    limit(memory, descriptors, tasks)
}

/// Limits octets allocated, descriptors, and the user's threads and processes. Cannot be taken back.
pub(crate) fn limit(memory: u64, descriptors: u64, tasks: Option<u64>) -> Result<(), ConfineError> {
    let limits = [
        (Resource::Core, 0, "forbidding core files"),
        (Resource::Data, memory, "limiting its memory"),
        (Resource::Nofile, descriptors, "limiting its descriptors"),
    ];
    let tasks = tasks.map(|tasks| (Resource::Nproc, tasks, "limiting its threads"));
    for (resource, limit, doing) in limits.into_iter().chain(tasks) {
        rustix::process::setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })
            .map_err(failed(doing))?;
    }
    Ok(())
}

/// No file may be opened, no TCP port used but to connect to these, no process outside signalled. Says whether the kernel
/// knows all of that.
pub(crate) fn restrict_files_and_network(ports: impl IntoIterator<Item = u16>) -> Result<bool, ConfineError> {
    let abi = ABI::V6;
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?;
    let rules = ports.into_iter().map(|port| NetPort::new(port, AccessNet::ConnectTcp));
    let ruleset = ruleset.create()?.add_rules(rules.map(Ok::<_, RulesetError>))?;
    match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Ok(true),
        RulesetStatus::PartiallyEnforced => Ok(false),
        RulesetStatus::NotEnforced => Err(ConfineError::NoLandlock),
    }
}
