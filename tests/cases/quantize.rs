use super::{AWKWARD, Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, quantize::QuantizeParams};
use aespa_gpu::engine::matrix::stride;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for cols in AWKWARD.into_iter().filter(|c| *c > 0) {
        all.push(case(5, cols, cols, 15));
        all.push(case(3, cols, 32, 7));
    }
    all.extend([case(0, 8, 8, 15), case(1, 1, 1, 1), case(67, 40, 16, 255), case(2, 1000, 128, 3)]);
    all
}

fn case(rows: usize, cols: usize, group: usize, max_code: u32) -> Case {
    Case::new(format!("{rows} x {cols} group {group} codes to {max_code}"), move |io| {
        let (ld, n_group) = (stride(cols), cols.div_ceil(group));
        let (w, ws) = io.matrix::<f32>(rows, cols, ld);
        // Grids that cover about three quarters of the range, so that codes clip at both ends.
        let scales: Vec<f32> = (0..rows * n_group).map(|_| (1.5 + 0.2 * io.rng.value()) / max_code as f32).collect();
        let zeros: Vec<f32> = scales.iter().map(|_| io.rng.zero_point(max_code)).collect();
        let (scale, zero) = (io.upload(scales.clone()), io.upload(zeros.clone()));
        let (codes, w_hat) = (io.output::<u32>("codes", rows * ld), io.output::<f32>("w_hat", rows * ld));
        let p =
            QuantizeParams { rows: rows as u32, cols: cols as u32, ld: ld as u32, group: group as u32, n_group: n_group as u32, max_code };
        kernels::quantize(&mut io.rec, p, w, scale, zero, codes.buffer, w_hat.buffer);
        let grid = move |r: usize, j: usize| (f64::from(scales[r * n_group + j / group]), f64::from(zeros[r * n_group + j / group]));
        let grid2 = grid.clone();
        let code = move |r: usize, j: usize| nearest(ws[r * ld + j] / grid(r, j).0 + grid(r, j).1, f64::from(max_code));
        let code2 = code.clone();
        io.expect_matrix(codes, cols, ld, move |r, j| code(r, j).map_or(Want::Anything, |q| Want::Bits(q as u32)));
        io.expect_matrix(w_hat, cols, ld, move |r, j| match code2(r, j) {
            Some(q) => {
                let (s, z) = grid2(r, j);
                Want::Near(s * (q - z), EPS * (s * (q - z)).abs() + EPS * (s * z).abs())
            }
            None => Want::Anything,
        });
    })
}

/// The nearest code; none where f32 may round to either side. Division in f32 is off by 2.5 units in the last place at most.
fn nearest(x: f64, max_code: f64) -> Option<f64> {
    let tie = (x - x.floor() - 0.5).abs() < 1e-5 * x.abs().max(1.0);
    (!tie).then(|| x.round_ties_even().clamp(0.0, max_code))
}
