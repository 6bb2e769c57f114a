use super::{AWKWARD, Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, rescale::RescaleParams};
use aespa_gpu::engine::matrix::stride;
use aespa_gpu::tensor::Dtype;

pub fn cases() -> Vec<Case> {
    let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    let sizes = AWKWARD.into_iter().filter(|c| *c > 0).map(|cols| (5, cols, 0)).chain([(0, 8, 0), (131, 40, 3)]);
    sizes.flat_map(|(rows, cols, row0)| dtypes.map(|dtype| case(dtype, rows, cols, row0))).collect()
}

fn case(dtype: Dtype, rows: usize, cols: usize, row0: usize) -> Case {
    Case::new(format!("{dtype} {rows} x {cols} from row {row0}"), move |io| {
        let (ld_source, ld_out) = (stride(cols) + 8, stride(cols));
        let values = io.rng.padded(row0 + rows, cols, ld_source);
        let (source, exact) = io.stored(dtype, &values);
        let ((row, rv), (column, cv)) = (io.matrix::<f32>(1, rows, rows), io.matrix::<f32>(1, cols, cols));
        let out = io.output::<f32>("out", rows * ld_out);
        let (ld_source_32, ld_out_32) = (ld_source as u32, ld_out as u32);
        let p = RescaleParams { rows: rows as u32, cols: cols as u32, row0: row0 as u32, ld_source: ld_source_32, ld_out: ld_out_32 };
        kernels::rescale(&mut io.rec, p, row, column, source, out.buffer);
        io.expect_matrix(out, cols, ld_out, |r, j| {
            let value = exact[(row0 + r) * ld_source + j] * rv[r] * cv[j];
            Want::Near(value, EPS * value.abs())
        });
    })
}
