//! A bounded cursor over TPM and TCG structures. The one place where lengths from the wire are believed, after
//! they were compared with what is there.

use std::fmt;

/// Why bytes are not the structure that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{structure} is malformed at octet {offset}: {problem}")]
pub struct DecodeError {
    /// The structure by its TCG name.
    pub structure: &'static str,
    /// Where in the input.
    pub offset: usize,
    /// What is wrong there.
    pub problem: Problem,
}

/// What can be wrong with a structure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// The input ends too early.
    Truncated {
        /// Octets wanted.
        wanted: usize,
        /// Octets left.
        left: usize,
    },
    /// The structure is complete and the input is not at its end.
    Trailing {
        /// Octets left over.
        left: usize,
    },
    /// A value that the structure does not allow, or that nothing here needs.
    Value {
        /// The field.
        field: &'static str,
        /// What it held.
        found: u64,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { wanted, left } => write!(f, "{wanted} octets wanted, {left} left"),
            Self::Trailing { left } => write!(f, "{left} octets after its end"),
            Self::Value { field, found } => write!(f, "{field} is {found:#x}"),
        }
    }
}

/// Byte order of a structure: TPM structures are big-endian, event logs little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Most significant octet first.
    Big,
    /// Least significant octet first.
    Little,
}

/// A cursor over `input` that never reads past its end and never copies.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    structure: &'static str,
    input: &'a [u8],
    offset: usize,
    order: Order,
}

impl<'a> Reader<'a> {
    /// A cursor at the start of `input`, which should hold the named structure.
    #[must_use]
    pub fn new(structure: &'static str, input: &'a [u8], order: Order) -> Self {
        Self { structure, input, offset: 0, order }
    }

    /// Octets not read yet.
    #[must_use]
    pub fn left(&self) -> usize {
        self.input.len() - self.offset
    }

    /// Octets read so far.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// What is not read yet, without reading it.
    #[must_use]
    pub fn rest(&self) -> &'a [u8] {
        &self.input[self.offset..]
    }

    /// The next `count` octets.
    ///
    /// # Errors
    /// Fewer are left.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let Some((taken, _)) = self.rest().split_at_checked(count) else {
            return Err(self.error(Problem::Truncated { wanted: count, left: self.left() }));
        };
        self.offset += count;
        Ok(taken)
    }

    /// The next octets as an array.
    ///
    /// # Errors
    /// Fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    /// One octet.
    ///
    /// # Errors
    /// None is left.
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[octet]| octet)
    }

    /// Two octets.
    ///
    /// # Errors
    /// Fewer are left.
    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        let octets = self.array()?;
        Ok(match self.order {
            Order::Big => u16::from_be_bytes(octets),
            Order::Little => u16::from_le_bytes(octets),
        })
    }

    /// Four octets.
    ///
    /// # Errors
    /// Fewer are left.
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        let octets = self.array()?;
        Ok(match self.order {
            Order::Big => u32::from_be_bytes(octets),
            Order::Little => u32::from_le_bytes(octets),
        })
    }

    /// Eight octets.
    ///
    /// # Errors
    /// Fewer are left.
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        let octets = self.array()?;
        Ok(match self.order {
            Order::Big => u64::from_be_bytes(octets),
            Order::Little => u64::from_le_bytes(octets),
        })
    }

    /// A `TPM2B`: two octets of size and that many octets, at most `limit`.
    ///
    /// # Errors
    /// Too few are left, or the size is over the limit.
    pub fn sized(&mut self, field: &'static str, limit: usize) -> Result<&'a [u8], DecodeError> {
        let size = usize::from(self.u16()?);
        if size > limit {
            return Err(self.value(field, size as u64));
        }
        self.bytes(size)
    }

    /// Says that all was read.
    ///
    /// # Errors
    /// Something is left.
    pub fn finish(self) -> Result<(), DecodeError> {
        match self.left() {
            0 => Ok(()),
            left => Err(self.error(Problem::Trailing { left })),
        }
    }

    /// The error that `field` holds a value which it must not.
    #[must_use]
    pub fn value(&self, field: &'static str, found: impl Into<u64>) -> DecodeError {
        self.error(Problem::Value { field, found: found.into() })
    }

    fn error(&self, problem: Problem) -> DecodeError {
        DecodeError { structure: self.structure, offset: self.offset, problem }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_compared_before_they_are_believed() {
        let mut reader = Reader::new("TEST", &[0xff, 0xff, 1], Order::Big);
        let error = reader.clone().sized("field", 16).unwrap_err();
        assert_eq!(error.problem, Problem::Value { field: "field", found: 0xffff });
        let error = reader.sized("field", 0xffff).unwrap_err();
        assert_eq!(error.to_string(), "TEST is malformed at octet 2: 65535 octets wanted, 1 left");
    }

    #[test]
    fn an_octet_left_over_is_an_error() {
        let mut reader = Reader::new("TEST", &[1, 2, 3], Order::Little);
        assert_eq!(reader.u16().unwrap(), 0x0201);
        assert_eq!(reader.finish().unwrap_err().problem, Problem::Trailing { left: 1 });
    }
}
