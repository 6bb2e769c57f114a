//! The best scale and minimum of every row and one group for fixed codes, rows independent, in closed form.
//!
//! With ŵ = s q + m the error changes by ds q + dm 1, and the loss e H eᵀ by the quadratic
//!   2 (ds b + dm c) + ds² a + 2 ds dm f + dm² g,   b = q · M, c = 1 · M, a = q H qᵀ, f = q H 1ᵀ, g = 1 H 1ᵀ,   M = E H,
//! all over the columns of the group. Its minimum, that over m alone and that over s alone are tried, s rounded to the type in which it is
//! stored and m found anew for the rounded s, rounded too; the one that lowers the loss most is taken: M += ds q H + dm 1 H, z = −m / s.

use super::row_dot::dot;
use super::scale_refit::{StoredScale, steps_needed, steps_of};
use super::simd::{Loop, widest};
use super::stored::stored_minimum;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// q, qh (q H), m [rows, ld]; h (1 H) [cols]; scale, zero [rows, n_group], of which `group` is refit, whose columns are
    /// col0 .. col0 + width.
    pub struct MinimumRefitParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        pub col0: u32,
        pub width: u32,
        pub group: u32,
        pub n_group: u32,
        /// Type in which scales and minima are stored: 0 f32, 1 f16, 2 bf16.
        pub scale_dtype: u32,
        /// Groups of a super-block; 0: scales and minima are stored by themselves. Else they are whole numbers of steps, up to count_high, and
        /// steps [rows, n_super, 2] holds those of every super-block.
        pub per_super: u32,
        pub count_high: f32,
    }
}

impl Launch for MinimumRefitParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.rows as usize)
    }

    fn cost(&self) -> Cost {
        Cost { flops: f64::from(self.rows) * (8.0 * f64::from(self.width) + 4.0 * f64::from(self.cols)) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        if self.col0 + self.width > self.cols || self.group >= self.n_group {
            return Err(format!("group {} of {}: columns {} + {} of {}", self.group, self.n_group, self.col0, self.width, self.cols));
        }
        within("m", self.cols, self.ld)?;
        let (all, grids) = (self.rows as usize * self.ld as usize, self.rows as usize * self.n_group as usize);
        need("q", len[0], all)?;
        need("qh", len[1], all)?;
        need("h", len[2], self.cols as usize)?;
        need("steps", len[3], steps_needed(self.rows, self.n_group, self.per_super))?;
        need("scale", len[4], grids)?;
        need("zero", len[5], grids)?;
        need("m", len[6], all)
    }
}

#[allow(clippy::too_many_arguments, reason = "the kernel's bindings")]
pub(super) fn native(
    p: &MinimumRefitParams,
    _: &Constants,
    q: &[f32],
    qh: &[f32],
    h: &[f32],
    steps: &[f32],
    scale: &mut [f32],
    zero: &mut [f32],
    m: &mut [f32],
) {
    let (ld, cols, n_group, group) = (p.ld as usize, p.cols as usize, (p.n_group as usize).max(1), p.group as usize);
    let grids = scale.par_chunks_mut(n_group).zip(zero.par_chunks_mut(n_group));
    let rows = grids.zip(m.par_chunks_mut(ld)).zip(q.par_chunks(ld).zip(qh.par_chunks(ld)));
    rows.take(p.rows as usize).enumerate().for_each(|(row, (((scale, zero), m), (q, qh)))| {
        let grid = (&mut scale[group], &mut zero[group]);
        let [step, step_minimum] = steps_of(steps, row, p.group, p.n_group, p.per_super);
        let stored = Stored { scale: StoredScale { dtype: p.scale_dtype, step, low: 0.0, high: p.count_high }, step_minimum };
        widest(Row { p, stored, q: &q[..cols], qh: &qh[..cols], h: &h[..cols], grid, m: &mut m[..cols] });
    });
}

/// What scales and minima are stored as.
#[derive(Clone, Copy)]
pub struct Stored {
    pub scale: StoredScale,
    /// 0: no minimum but 0, where scales have steps.
    pub step_minimum: f32,
}

impl Stored {
    /// The nearest stored minimum.
    #[inline(always)]
    pub fn minimum(self, x: f32) -> f32 {
        if self.scale.step == 0.0 {
            stored_minimum(x, self.scale.dtype)
        } else if self.step_minimum == 0.0 {
            0.0
        } else {
            -self.step_minimum * (-x / self.step_minimum).round_ties_even().max(0.0).min(self.scale.high)
        }
    }
}

struct Row<'a> {
    p: &'a MinimumRefitParams,
    stored: Stored,
    q: &'a [f32],
    qh: &'a [f32],
    h: &'a [f32],
    grid: (&'a mut f32, &'a mut f32),
    m: &'a mut [f32],
}

impl Loop for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Row { p, stored, q, qh, h, grid: (scale, zero), m } = self;
        let own = p.col0 as usize..(p.col0 + p.width) as usize;
        let quadratic = Quadratic {
            b: dot(&q[own.clone()], &m[own.clone()]),
            c: m[own.clone()].iter().sum(),
            a: dot(&q[own.clone()], &qh[own.clone()]),
            f: qh[own.clone()].iter().sum(),
            g: h[own].iter().sum(),
        };
        let minimum = stored.minimum(-*scale * *zero);
        let Some((after, lower)) = quadratic.best(*scale, minimum, stored) else { return };
        let (ds, dm) = (after - *scale, lower - minimum);
        for ((m, qh), h) in m.iter_mut().zip(qh).zip(h) {
            *m += ds * qh + dm * h;
        }
        (*scale, *zero) = (after, -lower / after);
    }
}

struct Quadratic {
    b: f32,
    c: f32,
    a: f32,
    f: f32,
    g: f32,
}

impl Quadratic {
    /// The stored scale and minimum that lower the loss most, if any do.
    #[inline(always)]
    fn best(&self, scale: f32, minimum: f32, stored: Stored) -> Option<(f32, f32)> {
        let Self { b, c, a, f, g } = *self;
        let det = a * g - f * f;
        let mut best = (0.0, None);
        // Both, the minimum alone, the scale alone.
        let both = if det > 1e-6 * a * g { (c * f - b * g) / det } else { 0.0 };
        for ds in [both, 0.0, if a > 0.0 { -b / a } else { 0.0 }] {
            let exact = scale + ds;
            // Written so that NaN is left out, as is a scale of the wrong sign.
            if !(exact > 0.0 && exact < f32::MAX) {
                continue;
            }
            let after = if ds == 0.0 { scale } else { stored.scale.nearest(exact) };
            let ds = after - scale;
            for dm in [-(c + ds * f) / g, 0.0] {
                let exact = minimum + dm;
                if exact.is_nan() || exact.abs() >= f32::MAX {
                    continue;
                }
                let lower = if dm == 0.0 { minimum } else { stored.minimum(exact) };
                let dm = lower - minimum;
                let change = 2.0 * (ds * b + dm * c) + ds * ds * a + 2.0 * ds * dm * f + dm * dm * g;
                if after.is_finite() && lower.is_finite() && change < best.0 {
                    best = (change, Some((after, lower)));
                }
            }
        }
        best.1
    }
}
