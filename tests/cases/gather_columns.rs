use super::{AWKWARD, Case, Want};
use aespa_gpu::engine::kernels::{self, gather_columns::GatherColumnsParams};
use aespa_gpu::engine::matrix::stride;
use aespa_gpu::tensor::Dtype;

pub fn cases() -> Vec<Case> {
    let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    let sizes = AWKWARD.into_iter().filter(|c| *c > 0).map(|cols| (5, cols)).chain([(0, 8), (131, 40)]);
    sizes.flat_map(|(rows, cols)| dtypes.map(|dtype| case(dtype, rows, cols))).collect()
}

fn case(dtype: Dtype, rows: usize, cols: usize) -> Case {
    Case::new(format!("{dtype} {rows} x {cols}"), move |io| {
        let (ld_source, ld_to) = (stride(cols) + 8, stride(cols));
        // Rows of a larger matrix, to the end of another.
        let (row_source, row_to) = (rows / 3, rows / 2);
        let values = io.rng.padded(row_source + rows, cols, ld_source);
        let (source, exact) = io.stored(dtype, &values);
        let order = io.rng.permutation(cols);
        let order_buffer = io.upload(order.clone());
        let to = io.output::<f32>("to", (row_to + rows) * ld_to);
        let p = GatherColumnsParams {
            rows: rows as u32,
            cols: cols as u32,
            ld_source: ld_source as u32,
            ld_to: ld_to as u32,
            row_source: row_source as u32,
            row_to: row_to as u32,
        };
        kernels::gather_columns(&mut io.rec, p, order_buffer, source, to.buffer);
        io.expect_matrix(to, cols, ld_to, |r, j| match r.checked_sub(row_to) {
            Some(r) => Want::Near(exact[(row_source + r) * ld_source + order[j] as usize], 0.0),
            None => Want::Same,
        });
    })
}
