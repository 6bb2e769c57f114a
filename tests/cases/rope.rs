use super::{Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, rope::RopeParams};

pub fn cases() -> Vec<Case> {
    let sizes = [(0, 4, 2, 8), (1, 1, 1, 2), (5, 5, 3, 64), (64, 16, 1, 128), (13, 7, 5, 30), (31, 31, 9, 64)];
    sizes.into_iter().map(|(n_tok, seq_len, n_head, d_head)| case(n_tok, seq_len, n_head, d_head)).collect()
}

fn case(n_tok: usize, seq_len: usize, n_head: usize, d_head: usize) -> Case {
    Case::new(format!("{n_tok} tokens, sequences of {seq_len}, {n_head} heads of {d_head}"), move |io| {
        let (half, ld) = (d_head / 2, (n_head * d_head).next_multiple_of(8) + 8);
        let (cos, c) = io.matrix::<f32>(seq_len, half, half);
        let (sin, s) = io.matrix::<f32>(seq_len, half, half);
        let before = io.rng.padded(n_tok, n_head * d_head, ld);
        let x = io.inout("x", before.clone());
        let p = RopeParams { n_tok: n_tok as u32, seq_len: seq_len as u32, n_head: n_head as u32, d_head: d_head as u32, ld: ld as u32 };
        kernels::rope(&mut io.rec, p, cos, sin, x.buffer);
        io.expect_matrix(x, n_head * d_head, ld, |t, column| {
            let (j, first) = (column % d_head, t * ld + column / d_head * d_head);
            let at = t % seq_len * half + j % half;
            let (a, b) = (f64::from(before[first + j % half]), f64::from(before[first + j % half + half]));
            let (one, two) = if j < half { (a * c[at], -b * s[at]) } else { (b * c[at], a * s[at]) };
            Want::Near(one + two, 2.0 * EPS * (one.abs() + two.abs()))
        });
    })
}
