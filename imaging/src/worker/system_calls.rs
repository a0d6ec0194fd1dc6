//! The system calls that a confined worker may make: I/O on what is open, memory without code in it, threads, and its
//! own end. Any other kills the process; but for two that libc tries by itself and can do without, which just fail.

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FilterError {
    /// It cannot be made for this machine.
    #[error("compiling the filter")]
    Compile(#[from] BackendError),
    /// The kernel refuses it.
    #[error("installing the filter")]
    Install(#[from] seccompiler::Error),
}

/// Whatever arguments.
const ALLOWED: &[libc::c_long] = &[
    // I/O on open descriptors, and closing them.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fallocate,
    libc::SYS_lseek,
    // A disk that was given up for a moment is opened anew.
    libc::SYS_fadvise64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendfile,
    libc::SYS_shutdown,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_close,
    // How often a thread has lost its processor: its own numbers are all that it may have.
    libc::SYS_getrusage,
];

/// What any process needs for its threads and its memory, with whatever arguments.
const EVERYBODYS: &[libc::c_long] = &[
    // Memory; mmap and mprotect have rules.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Threads.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    // Signals: handlers return, and a thread that starts or panics masks them.
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    // Time and chance.
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    // The end.
    libc::SYS_exit,
    libc::SYS_exit_group,
];

#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[libc::c_long] = &[libc::SYS_poll, libc::SYS_time];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[libc::c_long] = &[];

/// What fails, and how. Upon the first, libc makes threads with `clone`, whose flags can be looked at; its allocator
/// would like to count processors when memory is short or threads are many.
const FAILING: [(libc::c_long, libc::c_int); 2] = [(libc::SYS_clone3, libc::ENOSYS), (libc::SYS_openat, libc::EACCES)];

/// `clone` for a thread, as glibc and musl ask for it: never a process, never a namespace.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;
const DETACHED: u64 = libc::CLONE_DETACHED as u64;
const EXECUTABLE: u64 = libc::PROT_EXEC as u64;

/// Filters the system calls of this thread and of all that it starts. Cannot be taken back.
pub(super) fn filter() -> Result<(), FilterError> {
    install(rules()?, &FAILING)
}

/// Kills the process for all but what `rules` allow, and what is only to fail.
pub(crate) fn install(
    mut rules: BTreeMap<i64, Vec<SeccompRule>>,
    failing: &[(libc::c_long, libc::c_int)],
) -> Result<(), FilterError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    rules.extend(failing.iter().map(|(call, _)| (*call, vec![])));
    // A filter has one answer to all that it lists; of several filters' answers, the strictest counts.
    for &(call, errno) in failing {
        let errno = SeccompAction::Errno(u32::try_from(errno).unwrap_or_default());
        let calls = BTreeMap::from([(call, vec![])]);
        let fails: BpfProgram = SeccompFilter::new(calls, SeccompAction::Allow, errno, architecture)?.try_into()?;
        seccompiler::apply_filter(&fails)?;
    }
    // What installs a filter is not on its list, so this one comes last.
    let rest: BpfProgram =
        SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)?.try_into()?;
    seccompiler::apply_filter(&rest)?;
    Ok(())
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut rules = threads_and_memory()?;
    rules.extend(ALLOWED.iter().chain(ALLOWED_HERE).map(|call| (*call, vec![])));
    // Whether a descriptor is open: asked by debug builds before they close one. And that a socket shall not block.
    let commands = [libc::F_GETFD as u64, libc::F_SETFL as u64].map(|command| argument(1, SeccompCmpOp::Eq, command));
    rules.insert(libc::SYS_fcntl, commands.into_iter().collect::<Result<_, _>>()?);
    Ok(rules)
}

/// [`EVERYBODYS`]; threads but no processes, memory but no code, and an end of one's own.
pub(crate) fn threads_and_memory() -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let threads = [argument(0, SeccompCmpOp::Eq, THREAD)?, argument(0, SeccompCmpOp::Eq, THREAD | DETACHED)?];
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = EVERYBODYS.iter().map(|call| (*call, vec![])).collect();
    rules.insert(libc::SYS_clone, threads.into());
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![argument(2, SeccompCmpOp::MaskedEq(EXECUTABLE), 0)?]);
    }
    // To end itself by a signal of its own: `abort`.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![argument(0, SeccompCmpOp::Eq, own)?]);
    Ok(rules)
}

/// Allows a call if one of its arguments is so.
pub(crate) fn argument(index: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Qword, operator, value)?])
}
