use super::{AWKWARD, Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, column_dot::ColumnDotParams};
use aespa_gpu::engine::matrix::stride;

pub fn cases() -> Vec<Case> {
    let wide = AWKWARD.into_iter().filter(|c| *c > 0).map(|cols| case(5, cols));
    wide.chain([0, 1, 7, 8, 9, 64, 65, 1021].map(|rows| case(rows, 33))).collect()
}

fn case(rows: usize, cols: usize) -> Case {
    Case::new(format!("{rows} x {cols}"), move |io| {
        let ld = stride(cols);
        let ((a, av), (b, bv)) = (io.matrix::<f32>(rows, cols, ld), io.matrix::<f32>(rows, cols, ld));
        let before = io.rng.values(cols);
        let out = io.inout::<f32>("out", before.clone());
        let p = ColumnDotParams { rows: rows as u32, cols: cols as u32, ld: ld as u32 };
        kernels::column_dot(&mut io.rec, p, a, b, out.buffer);
        io.expect(out, |j| {
            let terms = (0..rows).map(|r| av[r * ld + j] * bv[r * ld + j]);
            let start = f64::from(before[j]);
            let (sum, magnitude) = terms.fold((start, start.abs()), |(sum, magnitude), t: f64| (sum + t, magnitude + t.abs()));
            Want::Near(sum, EPS * (rows as f64 + 1.0) * magnitude)
        });
    })
}
