use super::{Case, EPS, TestElem, Want};
use aespa_gpu::engine::kernels::{self, gram::GramParams};
use aespa_gpu::engine::matrix::stride;
use half::f16;

pub fn cases() -> Vec<Case> {
    // (n_tok, d, row0, rows): around the tile of 64 and the step of 16, whole matrices and panels that start off a tile.
    let whole = [(1, 1), (5, 3), (15, 63), (16, 64), (17, 65), (131, 67), (33, 130), (0, 10)].map(|(n, d)| (n, d, 0, d));
    let panels = [(20, 200, 64, 64), (20, 200, 72, 100), (20, 200, 136, 64), (7, 131, 128, 3), (9, 70, 8, 0)];
    whole.into_iter().chain(panels).flat_map(|(n, d, row0, rows)| [case::<f32>(n, d, row0, rows), case::<f16>(n, d, row0, rows)]).collect()
}

fn case<E: TestElem>(n_tok: usize, d: usize, row0: usize, rows: usize) -> Case {
    Case::of::<E>(format!("{n_tok} x {d}, rows {row0} + {rows}"), move |io| {
        let (ldx, ldg) = (stride(d) + 8, stride(d) + 16);
        let (x, xs) = io.matrix::<E>(n_tok, d, ldx);
        // Panels begin inside of g.
        let g_row = if row0 > 0 { 5 } else { 0 };
        let before = io.rng.padded(g_row + rows, d, ldg);
        let g = io.inout("g", before.clone());
        let p = GramParams {
            n_tok: n_tok as u32,
            d: d as u32,
            ldx: ldx as u32,
            ldg: ldg as u32,
            row0: row0 as u32,
            rows: rows as u32,
            g_row: g_row as u32,
        };
        kernels::gram(&mut io.rec, p, x, g.buffer);
        io.expect_matrix(g, d, ldg, |at, j| {
            let old = f64::from(before[at * ldg + j]);
            let Some(i) = at.checked_sub(g_row) else { return Want::Near(old, 0.0) };
            if j > row0 + i {
                return Want::Anything;
            }
            let terms = (0..n_tok).map(|t| xs[t * ldx + row0 + i] * xs[t * ldx + j]);
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
            Want::Near(sum + old, EPS * (n_tok as f64 + 1.0) * (size + old.abs()))
        });
    })
}
