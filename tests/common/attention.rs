//! The attention of a LLaMA folder's first block in f64, written from the definitions: what statistics, probes and losses are held to.

use aespa_gpu::model::ModelSpec;
use std::array;

/// W_Q, W_K, W_V or W_O in [`Attention::w`].
pub const Q: usize = 0;
pub const K: usize = 1;
pub const V: usize = 2;
pub const O: usize = 3;

/// Matrices are row-major; the rows of queries, keys and values hold all heads.
pub struct Attention {
    pub d_model: usize,
    pub d_head: usize,
    pub n_head: usize,
    pub n_kv: usize,
    /// Tokens of a window.
    pub length: usize,
    /// [length, d_head / 2].
    cos: Vec<f64>,
    sin: Vec<f64>,
    /// Per window [length, d_model]: the normed input.
    pub x: Vec<Vec<f64>>,
    /// [d_out, d_in].
    pub w: [Vec<f64>; 4],
    /// [d_out].
    b: [Vec<f64>; 4],
}

impl Attention {
    /// `get` reads a tensor by its name in a checkpoint. Biases that it does not find are 0.
    pub fn new(spec: &ModelSpec, windows: &[Vec<u32>], get: impl Fn(&str) -> Option<Vec<f32>>) -> Self {
        let read = |name: &str| get(name).map(|values| values.into_iter().map(f64::from).collect::<Vec<f64>>());
        let must = |name: &str| read(name).unwrap_or_else(|| panic!("no {name}"));
        let (table, gain) = (must("model.embed_tokens.weight"), must("model.layers.0.input_layernorm.weight"));
        let (d_model, length) = (spec.d_model, windows[0].len());
        let normed = |id: u32| -> Vec<f64> {
            let row = &table[id as usize * d_model..][..d_model];
            let mean = row.iter().map(|v| v * v).sum::<f64>() / d_model as f64;
            row.iter().zip(&gain).map(|(v, g)| v / (mean + f64::from(spec.norm_eps)).sqrt() * g).collect()
        };
        let factor = spec.rope.attention_factor();
        let inv_freq = spec.rope.inv_freq(spec.d_head, length);
        let angles = (0..length).flat_map(|l| inv_freq.iter().map(move |f| l as f64 * f));
        let (cos, sin) = angles.map(|a| (a.cos() * factor, a.sin() * factor)).unzip();
        let x = windows.iter().map(|ids| ids.iter().flat_map(|id| normed(*id)).collect()).collect();
        let name = |i: usize, suffix: &str| format!("model.layers.0.self_attn.{}_proj.{suffix}", ["q", "k", "v", "o"][i]);
        let w: [Vec<f64>; 4] = array::from_fn(|i| must(&name(i, "weight")));
        let d_in = [d_model, d_model, d_model, spec.n_head * spec.d_head];
        let b = array::from_fn(|i| read(&name(i, "bias")).unwrap_or_else(|| vec![0.0; w[i].len() / d_in[i]]));
        Self { d_model, d_head: spec.d_head, n_head: spec.n_head, n_kv: spec.n_kv, length, cos, sin, x, w, b }
    }

    pub fn n_tok(&self) -> usize {
        self.x.len() * self.length
    }

    /// x Wᵀ + b.
    fn linear(&self, x: &[f64], which: usize) -> Vec<f64> {
        let d_in = self.w[which].len() / self.b[which].len();
        let row = |x: &[f64]| -> Vec<f64> {
            self.w[which].chunks(d_in).zip(&self.b[which]).map(|(w, b)| b + w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()).collect()
        };
        x.chunks(d_in).flat_map(row).collect()
    }

    fn rotated(&self, mut rows: Vec<f64>, heads: usize) -> Vec<f64> {
        let (d, half) = (self.d_head, self.d_head / 2);
        for (t, row) in rows.chunks_mut(heads * d).enumerate() {
            for head in row.chunks_mut(d) {
                for j in 0..half {
                    let (a, b, c, s) = (head[j], head[j + half], self.cos[t * half + j], self.sin[t * half + j]);
                    (head[j], head[j + half]) = (a * c - b * s, b * c + a * s);
                }
            }
        }
        rows
    }

    pub fn queries(&self, window: usize) -> Vec<f64> {
        self.rotated(self.linear(&self.x[window], Q), self.n_head)
    }

    pub fn keys(&self, window: usize) -> Vec<f64> {
        self.rotated(self.linear(&self.x[window], K), self.n_kv)
    }

    /// Causal softmax weights of a head, [length, length].
    pub fn weights(&self, q: &[f64], k: &[f64], head: usize) -> Vec<f64> {
        let Self { d_head: d, n_head, n_kv, length, .. } = *self;
        let kv = head * n_kv / n_head;
        let mut a = vec![0.0; length * length];
        for i in 0..length {
            for j in 0..=i {
                let score: f64 = (0..d).map(|e| q[(i * n_head + head) * d + e] * k[(j * n_kv + kv) * d + e]).sum();
                a[i * length + j] = (score / (d as f64).sqrt()).exp();
            }
            let norm: f64 = a[i * length..][..length].iter().sum();
            a[i * length..][..length].iter_mut().for_each(|v| *v /= norm);
        }
        a
    }

    /// What the heads give, [length, n_head, d_head].
    pub fn context(&self, window: usize) -> Vec<f64> {
        let Self { d_head: d, n_head, n_kv, length, .. } = *self;
        let (q, k, v) = (self.queries(window), self.keys(window), self.linear(&self.x[window], V));
        let mut context = vec![0.0; length * n_head * d];
        for head in 0..n_head {
            let a = self.weights(&q, &k, head);
            for (i, e) in (0..length * d).map(|at| (at / d, at % d)) {
                context[(i * n_head + head) * d + e] =
                    (0..=i).map(|j| a[i * length + j] * v[(j * n_kv + head * n_kv / n_head) * d + e]).sum();
            }
        }
        context
    }

    /// The attention's output, [length, d_model].
    pub fn output(&self, window: usize) -> Vec<f64> {
        self.linear(&self.context(window), O)
    }
}
