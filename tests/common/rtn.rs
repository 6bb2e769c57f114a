//! Round-to-nearest with min-max grids: the least that makes a quantized model, for tests of what comes after a solver.

use aespa_gpu::Result;
use aespa_gpu::model::{Checkpoint, Linear, Weights};
use aespa_gpu::quant::{Lattice, Offset, PackedLinear};

/// W [d_out, d_in], scales and minima rounded to their type before codes are chosen.
pub fn quantize(w: &[f32], d_out: usize, d_in: usize, lattice: Lattice) -> Result<PackedLinear> {
    let (max_code, dtype) = (lattice.max_code() as f32, lattice.dtype);
    let (mut codes, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
    for row in w.chunks(d_in) {
        for values in row.chunks(lattice.group_width(d_in)) {
            let low = values.iter().fold(0.0f32, |a, b| a.min(*b));
            let high = values.iter().fold(0.0f32, |a, b| a.max(*b));
            let width = if lattice.is_centred() { 2.0 * high.max(-low) } else { high - low };
            let scale = dtype.round((width / max_code).max(1e-4));
            let zero = match lattice.offset {
                Offset::Centre | Offset::Signed => lattice.centre() as f32,
                Offset::Zero { lowest } => (-low / scale).round_ties_even().clamp(lowest as f32, max_code),
                Offset::Minimum => -dtype.round(low) / scale,
            };
            codes.extend(values.iter().map(|v| (v / scale + zero).round_ties_even().clamp(0.0, max_code) as u8));
            scales.push(scale);
            zeros.push(zero);
        }
    }
    let offsets = lattice.offsets(&scales, &zeros);
    PackedLinear::from_codes(lattice, d_out, d_in, &codes, scales, offsets)
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
