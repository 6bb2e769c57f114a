//! C[b, i, j] = alpha Σ_t A[b, t, i] B[b, t, j] + beta C[b, i, j]: cross moments of two streams of activations, second moments of
//! heads (a batch per head), and weight gradients Σ_t g_t x_tᵀ.
//!
//! A panel of rows i0.. of C is the product with `a_offset` moved by i0.

use super::gemm::{View, shared_product};
use super::matmul_nt::{aligned, extent, half_of};
use crate::engine::Elem;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, need, params, within};
use rayon::prelude::*;
use std::borrow::Cow;

params! {
    /// A [k, n] at `a_offset` with stride `lda`, B [k, m], C [n, m]; offsets and strides in elements, multiples of 8. Batch b is b batch
    /// strides further; those of C are whole blocks of rows.
    pub struct MatmulTnParams {
        pub n: u32,
        pub m: u32,
        pub k: u32,
        pub lda: u32,
        pub ldb: u32,
        pub ldc: u32,
        pub a_offset: u32,
        pub b_offset: u32,
        pub c_offset: u32,
        pub a_batch: u32,
        pub b_batch: u32,
        pub c_batch: u32,
        pub batches: u32,
        pub alpha: f32,
        pub beta: f32,
    }
}

impl Launch for MatmulTnParams {
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
        let rest = Self { n: self.n - first, a_offset: self.a_offset + first, c_offset: self.c_offset + first * self.ldc, ..*self };
        Some([Self { n: first, ..*self }, rest])
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        aligned(&[self.lda, self.ldb, self.ldc, self.a_offset, self.b_offset, self.c_offset, self.a_batch, self.b_batch, self.c_batch])?;
        let last = self.batches.saturating_sub(1);
        within("a", self.n, self.lda)?;
        within("b", self.m, self.ldb)?;
        within("c", self.m, self.ldc)?;
        if self.batches > 1 && self.c_batch < self.n * self.ldc {
            return Err(format!("batches of c are {} elements apart, {} rows of {} overlap", self.c_batch, self.n, self.ldc));
        }
        need("a", len[0], extent(self.a_offset, last, self.a_batch, self.k, self.lda, self.n))?;
        need("b", len[1], extent(self.b_offset, last, self.b_batch, self.k, self.ldb, self.m))?;
        need("c", len[2], extent(self.c_offset, last, self.c_batch, self.n, self.ldc, self.m))
    }
}

pub(super) fn native<E: Elem>(p: &MatmulTnParams, _: &Constants, a: &[f32], b: &[E], c: &mut [f32]) {
    let b: Cow<'_, [f32]> = match E::as_f32(b) {
        Some(b) => Cow::Borrowed(b),
        None => Cow::Owned(b.par_iter().map(|v| v.to_f32()).collect()),
    };
    let (n, m, k) = (p.n as usize, p.m as usize, p.k as usize);
    let (lda, ldc) = (p.lda as usize, p.ldc as usize);
    let batches = c[p.c_offset as usize..].par_chunks_mut((p.c_batch as usize).max(n * ldc)).take(p.batches as usize).enumerate();
    batches.for_each(|(batch, c)| {
        let lhs = View { data: a, start: p.a_offset as usize + batch * p.a_batch as usize, row: 1, col: lda };
        let rhs = View { data: &b, start: p.b_offset as usize + batch * p.b_batch as usize, row: p.ldb as usize, col: 1 };
        shared_product([n, m, k], p.alpha, lhs, rhs, p.beta, c, 0, ldc);
    });
}
