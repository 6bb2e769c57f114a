//! Asymmetric targets: the quantized layer, reading what the quantized network gives it, should give what the float layer gives in
//! the float network (QEP, NeurIPS 2025; GPTAQ, ICML 2025); where its output is added to the residual stream, also what that lacks.
//!
//! Minimise ‖Q X − W X̃ − (R̃ − R)‖² with X and the stream R from the quantized network, X̃ and R̃ from the float one; R̃ − R only for
//! linears whose outputs are added to R. Completing the square, with H = Xᵀ X / n_tok, C = (X̃ − X)ᵀ X / n_tok (rows are channels of the
//! difference) and D = (R̃ − R)ᵀ X / n_tok, it is tr((Q − W*) H (Q − W*)ᵀ) and a constant, for
//!   W* = W + (W C + D) H⁻¹.
//! H⁻¹ is that of H + ridge (diag H + median(diag H) I). Any solver and any row metric can aim at W*. C and D are estimates, and moving
//! all the way fits their noise, so
//!   W* = W + (α W C + β D) H⁻¹,
//! with α and β from a split-half test (`strength.rs`).
//!
//! Shapes: W and D [d_out, d], H and C [d, d]. Cost: three products of d_out d² per linear, and two factorisations of d³ per input.

use super::strength::Strength;
use crate::Result;
use crate::calib::Gram;
use crate::engine::kernels::{self, axpy, matmul_nn};
use crate::engine::matrix::STRIDE_ALIGN;
use crate::engine::{Engine, Mat, Panels, Recording, on_host, panels, submit};
use crate::round::factor::{Factor, factor};
use crate::round::gptq::DeviceFactor;

/// Of the regression of X̃ − X and R̃ − R on X, relative to each channel's energy and to the median energy. On SmolLM2 at 3 bits without
/// the second part a few channels with next to no energy took shifts of ten times the weights, and perplexity doubled; 0.03 to 1 are all
/// good.
const RIDGE: f32 = 0.3;

/// What moves the targets of the linears that read one input.
pub struct Targets {
    pub strength: Strength,
    /// C [d, d].
    cross: Panels,
    /// β D [d_out, d], where there is such.
    residual: Option<Vec<f32>>,
    factor: DeviceFactor,
}

impl Targets {
    /// Uploads C, and keeps D where there is such.
    ///
    /// # Errors
    /// `Kind::Numeric` when H cannot be factored.
    pub fn upload(
        engine: &mut dyn Engine,
        gram: &Gram,
        cross: Vec<f32>,
        mut residual: Option<Vec<f32>>,
        strength: Strength,
    ) -> Result<Self> {
        let d = gram.d;
        let ranges = panels::ranges([d, d], STRIDE_ALIGN, engine.limits());
        let host = on_host(engine, Factor::what(d), Factor::flops(d), || match gram.is_blank() {
            true => {
                let _ridged = Gram::blank(d);
                Ok(Factor::blank(d))
            }
            false => factor(&ridged(gram), d, false, 0.0),
        })?;
        let factor = submit(engine, |rec| DeviceFactor::upload(rec, host))?;
        let cross = submit(engine, |rec| Panels::upload(rec, "cross moment", d, cross, gram.is_blank(), &ranges))?;
        if let Some(values) = residual.as_mut().filter(|_| !gram.is_blank()) {
            values.iter_mut().for_each(|v| *v *= strength.residual);
        }
        Ok(Self { strength, cross, residual, factor })
    }

    /// Are they also moved by what the residual stream lacks?
    pub fn has_residual(&self) -> bool {
        self.residual.is_some()
    }

    pub fn free(self, engine: &mut dyn Engine) -> Result<()> {
        submit(engine, |rec| {
            self.cross.free(rec);
            self.factor.free(rec);
        })
    }

    /// Records W* of the rows `w`, which start at row `first` of their linear: a new matrix.
    pub fn moved(&self, rec: &mut Recording<'_>, w: Mat<f32>, first: usize) -> Mat<f32> {
        let missing = match &self.residual {
            Some(values) => Mat::upload(rec, "missing output", w.rows, w.cols, values[first * w.cols..][..w.rows * w.cols].to_vec()),
            None => Mat::zeros(rec, "missing output", w.rows, w.cols),
        };
        matmul_nn::by_panels(rec, w, &self.cross, [self.strength.inputs, 1.0], missing);
        let target = self.factor.solve(rec, missing);
        missing.free(rec);
        kernels::axpy(rec, axpy::AxpyParams { n: w.buffer.len() as u32, alpha: 1.0 }, w.buffer, target.buffer);
        target
    }
}

/// H + RIDGE (diag H + median(diag H) I): channels with next to no energy would otherwise get enormous weights for next to no gain, and
/// the grid of their row with them.
pub(super) fn ridged(gram: &Gram) -> Vec<f32> {
    let d = gram.d;
    let mut diag: Vec<f32> = (0..d).map(|j| gram.h[j * d + j]).collect();
    diag.sort_by(f32::total_cmp);
    let median = diag[d / 2];
    let mut h = gram.h.clone();
    (0..d).for_each(|j| h[j * d + j] += RIDGE * (h[j * d + j] + median));
    h
}
