use super::{Case, EPS, Io, Want};
use aespa_gpu::engine::Buffer;
use aespa_gpu::engine::kernels::{self, attention_backward_q::AttentionBackwardQParams};
use aespa_gpu::engine::matrix::stride;
use std::f64::consts::LN_2;

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub n_seq: usize,
    pub seq_len: usize,
    pub n_head: usize,
    pub n_kv: usize,
    pub d_head: usize,
}

/// Around tiles of 32 and 64 tokens, 16 elements of a head, 64 and 128 columns.
pub fn shapes() -> Vec<Shape> {
    let all = [
        (1, 1, 1, 1, 2),
        (2, 5, 2, 1, 8),
        (1, 31, 2, 2, 10),
        (1, 32, 1, 1, 64),
        (2, 33, 3, 1, 16),
        (1, 63, 2, 1, 66),
        (1, 64, 4, 2, 80),
        (3, 65, 2, 2, 6),
        (1, 97, 4, 2, 128),
        (1, 131, 1, 1, 130),
        (1, 70, 2, 1, 256),
        (0, 4, 1, 1, 8),
    ];
    all.into_iter().map(|(n_seq, seq_len, n_head, n_kv, d_head)| Shape { n_seq, seq_len, n_head, n_kv, d_head }).collect()
}

/// A value and how far off an f32 computation may be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounded {
    pub value: f64,
    pub error: f64,
}

impl Bounded {
    pub fn want(self) -> Want {
        Want::Near(self.value, self.error)
    }
}

/// Attention's inputs, and what its backward pass is made of, in f64.
pub struct Problem {
    pub shape: Shape,
    pub ld_q: usize,
    pub ld_kv: usize,
    pub scale: f32,
    /// q, k, v, dout on the device and here.
    pub buffers: [Buffer<f32>; 4],
    pub values: [Vec<f64>; 4],
    /// Per token and head: log2 of the norm, delta, and for each key of the token's sequence up to it P and scale P (dP − delta).
    pub rows: Vec<Row>,
}

pub struct Row {
    pub log_norm: Bounded,
    pub delta: Bounded,
    pub weights: Vec<Bounded>,
    pub slopes: Vec<Bounded>,
}

impl Problem {
    pub fn new(io: &mut Io, shape: Shape, sharp: f32) -> Self {
        let Shape { n_seq, seq_len, n_head, n_kv, d_head } = shape;
        let tokens = n_seq * seq_len;
        let (ld_q, ld_kv) = (stride(n_head * d_head) + 8, stride(n_kv * d_head) + 16);
        let (q, qs) = io.matrix::<f32>(tokens, n_head * d_head, ld_q);
        let (k, ks) = io.matrix::<f32>(tokens, n_kv * d_head, ld_kv);
        let (v, vs) = io.matrix::<f32>(tokens, n_kv * d_head, ld_kv);
        let (dout, douts) = io.matrix::<f32>(tokens, n_head * d_head, ld_q);
        let scale = sharp / (d_head as f32).sqrt();
        let (buffers, values) = ([q, k, v, dout], [qs, ks, vs, douts]);
        let mut problem = Self { shape, ld_q, ld_kv, scale, buffers, values, rows: Vec::new() };
        problem.rows = (0..tokens * n_head).map(|row| problem.row(row / n_head, row % n_head)).collect();
        problem
    }

    /// Element e of head `head`'s query (or dout) at a token.
    pub fn q_at(&self, which: usize, token: usize, head: usize, e: usize) -> f64 {
        self.values[which][token * self.ld_q + head * self.shape.d_head + e]
    }

    /// Element e of the key (or value) that query head `head` reads.
    pub fn kv_at(&self, which: usize, token: usize, head: usize, e: usize) -> f64 {
        let kv = head * self.shape.n_kv / self.shape.n_head;
        self.values[which][token * self.ld_kv + kv * self.shape.d_head + e]
    }

    fn row(&self, token: usize, head: usize) -> Row {
        let (d, scale) = (self.shape.d_head, f64::from(self.scale));
        let keys = token / self.shape.seq_len * self.shape.seq_len..=token;
        let product = |a: usize, b: usize, t: usize| {
            let terms = (0..d).map(|e| self.q_at(a, token, head, e) * self.kv_at(b, t, head, e));
            terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
        };
        let scores: Vec<(f64, f64)> = keys.clone().map(|t| product(0, 1, t)).map(|(s, size)| (scale * s, scale * size)).collect();
        let slopes: Vec<(f64, f64)> = keys.map(|t| product(3, 2, t)).collect();
        let n = scores.len() as f64;
        let highest = scores.iter().map(|s| s.0).fold(f64::MIN, f64::max);
        let spread = scores.iter().map(|s| highest - s.0).fold(0.0, f64::max);
        let norm: f64 = scores.iter().map(|s| (s.0 - highest).exp()).sum();
        let log_norm = highest + norm.ln();
        // As for the attention kernel: errors of scores, exp and sums; and those of the logarithm of the norm, which a weight is made from.
        let score_error = EPS * (d as f64 + 3.0) * scores.iter().map(|s| s.1).fold(0.0, f64::max);
        let log_error = score_error + EPS * (n + 11.0 + 4.0 * spread + 4.0 * log_norm.abs());
        let relative = score_error + log_error + EPS * (4.0 + 4.0 * spread);
        let weights: Vec<Bounded> =
            scores.iter().map(|s| (s.0 - log_norm).exp()).map(|w| Bounded { value: w, error: w * relative }).collect();
        let of_slope = |size: f64| EPS * (d as f64 + 2.0) * size;
        let terms = || weights.iter().zip(&slopes);
        let delta = Bounded {
            value: terms().map(|(w, s)| w.value * s.0).sum(),
            error: terms().map(|(w, s)| w.value * (of_slope(s.1) + s.0.abs() * (relative + EPS * (n + 4.0)))).sum(),
        };
        let slopes = terms()
            .map(|(w, s)| {
                let value = scale * w.value * (s.0 - delta.value);
                let inner = of_slope(s.1) + delta.error + 2.0 * EPS * (s.0.abs() + delta.value.abs());
                Bounded { value, error: value.abs() * (relative + 4.0 * EPS) + scale * w.value * inner }
            })
            .collect();
        Row { log_norm: Bounded { value: log_norm / LN_2, error: log_error / LN_2 }, delta, weights, slopes }
    }
}

/// Σ a b for factors with errors and exact values, summed in f32.
pub fn sum(terms: impl Iterator<Item = (Bounded, f64)>) -> Bounded {
    let (value, error, size, count) = terms.fold((0.0, 0.0, 0.0, 0.0), |(value, error, size, count), (a, b)| {
        (value + a.value * b, error + a.error * b.abs(), size + (a.value * b).abs(), count + 1.0)
    });
    Bounded { value, error: error + EPS * (count + 3.0) * size }
}

pub fn cases() -> Vec<Case> {
    shapes().into_iter().flat_map(|shape| [case(shape, 1.0), case(shape, 30.0)]).collect()
}

/// `sharp` multiplies the usual scale: large scores make nearly one-hot weights.
fn case(shape: Shape, sharp: f32) -> Case {
    Case::new(format!("{shape:?}, sharpness {sharp}"), move |io| {
        let problem = Problem::new(io, shape, sharp);
        let Shape { n_seq, seq_len, n_head, n_kv, d_head } = shape;
        let tokens = n_seq * seq_len;
        let dq = io.output::<f32>("dq", tokens * problem.ld_q);
        let statistics = io.output::<f32>("statistics", tokens * n_head * 2);
        let p = AttentionBackwardQParams {
            n_seq: n_seq as u32,
            seq_len: seq_len as u32,
            n_head: n_head as u32,
            n_kv: n_kv as u32,
            d_head: d_head as u32,
            ld_q: problem.ld_q as u32,
            ld_kv: problem.ld_kv as u32,
            scale: problem.scale,
        };
        let [q, k, v, dout] = problem.buffers;
        kernels::attention_backward_q(&mut io.rec, p, q, k, v, dout, dq.buffer, statistics.buffer);
        io.expect_matrix(dq, n_head * d_head, problem.ld_q, |token, column| {
            let (head, e) = (column / d_head, column % d_head);
            let first = token / seq_len * seq_len;
            let slopes = problem.rows[token * n_head + head].slopes.iter().enumerate();
            sum(slopes.map(|(t, slope)| (*slope, problem.kv_at(1, first + t, head, e)))).want()
        });
        io.expect(statistics, |i| if i % 2 == 0 { problem.rows[i / 2].log_norm } else { problem.rows[i / 2].delta }.want());
    })
}
