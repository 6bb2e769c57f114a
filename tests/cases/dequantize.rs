use super::{AWKWARD, Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, dequantize::DequantizeParams};
use aespa_gpu::engine::matrix::stride;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for cols in AWKWARD.into_iter().filter(|c| *c > 0) {
        all.extend([case(5, cols, cols), case(3, cols, 32)]);
    }
    all.extend([case(0, 8, 8), case(67, 40, 16), case(2, 1000, 128)]);
    all
}

fn case(rows: usize, cols: usize, group: usize) -> Case {
    Case::new(format!("{rows} x {cols} group {group}"), move |io| {
        let (ld, n_group) = (stride(cols), cols.div_ceil(group));
        let codes: Vec<u32> = (0..rows * ld).map(|_| io.rng.below(256) as u32).collect();
        let codes_buffer = io.upload(codes.clone());
        let (scale, s) = io.matrix::<f32>(rows, n_group, n_group);
        let (zero, z) = io.matrix::<f32>(rows, n_group, n_group);
        let w_hat = io.output::<f32>("w_hat", rows * ld);
        let (ld32, n_group32) = (ld as u32, n_group as u32);
        let p = DequantizeParams { rows: rows as u32, cols: cols as u32, ld: ld32, group: group as u32, n_group: n_group32 };
        kernels::dequantize(&mut io.rec, p, codes_buffer, scale, zero, w_hat.buffer);
        io.expect_matrix(w_hat, cols, ld, |r, j| {
            let grid = r * n_group + j / group;
            let value = s[grid] * (f64::from(codes[r * ld + j]) - z[grid]);
            Want::Near(value, EPS * value.abs())
        });
    })
}
