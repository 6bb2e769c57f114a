//! Gram matrices H = Xᵀ X / n_tok of the linears' inputs, accumulated on the device.
//!
//! One matrix per distinct input (4 per LLaMA block, not 7), lower triangle, f32, two-level sums: a launch sums a batch by itself.
//! Matrices that are too large for one buffer are split into panels of rows.

use crate::engine::kernels::{self, gram};
use crate::engine::matrix::{self, PendingMat};
use crate::engine::{Downloads, Elem, Limits, Mat, Recording};
use crate::model::{Block, Input};
use crate::{Error, Result};

/// H of one input, on the host: symmetric, [d, d], divided by the number of tokens.
#[derive(Clone, Debug)]
pub struct Gram {
    pub d: usize,
    pub n_tok: usize,
    pub h: Vec<f32>,
}

/// The accumulators of a block's inputs on the device.
pub struct GramSet {
    inputs: Vec<Accumulator>,
}

struct Accumulator {
    input: Input,
    d: usize,
    n_tok: usize,
    /// First row and rows of each panel.
    panels: Vec<(usize, Mat<f32>)>,
}

impl GramSet {
    /// Zeroed accumulators for `inputs` of `block`.
    pub fn new(rec: &mut Recording<'_>, block: &Block, inputs: &[Input], limits: Limits) -> Self {
        let accumulator = |rec: &mut Recording<'_>, input: Input| {
            let d = block.width(input);
            let ranges = matrix::row_panels(d, 4 * matrix::stride(d), matrix::STRIDE_ALIGN, limits);
            let panels = ranges.into_iter().map(|r| (r.start, Mat::zeros(rec, "gram", r.len(), d))).collect();
            Accumulator { input, d, n_tok: 0, panels }
        };
        Self { inputs: inputs.iter().map(|input| accumulator(rec, *input)).collect() }
    }

    /// Records H += Xᵀ X for the rows of x.
    pub fn add<E: Elem>(&mut self, rec: &mut Recording<'_>, input: Input, x: Mat<E>) {
        let Some(acc) = self.inputs.iter_mut().find(|a| a.input == input) else { return };
        acc.n_tok += x.rows;
        for (row0, panel) in &acc.panels {
            let p = gram::GramParams {
                n_tok: x.rows as u32,
                d: acc.d as u32,
                ldx: x.ld as u32,
                ldg: panel.ld as u32,
                row0: *row0 as u32,
                rows: panel.rows as u32,
            };
            kernels::gram(rec, p, x.buffer, panel.buffer);
        }
    }

    /// Records the read-back of all matrices and gives the accumulators back.
    pub fn download(self, rec: &mut Recording<'_>) -> PendingGrams {
        let mut pending = Vec::new();
        for acc in self.inputs {
            let panels = acc.panels.iter().map(|(row0, panel)| (*row0, panel.download(rec))).collect();
            acc.panels.into_iter().for_each(|(_, panel)| panel.free(rec));
            pending.push((acc.input, acc.d, acc.n_tok, panels));
        }
        PendingGrams { pending }
    }
}

type PendingPanels = Vec<(usize, PendingMat<f32>)>;

/// Downloads under way.
pub struct PendingGrams {
    pending: Vec<(Input, usize, usize, PendingPanels)>,
}

impl PendingGrams {
    /// # Errors
    /// `Kind::Numeric` names the input when a statistic is not finite: the activations overflowed.
    pub fn take(self, downloads: &mut Downloads) -> Result<Vec<(Input, Gram)>> {
        self.pending
            .into_iter()
            .map(|(input, d, n_tok, panels)| {
                let mut h = vec![0.0f32; d * d];
                for (row0, panel) in panels {
                    let values = panel.take(downloads)?;
                    h[row0 * d..][..values.len()].copy_from_slice(&values);
                }
                symmetrize(&mut h, d, 1.0 / n_tok.max(1) as f32);
                if h.iter().any(|v| !v.is_finite()) {
                    return Err(Error::numeric(format!("Gram matrix of {input}"), "is not finite: activations overflow in this model"));
                }
                Ok((input, Gram { d, n_tok, h }))
            })
            .collect()
    }
}

/// Scales the lower triangle and mirrors it.
fn symmetrize(h: &mut [f32], d: usize, scale: f32) {
    for i in 0..d {
        for j in 0..=i {
            let v = h[i * d + j] * scale;
            h[i * d + j] = v;
            h[j * d + i] = v;
        }
    }
}
