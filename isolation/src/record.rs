//! What is on record of a node: the values that deciding works on. Read and written by [`crate::store`].

use assay_wire::agreement::Subject;
use assay_wire::id::{AdmissionId, BootId, LeaseId, NodeId};
use assay_wire::isolation::{Nic, NicStatus, NodeLease, NodeState, NodeStatus, PortIntent};
use assay_wire::net::VlanId;

/// A node, its NICs, its live lease and its last admission.
#[derive(Debug, Clone)]
pub struct NodeRecord {
    /// Its name.
    pub name: NodeId,
    /// Where it stands.
    pub state: NodeState,
    /// Why, in words.
    pub reason: String,
    /// Since when, in ms since the epoch.
    pub since_ms: i64,
    /// Its current boot through the airlock.
    pub boot: Option<BootId>,
    /// How far it is into the airlock.
    pub entry: Entry,
    /// When it was powered on in the airlock, in ms since the epoch; meaningful once `entry` is done.
    pub entered_ms: i64,
    /// What its BMC said of its last reset when it was powered on: any other value later is a reset that we did not
    /// make.
    pub reset_time: Option<String>,
    /// Resets of the machine so far, ordered here or reported by its BMC; never fewer than there were. A TPM that had
    /// more was reset by itself.
    pub machine_resets: u64,
    /// Its NICs, in order; the first boots and is the only one that ever leaves quarantine.
    pub nics: Vec<NicRecord>,
    /// Its live lease.
    pub lease: Option<LeaseRecord>,
    /// The last admission of its current boot.
    pub admission: Option<AdmissionRecord>,
}

/// How far a node in the airlock is into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// To be powered off, moved, and powered on.
    Pending,
    /// Powered on in the airlock.
    Done,
}

/// A NIC and its port's desired state.
#[derive(Debug, Clone)]
pub struct NicRecord {
    /// The NIC.
    pub nic: Nic,
    /// What its port should be.
    pub desired: PortIntent,
    /// What its port was when last read; none if it could not be read, or is no intent.
    pub observed: Option<PortIntent>,
}

/// A live lease, with what it leads to.
#[derive(Debug, Clone)]
pub struct LeaseRecord {
    /// The lease.
    pub lease: NodeLease,
    /// The VLAN of its network.
    pub vlan: VlanId,
}

/// An admission on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdmissionRecord {
    /// The result's id.
    pub id: AdmissionId,
    /// For this lease.
    pub lease: LeaseId,
    /// For this boot.
    pub boot: BootId,
    /// The AK that quoted: its TPM name, hexadecimal.
    pub ak_name: String,
    /// Until then, in ms since the epoch.
    pub expires_at_ms: i64,
    /// Why it was ended early.
    pub revoked: Option<String>,
}

/// What is recorded of an admission when it is made.
#[derive(Debug, Clone)]
pub struct NewAdmission {
    /// As it is read back.
    pub record: AdmissionRecord,
    /// What its results were about: renewals must be about the same.
    pub subject: Subject,
    /// Ids of the results that supported the one that made it.
    pub supporting: Vec<AdmissionId>,
}

impl NodeRecord {
    /// Sets what every port should be: `boot` for the NIC that boots, quarantine for all others.
    pub fn desire(&mut self, boot: PortIntent) {
        for (index, nic) in self.nics.iter_mut().enumerate() {
            nic.desired = if index == 0 { boot } else { PortIntent::Quarantine };
        }
    }

    /// Forgets the boot that was: whatever comes next goes through the whole airlock.
    pub fn enter_anew(&mut self) {
        self.boot = None;
        self.entry = Entry::Pending;
        self.reset_time = None;
        self.admission = None;
    }

    /// The NIC that boots.
    #[must_use]
    pub fn boot_nic(&self) -> Option<&NicRecord> {
        self.nics.first()
    }

    /// As the API shows it.
    #[must_use]
    pub fn status(&self) -> NodeStatus {
        let nic = |n: &NicRecord| NicStatus { nic: n.nic.clone(), desired: n.desired, observed: n.observed };
        NodeStatus {
            name: self.name.clone(),
            state: self.state,
            reason: self.reason.clone(),
            lease: self.lease.as_ref().map(|l| l.lease.clone()),
            boot: self.boot,
            nics: self.nics.iter().map(nic).collect(),
            since_ms: self.since_ms,
        }
    }
}
