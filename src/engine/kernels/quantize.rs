//! Nearest codes on a grid, and what they stand for, in one pass:
//! q = clamp(round(w / s + z), 0, max_code), ŵ = s (q − z); s and z per row and group of columns. Ties of w / s + z − round(z) go to the
//! even number, so that a whole z moves all codes alike. z is whole on integer grids and −m / s on those with a minimum m.

use super::row_dot::check_groups;
use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// w, codes, w_hat [rows, ld]; scale and zero [rows, n_group].
    pub struct QuantizeParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        pub group: u32,
        pub n_group: u32,
        pub max_code: u32,
    }
}

impl Launch for QuantizeParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.rows as usize * self.cols as usize).div_ceil(256))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 6.0 * f64::from(self.rows) * f64::from(self.cols) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_groups(self.cols, self.group, self.n_group)?;
        within("w", self.cols, self.ld)?;
        let (all, grids) = (self.rows as usize * self.ld as usize, self.rows as usize * self.n_group as usize);
        need("w", len[0], all)?;
        need("scale", len[1], grids)?;
        need("zero", len[2], grids)?;
        need("codes", len[3], all)?;
        need("w_hat", len[4], all)
    }
}

pub(super) fn native(p: &QuantizeParams, _: &Constants, w: &[f32], scale: &[f32], zero: &[f32], codes: &mut [u32], w_hat: &mut [f32]) {
    let (cols, ld, group, n_group) = (p.cols as usize, p.ld as usize, p.group as usize, p.n_group as usize);
    let max = p.max_code as f32;
    codes.par_chunks_mut(ld).zip(w_hat.par_chunks_mut(ld)).zip(w.par_chunks(ld)).take(p.rows as usize).enumerate().for_each(
        |(r, ((codes, w_hat), w))| {
            for g in 0..n_group {
                let columns = g * group..((g + 1) * group).min(cols);
                let (s, z) = (scale[r * n_group + g], zero[r * n_group + g]);
                let (w, codes, w_hat) = (&w[columns.clone()], &mut codes[columns.clone()], &mut w_hat[columns]);
                widest(Nearest { w, scale: s, zero: z, max_code: max, codes, w_hat });
            }
        },
    );
}

/// One group of one row.
struct Nearest<'a> {
    w: &'a [f32],
    scale: f32,
    zero: f32,
    max_code: f32,
    codes: &'a mut [u32],
    w_hat: &'a mut [f32],
}

impl Loop for Nearest<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for ((c, h), w) in self.codes.iter_mut().zip(self.w_hat).zip(self.w) {
            let q = code(*w, self.scale, self.zero, self.max_code);
            *c = q as u32;
            *h = self.scale * (q - self.zero);
        }
    }
}

/// The nearest code of `w`, as a float.
#[inline(always)]
pub(super) fn code(w: f32, scale: f32, zero: f32, max_code: f32) -> f32 {
    let whole = zero.round_ties_even();
    ((w / scale + (zero - whole)).round_ties_even() + whole).clamp(0.0, max_code)
}
