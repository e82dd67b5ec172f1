//! Seeds: every random test prints its own, and is replayed by setting `ENDIO_SEED`.

use std::env;

/// A small generator (SplitMix64) whose numbers are the same in every version of everything.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of a seed. Equal seeds give equal numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number below `bound`; 0 if `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.draw() % bound }
    }

    /// A number in `from..=to`.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to.saturating_sub(from).saturating_add(1))
    }

    /// True in `percent` of a hundred cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// An independent generator for a part of the work.
    pub fn fork(&mut self) -> Self {
        Self(self.draw())
    }

    /// `length` random bytes.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.draw().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

/// Spreads the bits of a number over all of it.
pub fn mix(value: u64) -> u64 {
    let mut mixed = value;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// The seed of this run: `ENDIO_SEED`, or a fresh one. Prints how to replay `test` of `package`.
pub fn announce(package: &str, test: &str) -> u64 {
    let seed = number("ENDIO_SEED", rand::random::<u32>().into());
    eprintln!("seed {seed}; replay: ENDIO_SEED={seed} cargo test -p {package} {test}");
    seed
}

/// A number from the environment, or the default if it is absent or no number.
pub fn number(variable: &str, default: u64) -> u64 {
    env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let (mut one, mut two) = (Rng::new(7), Rng::new(7));
        assert_eq!(one.bytes(100), two.bytes(100));
        assert_ne!(one.fork().draw(), Rng::new(8).draw());
    }

    #[test]
    fn between_reaches_both_of_its_ends_and_nothing_else() {
        let mut rng = Rng::new(1);
        let drawn: Vec<u64> = (0..200).map(|_| rng.between(3, 5)).collect();
        assert!(drawn.contains(&3) && drawn.contains(&5));
        assert!(drawn.iter().all(|number| (3..=5).contains(number)));
        assert_eq!(rng.below(0), 0);
    }
}
