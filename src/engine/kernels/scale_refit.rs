//! The best scale of every row for fixed codes, rows independent, in closed form.
//!
//! The error E = s u − w with u = q − z changes by ds u, the loss e H eᵀ by 2 ds b + ds² a with b = u · M, a = u H uᵀ and M = E H. The
//! minimum ds = −b / a is rounded so that s + ds is a scale as stored, and taken where it lowers the loss: s += ds, M += ds u H. No scale
//! changes its sign or vanishes. u may be restricted to one group of columns; u H then still has all columns.

use super::row_dot::dot;
use super::simd::{Loop, widest};
use super::stored::stored_scale;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
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
        /// Groups of a super-block; 0: scales are stored by themselves. Else they are whole numbers of steps, from count_low to count_high, and
        /// steps [rows, n_super, 2] holds the step of every super-block and that of its minima.
        pub per_super: u32,
        pub count_low: f32,
        pub count_high: f32,
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
        need("steps", len[2], steps_needed(self.rows, self.n_group, self.per_super))?;
        need("scale", len[3], self.rows as usize * self.n_group as usize)?;
        need("m", len[4], all)
    }
}

/// Steps of rows of `n_group` groups, two for each super-block.
pub(super) fn steps_needed(rows: u32, n_group: u32, per_super: u32) -> usize {
    if per_super == 0 { 0 } else { rows as usize * n_group.div_ceil(per_super) as usize * 2 }
}

/// The steps of the super-block in which a group of a row lies: of scales and of minima; zeros where there are none.
pub(super) fn steps_of(steps: &[f32], row: usize, group: u32, n_group: u32, per_super: u32) -> [f32; 2] {
    if per_super == 0 {
        return [0.0; 2];
    }
    let at = row * n_group.div_ceil(per_super) as usize + (group / per_super) as usize;
    [steps[2 * at], steps[2 * at + 1]]
}

pub(super) fn native(p: &ScaleRefitParams, _: &Constants, u: &[f32], uh: &[f32], steps: &[f32], scale: &mut [f32], m: &mut [f32]) {
    let (ld, cols) = (p.ld as usize, p.cols as usize);
    let rows = scale.par_chunks_mut((p.n_group as usize).max(1)).zip(m.par_chunks_mut(ld)).zip(u.par_chunks(ld).zip(uh.par_chunks(ld)));
    rows.take(p.rows as usize).enumerate().for_each(|(row, ((scale, m), (u, uh)))| {
        let [step, _] = steps_of(steps, row, p.group, p.n_group, p.per_super);
        let stored = StoredScale { dtype: p.scale_dtype, step, low: p.count_low, high: p.count_high };
        widest(Row { p, stored, u: &u[..cols], uh: &uh[..cols], scale: &mut scale[p.group as usize], m: &mut m[..cols] });
    });
}

/// What a scale is stored as: a float, or a number of steps.
#[derive(Clone, Copy)]
pub struct StoredScale {
    pub dtype: u32,
    /// 0: there are none.
    pub step: f32,
    pub low: f32,
    pub high: f32,
}

impl StoredScale {
    /// The nearest stored scale of the sign of `x` that is not 0.
    #[inline(always)]
    pub fn nearest(self, x: f32) -> f32 {
        let size = x.abs();
        if self.step == 0.0 {
            return x.signum() * stored_scale(size, self.dtype);
        }
        let most = if x > 0.0 { self.high } else { -self.low };
        x.signum() * self.step * (size / self.step).round_ties_even().max(1.0).min(most)
    }
}

struct Row<'a> {
    p: &'a ScaleRefitParams,
    stored: StoredScale,
    u: &'a [f32],
    uh: &'a [f32],
    scale: &'a mut f32,
    m: &'a mut [f32],
}

impl Loop for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Row { p, stored, u, uh, scale, m } = self;
        let own = p.col0 as usize..(p.col0 + p.width) as usize;
        let b = dot(&u[own.clone()], &m[own.clone()]);
        let c = dot(&u[own.clone()], &uh[own]);
        let a = if p.folded != 0 { (b + c) / *scale } else { c };
        let after = refit(*scale, a, b, stored);
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
fn refit(scale: f32, a: f32, b: f32, stored: StoredScale) -> f32 {
    let exact = scale - b / a;
    // Written so that NaN keeps the scale, as does a scale of the wrong sign.
    let size = exact * scale.signum();
    let fine = a > 0.0 && size > 0.0 && size < f32::MAX;
    if !fine {
        return scale;
    }
    let after = stored.nearest(exact);
    let ds = after - scale;
    if 2.0 * ds * b + ds * ds * a < 0.0 { after } else { scale }
}
