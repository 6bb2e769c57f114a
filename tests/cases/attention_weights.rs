use super::{Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, attention_weights::AttentionWeightsParams};
use aespa_gpu::engine::matrix::stride;

pub fn cases() -> Vec<Case> {
    // (rows, i0, step, columns past the last key, d_head, batches): around tiles of 32 rows, 64 keys and 16 elements of a head.
    let shapes = [
        (1, 0, 1, 0, 2, 1),
        (5, 0, 1, 3, 8, 2),
        (32, 0, 1, 0, 16, 1),
        (33, 31, 1, 0, 10, 3),
        (64, 64, 1, 0, 64, 1),
        (7, 130, 1, 150, 80, 1),
        (31, 3, 5, 9, 18, 2),
        (40, 0, 3, 0, 128, 1),
        (3, 2, 64, 1, 256, 1),
        (0, 0, 1, 4, 8, 1),
    ];
    shapes.into_iter().flat_map(|s| [case(s, 1.0), case(s, 30.0)]).collect()
}

/// The second of three heads of q and of two of k. `sharp` multiplies the usual scale: large scores make nearly one-hot weights.
fn case((rows, i0, step, extra, d_head, batches): (usize, usize, usize, usize, usize, usize), sharp: f32) -> Case {
    let name = format!("{batches} x {rows} rows from {i0} by {step}, {extra} more columns, heads of {d_head}, sharpness {sharp}");
    Case::new(name, move |io| {
        let tokens = i0 + rows.saturating_sub(1) * step + 1;
        let cols = tokens + extra;
        let (ld_q, ld_k, ld_out) = (3 * d_head + 2, 2 * d_head + 4, stride(cols) + 8);
        let (q, qs) = io.matrix::<f32>(batches * tokens, 3 * d_head, ld_q);
        let (k, ks) = io.matrix::<f32>(batches * tokens, 2 * d_head, ld_k);
        let out_batch = rows * ld_out + 16;
        let out = io.output::<f32>("out", batches * out_batch);
        let p = AttentionWeightsParams {
            rows: rows as u32,
            i0: i0 as u32,
            step: step as u32,
            cols: cols as u32,
            d_head: d_head as u32,
            ld_q: ld_q as u32,
            ld_k: ld_k as u32,
            ld_out: ld_out as u32,
            q_offset: d_head as u32,
            k_offset: d_head as u32,
            q_batch: (tokens * ld_q) as u32,
            k_batch: (tokens * ld_k) as u32,
            out_batch: out_batch as u32,
            batches: batches as u32,
            scale: sharp / (d_head as f32).sqrt(),
        };
        kernels::attention_weights(&mut io.rec, p, q, k, out.buffer);
        let row_of = |batch: usize, row: usize| {
            let i = i0 + row * step;
            let query = &qs[(batch * tokens + i) * ld_q + d_head..][..d_head];
            let (mut scores, mut error) = (Vec::new(), 0.0f64);
            for j in 0..=i {
                let key = &ks[(batch * tokens + j) * ld_k + d_head..][..d_head];
                let terms = query.iter().zip(key).map(|(q, k)| q * k);
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                scores.push(f64::from(p.scale) * sum);
                error = error.max(f64::from(p.scale) * size * (d_head as f64 + 3.0));
            }
            let highest = scores.iter().copied().fold(f64::MIN, f64::max);
            let spread = scores.iter().map(|s| highest - s).fold(0.0, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - highest).exp()).collect();
            let norm: f64 = weights.iter().sum();
            // As for the attention kernel: errors of the scores, of exp, of the sum.
            let relative = EPS * (2.0 * error + 2.0 * (3.0 + 4.0 * spread) + 2.0 * scores.len() as f64 + 8.0);
            weights.into_iter().map(|w| Want::Near(w / norm, w / norm * relative)).collect::<Vec<_>>()
        };
        let wants: Vec<Vec<Want>> = (0..batches * rows).map(|r| row_of(r / rows, r % rows)).collect();
        io.expect(out, |index| {
            let (batch, rest) = (index / out_batch, index % out_batch);
            let (row, j) = (rest / ld_out, rest % ld_out);
            if row >= rows || j >= stride(cols) {
                return Want::Same;
            }
            wants[batch * rows + row].get(j).copied().unwrap_or(Want::Near(0.0, 0.0))
        });
    })
}
