use super::cross_entropy::{argmax, sum_of_exp};
use super::{Case, Want};
use aespa_gpu::engine::kernels::{self, kl_divergence::KlDivergenceParams};
use aespa_gpu::engine::matrix::stride;

pub fn cases() -> Vec<Case> {
    let sizes = [(0, 8, 8), (1, 1, 1), (3, 255, 255), (3, 256, 64), (5, 1021, 300), (70, 257, 256), (2, 50_003, 16_384)];
    sizes.into_iter().map(|(n_tok, vocab, chunk)| case(n_tok, vocab, chunk)).collect()
}

fn case(n_tok: usize, vocab: usize, chunk: usize) -> Case {
    Case::new(format!("{n_tok} x {vocab} in chunks of {chunk}"), move |io| {
        let mut rows = |scale: f32| -> Vec<Vec<f32>> {
            let row = |_| io.rng.values(vocab).into_iter().map(|v| v * scale).collect();
            (0..n_tok).map(row).collect()
        };
        let (logits, reference) = (rows(9.0), rows(11.0));
        let state = io.output::<f32>("state", n_tok * 8);
        for col0 in (0..vocab).step_by(chunk) {
            let cols = chunk.min(vocab - col0);
            let ld = stride(cols);
            let padding = vec![f32::NAN; ld - cols];
            let piece = |rows: &[Vec<f32>]| rows.iter().flat_map(|r| r[col0..col0 + cols].iter().chain(&padding).copied()).collect();
            let (l, r) = (io.upload(piece(&logits)), io.upload(piece(&reference)));
            let p =
                KlDivergenceParams { n_tok: n_tok as u32, cols: cols as u32, ld: ld as u32, col0: col0 as u32, first: (col0 == 0).into() };
            kernels::kl_divergence(&mut io.rec, p, l, r, state.buffer);
        }
        io.expect(state, |i| {
            let (l, r) = (&logits[i / 8], &reference[i / 8]);
            let ((at, m), (at_ref, n)) = (argmax(l), argmax(r));
            match i % 8 {
                0 => Want::Near(m, 0.0),
                1 => sum_of_exp(l.iter().map(|l| (f64::from(*l) - m, 1.0))),
                2 => Want::Near(n, 0.0),
                3 => sum_of_exp(r.iter().map(|r| (f64::from(*r) - n, 1.0))),
                4 => sum_of_exp(l.iter().zip(r).map(|(l, r)| (f64::from(*r) - n, f64::from(*r) - f64::from(*l)))),
                5 => Want::Near(at as f64, 0.0),
                6 => Want::Near(at_ref as f64, 0.0),
                _ => Want::Near(0.0, 0.0),
            }
        });
    })
}
