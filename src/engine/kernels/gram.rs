//! G[i, j] += Σ_t x[t, i] x[t, j] for j ≤ i: the column metric of every linear that reads X. Half of the symmetric product.
//!
//! Two-level sums: a launch sums its tokens (at most a few thousand) by themselves, then adds the result to G once. G may be
//! split into panels of rows; a launch fills rows `row0..row0 + rows` of the whole matrix.

use super::gemm::{View, product};
use super::matmul_nt::{aligned, extent, half_of};
use crate::engine::Elem;
use crate::engine::kernel::{Constants, Cost, Defined, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;
use std::borrow::Cow;

params! {
    /// x [n_tok, ldx], d columns; g holds rows `row0..row0 + rows` of [d, ldg] from its row `g_row` on. Only j ≤ i is meaningful; above the
    /// diagonal g holds anything afterwards.
    pub struct GramParams {
        pub n_tok: u32,
        pub d: u32,
        pub ldx: u32,
        pub ldg: u32,
        pub row0: u32,
        pub rows: u32,
        /// Where they begin in g, whose first row may be another one.
        pub g_row: u32,
    }
}

impl Launch for GramParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    /// One workgroup per tile on or below the diagonal: row r of the panel's tiles has `first + r + 1` of them.
    fn grid(&self, c: &Constants) -> [u32; 3] {
        let tile = c.get("TILE");
        let (first, rows) = (self.row0.div_ceil(tile) as usize, self.rows.div_ceil(tile) as usize);
        grid_1d(rows * first + rows * (rows + 1) / 2)
    }

    fn cost(&self) -> Cost {
        // Row i has i + 1 meaningful columns.
        let (first, rows) = (f64::from(self.row0), f64::from(self.rows));
        Cost { flops: 2.0 * f64::from(self.n_tok) * rows * (first + (rows + 1.0) / 2.0) }
    }

    fn defined(&self) -> Defined {
        Defined::Lower { row0: self.row0.saturating_sub(self.g_row) as usize, ld: self.ldg as usize }
    }

    /// Two halves of the rows.
    fn halves(&self) -> Option<[Self; 2]> {
        let first = half_of(self.rows)?;
        let rest = Self { row0: self.row0 + first, rows: self.rows - first, g_row: self.g_row + first, ..*self };
        Some([Self { rows: first, ..*self }, rest])
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        aligned(&[self.ldx, self.ldg, self.row0])?;
        if self.g_row > self.row0 || self.row0 + self.rows > self.d || self.d > self.ldg {
            return Err(format!("rows {}..{} of a {} x {} matrix", self.row0, self.row0 + self.rows, self.d, self.ldg));
        }
        within("x", self.d, self.ldx)?;
        need("x", len[0], extent(0, 0, 0, self.n_tok, self.ldx, self.d))?;
        need("g", len[1], extent(self.g_row.saturating_mul(self.ldg), 0, 0, self.rows, self.ldg, self.d))
    }
}

/// Rows at the diagonal that are one product: wide enough for a fast one, narrow enough that little above the diagonal is computed.
const BLOCK: usize = 96;

/// Rows of G per task, in whole blocks: the other operand is packed once for all of them, but there must be some tasks for every core, of which
/// later ones are longer.
fn rows_per_task(rows: usize) -> usize {
    (2 * rows / (3 * rayon::current_num_threads()) / BLOCK * BLOCK).clamp(BLOCK, 5 * BLOCK)
}

pub(super) fn native<E: Elem>(p: &GramParams, _: &Constants, x: &[E], g: &mut [f32]) {
    let x: Cow<'_, [f32]> = match E::as_f32(x) {
        Some(x) => Cow::Borrowed(x),
        None => Cow::Owned(x.par_iter().map(|v| v.to_f32()).collect()),
    };
    let (ldx, ldg, rows) = (p.ldx as usize, p.ldg as usize, p.rows as usize);
    let each = rows_per_task(rows);
    let columns = |first: usize| View { data: &x, start: first, row: 1, col: ldx };
    let tokens = |first: usize| View { data: &x, start: first, row: ldx, col: 1 };
    let n_tok = p.n_tok as usize;
    let tasks = g[p.g_row as usize * ldg..].par_chunks_mut(each * ldg).take(rows.div_ceil(each)).enumerate();
    // Later tasks are longer: start with them, so that the last ones to run are short.
    tasks.rev().with_max_len(1).for_each(|(i, g)| {
        let (first, n) = (p.row0 as usize + i * each, each.min(rows - i * each));
        product([n, first, n_tok], 1.0, columns(first), tokens(0), 1.0, g, 0, ldg);
        for (b, g) in g.chunks_mut(BLOCK * ldg).take(n.div_ceil(BLOCK)).enumerate() {
            let n = BLOCK.min(n - b * BLOCK);
            product([n, b * BLOCK + n, n_tok], 1.0, columns(first + b * BLOCK), tokens(first), 1.0, g, first, ldg);
        }
    });
}
