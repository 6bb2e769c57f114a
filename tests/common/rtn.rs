//! Round-to-nearest with min-max grids: the least that makes a quantized model, for tests of what comes after a solver.

use aespa_gpu::Result;
use aespa_gpu::model::{Checkpoint, Weights};
use aespa_gpu::quant::{PackedLinear, Scheme};
use aespa_gpu::tensor::Dtype;

/// W [d_out, d_in], scales rounded to `dtype` before codes are chosen.
pub fn quantize(w: &[f32], d_out: usize, d_in: usize, scheme: Scheme, dtype: Dtype) -> Result<PackedLinear> {
    let max_code = scheme.max_code() as f32;
    let (mut codes, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
    for row in w.chunks(d_in) {
        for values in row.chunks(scheme.group_width(d_in)) {
            let low = values.iter().fold(0.0f32, |a, b| a.min(*b));
            let high = values.iter().fold(0.0f32, |a, b| a.max(*b));
            let width = if scheme.symmetric { 2.0 * high.max(-low) } else { high - low };
            let scale = dtype.round((width / max_code).max(1e-4));
            let zero = match scheme.symmetric {
                true => scheme.symmetric_zero() as f32,
                false => (-low / scale).round_ties_even().clamp(0.0, max_code),
            };
            codes.extend(values.iter().map(|v| ((v / scale).round_ties_even() + zero).clamp(0.0, max_code) as u8));
            scales.push(scale);
            zeros.push(zero as u8);
        }
    }
    PackedLinear::from_codes(scheme, d_out, d_in, dtype, &codes, scales, zeros)
}

/// Calls `each` with every linear of every block, quantized.
pub fn quantize_model(
    checkpoint: &Checkpoint,
    scheme: Scheme,
    mut each: impl FnMut(&aespa_gpu::model::Linear, PackedLinear) -> Result<()>,
) -> Result<()> {
    for linear in checkpoint.spec().blocks.iter().flat_map(|b| &b.linears) {
        let w = Weights::linear(checkpoint, linear)?.to_f32();
        each(linear, quantize(&w, linear.d_out, linear.d_in, scheme, checkpoint.spec().dtype)?)?;
    }
    Ok(())
}
