//! Reproducible choices.

/// xorshift64*: the same seed gives the same choices.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Any seed will do; 0 counts as 1.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// A number below `end`; 0 for `end` 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let drawn = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d);
        // The high half of a wide product: without the bias and the price of a remainder.
        ((u128::from(drawn) * u128::from(end)) >> 64) as u64
    }
}
