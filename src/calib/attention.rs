//! aespa's statistics of attention (arXiv 2402.08958, equations 15 to 22), accumulated on the device while the block runs:
//!   H_V[g] = mean over the query heads h of group g of  Xᵀ A_hᵀ A_h X / n_tok   [d_model, d_model]   columns of W_V
//!   C_Q[h] = Q_hᵀ Q_h / n_tok,  C_K[g] = K_gᵀ K_g / n_tok, after the rotary embedding   [d_head, d_head]   rows of W_K and W_Q
//! with X the input of the projections, A_h the causal softmax weights of a head in a sequence, and sums over all sequences.
//!
//! A X exists for a few thousand rows at a time, never for all heads; A for one query head; H_V per key/value head, never per query head.
//! Tiles of query rows see a product as long as their causal part. With a `step` above 1 every step-th query row counts, starting at
//! another one in each head and batch: the products then cost a step-th, and the mean is over the rows that were taken.
//!
//! Cost per sequence of L tokens and query head, step 1: L² d_head flops for A, about 0.6 · 2 L² d_model for A X, L d_model² for the
//! Gram matrix. Device memory: n_kv d_model² floats of accumulators, and up to 4096 (L + d_model) floats while a batch is added.

use super::gram::{Accumulator, Gram, PendingGram, finite};
use super::observer::{AttentionPoint, Observer};
use super::rope_average::RopeAverage;
use crate::Result;
use crate::engine::kernels::{self, attention_weights::AttentionWeightsParams, matmul_nn::MatmulNnParams, matmul_tn::MatmulTnParams};
use crate::engine::matrix::{self, PendingMat, STRIDE_ALIGN};
use crate::engine::{Downloads, Elem, Engine, Limits, Mat, Panels, Recording, Weight};
use crate::model::ModelSpec;

/// Rows of A and of A X at most: enough to keep a device busy, few enough that one sum over them stays accurate.
const ROWS: usize = 4096;

/// The accumulators of one block on the device.
pub struct AttentionStats {
    n_head: usize,
    n_kv: usize,
    d_head: usize,
    step: usize,
    limits: Limits,
    /// Per key/value head.
    h_v: Vec<Accumulator>,
    c_q: HeadMoments,
    c_k: HeadMoments,
    batches: usize,
}

impl AttentionStats {
    /// Zeroed accumulators. `step` thins out the query rows that H_V is made of; 1 takes all.
    pub fn new(rec: &mut Recording<'_>, spec: &ModelSpec, step: usize, limits: Limits) -> Self {
        Self {
            n_head: spec.n_head,
            n_kv: spec.n_kv,
            d_head: spec.d_head,
            step: step.max(1),
            limits,
            h_v: (0..spec.n_kv).map(|_| Accumulator::new(rec, spec.d_model, limits)).collect(),
            c_q: HeadMoments::new(rec, spec.n_head, spec.d_head),
            c_k: HeadMoments::new(rec, spec.n_kv, spec.d_head),
            batches: 0,
        }
    }

    /// Records the sums over one batch.
    pub fn add<E: Elem>(&mut self, rec: &mut Recording<'_>, point: &AttentionPoint<E>) {
        self.c_q.add(rec, point.q);
        self.c_k.add(rec, point.k);
        let d = point.a.cols;
        let weights =
            Mat::alloc(rec, "attention weights", fitting(point.batch.seq_len, self.limits).min(point.batch.n_tok()), point.batch.seq_len);
        let mut tile = Tile { y: Mat::alloc(rec, "weighted inputs", fitting(d, self.limits), d), filled: 0 };
        for kv in 0..self.n_kv {
            let group = self.n_head / self.n_kv;
            for head in kv * group..(kv + 1) * group {
                self.add_head(rec, point, head, weights, &mut tile);
            }
            tile.flush(rec, &mut self.h_v[kv]);
        }
        weights.free(rec);
        tile.y.free(rec);
        self.batches += 1;
    }

    /// Adds A_h X of every sequence, as many rows of A at a time as `weights` holds.
    fn add_head<E: Elem>(&mut self, rec: &mut Recording<'_>, point: &AttentionPoint<E>, head: usize, weights: Mat<f32>, tile: &mut Tile) {
        let (seq_len, kv) = (point.batch.seq_len, head * self.n_kv / self.n_head);
        let first = (self.batches + head) % self.step;
        let rows = seq_len.saturating_sub(first).div_ceil(self.step);
        // Several whole sequences, or a part of one.
        let (together, part) = if rows <= weights.rows { (weights.rows / rows.max(1), rows) } else { (1, weights.rows) };
        for sequence in (0..point.batch.n_seq).step_by(together) {
            for start in (0..rows).step_by(part.max(1)) {
                let rows = part.min(rows - start);
                let batches = together.min(point.batch.n_seq - sequence);
                let p = AttentionWeightsParams {
                    rows: rows as u32,
                    i0: (first + start * self.step) as u32,
                    step: self.step as u32,
                    cols: (first + (start + rows - 1) * self.step + 1) as u32,
                    d_head: self.d_head as u32,
                    ld_q: point.q.ld as u32,
                    ld_k: point.k.ld as u32,
                    ld_out: weights.ld as u32,
                    q_offset: (sequence * seq_len * point.q.ld + head * self.d_head) as u32,
                    k_offset: (sequence * seq_len * point.k.ld + kv * self.d_head) as u32,
                    q_batch: (seq_len * point.q.ld) as u32,
                    k_batch: (seq_len * point.k.ld) as u32,
                    out_batch: (rows * weights.ld) as u32,
                    batches: batches as u32,
                    scale: point.scale,
                };
                kernels::attention_weights(rec, p, point.q.buffer, point.k.buffer, weights.buffer);
                for batch in 0..batches {
                    let x_row = (sequence + batch) * seq_len;
                    tile.add(rec, &p, batch, weights, point.a, x_row, &mut self.h_v[kv]);
                }
            }
        }
    }

    /// Records the read-back and gives the accumulators back.
    pub fn download(self, rec: &mut Recording<'_>) -> PendingAttention {
        PendingAttention {
            h_v: self.h_v.into_iter().map(|acc| acc.download(rec)).collect(),
            c_q: self.c_q.download(rec),
            c_k: self.c_k.download(rec),
        }
    }
}

impl<E: Elem> Observer<E> for AttentionStats {
    fn attention(&mut self, rec: &mut Recording<'_>, point: &AttentionPoint<E>) {
        self.add(rec, point);
    }
}

/// Rows of `width` floats that one buffer holds, [`ROWS`] at most.
fn fitting(width: usize, limits: Limits) -> usize {
    let fit = usize::try_from(limits.max_buffer).unwrap_or(usize::MAX) / (4 * matrix::stride(width)).max(1);
    fit.clamp(1, ROWS)
}

/// Rows of A X that wait for their Gram matrix.
struct Tile {
    y: Mat<f32>,
    filled: usize,
}

impl Tile {
    /// Appends A X for one batch of the weights that `p` made; the sequence's X starts at row `x_row`.
    #[allow(clippy::too_many_arguments, reason = "the operands of a product")]
    fn add<E: Elem>(
        &mut self,
        rec: &mut Recording<'_>,
        p: &AttentionWeightsParams,
        batch: usize,
        weights: Mat<f32>,
        x: Mat<E>,
        x_row: usize,
        h: &mut Accumulator,
    ) {
        let (rows, y) = (p.rows as usize, self.y);
        // Short products skip what is above the diagonal, long ones fill the device.
        let most = (rows / 4).next_multiple_of(64).clamp(64, 512);
        let mut start = 0;
        while start < rows {
            let n = most.min(rows - start).min(y.rows - self.filled);
            let last = p.i0 as usize + (start + n - 1) * p.step as usize;
            let p = MatmulNnParams {
                n: n as u32,
                m: y.cols as u32,
                k: last as u32 + 1,
                lda: weights.ld as u32,
                ldb: x.ld as u32,
                ldc: y.ld as u32,
                a_offset: ((batch * rows + start) * weights.ld) as u32,
                b_offset: (x_row * x.ld) as u32,
                c_offset: (self.filled * y.ld) as u32,
                alpha: 1.0,
                beta: 0.0,
            };
            kernels::matmul_nn(rec, p, weights.buffer, x.buffer, y.buffer);
            start += n;
            self.filled += n;
            if self.filled == y.rows {
                self.flush(rec, h);
            }
        }
    }

    fn flush(&mut self, rec: &mut Recording<'_>, h: &mut Accumulator) {
        h.add(rec, self.y, self.filled);
        self.filled = 0;
    }
}

/// Second moments of the heads of a matrix, [n_head · d_head, block]: head by head, except where a head's columns do not start on whole
/// strides. Then all heads are one block, of which the diagonal counts.
struct HeadMoments {
    d_head: usize,
    n_head: usize,
    n_tok: usize,
    c: Mat<f32>,
}

impl HeadMoments {
    fn new(rec: &mut Recording<'_>, n_head: usize, d_head: usize) -> Self {
        let block = if d_head.is_multiple_of(STRIDE_ALIGN) { d_head } else { n_head * d_head };
        Self { d_head, n_head, n_tok: 0, c: Mat::zeros(rec, "head moments", n_head * d_head, block) }
    }

    /// C_h += X_hᵀ X_h for the heads of x, [n_tok, n_head · d_head].
    fn add(&mut self, rec: &mut Recording<'_>, x: Mat<f32>) {
        self.n_tok += x.rows;
        let block = self.c.cols;
        let p = MatmulTnParams {
            n: block as u32,
            m: block as u32,
            k: x.rows as u32,
            lda: x.ld as u32,
            ldb: x.ld as u32,
            ldc: self.c.ld as u32,
            a_batch: matrix::stride(block) as u32,
            b_batch: matrix::stride(block) as u32,
            c_batch: (block * self.c.ld) as u32,
            batches: (self.c.rows / block) as u32,
            alpha: 1.0,
            beta: 1.0,
            ..Default::default()
        };
        kernels::matmul_tn(rec, p, x.buffer, x.buffer, self.c.buffer);
    }

    fn download(self, rec: &mut Recording<'_>) -> PendingMoments {
        let pending = self.c.download(rec);
        self.c.free(rec);
        PendingMoments { d_head: self.d_head, n_head: self.n_head, n_tok: self.n_tok, block: self.c.cols, pending }
    }
}

/// W_Oᵀ W_O of every key/value head, the mean over the query heads of its group: what an error of a value costs at the attention's output.
/// `w_o` is [d_model, n_head · d_head] on the device; the result [n_kv, d_head, d_head] on the host.
pub fn output_metric(engine: &mut dyn Engine, spec: &ModelSpec, w_o: &Weight) -> Result<Vec<f32>> {
    let mut rec = Recording::new();
    let mut moments = HeadMoments::new(&mut rec, spec.n_head, spec.d_head);
    let wide = Panels::widened(&mut rec, w_o);
    wide.iter().for_each(|panel| moments.add(&mut rec, panel.mat));
    wide.free(&mut rec);
    // Sums, not means over the rows of W_O.
    let rows = moments.n_tok as f32;
    let pending = moments.download(&mut rec);
    let c = pending.take(&mut engine.run(rec)?, "output projection")?;
    let (size, group) = (spec.d_head * spec.d_head, spec.n_head / spec.n_kv);
    let sum = |heads: &[f32], at: usize| heads.iter().skip(at).step_by(size).sum::<f32>();
    Ok(c.chunks(group * size).flat_map(|heads| (0..size).map(move |at| sum(heads, at) * rows / group as f32)).collect())
}

struct PendingMoments {
    d_head: usize,
    n_head: usize,
    n_tok: usize,
    block: usize,
    pending: PendingMat<f32>,
}

impl PendingMoments {
    /// [n_head, d_head, d_head], divided by the number of tokens.
    fn take(self, downloads: &mut Downloads, what: &str) -> Result<Vec<f32>> {
        let sums = self.pending.take(downloads)?;
        finite(&sums, what)?;
        let scale = 1.0 / self.n_tok.max(1) as f32;
        let d = self.d_head;
        let rows = (0..self.n_head * d).map(|row| (row, row / d * d % self.block));
        Ok(rows.flat_map(|(row, column)| sums[row * self.block + column..][..d].iter().map(|v| v * scale)).collect())
    }
}

/// Downloads under way.
pub struct PendingAttention {
    h_v: Vec<PendingGram>,
    c_q: PendingMoments,
    c_k: PendingMoments,
}

impl PendingAttention {
    /// # Errors
    /// `Kind::Numeric` names the statistic that is not finite: the activations overflowed.
    pub fn take(self, downloads: &mut Downloads) -> Result<AttentionMoments> {
        let d_head = self.c_q.d_head;
        let h_v = self.h_v.into_iter().enumerate().map(|(g, h)| h.take(downloads, format!("attention-weighted Gram matrix of head {g}")));
        Ok(AttentionMoments {
            d_head,
            h_v: h_v.collect::<Result<_>>()?,
            c_q: self.c_q.take(downloads, "second moment of the queries")?,
            c_k: self.c_k.take(downloads, "second moment of the keys")?,
        })
    }
}

/// The statistics of one block, on the host. Means over tokens.
#[derive(Clone, Debug)]
pub struct AttentionMoments {
    pub d_head: usize,
    /// Per key/value head; `n_tok` counts the rows of A X, those of all query heads of the group.
    pub h_v: Vec<Gram>,
    /// [n_head, d_head, d_head], after the rotary embedding.
    pub c_q: Vec<f32>,
    /// [n_kv, d_head, d_head], after the rotary embedding.
    pub c_k: Vec<f32>,
}

/// What the errors of rows of W_Q and W_K are weighed by, head by head: L = tr(G E H Eᵀ).
#[derive(Clone, Debug)]
pub struct QueryKeyMetric {
    pub d_head: usize,
    /// [n_head, d_head, d_head].
    pub g_q: Vec<f32>,
    /// [n_kv, d_head, d_head].
    pub g_k: Vec<f32>,
}

impl AttentionMoments {
    /// G_Q[h] from C_K of the head's group, G_K[g] from the mean of C_Q over the group's query heads; both averaged over positions by
    /// `rope`, `None` for models without rotary embedding.
    pub fn row_metric(&self, rope: Option<&RopeAverage>) -> QueryKeyMetric {
        let size = self.d_head * self.d_head;
        let group = self.c_q.len() / self.c_k.len().max(1);
        let average = |c: &[f32]| rope.map_or_else(|| c.to_vec(), |rope| rope.average(c));
        let per_kv: Vec<Vec<f32>> = self.c_k.chunks(size).map(average).collect();
        let mean = |heads: &[f32]| -> Vec<f32> {
            let sum = |at: usize| heads.iter().skip(at).step_by(size).map(|v| f64::from(*v)).sum::<f64>();
            (0..size).map(|at| (sum(at) / group as f64) as f32).collect()
        };
        QueryKeyMetric {
            d_head: self.d_head,
            g_q: per_kv.iter().flat_map(|g| std::iter::repeat_n(g, group)).flatten().copied().collect(),
            g_k: self.c_q.chunks(group * size).flat_map(|heads| average(&mean(heads))).collect(),
        }
    }
}
