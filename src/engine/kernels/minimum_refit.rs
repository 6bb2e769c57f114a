//! The best scale and minimum of every row and one group for fixed codes, rows independent, in closed form.
//!
//! With ŵ = s q + m the error changes by ds q + dm 1, and the loss e H eᵀ by the quadratic
//!   2 (ds b + dm c) + ds² a + 2 ds dm f + dm² g,   b = q · M, c = 1 · M, a = q H qᵀ, f = q H 1ᵀ, g = 1 H 1ᵀ,   M = E H,
//! all over the columns of the group. Its minimum, that over m alone and that over s alone are tried, s rounded to the type in which it is
//! stored and m found anew for the rounded s, rounded too; the one that lowers the loss most is taken: M += ds q H + dm 1 H, z = −m / s.

use super::minimum_search::{stored_minimum, stored_scale};
use super::row_dot::dot;
use super::simd::{Loop, widest};
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
        need("scale", len[3], grids)?;
        need("zero", len[4], grids)?;
        need("m", len[5], all)
    }
}

#[allow(clippy::too_many_arguments, reason = "the kernel's bindings")]
pub(super) fn native(
    p: &MinimumRefitParams,
    _: &Constants,
    q: &[f32],
    qh: &[f32],
    h: &[f32],
    scale: &mut [f32],
    zero: &mut [f32],
    m: &mut [f32],
) {
    let (ld, cols, n_group, group) = (p.ld as usize, p.cols as usize, (p.n_group as usize).max(1), p.group as usize);
    let grids = scale.par_chunks_mut(n_group).zip(zero.par_chunks_mut(n_group));
    let rows = grids.zip(m.par_chunks_mut(ld)).zip(q.par_chunks(ld).zip(qh.par_chunks(ld)));
    rows.take(p.rows as usize).for_each(|(((scale, zero), m), (q, qh))| {
        let grid = (&mut scale[group], &mut zero[group]);
        widest(Row { p, q: &q[..cols], qh: &qh[..cols], h: &h[..cols], grid, m: &mut m[..cols] });
    });
}

struct Row<'a> {
    p: &'a MinimumRefitParams,
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
        let Row { p, q, qh, h, grid: (scale, zero), m } = self;
        let own = p.col0 as usize..(p.col0 + p.width) as usize;
        let quadratic = Quadratic {
            b: dot(&q[own.clone()], &m[own.clone()]),
            c: m[own.clone()].iter().sum(),
            a: dot(&q[own.clone()], &qh[own.clone()]),
            f: qh[own.clone()].iter().sum(),
            g: h[own].iter().sum(),
        };
        let minimum = stored_minimum(-*scale * *zero, p.scale_dtype);
        let Some((after, lower)) = quadratic.best(*scale, minimum, p.scale_dtype) else { return };
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
    fn best(&self, scale: f32, minimum: f32, scale_dtype: u32) -> Option<(f32, f32)> {
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
            let after = if ds == 0.0 { scale } else { stored_scale(exact, scale_dtype) };
            let ds = after - scale;
            for dm in [-(c + ds * f) / g, 0.0] {
                let exact = minimum + dm;
                if exact.is_nan() || exact.abs() >= f32::MAX {
                    continue;
                }
                let lower = if dm == 0.0 { minimum } else { stored_minimum(exact, scale_dtype) };
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
