//! What an attacker's code would try from inside a companion, for tests: what it would from inside a worker, and what the
//! key in its hands might be good for. Built with the crash points only, which no shipped program has.

use super::message::FromRbdDisk;
use crate::worker::attack::{Attack, Outcome};
use crate::worker::message::{MESSAGE_BYTES, receive, send};
use assay_rbd::name::{ImageKind, ImageName, Namespace};
use assay_rbd::{Cluster, DEFAULT_OBJECT_ORDER, Pool, RbdError};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use std::io;
use std::net::SocketAddr;
use std::sync::OnceLock;

/// TCP over several paths, which is a protocol of its own.
const MPTCP: Protocol = rustix::net::ipproto::MPTCP;
/// `MSG_FASTOPEN`.
const FAST_OPEN: u32 = 0x2000_0000;

/// One attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum RbdAttack {
    System(Attack),
    Multipath { to: SocketAddr },
    FastOpen { to: SocketAddr },
    Datagram,
    OpenSibling { image: ImageName },
    ListNamespace,
    ListTrash,
    MakeImage,
    RemoveOwn { image: ImageName },
    WriteGolden { namespace: Namespace, image: ImageName },
    ListGolden { namespace: Namespace },
    Monitor { command: String },
}

/// What an attacker finds in the process.
pub(super) struct Held {
    pub(super) cluster: Cluster,
    pub(super) pool: Pool,
}

/// Does as it is told until nobody tells it anything.
pub(super) fn obey(held: &OnceLock<Held>) {
    let mut buffer = vec![0; MESSAGE_BYTES];
    while let Ok(Some((attack, _))) = receive::<RbdAttack>(rustix::stdio::stdin(), &mut buffer, RecvFlags::empty()) {
        let outcome = match (attack.run_anywhere(), held.get()) {
            (Some(outcome), _) => outcome,
            (None, Some(held)) => match held.attempt(attack) {
                Ok(()) => Outcome::Succeeded,
                Err(error) => Outcome::Refused { error: assay_service::error::chain(&error) },
            },
            (None, None) => return,
        };
        let _gone_if_it_fails = send(rustix::stdio::stdin(), &FromRbdDisk::Attacked(outcome), &[], SendFlags::empty());
    }
}

impl RbdAttack {
    /// Tries what needs nothing of the process's.
    #[must_use]
    pub fn run_anywhere(&self) -> Option<Outcome> {
        match self {
            Self::System(attack) => Some(attack.run()),
            Self::Multipath { to } => Some(outcome(multipath(*to))),
            Self::FastOpen { to } => Some(outcome(fast_open(*to))),
            Self::Datagram => Some(outcome(datagram())),
            _ => None,
        }
    }
}

fn outcome(tried: io::Result<()>) -> Outcome {
    tried.map_or_else(|error| Outcome::Refused { error: error.to_string() }, |()| Outcome::Succeeded)
}

fn multipath(to: SocketAddr) -> io::Result<()> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, Some(MPTCP))?;
    Ok(rustix::net::connect(&socket, &to)?)
}

fn fast_open(to: SocketAddr) -> io::Result<()> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    Ok(rustix::net::sendto(&socket, b"out", SendFlags::from_bits_retain(FAST_OPEN), &to).map(drop)?)
}

/// A pair that can be connected to another socket's name.
fn datagram() -> io::Result<()> {
    let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::empty(), None);
    Ok(pair.map(drop)?)
}

impl Held {
    fn attempt(&self, attack: RbdAttack) -> Result<(), RbdError> {
        let golden = |namespace| self.pool.in_namespace(&namespace);
        match attack {
            RbdAttack::System(_) | RbdAttack::Multipath { .. } | RbdAttack::FastOpen { .. } | RbdAttack::Datagram => {
                Ok(())
            }
            RbdAttack::OpenSibling { image } => self.pool.open_read_only(image, None).map(drop),
            RbdAttack::ListNamespace => self.pool.images().map(drop),
            RbdAttack::ListTrash => self.pool.trash().map(drop),
            RbdAttack::MakeImage => {
                self.pool.create_image(ImageName::numbered(ImageKind::Disk, 99), 1 << 20, DEFAULT_OBJECT_ORDER)
            }
            RbdAttack::RemoveOwn { image } => self.pool.remove_image(image),
            RbdAttack::WriteGolden { namespace, image } => golden(namespace)?.open_image(image)?.write_at(0, &[1; 512]),
            RbdAttack::ListGolden { namespace } => golden(namespace)?.images().map(drop),
            RbdAttack::Monitor { command } => {
                let command = serde_json::from_str(&command).unwrap_or_default();
                self.cluster.mon_command(&command).map(drop)
            }
        }
    }
}
