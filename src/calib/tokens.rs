//! How much each token counts in the statistics of a block.
//!
//! Whatever a block adds to the residual stream is read through a norm by all that follows: an error e_i of token i arrives there as
//! e_i / rms(x_i), with x_i the stream after the block. To first order H = Σ_i w_i x_i x_iᵀ / n_tok with w_i = 1 / rms(x_i)² would be the
//! metric; but such weights also hand the statistics over to a few tokens, and half the way does better:
//!   H = Σ_i w_i x_i x_iᵀ / n_tok,  C = Σ_i w_i (x̃_i − x_i) x_iᵀ / n_tok,  w_i = (1 / rms_i) / mean(1 / rms)
//! for every linear of the block. Where a few tokens carry massive activations (attention sinks), they are most of a plain H.
//! SmolLM2-135M, 3 bits per channel, 16 windows of 512, ten sweeps, by a prototype of this file that is not kept, two draws, perplexity
//! at home and abroad: tokens alike 46.5, 79.4 and 47.7, 83.2; 1 / rms² 45.0, 75.7 and 46.4, 80.1; 1 / rms 45.2, 74.5 and 46.1, 77.8. Squared gradients of the whole model's loss with respect to a
//! linear's outputs, the Fisher weights of GuidedQuant (ICML 2025), clipped at ten times their mean: 47.4, 85.1 on the second draw; their
//! square roots 46.7, 77.8. They cost a backward pass through the model and are not worth it here.
//!
//! Cost: one forward pass of the float block, and a scaled copy of every activation that is added up.

use super::forward::Forward;
use super::residency::DeviceBlock;
use super::stream::HiddenStates;
use crate::engine::kernels::{self, rescale, row_dot};
use crate::engine::{Buffer, Elem, Engine, Mat, Recording};
use crate::{Error, Result, interrupt};
use serde::Serialize;
use std::ops::Range;

/// What tokens count by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tokens {
    /// All alike.
    Uniform,
    /// By the inverse root mean square of the residual stream after the block.
    Residual,
}

/// Names and meanings of the values of `--tokens`.
pub static TOKENS: &[(&str, Tokens, &str)] = &[
    ("uniform", Tokens::Uniform, "all tokens count alike"),
    ("residual", Tokens::Residual, "by the inverse norm of the residual stream, as later norms shrink errors"),
];

/// Square roots of the weights of all tokens, in the order of the batches; the weights' mean is 1.
#[derive(Clone, Debug)]
pub struct TokenWeights {
    roots: Vec<f32>,
    /// First token of each batch.
    starts: Vec<usize>,
}

impl TokenWeights {
    /// The weights of `states` on their way through the block `device`.
    ///
    /// # Errors
    /// `Kind::Numeric` when the stream is not finite.
    pub fn of_residual<E: Elem>(
        engine: &mut dyn Engine,
        forward: &Forward<'_, E>,
        states: &HiddenStates,
        device: &DeviceBlock,
    ) -> Result<Self> {
        let (mut weights, mut starts) = (Vec::new(), Vec::new());
        for index in 0..states.batches() {
            interrupt::check()?;
            starts.push(weights.len());
            let mut rec = Recording::new();
            let x = states.upload(&mut rec, index)?;
            forward.block(&mut rec, device, x, states.batch(index), &mut (), None)?;
            let squares = rec.alloc("squares", x.rows);
            let (rows, cols, ld) = (x.rows as u32, x.cols as u32, x.ld as u32);
            let p = row_dot::RowDotParams { rows, cols, ld, group: cols.max(1), n_group: 1 };
            kernels::row_dot(&mut rec, p, x.buffer, x.buffer, squares);
            let pending = rec.download(squares);
            rec.free(squares);
            x.free(&mut rec);
            let squares = engine.run(rec)?.take(pending)?;
            let eps = forward.spec().norm_eps;
            weights.extend(squares.iter().map(|s| 1.0 / f64::from(s / x.cols as f32 + eps).sqrt()));
        }
        let mean = weights.iter().sum::<f64>() / weights.len().max(1) as f64;
        let roots: Vec<f32> = weights.iter().map(|w| (w / mean).sqrt() as f32).collect();
        if roots.iter().any(|r| !r.is_finite()) {
            return Err(Error::numeric("residual stream", "is not finite: activations overflow in this model"));
        }
        Ok(Self { roots, starts })
    }

    /// Those of the batches `batches`, to be handed out row by row.
    pub fn rows(&self, batches: Range<usize>) -> RowWeights<'_> {
        let at = |batch: usize| self.starts.get(batch).copied().unwrap_or(self.roots.len());
        RowWeights { roots: &self.roots[at(batches.start)..at(batches.end)] }
    }
}

/// Weights of the rows that are still to come.
#[derive(Clone, Copy, Debug)]
pub struct RowWeights<'w> {
    roots: &'w [f32],
}

impl RowWeights<'_> {
    /// Records the next rows, `x`, each times the root of its weight.
    pub(super) fn scaled<E: Elem>(&mut self, rec: &mut Recording<'_>, x: Mat<E>) -> Mat<f32> {
        let (now, later) = self.roots.split_at(x.rows.min(self.roots.len()));
        if now.len() < x.rows {
            rec.fail(Error::internal("token weights", "are fewer than the tokens"));
        }
        self.roots = later;
        scaled(rec, x, now)
    }
}

/// Records a copy of `x` in f32, each row times its factor.
fn scaled<E: Elem>(rec: &mut Recording<'_>, x: Mat<E>, factors: &[f32]) -> Mat<f32> {
    let copy = Mat::alloc(rec, "scaled activations", x.rows, x.cols);
    let ones: Buffer<f32> = rec.upload("ones", vec![1.0f32; x.cols]);
    let factors = rec.upload("token weights", factors.to_vec());
    let (rows, cols, ld_source, ld_out) = (x.rows as u32, x.cols as u32, x.ld as u32, copy.ld as u32);
    let p = rescale::RescaleParams { rows, cols, row0: 0, ld_source, ld_out };
    kernels::rescale(rec, p, factors, ones, x.buffer.as_stored(), copy.buffer);
    rec.free(factors);
    rec.free(ones);
    copy
}
