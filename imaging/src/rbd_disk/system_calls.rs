//! The system calls that a confined companion may make: those that librados and librbd make once they are loaded, as found
//! by tracing them through connecting, opening a clone, every kind of I/O, an OSD that dies, and the end. None of them opens
//! a file; where one tries, it is told that it may not, and goes on.
//!
//! Landlock's rules for TCP ports do not see all ways to connect: neither TCP's siblings (MPTCP), nor a first packet that
//! carries data. Those are refused here.

use crate::worker::system_calls::{FilterError, argument, install, threads_and_memory};
use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};
use std::collections::BTreeMap;

/// Whatever arguments; beside what any process needs.
const ALLOWED: &[libc::c_long] = &[
    // I/O on open descriptors, and closing them. What sends is below.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    // Waiting for it.
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    // Ceph's ports; Landlock has them. What makes a socket is below.
    libc::SYS_connect,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    // Time, and the kernel's name.
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_uname,
];

#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[libc::c_long] = &[libc::SYS_poll, libc::SYS_time, libc::SYS_epoll_create, libc::SYS_epoll_wait];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[libc::c_long] = &[];

/// What fails, and how. Upon the first, libc makes threads with `clone`, whose flags can be looked at. The others look for
/// keyrings, OpenSSL's configuration, the time zone, the number of processors, and what standard error is.
const FAILING: [(libc::c_long, libc::c_int); 3] =
    [(libc::SYS_clone3, libc::ENOSYS), (libc::SYS_openat, libc::EACCES), (libc::SYS_newfstatat, libc::EACCES)];

/// A socket's kind, without its flags.
const KIND: u64 = 0xf;
const STREAM: u64 = libc::SOCK_STREAM as u64;

/// Filters the system calls of this thread and of all that it starts. Cannot be taken back.
pub(super) fn filter() -> Result<(), FilterError> {
    install(rules()?, &FAILING)
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut rules = threads_and_memory()?;
    rules.extend(ALLOWED.iter().chain(ALLOWED_HERE).map(|call| (*call, vec![])));
    let socket = |family: i32, protocol: i32| {
        let condition = |index, operator, value| SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value);
        SeccompRule::new(vec![
            condition(0, SeccompCmpOp::Eq, number(family))?,
            condition(1, SeccompCmpOp::MaskedEq(KIND), STREAM)?,
            condition(2, SeccompCmpOp::Eq, number(protocol))?,
        ])
    };
    let mut sockets = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        sockets.extend([socket(family, 0)?, socket(family, libc::IPPROTO_TCP)?]);
    }
    rules.insert(libc::SYS_socket, sockets);
    // The channels. A pair of another kind could be connected elsewhere.
    rules.insert(libc::SYS_socketpair, vec![socket(libc::AF_UNIX, 0)?]);
    let no_fast_open = |index| argument(index, SeccompCmpOp::MaskedEq(number(libc::MSG_FASTOPEN)), 0);
    rules.insert(libc::SYS_sendmsg, vec![no_fast_open(2)?]);
    rules.insert(libc::SYS_sendto, vec![no_fast_open(3)?]);
    let one_of = |index, values: &[i32]| {
        values.iter().map(|value| argument(index, SeccompCmpOp::Eq, number(*value))).collect::<Result<Vec<_>, _>>()
    };
    rules.insert(libc::SYS_setsockopt, one_of(1, &[libc::SOL_SOCKET, libc::IPPROTO_TCP])?);
    rules.insert(libc::SYS_fcntl, one_of(1, &[libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL])?);
    rules.insert(libc::SYS_prctl, one_of(0, &[libc::PR_SET_NAME])?);
    // To end itself.
    rules.insert(libc::SYS_kill, vec![argument(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?]);
    Ok(rules)
}

/// None of these is negative.
fn number(value: i32) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}
