use super::{Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, cross_entropy::CrossEntropyParams};
use aespa_gpu::engine::matrix::stride;

pub fn cases() -> Vec<Case> {
    let sizes = [(0, 8, 8), (1, 1, 1), (3, 255, 255), (3, 256, 64), (5, 1021, 300), (70, 257, 256), (2, 50_003, 16_384)];
    sizes.into_iter().map(|(n_tok, vocab, chunk)| case(n_tok, vocab, chunk)).collect()
}

fn case(n_tok: usize, vocab: usize, chunk: usize) -> Case {
    Case::new(format!("{n_tok} x {vocab} in chunks of {chunk}"), move |io| {
        let mut logits: Vec<Vec<f32>> = (0..n_tok).map(|_| io.rng.values(vocab).into_iter().map(|v| v * 12.0).collect()).collect();
        // Two equal maxima in every third row: the first one counts.
        for row in logits.iter_mut().step_by(3) {
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            row[vocab - 1] = max;
        }
        let target: Vec<u32> = (0..n_tok).map(|_| io.rng.below(vocab) as u32).collect();
        let targets = io.upload(target.clone());
        let state = io.output::<f32>("state", n_tok * 4);
        for col0 in (0..vocab).step_by(chunk) {
            let cols = chunk.min(vocab - col0);
            let ld = stride(cols);
            let padding = vec![f32::NAN; ld - cols];
            let data: Vec<f32> = logits.iter().flat_map(|row| row[col0..col0 + cols].iter().chain(&padding).copied()).collect();
            let data = io.upload(data);
            let p =
                CrossEntropyParams { n_tok: n_tok as u32, cols: cols as u32, ld: ld as u32, col0: col0 as u32, first: (col0 == 0).into() };
            kernels::cross_entropy(&mut io.rec, p, data, targets, state.buffer);
        }
        io.expect(state, |i| {
            let (row, wanted) = (&logits[i / 4], target[i / 4] as usize);
            let (at, max) = argmax(row);
            match i % 4 {
                0 => Want::Near(max, 0.0),
                1 => sum_of_exp(row.iter().map(|l| (f64::from(*l) - max, 1.0))),
                2 => Want::Near(row[wanted].into(), 0.0),
                _ => Want::Near(at as f64, 0.0),
            }
        });
    })
}

/// Index and value of the first of the largest.
pub fn argmax(row: &[f32]) -> (usize, f64) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (row.iter().position(|v| *v == max).unwrap_or(0), max.into())
}

/// Σ factor · exp(x): WGSL's exp is good to 3 + 2 |x| units in the last place, x itself is rounded, and k terms are summed.
pub fn sum_of_exp(terms: impl Iterator<Item = (f64, f64)>) -> Want {
    let (mut sum, mut error, mut count, mut magnitude) = (0.0, 0.0, 0.0, 0.0);
    for (x, factor) in terms {
        let term = factor * x.exp();
        sum += term;
        magnitude += term.abs();
        error += term.abs() * EPS * (5.0 + 4.0 * x.abs());
        count += 1.0;
    }
    Want::Near(sum, error + EPS * count * magnitude)
}
