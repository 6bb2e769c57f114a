//! Random choices of a mutator.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

pub struct Choice(ChaCha8Rng);

impl Choice {
    pub fn new(seed: u32) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed.into()))
    }

    /// Below `n`, which may be 0 for 0.
    pub fn below(&mut self, n: usize) -> usize {
        self.0.next_u64() as usize % n.max(1)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// Numbers at which counts, products and conversions break, and others.
    pub fn number(&mut self) -> u64 {
        const EDGES: &[u64] = &[
            0,
            1,
            2,
            3,
            4,
            6,
            7,
            8,
            15,
            16,
            31,
            32,
            33,
            64,
            128,
            255,
            256,
            257,
            512,
            1024,
            4096,
            65_535,
            65_536,
            1 << 18,
            1 << 24,
            1 << 30,
            (1 << 31) - 1,
            1 << 31,
            u32::MAX as u64,
            1 << 32,
            1 << 40,
            1 << 53,
            1 << 60,
            1 << 62,
            i64::MAX as u64,
            1 << 63,
            u64::MAX - 31,
            u64::MAX,
        ];
        match self.below(8) {
            0 => self.below(300) as u64,
            1 => self.0.next_u64() >> self.below(64),
            2 => self.of(EDGES).wrapping_add(self.below(3) as u64).wrapping_sub(1),
            _ => self.of(EDGES),
        }
    }

    /// `from` changed a little, or any number.
    pub fn near(&mut self, from: u64) -> u64 {
        match self.below(8) {
            0 => from.wrapping_add(1),
            1 => from.wrapping_sub(1),
            2 => from.wrapping_mul(2),
            3 => from / 2,
            4 => from.wrapping_mul(self.below(300) as u64),
            5 => from ^ 1 << self.below(64),
            _ => self.number(),
        }
    }

    /// The bits of a float at which computations break, or of any.
    pub fn float(&mut self) -> f64 {
        const EDGES: &[f64] =
            &[0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-30, 1e-6, 65504.0, 65520.0, 1e10, 3e38, -3e38, 1e300, f64::INFINITY, f64::NAN];
        if self.one_in(3) { f64::from_bits(self.0.next_u64()) } else { self.of(EDGES) }
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut bytes = vec![0; n];
        self.0.fill_bytes(&mut bytes);
        bytes
    }
}
