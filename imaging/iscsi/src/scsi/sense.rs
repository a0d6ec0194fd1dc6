//! Sense data and status (SPC-4 §4.5, SAM-5 §5.3): how a refusal is told.

/// SCSI status codes used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Good = 0x00,
    CheckCondition = 0x02,
    Busy = 0x08,
    ReservationConflict = 0x18,
}

/// Why a command is not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// CHECK CONDITION with this sense.
    Check(Sense),
    /// RESERVATION CONFLICT.
    Reservation,
    /// BUSY: the initiator may try again.
    Busy,
}

impl From<Sense> for Refusal {
    fn from(sense: Sense) -> Self {
        Self::Check(sense)
    }
}

/// A sense key, an additional sense code and qualifier, and sometimes where the fault is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sense {
    key: u8,
    /// Additional sense code in the high octet, qualifier in the low one.
    code: u16,
    information: Option<u32>,
    /// The octet of the CDB that is refused.
    field: Option<u8>,
}

impl Sense {
    pub(crate) const NONE: Self = Self::new(0x0, 0x0000);
    pub(crate) const UNREADABLE: Self = Self::new(0x3, 0x1100);
    pub(crate) const UNWRITABLE: Self = Self::new(0x3, 0x0c00);
    pub(crate) const HARDWARE: Self = Self::new(0x4, 0x4400);
    pub(crate) const PARAMETER_LIST_LENGTH: Self = Self::new(0x5, 0x1a00);
    pub(crate) const INVALID_OPCODE: Self = Self::new(0x5, 0x2000);
    pub(crate) const OUT_OF_RANGE: Self = Self::new(0x5, 0x2100);
    pub(crate) const INVALID_FIELD_IN_CDB: Self = Self::new(0x5, 0x2400);
    pub(crate) const NO_SUCH_UNIT: Self = Self::new(0x5, 0x2500);
    pub(crate) const INVALID_FIELD_IN_LIST: Self = Self::new(0x5, 0x2600);
    pub(crate) const INVALID_RELEASE: Self = Self::new(0x5, 0x2604);
    pub(crate) const NOT_SAVED: Self = Self::new(0x5, 0x3900);
    pub(crate) const NO_REGISTRATION_ROOM: Self = Self::new(0x5, 0x5504);
    pub(crate) const INVALID_FIELD_IN_UNIT: Self = Self::new(0x5, 0x0e03);
    pub(crate) const WRITE_PROTECTED: Self = Self::new(0x7, 0x2700);
    pub(crate) const NO_SPACE: Self = Self::new(0x7, 0x2707);
    pub(crate) const ABORTED: Self = Self::new(0xb, 0x0000);
    pub(crate) const DATA_PHASE: Self = Self::new(0xb, 0x4b00);
    pub(crate) const OPERATION_IN_PROGRESS: Self = Self::new(0x5, 0x0016);
    pub(crate) const TOO_MANY_TARGETS: Self = Self::new(0x5, 0x2606);
    pub(crate) const UNSUPPORTED_TARGET: Self = Self::new(0x5, 0x2607);
    pub(crate) const TOO_MANY_SEGMENTS: Self = Self::new(0x5, 0x2608);
    pub(crate) const UNSUPPORTED_SEGMENT: Self = Self::new(0x5, 0x2609);
    pub(crate) const COPY_ABORTED: Self = Self::new(0xa, 0x0000);
    pub(crate) const COPY_TARGET_UNREACHABLE: Self = Self::new(0xa, 0x0804);
    pub(crate) const COPY_DEVICE_FAILED: Self = Self::new(0xa, 0x0d01);
    const MISCOMPARE: Self = Self::new(0xe, 0x1d00);

    const fn new(key: u8, code: u16) -> Self {
        Self { key, code, information: None, field: None }
    }

    /// INVALID FIELD IN CDB, with the octet that is at fault.
    pub(crate) const fn invalid_octet(octet: u8) -> Self {
        Self { field: Some(octet), ..Self::INVALID_FIELD_IN_CDB }
    }

    /// A unit attention condition with this code.
    pub(crate) const fn attention(code: u16) -> Self {
        Self::new(0x6, code)
    }

    /// MISCOMPARE DURING VERIFY OPERATION, at this octet.
    pub(crate) fn miscompare(offset: u32) -> Self {
        Self { information: Some(offset), ..Self::MISCOMPARE }
    }

    /// Encodes it: fixed format (SPC-4 §4.5.3), or descriptor format (§4.5.2) where the D_SENSE bit is set.
    pub(crate) fn encode(&self, descriptor_format: bool) -> Vec<u8> {
        let [code, qualifier] = self.code.to_be_bytes();
        if descriptor_format {
            let mut sense = vec![0x72, self.key, code, qualifier, 0, 0, 0, 0];
            if let Some(information) = self.information {
                sense[7] += 12;
                // Information descriptor, valid.
                sense.extend_from_slice(&[0x00, 0x0a, 0x80, 0]);
                sense.extend_from_slice(&u64::from(information).to_be_bytes());
            }
            if let Some(octet) = self.field {
                sense[7] += 8;
                // Sense key specific descriptor: valid, in the CDB.
                sense.extend_from_slice(&[0x02, 0x06, 0, 0, 0xc0, 0, octet, 0]);
            }
            return sense;
        }
        let mut sense = vec![0; 18];
        sense[0] = if self.information.is_some() { 0xf0 } else { 0x70 };
        sense[2] = self.key;
        sense[3..7].copy_from_slice(&self.information.unwrap_or(0).to_be_bytes());
        sense[7] = 10;
        sense[12] = code;
        sense[13] = qualifier;
        if let Some(octet) = self.field {
            sense[15..18].copy_from_slice(&[0xc0, 0, octet]);
        }
        sense
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_carry_the_code_and_the_information() {
        let fixed = Sense::miscompare(5).encode(false);
        assert_eq!((fixed[0], fixed[2], fixed[6], fixed[12], fixed.len()), (0xf0, 0xe, 5, 0x1d, 18));
        let descriptor = Sense::miscompare(5).encode(true);
        assert_eq!((descriptor[0], descriptor[1], descriptor[2], descriptor[7]), (0x72, 0xe, 0x1d, 12));
        assert_eq!(descriptor.len(), 20);
        assert_eq!(Sense::OUT_OF_RANGE.encode(true).len(), 8);
    }

    #[test]
    fn both_formats_point_at_the_octet_that_is_refused() {
        assert_eq!(Sense::invalid_octet(2).encode(false)[12..], [0x24, 0, 0, 0xc0, 0, 2]);
        let descriptor = Sense::invalid_octet(2).encode(true);
        assert_eq!((descriptor[7], &descriptor[8..]), (8, &[2, 6, 0, 0, 0xc0, 0, 2, 0][..]));
    }
}
