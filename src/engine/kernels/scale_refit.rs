//! The best scale of every row for fixed codes, rows independent, in closed form.
//!
//! The error E = s u − w with u = q − z changes by ds u, the loss e H eᵀ by 2 ds b + ds² a with b = u · M, a = u H uᵀ and M = E H. The
//! minimum ds = −b / a is rounded to the type in which scales are stored, and taken where it lowers the loss: s += ds, M += ds u H. No scale changes its
//! sign. u may be restricted to one group of columns; u H then still has all columns.

use super::row_dot::dot;
use super::scale_search::smallest;
use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use crate::tensor::Dtype;
use rayon::prelude::*;

params! {
    /// u, uh, m [rows, ld]; scale [rows, n_group], of which `group` is refit, whose columns are col0 .. col0 + width.
    pub struct ScaleRefitParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        pub col0: u32,
        pub width: u32,
        pub group: u32,
        pub n_group: u32,
        /// Type in which scales are stored: 0 f32, 1 f16, 2 bf16.
        pub scale_dtype: u32,
        /// 1: `uh` holds w H instead, and u H = (M + w H) / s, which holds where the group is the whole row.
        pub folded: u32,
    }
}

impl Launch for ScaleRefitParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.rows as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: f64::from(self.rows) * (4.0 * f64::from(self.width) + 3.0 * f64::from(self.cols)) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        if self.col0 + self.width > self.cols || self.group >= self.n_group {
            return Err(format!("group {} of {}: columns {} + {} of {}", self.group, self.n_group, self.col0, self.width, self.cols));
        }
        if self.folded != 0 && self.width != self.cols {
            return Err("u H follows from w H for whole rows only".to_owned());
        }
        within("m", self.cols, self.ld)?;
        let all = self.rows as usize * self.ld as usize;
        need("u", len[0], all)?;
        need("uh", len[1], all)?;
        need("scale", len[2], self.rows as usize * self.n_group as usize)?;
        need("m", len[3], all)
    }
}

pub(super) fn native(p: &ScaleRefitParams, _: &Constants, u: &[f32], uh: &[f32], scale: &mut [f32], m: &mut [f32]) {
    let (ld, cols) = (p.ld as usize, p.cols as usize);
    let rows = scale.par_chunks_mut((p.n_group as usize).max(1)).zip(m.par_chunks_mut(ld)).zip(u.par_chunks(ld).zip(uh.par_chunks(ld)));
    rows.take(p.rows as usize).for_each(|((scale, m), (u, uh))| {
        widest(Row { p, u: &u[..cols], uh: &uh[..cols], scale: &mut scale[p.group as usize], m: &mut m[..cols] });
    });
}

struct Row<'a> {
    p: &'a ScaleRefitParams,
    u: &'a [f32],
    uh: &'a [f32],
    scale: &'a mut f32,
    m: &'a mut [f32],
}

impl Loop for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Row { p, u, uh, scale, m } = self;
        let own = p.col0 as usize..(p.col0 + p.width) as usize;
        let b = dot(&u[own.clone()], &m[own.clone()]);
        let c = dot(&u[own.clone()], &uh[own]);
        let a = if p.folded != 0 { (b + c) / *scale } else { c };
        let after = refit(*scale, a, b, p.scale_dtype);
        let ds = after - *scale;
        if ds == 0.0 {
            return;
        }
        if p.folded != 0 {
            let ratio = ds / *scale;
            for (m, wh) in m.iter_mut().zip(uh) {
                *m += ratio * (*m + wh);
            }
        } else {
            for (m, uh) in m.iter_mut().zip(uh) {
                *m += ds * uh;
            }
        }
        *scale = after;
    }
}

/// The stored scale that lowers 2 ds b + ds² a most, or `scale` itself.
#[inline(always)]
fn refit(scale: f32, a: f32, b: f32, scale_dtype: u32) -> f32 {
    let exact = scale - b / a;
    // Written so that NaN keeps the scale, as does a scale of the wrong sign.
    let (sign, size) = (scale.signum(), exact * scale.signum());
    let fine = a > 0.0 && size > 0.0 && size < f32::MAX;
    if !fine {
        return scale;
    }
    let dtype = Dtype::from_code(scale_dtype);
    let after = sign * dtype.round(size).max(smallest(scale_dtype));
    let ds = after - scale;
    if 2.0 * ds * b + ds * ds * a < 0.0 { after } else { scale }
}
