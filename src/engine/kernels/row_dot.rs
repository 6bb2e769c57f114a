//! out[r, g] = Σ_j a[r, j] b[r, j] over the columns j of group g: with a = E H and b = E it is the loss e H eᵀ of every row.

use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// a, b [rows, ld]; groups of `group` columns, the last may be shorter; out [rows, n_group].
    pub struct RowDotParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        pub group: u32,
        pub n_group: u32,
    }
}

impl Launch for RowDotParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.rows as usize * self.n_group as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: 2.0 * f64::from(self.rows) * f64::from(self.cols) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_groups(self.cols, self.group, self.n_group)?;
        within("a", self.cols, self.ld)?;
        need("a", len[0], self.rows as usize * self.ld as usize)?;
        need("b", len[1], self.rows as usize * self.ld as usize)?;
        need("out", len[2], self.rows as usize * self.n_group as usize)
    }
}

pub(super) fn check_groups(cols: u32, group: u32, n_group: u32) -> Result<(), String> {
    if group == 0 || n_group != cols.div_ceil(group) { Err(format!("{n_group} groups of {group} do not cover {cols} columns")) } else { Ok(()) }
}

pub(super) fn native(p: &RowDotParams, _: &Constants, a: &[f32], b: &[f32], out: &mut [f32]) {
    let (cols, ld, group) = (p.cols as usize, p.ld as usize, p.group as usize);
    out.par_chunks_mut((p.n_group as usize).max(1)).zip(a.par_chunks(ld)).zip(b.par_chunks(ld)).take(p.rows as usize).for_each(|((out, a), b)| {
        widest(Row { a: &a[..cols], b: &b[..cols], group, out });
    });
}

/// One row.
struct Row<'a> {
    a: &'a [f32],
    b: &'a [f32],
    group: usize,
    out: &'a mut [f32],
}

impl Loop for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Row { a, b, group, out } = self;
        for ((out, a), b) in out.iter_mut().zip(a.chunks(group)).zip(b.chunks(group)) {
            *out = dot(a, b);
        }
    }
}

/// Dot product in the order of the shaders, so that engines agree on decisions that hang on it: every 64th product, then a tree.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 64];
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<64>(), b.as_chunks::<64>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..64 {
            sums[i] += a[i] * b[i];
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(rest_a).zip(rest_b) {
        *sum += a * b;
    }
    for half in [32, 16, 8, 4, 2, 1] {
        let (low, high) = sums.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
    }
    sums[0]
}
