//! Embedding gather: out[t, :] = table[ids[t], :]. A table that is split into row panels is gathered panel by panel; each
//! launch writes only the tokens whose row it holds.

use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use crate::tensor::Dtype;
use half::{bf16, f16};
use rayon::prelude::*;

params! {
    /// ids [n_tok], table rows `row0..row0 + rows` [rows, ld_table], out [n_tok, ld_out].
    pub struct EmbedParams {
        pub n_tok: u32,
        pub d: u32,
        pub ld_table: u32,
        pub ld_out: u32,
        pub row0: u32,
        pub rows: u32,
    }
}

impl Launch for EmbedParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.n_tok as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: 0.0 }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        within("table", self.d, self.ld_table)?;
        within("out", self.d, self.ld_out)?;
        need("ids", len[0], self.n_tok as usize)?;
        need("table", len[1], self.rows as usize * self.ld_table as usize)?;
        need("out", len[2], self.n_tok as usize * self.ld_out as usize)
    }
}

pub(super) fn native(p: &EmbedParams, c: &Constants, ids: &[u32], table: &[u32], out: &mut [f32]) {
    let (d, ld) = (p.d as usize, p.ld_table as usize);
    let dtype = c.stored("table");
    out.par_chunks_mut(p.ld_out as usize).zip(ids).take(p.n_tok as usize).for_each(|(out, id)| {
        if let Some(row) = id.checked_sub(p.row0).filter(|row| *row < p.rows) {
            widen(dtype, table, row as usize * ld, &mut out[..d]);
        }
    });
}

/// Stored weights `start..start + out.len()` as f32.
pub(super) fn widen(dtype: Dtype, words: &[u32], start: usize, out: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    let end = start + out.len();
    match dtype {
        Dtype::F32 => out.copy_from_slice(&bytemuck::cast_slice(words)[start..end]),
        Dtype::F16 => bytemuck::cast_slice::<u32, f16>(words)[start..end].convert_to_f32_slice(out),
        Dtype::Bf16 => bytemuck::cast_slice::<u32, bf16>(words)[start..end].convert_to_f32_slice(out),
    }
}
