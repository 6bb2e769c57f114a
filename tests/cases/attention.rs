use super::{Case, EPS, TestElem, Want};
use aespa_gpu::engine::kernels::{self, attention::AttentionParams};
use aespa_gpu::engine::matrix::stride;
use half::f16;

pub fn cases() -> Vec<Case> {
    // (n_seq, seq_len, n_head, n_kv, d_head): around tiles of 32 queries, 64 keys, 16 elements of a head and 64 columns.
    let shapes = [
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
    shapes.into_iter().flat_map(|s| [case::<f32>(s, 1.0), case::<f16>(s, 1.0), case::<f32>(s, 30.0)]).collect()
}

/// `sharp` multiplies the usual scale: large scores make nearly one-hot weights.
fn case<E: TestElem>((n_seq, seq_len, n_head, n_kv, d_head): (usize, usize, usize, usize, usize), sharp: f32) -> Case {
    Case::of::<E>(format!("{n_seq} x {seq_len} tokens, {n_head}/{n_kv} heads of {d_head}, sharpness {sharp}"), move |io| {
        let tokens = n_seq * seq_len;
        let (ld_q, ld_kv, ld_out) = (stride(n_head * d_head) + 8, stride(n_kv * d_head) + 16, stride(n_head * d_head));
        let (q, qs) = io.matrix::<f32>(tokens, n_head * d_head, ld_q);
        let (k, ks) = io.matrix::<f32>(tokens, n_kv * d_head, ld_kv);
        let (v, vs) = io.matrix::<f32>(tokens, n_kv * d_head, ld_kv);
        let out = io.output::<E>("out", tokens * ld_out);
        let p = AttentionParams {
            n_seq: n_seq as u32,
            seq_len: seq_len as u32,
            n_head: n_head as u32,
            n_kv: n_kv as u32,
            d_head: d_head as u32,
            ld_q: ld_q as u32,
            ld_kv: ld_kv as u32,
            ld_out: ld_out as u32,
            scale: sharp / (d_head as f32).sqrt(),
        };
        kernels::attention(&mut io.rec, p, q, k, v, out.buffer);
        // The weights of every token and head, and a bound on their relative errors.
        let rows: Vec<(Vec<f64>, f64)> = (0..tokens * n_head)
            .map(|row| {
                let (token, head) = (row / n_head, row % n_head);
                let query = &qs[token * ld_q + head * d_head..][..d_head];
                let (mut scores, mut error) = (Vec::new(), 0.0f64);
                for t in token / seq_len * seq_len..=token {
                    let key = &ks[t * ld_kv + head * n_kv / n_head * d_head..][..d_head];
                    let terms = query.iter().zip(key).map(|(q, k)| q * k);
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                    scores.push(f64::from(p.scale) * sum);
                    error = error.max(f64::from(p.scale) * size * (d_head as f64 + 3.0));
                }
                let highest = scores.iter().copied().fold(f64::MIN, f64::max);
                let spread = scores.iter().map(|s| highest - s).fold(0.0, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - highest).exp()).collect();
                let norm: f64 = weights.iter().sum();
                // A score off by d makes a weight off by d relative to itself, and the norm likewise; exp of x is off by 3 + 2 |x|
                // units in the last place (Vulkan), once for the weight and once for fading older tiles; then sums over the keys.
                let relative = EPS * (2.0 * error + 2.0 * (3.0 + 4.0 * spread) + 2.0 * scores.len() as f64 + 8.0);
                (weights.into_iter().map(|w| w / norm).collect(), relative)
            })
            .collect();
        io.expect_matrix(out, n_head * d_head, ld_out, |token, column| {
            let (head, e) = (column / d_head, column % d_head);
            let (weights, relative) = &rows[token * n_head + head];
            let first = token / seq_len * seq_len;
            let values = weights.iter().enumerate().map(|(t, w)| w * vs[(first + t) * ld_kv + head * n_kv / n_head * d_head + e]);
            let (value, size) = values.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
            Want::Near(value, size * (relative + E::EPS))
        });
    })
}
