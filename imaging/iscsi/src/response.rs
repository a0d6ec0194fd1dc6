//! The end of a task on the wire: status, and by how much the transfer missed what the initiator expected.

use crate::link::{Link, StatSn};
use crate::pdu::{Answer, FINAL, Header};
use crate::scsi::Status;
use bytes::Bytes;

/// The O and U bits of a response.
const OVERFLOW: u8 = 0x04;
const UNDERFLOW: u8 = 0x02;

/// By how much the transfer missed what the initiator expected (§11.4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Residual {
    None,
    Overflow(u32),
    Underflow(u32),
}

impl Residual {
    pub(crate) fn of(transferred: u64, expected: u32) -> Self {
        let expected = u64::from(expected);
        if transferred > expected {
            Self::Overflow(u32::try_from(transferred - expected).unwrap_or(u32::MAX))
        } else if transferred < expected {
            Self::Underflow(u32::try_from(expected - transferred).unwrap_or(u32::MAX))
        } else {
            Self::None
        }
    }

    pub(crate) fn flags(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Overflow(_) => OVERFLOW,
            Self::Underflow(_) => UNDERFLOW,
        }
    }

    pub(crate) fn octets(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Overflow(octets) | Self::Underflow(octets) => octets,
        }
    }
}

/// A SCSI Response PDU (§11.4).
pub(crate) fn respond(
    link: &mut Link,
    lun: [u8; 8],
    task_tag: u32,
    status: Status,
    residual: Residual,
    payload: Bytes,
) {
    let header = Header::answer(Answer::ScsiResponse, FINAL | residual.flags())
        .set(3, &[status as u8])
        .set(8, &lun)
        .set_word(16, task_tag)
        .set_word(44, residual.octets());
    link.send(header, payload, StatSn::Advance, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn residuals_are_counted_from_the_initiators_side() {
        assert_eq!(Residual::of(512, 512), Residual::None);
        assert_eq!(Residual::of(1024, 512), Residual::Overflow(512));
        assert_eq!(Residual::of(0, 512), Residual::Underflow(512));
        assert_eq!(Residual::of(u64::MAX, 0), Residual::Overflow(u32::MAX));
    }
}
