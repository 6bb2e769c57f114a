//! The mean of Rᵀ C R over positions, R the rotary embedding: what a second moment after the embedding means before it.
//!
//! q_rot = R_l q at position l with R_l = [[cos, −sin], [sin, cos]] (half-split, diagonal blocks of d_head / 2), so an error of a row of
//! W_Q becomes R_l times it, and what weighs q_rot with C weighs the row with R_lᵀ C R_l. Positions of queries and of keys are taken as
//! independent and uniform, as aespa does (arXiv 2402.08958). With half × half tables CC_ij = mean_l cos_i cos_j, SS_ij = mean_l sin_i
//! sin_j, CS_ij = mean_l cos_i sin_j, and C in four blocks (· elementwise):
//!   G11 =  CC·C11 + CS·C12 + CSᵀ·C21 + SS·C22      G12 = −CS·C11 + CC·C12 − SS·C21 + CSᵀ·C22
//!   G21 = −CSᵀ·C11 − SS·C12 + CC·C21 + CS·C22      G22 =  SS·C11 − CSᵀ·C12 − CS·C21 + CC·C22
//! Four multiply-adds an element instead of two products per position. All in f64.

use crate::model::Rope;

/// The three tables, for one model and sequence length.
#[derive(Clone, Debug)]
pub struct RopeAverage {
    half: usize,
    /// mean cos_i cos_j, mean sin_i sin_j, mean cos_i sin_j; [half, half].
    cc: Vec<f64>,
    ss: Vec<f64>,
    cs: Vec<f64>,
}

impl RopeAverage {
    /// Positions 0..seq_len. YaRN's attention factor multiplies cos and sin here as it does in the forward pass: the embedding is R times
    /// that factor, and so is its derivative.
    pub fn new(rope: &Rope, d_head: usize, seq_len: usize) -> Self {
        let (half, factor, inv_freq) = (d_head / 2, rope.attention_factor(), rope.inv_freq(d_head, seq_len));
        let [mut cc, mut ss, mut cs] = [(); 3].map(|()| vec![0.0f64; half * half]);
        for position in 0..seq_len {
            let (sin, cos): (Vec<f64>, Vec<f64>) =
                inv_freq.iter().map(|f| (position as f64 * f).sin_cos()).map(|(s, c)| (s * factor, c * factor)).unzip();
            for i in 0..half {
                for j in 0..half {
                    cc[i * half + j] += cos[i] * cos[j];
                    ss[i * half + j] += sin[i] * sin[j];
                    cs[i * half + j] += cos[i] * sin[j];
                }
            }
        }
        let n = seq_len.max(1) as f64;
        [&mut cc, &mut ss, &mut cs].into_iter().flatten().for_each(|v| *v /= n);
        Self { half, cc, ss, cs }
    }

    /// mean_l R_lᵀ C R_l of one head's C [d_head, d_head].
    pub fn average(&self, c: &[f32]) -> Vec<f32> {
        let (half, d) = (self.half, 2 * self.half);
        let mut g = vec![0.0f32; d * d];
        for i in 0..half {
            for j in 0..half {
                let at = |row: usize, col: usize| row * d + col;
                let of = |row: usize, col: usize| f64::from(c[at(row, col)]);
                let (c11, c12, c21, c22) = (of(i, j), of(i, half + j), of(half + i, j), of(half + i, half + j));
                let (cc, ss, cs, sc) = (self.cc[i * half + j], self.ss[i * half + j], self.cs[i * half + j], self.cs[j * half + i]);
                g[at(i, j)] = (cc * c11 + cs * c12 + sc * c21 + ss * c22) as f32;
                g[at(i, half + j)] = (-cs * c11 + cc * c12 - ss * c21 + sc * c22) as f32;
                g[at(half + i, j)] = (-sc * c11 - ss * c12 + cc * c21 + cs * c22) as f32;
                g[at(half + i, half + j)] = (ss * c11 - sc * c12 - cs * c21 + cc * c22) as f32;
            }
        }
        g
    }
}

#[cfg(test)]
mod tests {
    use super::RopeAverage;
    use crate::model::{Rope, Scaling};

    /// mean_l R_lᵀ C R_l with R_l as a matrix.
    fn direct(rope: &Rope, d: usize, seq_len: usize, c: &[f32]) -> Vec<f64> {
        let inv_freq = rope.inv_freq(d, seq_len);
        let mut g = vec![0.0; d * d];
        for l in 0..seq_len {
            let mut r = vec![0.0; d * d];
            for (i, f) in inv_freq.iter().enumerate() {
                let (sin, cos) = (l as f64 * f).sin_cos();
                let (low, high) = (i, i + d / 2);
                for (row, col, v) in [(low, low, cos), (low, high, -sin), (high, low, sin), (high, high, cos)] {
                    r[row * d + col] = v * rope.attention_factor();
                }
            }
            for (i, j) in (0..d * d).map(|at| (at / d, at % d)) {
                let terms = (0..d * d).map(|at| (at / d, at % d)).map(|(a, b)| r[a * d + i] * f64::from(c[a * d + b]) * r[b * d + j]);
                g[i * d + j] += terms.sum::<f64>() / seq_len as f64;
            }
        }
        g
    }

    #[test]
    fn tables_equal_the_mean_over_positions() {
        let yarn =
            Scaling::Yarn { factor: 4.0, beta_fast: 32.0, beta_slow: 1.0, original_positions: 16, truncate: true, attention_factor: 1.3 };
        for (scaling, d, seq_len) in [(Scaling::Default, 8, 13), (Scaling::Default, 2, 1), (yarn, 10, 33)] {
            let rope = Rope { theta: 10_000.0, scaling };
            // Not symmetric: then no block can stand in for another.
            let c: Vec<f32> = (0..d * d).map(|i| ((i * 37 + 11) % 23) as f32 / 7.0 - 1.5).collect();
            let got = RopeAverage::new(&rope, d, seq_len).average(&c);
            for (g, w) in got.iter().zip(direct(&rope, d, seq_len, &c)) {
                assert!((f64::from(*g) - w).abs() <= 1e-6 * (1.0 + w.abs()), "{g} instead of {w}");
            }
        }
    }
}
