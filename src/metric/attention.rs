//! Attention-wise metrics of one block (aespa, arXiv 2402.08958): what the heads of W_Q, W_K and W_V are weighed by.
//!
//!   W_Q, W_K:  L = Σ_h tr(G_h E_h H E_hᵀ), G the second moment of the other operand (K or Q, rotary embedding averaged out), or the
//!              exact Gauss-Newton factor of the attention's output, measured by probes (`calib::Probe`);
//!   W_V:       L = Σ_h tr(G_h E_h H_V,h E_hᵀ), H_V = Xᵀ Aᵀ A X / n_tok; with G = W_Oᵀ W_O this is the attention output's error, exactly.
//!
//! All are estimates, and H_V and G weigh few directions much more than H does. Two shrinkages trade variance for bias: H_V towards H,
//! and G towards its mean diagonal, as far as two halves of the windows disagree (`shrink`).

use super::{Metric, shrink::shrinkage};
use crate::calib::{AttentionMoments, Gram, QueryKeyMetric};
use crate::model::Role;
use serde::Serialize;
use std::ops::Range;

/// The first of so many parts of each half's windows, which are in random order, gives the statistics of shrunk metrics. Perplexities of the
/// demo model at home and abroad from all, a quarter and an eighth of 128 windows, means over three seeds: 2 bits 42.16, 46.69; 42.25, 46.49;
/// 42.19, 46.35; 3 bits 39.79, 44.92; 39.76, 44.84; 39.79, 44.96.
const PART: usize = 4;
/// Tokens that they are taken from at least, both halves together, where there are as many.
const LEAST_TOKENS: usize = 16384;

/// What weighs the rows of a linear whose rows belong to heads of `d_head` rows, or gives every head a column metric of its own.
#[derive(Clone, Copy, Debug)]
pub enum Heads<'a> {
    /// Rows are independent, all under the metric of the input.
    None,
    /// G [n_head, d_head, d_head].
    Rows { d_head: usize, g: &'a [f32] },
    /// H per head, and perhaps G.
    Columns { d_head: usize, h: &'a [Gram], g: Option<&'a [f32]> },
}

/// What one half of the windows, or all of them, say about the attention of a block.
#[derive(Clone, Debug)]
pub struct AttentionHalf {
    pub rows: QueryKeyMetric,
    pub moments: AttentionMoments,
    /// Of the projections' input.
    pub input: Gram,
}

/// Shares of the simpler estimates that the split-half test asked for; means over heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Shrinkage {
    pub g_q: f32,
    pub g_k: f32,
    pub h_v: f32,
}

/// The metrics of one block's heads, on the host.
#[derive(Clone, Debug)]
pub struct AttentionMetric {
    rows: QueryKeyMetric,
    h_v: Vec<Gram>,
    g_v: Option<Vec<f32>>,
    pub shrinkage: Option<Shrinkage>,
}

impl AttentionMetric {
    /// Which of `batches` batches, of `tokens` tokens in all, each half is taken from; one half if there is one batch. Shrunk metrics take a
    /// part of them, as their statistics are the dearest of a block, and more of them change nothing that perplexities show (see `PART`).
    pub fn halves(metric: Metric, batches: usize, tokens: usize) -> Vec<Range<usize>> {
        let mut halves = match batches {
            0 | 1 => std::iter::once(0..batches).collect(),
            _ => vec![0..batches / 2, batches / 2..batches],
        };
        if metric.shrinks() {
            let least = (LEAST_TOKENS * batches).div_ceil(2 * tokens.max(1));
            for half in &mut halves {
                half.end = half.start + half.len().div_ceil(PART).max(least).min(half.len());
            }
        }
        halves
    }

    /// From what the halves say; shrunk as far as two disagree, where the metric asks for that.
    pub fn of(metric: Metric, halves: &[AttentionHalf]) -> Self {
        let mut metrics = Self { rows: mean_rows(halves), h_v: mean_values(halves), g_v: None, shrinkage: None };
        if let [first, second] = halves
            && metric.shrinks()
            && !first.input.is_blank()
        {
            metrics.shrinkage = Some(Shrinkage {
                g_q: shrink_rows(&mut metrics.rows.g_q, [&first.rows.g_q, &second.rows.g_q], first.rows.d_head),
                g_k: shrink_rows(&mut metrics.rows.g_k, [&first.rows.g_k, &second.rows.g_k], first.rows.d_head),
                h_v: shrink_values(&mut metrics.h_v, [first, second]),
            });
        }
        metrics
    }

    /// Weighs the rows of W_V by `g_v` [n_kv, d_head, d_head]: W_Oᵀ W_O.
    pub fn weigh_values(&mut self, g_v: Vec<f32>) {
        self.g_v = Some(g_v);
    }

    /// H_V of every key/value head, for a transform that changes the inputs.
    pub fn values_mut(&mut self) -> &mut [Gram] {
        &mut self.h_v
    }

    /// What weighs the heads of `role`.
    pub fn heads(&self, role: Role) -> Heads<'_> {
        let d_head = self.rows.d_head;
        match role {
            Role::Q => Heads::Rows { d_head, g: &self.rows.g_q },
            Role::K => Heads::Rows { d_head, g: &self.rows.g_k },
            Role::V => Heads::Columns { d_head, h: &self.h_v, g: self.g_v.as_deref() },
            _ => Heads::None,
        }
    }
}

/// What part of all tokens each of the halves has.
fn shares(halves: &[&AttentionHalf]) -> Vec<f32> {
    let all = halves.iter().map(|half| half.input.n_tok).sum::<usize>().max(1);
    halves.iter().map(|half| half.input.n_tok as f32 / all as f32).collect()
}

/// The mean over all tokens of what the halves have as means over theirs.
fn mean<'a>(halves: &'a [AttentionHalf], part: impl Fn(&'a AttentionHalf) -> &'a [f32]) -> Vec<f32> {
    let shares = shares(&halves.iter().collect::<Vec<_>>());
    let parts: Vec<&[f32]> = halves.iter().map(part).collect();
    (0..parts.first().map_or(0, |p| p.len())).map(|i| parts.iter().zip(&shares).map(|(p, share)| p[i] * share).sum()).collect()
}

fn mean_rows(halves: &[AttentionHalf]) -> QueryKeyMetric {
    let d_head = halves.first().map_or(0, |h| h.rows.d_head);
    QueryKeyMetric { d_head, g_q: mean(halves, |h| &h.rows.g_q), g_k: mean(halves, |h| &h.rows.g_k) }
}

fn mean_values(halves: &[AttentionHalf]) -> Vec<Gram> {
    let heads = halves.first().map_or(0, |h| h.moments.h_v.len());
    let of = |head: usize| {
        let grams: Vec<&Gram> = halves.iter().map(|h| &h.moments.h_v[head]).collect();
        if grams[0].is_blank() {
            return Gram::blank(grams[0].d);
        }
        let n_tok = grams.iter().map(|g| g.n_tok).sum();
        Gram { d: grams[0].d, n_tok, h: mean(halves, |h| &h.moments.h_v[head].h) }
    };
    (0..heads).map(of).collect()
}

/// G ← (1 − ρ) G + ρ mean(diag G) I for every head; the mean ρ.
fn shrink_rows(g: &mut [f32], halves: [&[f32]; 2], d: usize) -> f32 {
    let flat = |g: &[f32]| {
        let mean = (0..d).map(|i| g[i * d + i]).sum::<f32>() / d as f32;
        (0..d * d).map(|i| if i / d == i % d { mean } else { 0.0 }).collect::<Vec<f32>>()
    };
    let (size, heads) = (d * d, g.len() / (d * d).max(1));
    let mut sum = 0.0;
    for (head, g) in g.chunks_mut(size).enumerate() {
        let half = halves.map(|h| &h[head * size..(head + 1) * size]);
        let rho = shrinkage(half, [&flat(half[0]), &flat(half[1])]);
        let to = flat(g);
        g.iter_mut().zip(to).for_each(|(g, t)| *g = (1.0 - rho) * *g + rho * t);
        sum += rho;
    }
    sum / heads.max(1) as f32
}

/// H_V ← (1 − ρ) H_V + ρ c H for every head, c such that both weigh a channel alike on average; the mean ρ. Distances are taken between
/// matrices with H's diagonal scaled to one, so that a few large channels do not decide.
fn shrink_values(h_v: &mut [Gram], halves: [&AttentionHalf; 2]) -> f32 {
    let (heads, mut sum) = (h_v.len(), 0.0);
    let shares = shares(&halves);
    for (head, whole) in h_v.iter_mut().enumerate() {
        let d = whole.d;
        let inv_sqrt: Vec<f32> = (0..d)
            .map(|j| (0..2).map(|k| shares[k] * halves[k].input.h[j * d + j]).sum::<f32>())
            .map(|v| if v > 0.0 { v.sqrt().recip() } else { 0.0 })
            .collect();
        let unit = |h: &[f32]| (0..d * d).map(|i| h[i] * inv_sqrt[i / d] * inv_sqrt[i % d]).collect::<Vec<f32>>();
        let trace = |h: &[f32]| (0..d).map(|j| h[j * d + j]).sum::<f32>();
        let a = halves.map(|half| unit(&half.moments.h_v[head].h));
        let mut t = halves.map(|half| unit(&half.input.h));
        let mut factors = [0.0; 2];
        for k in 0..2 {
            factors[k] = trace(&a[k]) / trace(&t[k]).max(f32::MIN_POSITIVE);
            t[k].iter_mut().for_each(|v| *v *= factors[k]);
        }
        let rho = shrinkage([&a[0], &a[1]], [&t[0], &t[1]]);
        let to = [0, 1].map(|k| shares[k] * rho * factors[k]);
        for (i, v) in whole.h.iter_mut().enumerate() {
            *v = (1.0 - rho) * *v + to[0] * halves[0].input.h[i] + to[1] * halves[1].input.h[i];
        }
        sum += rho;
    }
    sum / heads.max(1) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_many_tokens_and_all_of_few() {
        let of = |batches: usize, n_tok: usize| AttentionMetric::halves(Metric::Probe, batches, batches * n_tok);
        assert_eq!((of(16, 4096), of(64, 4096)), (vec![0..2, 8..10], vec![0..8, 32..40]));
        assert_eq!((of(2, 4096), of(4, 4096)), (vec![0..1, 1..2], vec![0..2, 2..4]));
        // 16384 tokens are enough of 32768.
        assert_eq!((of(8, 4096), of(2, 1 << 20), of(32, 512)), (vec![0..2, 4..6], vec![0..1, 1..2], vec![0..16, 16..32]));
        // The published metric reads all of them.
        assert_eq!(AttentionMetric::halves(Metric::Attention, 5, 5 * 4096), [0..2, 2..5]);
        assert_eq!(AttentionMetric::halves(Metric::Probe, 1, 512), std::iter::once(0..1).collect::<Vec<_>>());
    }
}
