//! Sizes in bytes as people write them: `8GiB`, `512MiB`, `4k`, `4096`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A number of bytes that parses from and prints as exact text.
///
/// Suffixes are powers of 1024 (`k`, `KiB`, `M`, `MiB`, `G`, `GiB`, `T`, `TiB`, `P`, `PiB`, in any
/// case) or `B`. `KB`, `MB`, … are refused: half the world means 1000 by them. So are fractions:
/// a size is exact or it is not a size.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

/// Why a text is not a size.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ByteSizeError {
    /// Nothing before the suffix.
    #[error("a size starts with a whole number, such as 8GiB or 4096")]
    NoNumber,
    /// The suffix is none of the known ones.
    #[error("unknown unit {0:?}: use B, KiB, MiB, GiB, TiB or PiB (k, M, G, T, P mean the same)")]
    UnknownUnit(String),
    /// `KB` and its like.
    #[error("{0:?} can mean 1000 or 1024: write {1} for powers of 1024, or plain bytes")]
    Ambiguous(String, &'static str),
    /// The number does not fit in 64 bits.
    #[error("the size does not fit in 64 bits")]
    TooLarge,
}

/// Units from the largest, with the power of two they stand for.
const UNITS: [(&str, u32); 5] = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl ByteSize {
    /// The number of bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(ByteSizeError::NoNumber);
        }
        let number: u64 = number.parse().map_err(|_| ByteSizeError::TooLarge)?;
        let shift = shift_of(unit.trim_start())?;
        number.checked_mul(1 << shift).map(Self).ok_or(ByteSizeError::TooLarge)
    }
}

fn shift_of(unit: &str) -> Result<u32, ByteSizeError> {
    if unit.is_empty() || unit.eq_ignore_ascii_case("b") {
        return Ok(0);
    }
    for (name, shift) in UNITS {
        if unit.eq_ignore_ascii_case(name) || unit.eq_ignore_ascii_case(&name[..1]) {
            return Ok(shift);
        }
        let decimal = [name.as_bytes()[0], b'B'];
        if unit.as_bytes().eq_ignore_ascii_case(&decimal) {
            return Err(ByteSizeError::Ambiguous(unit.into(), name));
        }
    }
    Err(ByteSizeError::UnknownUnit(unit.into()))
}

impl fmt::Display for ByteSize {
    /// The largest unit that is exact, so that what is printed parses to the same number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, shift) in UNITS {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{name}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl From<u64> for ByteSize {
    fn from(bytes: u64) -> Self {
        Self(bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_exactly() {
        let cases = [
            ("0", 0),
            ("4096", 4096),
            ("4k", 4096),
            ("4KiB", 4096),
            ("512 MiB", 512 << 20),
            ("8GiB", 8 << 30),
            ("1t", 1 << 40),
            ("7B", 7),
            ("16383PiB", 16383 << 50),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_not_exact_is_refused() {
        assert_eq!("".parse::<ByteSize>(), Err(ByteSizeError::NoNumber));
        assert_eq!("GiB".parse::<ByteSize>(), Err(ByteSizeError::NoNumber));
        assert_eq!("-1".parse::<ByteSize>(), Err(ByteSizeError::NoNumber));
        assert_eq!("16384PiB".parse::<ByteSize>(), Err(ByteSizeError::TooLarge));
        assert_eq!("18446744073709551616".parse::<ByteSize>(), Err(ByteSizeError::TooLarge));
        assert!(matches!("1.5GiB".parse::<ByteSize>(), Err(ByteSizeError::UnknownUnit(_))));
        assert!(matches!("4kB".parse::<ByteSize>(), Err(ByteSizeError::Ambiguous(_, "KiB"))));
        assert!(matches!("4é".parse::<ByteSize>(), Err(ByteSizeError::UnknownUnit(_))));
    }

    #[test]
    fn what_is_printed_parses_to_the_same_size() {
        for bytes in [0, 1, 4095, 4096, 6 << 20, (8 << 30) + 512, 1 << 60, u64::MAX] {
            assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }
        assert_eq!(ByteSize(8 << 30).to_string(), "8GiB");
    }
}
