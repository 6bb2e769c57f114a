//! C[i, j] = alpha Σ_k A[i, k] B[k, j] + beta C[i, j]: GPTQ's trailing update (alpha −1, beta 1, in place),
//! attention weights times inputs.

use super::gemm::{View, product, rows_per_task, shared_product};
use super::matmul_nt::{aligned, extent, half_of};
use super::sparse::{self, Sparse};
use crate::engine::{Elem, Mat, Panel, Panels, Recording};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, need, params, within};
use rayon::prelude::*;
use std::borrow::Cow;

params! {
    /// A [n, k] at `a_offset` with stride `lda`, B [k, m], C [n, m]; offsets and strides in elements, multiples of 8.
    pub struct MatmulNnParams {
        pub n: u32,
        pub m: u32,
        pub k: u32,
        pub lda: u32,
        pub ldb: u32,
        pub ldc: u32,
        pub a_offset: u32,
        pub b_offset: u32,
        pub c_offset: u32,
        pub alpha: f32,
        pub beta: f32,
    }
}

impl Launch for MatmulNnParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, c: &Constants) -> [u32; 3] {
        [self.m.div_ceil(c.get("TILE_M")), self.n.div_ceil(c.get("TILE_N")), 1]
    }

    fn cost(&self) -> Cost {
        Cost { flops: 2.0 * f64::from(self.n) * f64::from(self.m) * f64::from(self.k) }
    }

    /// Two halves of the rows of C.
    fn halves(&self) -> Option<[Self; 2]> {
        let first = half_of(self.n)?;
        let rest = Self { n: self.n - first, a_offset: self.a_offset + first * self.lda, c_offset: self.c_offset + first * self.ldc, ..*self };
        Some([Self { n: first, ..*self }, rest])
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        aligned(&[self.lda, self.ldb, self.ldc, self.a_offset, self.b_offset, self.c_offset])?;
        within("a", self.k, self.lda)?;
        within("b", self.m, self.ldb)?;
        within("c", self.m, self.ldc)?;
        need("a", len[0], extent(self.a_offset, 0, 0, self.n, self.lda, self.k))?;
        need("b", len[1], extent(self.b_offset, 0, 0, self.k, self.ldb, self.m))?;
        need("c", len[2], extent(self.c_offset, 0, 0, self.n, self.ldc, self.m))
    }
}

/// Records out = alpha A B + beta out for B in panels of rows.
pub fn by_panels(rec: &mut Recording<'_>, a: Mat<f32>, b: &Panels, [alpha, beta]: [f32; 2], out: Mat<f32>) {
    for Panel { start, mat } in b.iter().copied() {
        let p = MatmulNnParams {
            n: a.rows as u32,
            m: out.cols as u32,
            k: mat.rows as u32,
            lda: a.ld as u32,
            ldb: mat.ld as u32,
            ldc: out.ld as u32,
            a_offset: start as u32,
            alpha,
            beta: if start == 0 { beta } else { 1.0 },
            ..Default::default()
        };
        super::matmul_nn(rec, p, a.buffer, mat.buffer, out.buffer);
    }
}

pub(super) fn native<E: Elem>(p: &MatmulNnParams, _: &Constants, a: &[f32], b: &[E], c: &mut [f32]) {
    let b: Cow<'_, [f32]> = match E::as_f32(b) {
        Some(b) => Cow::Borrowed(b),
        None => Cow::Owned(b.par_iter().map(|v| v.to_f32()).collect()),
    };
    let (n, lda, ldc) = (p.n as usize, p.lda as usize, p.ldc as usize);
    let [m, k] = [p.m, p.k].map(|v| v as usize);
    let lhs = |first: usize| View { data: a, start: p.a_offset as usize + first * lda, row: lda, col: 1 };
    let rhs = View { data: &b, start: p.b_offset as usize, row: p.ldb as usize, col: 1 };
    let c = &mut c[p.c_offset as usize..];
    if p.beta == 1.0 && sparse::seems_so(lhs(0), [n, k]) {
        let each = rows_per_task(n);
        return c.par_chunks_mut(each * ldc).take(n.div_ceil(each)).enumerate().for_each(|(i, c)| {
            let (lhs, n) = (lhs(i * each), each.min(n - i * each));
            match Sparse::of(lhs, [n, k]) {
                Some(sparse) => sparse.add_product(m, p.alpha, rhs, c, ldc),
                None => product([n, m, k], p.alpha, lhs, rhs, p.beta, c, 0, ldc),
            }
        });
    }
    shared_product([n, m, k], p.alpha, lhs(0), rhs, p.beta, c, 0, ldc);
}
