//! What the errors of rows of W_Q and W_K cost at the attention's output, measured by random probes.
//!
//! Let O_i = W_O · concat(heads) be the attention's output at token i. To first order an error E of W_Q changes it by J_i vec(E), and the
//! mean over tokens of ‖ΔO_i‖² is vec(E)ᵀ F vec(E) with F = mean_i J_iᵀ J_i: softmax, causal mask, rotary embedding, values, W_O and
//! grouped queries all in it (a Gauss-Newton matrix). With z_i uniform in {−1, +1}^d_model, independent over tokens,
//!   D = Σ_i ∂⟨z_i, O_i⟩ / ∂W = Σ_j g_j x_jᵀ,  the sums over one sequence,  has  E[vec(D) vec(D)ᵀ] = Σ_i J_iᵀ J_i,
//! where g_j is the gradient with respect to the query (or key) of token j before the rotary embedding. So for each head
//!   G_h = mean over probes of Σ_sequences D_h D_hᵀ / n_tok   [d_head, d_head]
//! estimates the partial trace of F over the input channels. If F is nearly a Kronecker product of G and the inputs' H, then
//! tr(G E H Eᵀ) / tr(H) is the mean of ‖ΔO_i‖² over the tokens. Between the heads of one layer, and between Q and K, the G compare.
//!
//! W_V needs no probes: its F is W_Oᵀ W_O and H_V exactly. Cost per probe and sequence of L tokens: the attention backward pass
//! (7 L² d_head flops a head), 2 L d_model n_head d_head for z W_O, twice that for D of queries and keys at most.

use super::attention::QueryKeyMetric;
use super::forward::Batch;
use super::gram::finite;
use super::observer::{AttentionPoint, Observer};
use crate::Result;
use crate::engine::kernels;
use crate::engine::kernels::attention_backward_kv::AttentionBackwardKvParams;
use crate::engine::kernels::attention_backward_q::AttentionBackwardQParams;
use crate::engine::kernels::matmul_nn;
use crate::engine::kernels::matmul_nt::MatmulNtParams;
use crate::engine::kernels::matmul_tn::MatmulTnParams;
use crate::engine::kernels::rope::RopeParams;
use crate::engine::matrix::{self, PendingMat, STRIDE_ALIGN};
use crate::engine::{Buffer, Downloads, Elem, Limits, Mat, Panels, Recording, Weight};
use crate::model::ModelSpec;
use rayon::prelude::*;

/// The accumulators of one block on the device, and what the probes need of it.
pub struct Probe {
    d_head: usize,
    n_head: usize,
    n_kv: usize,
    limits: Limits,
    seed: u64,
    probes: usize,
    /// Windows seen so far: what a window's probes are drawn from besides the seed.
    windows: usize,
    n_tok: usize,
    /// W_O in f32, [d_model, n_head · d_head].
    w_o: Panels,
    cos: Buffer<f32>,
    minus_sin: Buffer<f32>,
    /// [n_head · d_head, d_head] and [n_kv · d_head, d_head].
    g_q: Mat<f32>,
    g_k: Mat<f32>,
}

impl Probe {
    /// Zeroed accumulators. `w_o` is the block's output projection on the device, of which a copy is made; `seq_len` is that of the forward
    /// pass's rotary tables; each window gets `probes` probes.
    pub fn new(rec: &mut Recording<'_>, spec: &ModelSpec, w_o: &Weight, seq_len: usize, probes: usize, seed: u64, limits: Limits) -> Self {
        let (cos, sin) = spec.rope.tables(spec.d_head, seq_len);
        let minus_sin: Vec<f32> = sin.into_iter().map(|s| -s).collect();
        let moments = |rec: &mut Recording<'_>, heads: usize| Mat::zeros(rec, "probe moments", heads * spec.d_head, spec.d_head);
        Self {
            d_head: spec.d_head,
            n_head: spec.n_head,
            n_kv: spec.n_kv,
            limits,
            seed,
            probes,
            windows: 0,
            n_tok: 0,
            w_o: Panels::widened(rec, w_o),
            cos: rec.upload("rope", cos),
            minus_sin: rec.upload("rope", minus_sin),
            g_q: moments(rec, spec.n_head),
            g_k: moments(rec, spec.n_kv),
        }
    }

    /// Records all probes of one batch. Windows are numbered in the order in which they come.
    pub fn add<E: Elem>(&mut self, rec: &mut Recording<'_>, point: &AttentionPoint<E>) {
        for probe in 0..self.probes {
            let dout = self.gradient_of_heads(rec, point.batch, probe);
            let [dq, dk] = self.gradient_of_operands(rec, point, dout);
            dout.free(rec);
            for (gradient, moments) in [(dq, self.g_q), (dk, self.g_k)] {
                self.add_moments(rec, point, gradient, moments);
                gradient.free(rec);
            }
        }
        self.windows += point.batch.n_seq;
        self.n_tok += point.batch.n_tok();
    }

    /// z W_O, [n_tok, n_head · d_head]: the gradient of Σ_i ⟨z_i, O_i⟩ with respect to the heads' outputs.
    fn gradient_of_heads(&self, rec: &mut Recording<'_>, batch: Batch, probe: usize) -> Mat<f32> {
        let d_model = self.w_o.rows();
        let mut signs = vec![0.0f32; batch.n_tok() * d_model];
        signs.par_chunks_mut(d_model).enumerate().for_each(|(row, signs)| {
            probe_signs(self.seed, probe, self.windows + row / batch.seq_len, row % batch.seq_len, signs);
        });
        let z = Mat::upload(rec, "probe", batch.n_tok(), d_model, signs);
        let dout = Mat::alloc(rec, "gradient", batch.n_tok(), self.n_head * self.d_head);
        matmul_nn::by_panels(rec, z, &self.w_o, [1.0, 0.0], dout);
        z.free(rec);
        dout
    }

    /// Gradients with respect to queries and keys before the rotary embedding, shaped like those.
    fn gradient_of_operands<E: Elem>(&self, rec: &mut Recording<'_>, point: &AttentionPoint<E>, dout: Mat<f32>) -> [Mat<f32>; 2] {
        let AttentionPoint { batch, q, k, v, scale, .. } = *point;
        let alloc = |rec: &mut Recording<'_>, like: Mat<f32>| Mat::<f32>::alloc(rec, "gradient", like.rows, like.cols);
        let [dq, dk, dv] = [q, k, v].map(|mat| alloc(rec, mat));
        let statistics = rec.alloc("attention statistics", q.rows * self.n_head * 2);
        let (n_seq, seq_len, n_head, n_kv) = (batch.n_seq as u32, batch.seq_len as u32, self.n_head as u32, self.n_kv as u32);
        let (d_head, ld_q, ld_kv) = (self.d_head as u32, q.ld as u32, k.ld as u32);
        let p = AttentionBackwardQParams { n_seq, seq_len, n_head, n_kv, d_head, ld_q, ld_kv, scale };
        kernels::attention_backward_q(rec, p, q.buffer, k.buffer, v.buffer, dout.buffer, dq.buffer, statistics);
        let p = AttentionBackwardKvParams { n_seq, seq_len, n_head, n_kv, d_head, ld_q, ld_kv, scale };
        kernels::attention_backward_kv(rec, p, q.buffer, k.buffer, v.buffer, dout.buffer, statistics, dk.buffer, dv.buffer);
        rec.free(statistics);
        dv.free(rec);
        // The embedding is linear with the matrix [[cos, −sin], [sin, cos]], times YaRN's factor; its transpose has the other sign of sin.
        for (mat, n_head) in [(dq, n_head), (dk, n_kv)] {
            let p = RopeParams { n_tok: mat.rows as u32, seq_len, n_head, d_head, ld: mat.ld as u32 };
            kernels::rope(rec, p, self.cos, self.minus_sin, mat.buffer);
        }
        [dq, dk]
    }

    /// Adds D_h D_hᵀ of every sequence and head, D = gradientᵀ X, as many heads at a time as fit a buffer.
    fn add_moments<E: Elem>(&self, rec: &mut Recording<'_>, point: &AttentionPoint<E>, gradient: Mat<f32>, moments: Mat<f32>) {
        let (x, d_head, seq_len) = (point.a, self.d_head, point.batch.seq_len);
        // Whole heads that start on whole strides.
        let align = (1..).map(|heads| heads * d_head).find(|columns| columns.is_multiple_of(STRIDE_ALIGN)).unwrap_or(d_head);
        let panels = matrix::row_panels(gradient.cols, 4 * matrix::stride(x.cols), align, self.limits);
        let widest = panels.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let d = Mat::alloc(rec, "probe of the weights", widest, x.cols);
        for sequence in 0..point.batch.n_seq {
            for panel in &panels {
                let p = MatmulTnParams {
                    n: panel.len() as u32,
                    m: x.cols as u32,
                    k: seq_len as u32,
                    lda: gradient.ld as u32,
                    ldb: x.ld as u32,
                    ldc: d.ld as u32,
                    a_offset: (sequence * seq_len * gradient.ld + panel.start) as u32,
                    b_offset: (sequence * seq_len * x.ld) as u32,
                    batches: 1,
                    alpha: 1.0,
                    ..Default::default()
                };
                kernels::matmul_tn(rec, p, gradient.buffer, x.buffer, d.buffer);
                let p = MatmulNtParams {
                    n: d_head as u32,
                    m: d_head as u32,
                    k: d.cols as u32,
                    lda: d.ld as u32,
                    ldw: d.ld as u32,
                    ldc: moments.ld as u32,
                    c_offset: (panel.start * moments.ld) as u32,
                    a_batch: (d_head * d.ld) as u32,
                    w_batch: (d_head * d.ld) as u32,
                    c_batch: (d_head * moments.ld) as u32,
                    batches: (panel.len() / d_head) as u32,
                    alpha: 1.0,
                    beta: 1.0,
                    ..Default::default()
                };
                kernels::matmul_nt(rec, p, d.buffer, d.buffer.as_stored(), Buffer::none(), moments.buffer);
            }
        }
        d.free(rec);
    }

    /// Records the read-back and gives everything back.
    pub fn download(self, rec: &mut Recording<'_>) -> PendingProbe {
        let pending = [self.g_q, self.g_k].map(|g| g.download(rec));
        [self.g_q, self.g_k].into_iter().for_each(|g| g.free(rec));
        self.w_o.free(rec);
        rec.free(self.cos);
        rec.free(self.minus_sin);
        PendingProbe { d_head: self.d_head, draws: self.n_tok * self.probes, pending }
    }
}

impl<E: Elem> Observer<E> for Probe {
    fn attention(&mut self, rec: &mut Recording<'_>, point: &AttentionPoint<E>) {
        self.add(rec, point);
    }
}

/// Downloads under way.
pub struct PendingProbe {
    d_head: usize,
    draws: usize,
    pending: [PendingMat<f32>; 2],
}

impl PendingProbe {
    /// G of every head; see the top of the file for the scale.
    ///
    /// # Errors
    /// `Kind::Numeric` when a value is not finite: the activations overflowed.
    pub fn take(self, downloads: &mut Downloads) -> Result<QueryKeyMetric> {
        let scale = 1.0 / self.draws.max(1) as f32;
        let [g_q, g_k] = self.pending.map(|pending| -> Result<Vec<f32>> {
            let sums = pending.take(downloads)?;
            finite(&sums, "probe of the attention")?;
            Ok(sums.into_iter().map(|v| v * scale).collect())
        });
        Ok(QueryKeyMetric { d_head: self.d_head, g_q: g_q?, g_k: g_k? })
    }
}

/// The signs z of one token's channels, ±1: a hash of where they stand, so that they depend on neither batches nor engines.
pub fn probe_signs(seed: u64, probe: usize, window: usize, token: usize, signs: &mut [f32]) {
    let place = [probe, window, token].into_iter().fold(mix(seed), |hash, part| mix(hash ^ part as u64));
    for (word, signs) in signs.chunks_mut(64).enumerate() {
        let bits = mix(place ^ word as u64);
        for (bit, sign) in signs.iter_mut().enumerate() {
            *sign = if bits >> bit & 1 == 0 { 1.0 } else { -1.0 };
        }
    }
}

/// One step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection whose output bits all depend on all input bits.
fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::probe_signs;

    #[test]
    fn signs_are_balanced_and_independent_between_places() {
        let draw = |seed, probe, window, token| {
            let mut signs = vec![0.0f32; 4096];
            probe_signs(seed, probe, window, token, &mut signs);
            signs
        };
        let places = [(1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (1, 0, 1, 1)];
        let all: Vec<Vec<f32>> = places.iter().map(|(s, p, w, t)| draw(*s, *p, *w, *t)).collect();
        for (i, a) in all.iter().enumerate() {
            // Five standard deviations of a sum of 4096 signs.
            assert!(a.iter().sum::<f32>().abs() < 320.0 && a.iter().all(|v| v.abs() == 1.0), "{:?}", places[i]);
            for b in &all[..i] {
                assert!(a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>().abs() < 320.0, "{:?}", places[i]);
            }
        }
    }
}
