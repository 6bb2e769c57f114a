//! C[i, j] = alpha Σ_k A[i, k] W[j, k] + bias[j] + beta C[i, j]: every linear layer, E H, and the score products of groups.
//!
//! W is read as the checkpoint stores it (f32, f16, bf16) and widened on the way; sums are f32. Offsets and strides are in
//! elements and multiples of 8, so that rows start on 16 bytes. A batch b shifts the three operands by their batch strides.

use super::embed::widen;
use super::gemm::{View, product, rows_per_task, shared_product};
use crate::engine::Elem;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, need, params, within};
use crate::engine::matrix::stride;
use crate::tensor::Dtype;
use rayon::prelude::*;
use std::borrow::Cow;

params! {
    /// A [n, k] at `a_offset` with stride `lda`, W [m, k], C [n, m]; bias [bias_offset + m] or absent (has_bias = 0).
    pub struct MatmulNtParams {
        pub n: u32,
        pub m: u32,
        pub k: u32,
        pub lda: u32,
        pub ldw: u32,
        pub ldc: u32,
        pub a_offset: u32,
        pub w_offset: u32,
        pub c_offset: u32,
        pub a_batch: u32,
        pub w_batch: u32,
        pub c_batch: u32,
        pub batches: u32,
        pub bias_offset: u32,
        pub has_bias: u32,
        pub alpha: f32,
        pub beta: f32,
    }
}

impl Launch for MatmulNtParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, c: &Constants) -> [u32; 3] {
        [self.m.div_ceil(c.get("TILE_M")), self.n.div_ceil(c.get("TILE_N")), self.batches]
    }

    fn cost(&self) -> Cost {
        Cost { flops: 2.0 * f64::from(self.n) * f64::from(self.m) * f64::from(self.k) * f64::from(self.batches) }
    }

    /// Two halves of the rows of C.
    fn halves(&self) -> Option<[Self; 2]> {
        let first = half_of(self.n)?;
        let rest = Self { n: self.n - first, a_offset: self.a_offset + first * self.lda, c_offset: self.c_offset + first * self.ldc, ..*self };
        Some([Self { n: first, ..*self }, rest])
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        aligned(&[self.lda, self.ldw, self.ldc, self.a_offset, self.w_offset, self.c_offset, self.a_batch, self.w_batch, self.c_batch])?;
        let last = self.batches.saturating_sub(1);
        within("a", self.k, self.lda)?;
        within("w", self.k, self.ldw)?;
        within("c", self.m, self.ldc)?;
        need("a", len[0], extent(self.a_offset, last, self.a_batch, self.n, self.lda, self.k))?;
        need("w", len[1], extent(self.w_offset, last, self.w_batch, self.m, self.ldw, self.k))?;
        need("bias", len[2], if self.has_bias != 0 { self.bias_offset as usize + self.m as usize } else { 0 })?;
        need("c", len[3], extent(self.c_offset, last, self.c_batch, self.n, self.ldc, self.m))
    }
}

/// Strides and offsets must keep 16-byte alignment for every element type.
pub(super) fn aligned(values: &[u32]) -> Result<(), String> {
    match values.iter().find(|v| *v % 8 != 0) {
        Some(v) => Err(format!("stride or offset {v} is not a multiple of 8")),
        None => Ok(()),
    }
}

/// Rows of the first of two parts of a product, whole tiles of any size, if there are enough for two.
pub(super) fn half_of(rows: u32) -> Option<u32> {
    let first = (rows / 2).next_multiple_of(128);
    (first > 0 && first < rows).then_some(first)
}

/// Elements that a strided, batched matrix reaches, the padding of its last row included: kernels load groups of up to eight
/// elements and leave out afterwards what is not real.
pub(super) fn extent(offset: u32, last_batch: u32, batch: u32, rows: u32, ld: u32, cols: u32) -> usize {
    if rows == 0 || cols == 0 {
        return 0;
    }
    offset as usize + last_batch as usize * batch as usize + (rows as usize - 1) * ld as usize + stride(cols as usize)
}

/// W is widened in panels of so many elements, and of so many rows at least: a product wants to be wide, but W may be large.
const WIDE: usize = 4 << 20;
const PANEL: usize = 512;

pub(super) fn native<E: Elem>(p: &MatmulNtParams, c: &Constants, a: &[E], w: &[u32], bias: &[f32], out: &mut [f32]) {
    let dtype = c.stored("w");
    let a: Cow<'_, [f32]> = match E::as_f32(a) {
        Some(a) => Cow::Borrowed(a),
        None => Cow::Owned(a.par_iter().map(|v| v.to_f32()).collect()),
    };
    let bias = (p.has_bias != 0).then_some(bias);
    if p.batches > 1 {
        // Batches are many and small (groups of columns): one task each is enough, but they interleave in C, so rows are split.
        return batched(p, &a, bytemuck::cast_slice(w), out);
    }
    let (n, m, k) = (p.n as usize, p.m as usize, p.k as usize);
    let (lda, ldw, ldc) = (p.lda as usize, p.ldw as usize, p.ldc as usize);
    let each = (WIDE / k.max(1)).max(PANEL).min(m);
    let mut wide = if dtype == Dtype::F32 { Vec::new() } else { vec![0.0f32; each * k] };
    for start in (0..m).step_by(each.max(1)) {
        let rows = each.min(m - start);
        let at = p.w_offset as usize + start * ldw;
        let panel = if dtype == Dtype::F32 {
            View { data: bytemuck::cast_slice(w), start: at, row: 1, col: ldw }
        } else {
            wide.par_chunks_mut(k.max(1)).take(rows).enumerate().for_each(|(r, row)| widen(dtype, w, at + r * ldw, row));
            View { data: &wide, start: 0, row: 1, col: k }
        };
        let c_start = p.c_offset as usize + start;
        let beta = match bias {
            None => p.beta,
            Some(bias) => {
                let bias = &bias[p.bias_offset as usize + start..][..rows];
                out[c_start..].par_chunks_mut(ldc).take(n).for_each(|row| {
                    for (o, b) in row.iter_mut().zip(bias) {
                        *o = if p.beta == 0.0 { *b } else { p.beta * *o + b };
                    }
                });
                1.0
            }
        };
        let lhs = View { data: &a, start: p.a_offset as usize, row: lda, col: 1 };
        shared_product([n, rows, k], p.alpha, lhs, panel, beta, out, c_start, ldc);
    }
}

fn batched(p: &MatmulNtParams, a: &[f32], w: &[f32], out: &mut [f32]) {
    let (n, m, k) = (p.n as usize, p.m as usize, p.k as usize);
    let (lda, ldw, ldc) = (p.lda as usize, p.ldw as usize, p.ldc as usize);
    let each = rows_per_task(n);
    // Rows of all batches lie in the same rows of C when batches run along columns; otherwise batches are whole row blocks.
    let along_columns = (p.c_batch as usize) < ldc;
    let run = |rows: std::ops::Range<usize>, batch: usize, out: &mut [f32], c_start: usize| {
        let lhs = View { data: a, start: p.a_offset as usize + batch * p.a_batch as usize + rows.start * lda, row: lda, col: 1 };
        let rhs = View { data: w, start: p.w_offset as usize + batch * p.w_batch as usize, row: 1, col: ldw };
        product([rows.len(), m, k], p.alpha, lhs, rhs, p.beta, out, c_start, ldc);
    };
    let c0 = p.c_offset as usize;
    if along_columns {
        out[c0..].par_chunks_mut(each * ldc).take(n.div_ceil(each)).enumerate().for_each(|(i, out)| {
            for batch in 0..p.batches as usize {
                run(i * each..(i * each + each).min(n), batch, out, batch * p.c_batch as usize);
            }
        });
    } else {
        for batch in 0..p.batches as usize {
            out[c0 + batch * p.c_batch as usize..].par_chunks_mut(each * ldc).take(n.div_ceil(each)).enumerate().for_each(|(i, out)| {
                run(i * each..(i * each + each).min(n), batch, out, 0);
            });
        }
    }
}
