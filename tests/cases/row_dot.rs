use super::{AWKWARD, Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, row_dot::RowDotParams};
use aespa_gpu::engine::matrix::stride;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for cols in AWKWARD.into_iter().filter(|c| *c > 0) {
        all.extend([case(5, cols, cols), case(3, cols, 32)]);
    }
    all.extend([case(0, 8, 8), case(131, 40, 16), case(2, 1000, 128)]);
    all
}

fn case(rows: usize, cols: usize, group: usize) -> Case {
    Case::new(format!("{rows} x {cols} group {group}"), move |io| {
        let (ld, n_group) = (stride(cols), cols.div_ceil(group));
        let ((a, av), (b, bv)) = (io.matrix::<f32>(rows, cols, ld), io.matrix::<f32>(rows, cols, ld));
        let out = io.output::<f32>("out", rows * n_group);
        let p = RowDotParams { rows: rows as u32, cols: cols as u32, ld: ld as u32, group: group as u32, n_group: n_group as u32 };
        kernels::row_dot(&mut io.rec, p, a, b, out.buffer);
        io.expect(out, |i| {
            let (r, g) = (i / n_group, i % n_group);
            let columns = g * group..((g + 1) * group).min(cols);
            let k = columns.len() as f64;
            let terms = columns.map(|j| av[r * ld + j] * bv[r * ld + j]);
            let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, magnitude), t: f64| (sum + t, magnitude + t.abs()));
            Want::Near(sum, EPS * k * magnitude)
        });
    })
}
