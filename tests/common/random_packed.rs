//! Random packed matrices: whatever a lattice can hold, not what a solver would choose.

use aespa_gpu::quant::{Lattice, Offset, Offsets, PackedLinear};
use aespa_gpu::tensor::Dtype;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

/// What a matrix is made of.
#[derive(Clone, Debug)]
pub struct Parts {
    pub lattice: Lattice,
    pub d_out: usize,
    pub d_in: usize,
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
    pub offsets: Offsets,
    pub steps: Vec<[f32; 2]>,
}

pub fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    (rng.next_u64() % n as u64) as usize
}

pub fn of<T: Copy>(rng: &mut ChaCha8Rng, all: &[T]) -> T {
    all[below(rng, all.len())]
}

/// A value of the type, of either sign, small enough that a code's value is one too; sometimes a subnormal number or a zero.
fn value(rng: &mut ChaCha8Rng, dtype: Dtype) -> f32 {
    let exponent = match below(rng, 8) {
        0 => return of(rng, &[0.0, -0.0, 1.0]),
        1 => -24 + below(rng, 10) as i32,
        _ => -8 + below(rng, 14) as i32,
    };
    let mantissa = 1.0 + below(rng, 1 << 23) as f32 / (1 << 23) as f32;
    let sign = if below(rng, 4) == 0 { -1.0 } else { 1.0 };
    dtype.round(sign * mantissa * 2f32.powi(exponent))
}

impl Parts {
    pub fn new(rng: &mut ChaCha8Rng, lattice: Lattice, d_out: usize, d_in: usize) -> Self {
        let codes = (0..d_out * d_in).map(|_| below(rng, lattice.max_code() as usize + 1) as u8).collect();
        let n_group = d_out * lattice.n_group(d_in);
        let has_minima = lattice.offset == Offset::Minimum;
        let steps: Vec<[f32; 2]> = (0..d_out * lattice.n_super(d_in))
            .map(|_| [value(rng, lattice.dtype) / 256.0, if has_minima { value(rng, lattice.dtype) / 256.0 } else { 0.0 }])
            .map(|pair| pair.map(|step| lattice.dtype.round(step)))
            .collect();
        let counts = lattice.counts();
        let (mut scales, mut minima) = (Vec::new(), Vec::new());
        for at in 0..n_group {
            if lattice.steps.is_none() {
                scales.push(value(rng, lattice.dtype));
                minima.push(value(rng, lattice.dtype));
                continue;
            }
            let [step, step_minimum] = steps[at / lattice.groups_per_super(d_in)];
            // No zeros but those that readers make: of a count of 0.
            let count = counts.start() + below(rng, (counts.end() - counts.start() + 1) as usize) as i32;
            scales.push(step * if step == 0.0 { 0.0 } else { count as f32 });
            minima.push(0.0 - step_minimum * below(rng, *counts.end() as usize + 1) as f32);
        }
        let zeros = lattice.zeros();
        let offsets = match lattice.offset {
            Offset::Centre | Offset::Signed => Offsets::Centre,
            Offset::Zero { .. } => {
                Offsets::Zeros((0..n_group).map(|_| (*zeros.start() as usize + below(rng, zeros.clone().count())) as u8).collect())
            }
            Offset::Minimum => Offsets::Minima(minima),
        };
        Self { lattice, d_out, d_in, codes, scales, offsets, steps }
    }

    pub fn pack(&self) -> aespa_gpu::Result<PackedLinear> {
        let Self { lattice, d_out, d_in, codes, scales, offsets, steps } = self.clone();
        PackedLinear::from_codes(lattice, d_out, d_in, &codes, scales, offsets, steps)
    }

    /// The definition, element by element.
    pub fn values(&self) -> Vec<f32> {
        let (width, n_group) = (self.lattice.group_width(self.d_in), self.lattice.n_group(self.d_in));
        let value = |at: usize| {
            let group = at / self.d_in * n_group + at % self.d_in / width;
            let (code, scale) = (i32::from(self.codes[at]), self.scales[group]);
            match &self.offsets {
                Offsets::Centre => scale * (code - (1 << self.lattice.bits >> 1)) as f32,
                Offsets::Zeros(zeros) => scale * (code - i32::from(zeros[group])) as f32,
                Offsets::Minima(minima) => scale * code as f32 + minima[group],
            }
        };
        (0..self.codes.len()).map(value).collect()
    }
}
