//! Round-to-nearest with min-max grids: the least that makes a quantized model, for tests of what comes after a solver.

use aespa_gpu::Result;
use aespa_gpu::model::{Checkpoint, Linear, Weights};
use aespa_gpu::quant::{Lattice, Offset, PackedLinear};
use aespa_gpu::tensor::Dtype;

/// W [d_out, d_in], scales and minima rounded to what is stored before codes are chosen.
pub fn quantize(w: &[f32], d_out: usize, d_in: usize, lattice: Lattice) -> Result<PackedLinear> {
    let max_code = lattice.max_code() as f32;
    let (mut codes, mut scales, mut zeros, mut steps) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for row in w.chunks(d_in) {
        for super_block in row.chunks(lattice.steps.map_or(d_in, |steps| steps.columns)) {
            let ranges: Vec<[f32; 2]> = super_block.chunks(lattice.group_width(d_in)).map(range).collect();
            let width = |[low, high]: [f32; 2]| if lattice.is_centred() { 2.0 * high.max(-low) } else { high - low };
            let stored = Stored::of(&lattice, ranges.iter().map(|r| width(*r) / max_code), ranges.iter().map(|r| -r[0]));
            for (values, range) in super_block.chunks(lattice.group_width(d_in)).zip(&ranges) {
                let scale = stored.scale((width(*range) / max_code).max(1e-4));
                let zero = match lattice.offset {
                    Offset::Centre | Offset::Signed => lattice.centre() as f32,
                    Offset::Zero { lowest } => (-range[0] / scale).round_ties_even().clamp(lowest as f32, max_code),
                    Offset::Minimum => -stored.minimum(range[0]) / scale,
                };
                codes.extend(values.iter().map(|v| (v / scale + zero).round_ties_even().clamp(0.0, max_code) as u8));
                scales.push(scale);
                zeros.push(zero);
            }
            steps.extend(lattice.steps.map(|_| stored.steps));
        }
    }
    let offsets = lattice.offsets(d_in, &scales, &zeros, &steps);
    PackedLinear::from_codes(lattice, d_out, d_in, &codes, scales, offsets, steps)
}

/// The range of values, which holds zero.
fn range(values: &[f32]) -> [f32; 2] {
    values.iter().fold([0.0f32; 2], |[low, high], v| [low.min(*v), high.max(*v)])
}

/// How the scales and minima of a super-block are stored.
struct Stored {
    dtype: Dtype,
    /// 0: by themselves.
    steps: [f32; 2],
    most: f32,
}

impl Stored {
    fn of(lattice: &Lattice, scales: impl Iterator<Item = f32>, minima: impl Iterator<Item = f32>) -> Self {
        let most = *lattice.counts().end() as f32;
        let step = |largest: f32| if most == 0.0 { 0.0 } else { Dtype::F16.round(largest / most).max(1e-6) };
        let largest = [scales.fold(1e-4, f32::max), minima.fold(0.0, f32::max)];
        let has_minima = lattice.offset == Offset::Minimum;
        let steps = [Dtype::F16.round(step(largest[0])), if has_minima { Dtype::F16.round(step(largest[1])) } else { 0.0 }];
        Self { dtype: lattice.dtype, steps, most }
    }

    fn scale(&self, scale: f32) -> f32 {
        let step = self.steps[0];
        if step == 0.0 { self.dtype.round(scale) } else { step * (scale / step).round().clamp(1.0, self.most) }
    }

    fn minimum(&self, minimum: f32) -> f32 {
        let step = self.steps[1];
        if step == 0.0 { self.dtype.round(minimum) } else { -step * (-minimum / step).round().clamp(0.0, self.most) }
    }
}

/// Calls `each` with every matrix that `lattice` quantizes.
pub fn quantize_model(
    checkpoint: &Checkpoint,
    lattice: impl Fn(&Linear) -> Option<Lattice>,
    mut each: impl FnMut(&Linear, PackedLinear) -> Result<()>,
) -> Result<()> {
    for linear in checkpoint.spec().matrices() {
        if let Some(lattice) = lattice(linear) {
            let w = Weights::linear(checkpoint, linear)?.to_f32();
            each(linear, quantize(&w, linear.d_out, linear.d_in, lattice)?)?;
        }
    }
    Ok(())
}
