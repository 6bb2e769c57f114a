use super::{AWKWARD, Case, Want};
use aespa_gpu::engine::kernels::{self, embed::EmbedParams};
use aespa_gpu::engine::matrix::stride;
use aespa_gpu::tensor::Dtype;

pub fn cases() -> Vec<Case> {
    let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    let widths = AWKWARD.into_iter().filter(|d| *d > 0);
    widths.flat_map(|d| dtypes.map(|dtype| case(dtype, 7, d))).chain([case(Dtype::Bf16, 0, 8), case(Dtype::F16, 300, 9)]).collect()
}

/// Rows 10..30 of a vocabulary of 40: some tokens lie in another panel and must be left alone.
fn case(dtype: Dtype, n_tok: usize, d: usize) -> Case {
    Case::new(format!("{dtype} {n_tok} x {d}"), move |io| {
        let (row0, rows, ld_table, ld_out) = (10, 20, stride(d), stride(d) + 8);
        let values = io.rng.padded(rows, d, ld_table);
        let (table, exact) = io.stored(dtype, &values);
        let ids: Vec<u32> = (0..n_tok).map(|_| io.rng.below(40) as u32).collect();
        let id_buffer = io.upload(ids.clone());
        let out = io.output::<f32>("out", n_tok * ld_out);
        let p = EmbedParams {
            n_tok: n_tok as u32,
            d: d as u32,
            ld_table: ld_table as u32,
            ld_out: ld_out as u32,
            row0: row0 as u32,
            rows: rows as u32,
        };
        kernels::embed(&mut io.rec, p, id_buffer, table, out.buffer);
        io.expect_matrix(out, d, ld_out, |t, j| match (ids[t] as usize).checked_sub(row0).filter(|row| *row < rows) {
            Some(row) => Want::Near(exact[row * ld_table + j], 0.0),
            None => Want::Same,
        });
    })
}
