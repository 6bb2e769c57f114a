//! Gram matrices H = Xᵀ X / n_tok of the linears' inputs, accumulated on the device.
//!
//! One matrix per distinct input (4 per LLaMA block, not 7), lower triangle, f32, two-level sums: a launch sums a batch by itself.
//! Matrices that are too large for one buffer are split into panels of rows.

use super::observer::Observer;
use super::tokens::RowWeights;
use crate::engine::kernels::{self, gram};
use crate::engine::panels::PendingPanels;
use crate::engine::{Downloads, Elem, Limits, Mat, Panels, Recording};
use crate::model::{Block, Input};
use crate::{Error, Result};
use rayon::prelude::*;
use std::fmt::Display;

/// H on the host: symmetric, [d, d], divided by the number of rows of X.
#[derive(Debug)]
pub struct Gram {
    pub d: usize,
    /// The rows of X that were added up; 0 in an estimate, where nobody should touch the values.
    pub n_tok: usize,
    pub h: Vec<f32>,
}

impl Clone for Gram {
    /// Zeros that stand for what is not known stay untouched.
    fn clone(&self) -> Self {
        match self.is_blank() {
            true => Self::blank(self.d),
            false => Self { h: self.h.clone(), ..*self },
        }
    }
}

impl Gram {
    /// Stands for one that is not known.
    pub fn blank(d: usize) -> Self {
        Self { d, n_tok: 0, h: vec![0.0; d * d] }
    }

    pub fn is_blank(&self) -> bool {
        self.n_tok == 0
    }
}

/// The accumulators of a block's inputs on the device.
pub struct GramSet<'w> {
    inputs: Vec<InputSum<'w>>,
}

/// What one input has been seen to give.
struct InputSum<'w> {
    input: Input,
    sum: Accumulator,
    weights: Option<RowWeights<'w>>,
}

/// The lower triangle of Xᵀ X on the device.
pub(super) struct Accumulator {
    d: usize,
    n_tok: usize,
    panels: Panels,
}

impl Accumulator {
    /// Zeroed.
    pub fn new(rec: &mut Recording<'_>, d: usize, limits: Limits) -> Self {
        Self { d, n_tok: 0, panels: Panels::zeros(rec, "gram", [d, d], limits) }
    }

    /// Records the sum over the first `rows` rows of x.
    pub fn add<E: Elem>(&mut self, rec: &mut Recording<'_>, x: Mat<E>, rows: usize) {
        self.n_tok += rows;
        for panel in self.panels.iter() {
            let p = gram::GramParams {
                n_tok: rows as u32,
                d: self.d as u32,
                ldx: x.ld as u32,
                ldg: panel.mat.ld as u32,
                row0: panel.start as u32,
                rows: panel.mat.rows as u32,
                g_row: 0,
            };
            kernels::gram(rec, p, x.buffer, panel.mat.buffer);
        }
    }

    /// Records the read-back and gives the accumulator back.
    pub fn download(self, rec: &mut Recording<'_>) -> PendingGram {
        let panels = self.panels.download(rec);
        self.panels.free(rec);
        PendingGram { d: self.d, n_tok: self.n_tok, panels }
    }
}

/// A download under way.
pub(super) struct PendingGram {
    d: usize,
    n_tok: usize,
    panels: PendingPanels,
}

impl PendingGram {
    /// # Errors
    /// `Kind::Numeric` names `what` when the matrix is not finite: the activations overflowed.
    pub fn take(self, downloads: &mut Downloads, what: impl Display) -> Result<Gram> {
        let Self { d, n_tok, panels } = self;
        if downloads.is_blank() {
            return Ok(Gram::blank(d));
        }
        let mut h = panels.take(downloads)?;
        symmetrize(&mut h, d, 1.0 / n_tok.max(1) as f32);
        finite(&h, what)?;
        Ok(Gram { d, n_tok, h })
    }
}

/// # Errors
/// `Kind::Numeric` names the statistic `what` when a value is not finite.
pub(super) fn finite(values: &[f32], what: impl Display) -> Result<()> {
    if values.par_iter().with_min_len(1 << 16).all(|v| v.is_finite()) {
        return Ok(());
    }
    Err(Error::numeric(what, "is not finite: activations overflow in this model"))
}

impl<'w> GramSet<'w> {
    /// Zeroed accumulators for all inputs of `block`. With `weights` tokens count by them, and must come in their order.
    pub fn new(rec: &mut Recording<'_>, block: &Block, weights: Option<RowWeights<'w>>, limits: Limits) -> Self {
        let sum = |input| InputSum { input, sum: Accumulator::new(rec, block.width(input), limits), weights };
        Self { inputs: block.inputs().into_iter().map(sum).collect() }
    }

    /// A zeroed accumulator for one input of `block`.
    pub fn of(rec: &mut Recording<'_>, block: &Block, input: Input, limits: Limits) -> Self {
        Self { inputs: vec![InputSum { input, sum: Accumulator::new(rec, block.width(input), limits), weights: None }] }
    }

    /// Records H += Xᵀ X for the rows of x.
    pub fn add<E: Elem>(&mut self, rec: &mut Recording<'_>, input: Input, x: Mat<E>) {
        let Some(of) = self.inputs.iter_mut().find(|of| of.input == input) else { return };
        match &mut of.weights {
            None => of.sum.add(rec, x, x.rows),
            Some(weights) => {
                let scaled = weights.scaled(rec, x);
                of.sum.add(rec, scaled, scaled.rows);
                scaled.free(rec);
            }
        }
    }

    /// Records the read-back of all matrices and gives the accumulators back.
    pub fn download(self, rec: &mut Recording<'_>) -> PendingGrams {
        PendingGrams { pending: self.inputs.into_iter().map(|of| (of.input, of.sum.download(rec))).collect() }
    }
}

impl<E: Elem> Observer<E> for GramSet<'_> {
    fn input(&mut self, rec: &mut Recording<'_>, input: Input, x: Mat<E>) {
        self.add(rec, input, x);
    }
}

/// Downloads under way.
pub struct PendingGrams {
    pending: Vec<(Input, PendingGram)>,
}

impl PendingGrams {
    /// # Errors
    /// `Kind::Numeric` names the input when a statistic is not finite: the activations overflowed.
    pub fn take(self, downloads: &mut Downloads) -> Result<Vec<(Input, Gram)>> {
        let take = |(input, pending): (Input, PendingGram)| Ok((input, pending.take(downloads, format!("Gram matrix of {input}"))?));
        self.pending.into_iter().map(take).collect()
    }
}

/// Scales the lower triangle and mirrors it, a square at a time, so that what is read and what is written stay in the cache.
fn symmetrize(h: &mut [f32], d: usize, scale: f32) {
    const SQUARE: usize = 64;
    for top in (0..d).step_by(SQUARE) {
        for left in (0..=top).step_by(SQUARE) {
            for i in top..(top + SQUARE).min(d) {
                for j in left..(left + SQUARE).min(i + 1) {
                    let v = h[i * d + j] * scale;
                    h[i * d + j] = v;
                    h[j * d + i] = v;
                }
            }
        }
    }
}
