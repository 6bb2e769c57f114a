//! One iteration of AdaRound (Nagel et al., ICML 2020) on a quadratic loss whose gradient M = (G) E H a product has left in `e`:
//!   ŵ = s (clamp(b + h(v) + z, 0, max_code) − z),  b = floor(start / s),  h(v) = clamp(1.2 sigmoid(v) − 0.1, 0, 1)
//!   g = [quadratic · M · s · 1(0 ≤ b + h + z ≤ max_code) − 2 lambda beta sign(2h − 1) |2h − 1|^(beta − 1)] h'(v)
//!   moment = 0.9 moment + 0.1 g, square = 0.999 square + 0.001 g², v −= rate · moment / (root · sqrt(square) + 1e-8)
//! and E = ŵ − wanted is left in `e` for the next product, or the change of E, which is mostly zeros once h is 0 or 1 nearly everywhere. A
//! launch works on the columns col0..col0 + cols; `e` may hold just those.
//!
//! Where h is 0 or 1, g is 0. Once what is left of the moment no longer changes v, it is set to 0, and the weight is at rest: v, moment and square
//! stay as they are. That alters no v, and leaves most weights' passes out soon after h has reached its ends. (A moment that decayed on would
//! become subnormal and stay so, at many times the cost of a normal one.)

use super::math::{exp, ln};
use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

/// h(v) = start / s − b, moments 0, E written; `e` is not read.
pub const BEGIN: u32 = 0;
/// One iteration.
pub const STEP: u32 = 1;
/// `e` becomes ŵ with h = 1 where v ≥ 0 and 0 elsewhere.
pub const END: u32 = 2;
/// E is written as v has it; `e` is not read and nothing else is changed.
pub const ERROR: u32 = 3;
/// One iteration that leaves the change of E: exactly 0 where h was 0 or 1 and stays so.
pub const CHANGE: u32 = 4;

params! {
    /// start, wanted, v, moment, square [rows, ld]; e [rows, ld_e]; scale, zero [rows, n_group].
    pub struct AdaroundStepParams {
        pub rows: u32,
        /// Columns col0..col0 + cols, which lie at e_col..e_col + cols in `e`.
        pub col0: u32,
        pub cols: u32,
        pub ld: u32,
        pub ld_e: u32,
        pub e_col: u32,
        pub group: u32,
        pub n_group: u32,
        pub max_code: u32,
        /// `BEGIN`, `STEP`, `END`, `ERROR` or `CHANGE`.
        pub phase: u32,
        /// Twice the weight of the quadratic loss: its gradient is `quadratic` · M.
        pub quadratic: f32,
        /// Weight of Σ (1 − |2h − 1|^beta); 0 leaves it out.
        pub lambda: f32,
        pub beta: f32,
        /// Learning rate over 1 − 0.9^t.
        pub rate: f32,
        /// (1 − 0.999^t)^-½
        pub root: f32,
    }
}

impl Launch for AdaroundStepParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.rows as usize * self.cols as usize).div_ceil(256))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 50.0 * f64::from(self.rows) * f64::from(self.cols) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        within("start", self.col0.saturating_add(self.cols), self.ld)?;
        within("e", self.e_col.saturating_add(self.cols), self.ld_e)?;
        if self.group == 0 || (self.col0 + self.cols).div_ceil(self.group) > self.n_group {
            return Err(format!("{} groups of {} do not hold columns up to {}", self.n_group, self.group, self.col0 + self.cols));
        }
        if self.phase > CHANGE {
            return Err(format!("phase {}", self.phase));
        }
        need("e", len[7], self.rows as usize * self.ld_e as usize)?;
        let (all, grids) = (self.rows as usize * self.ld as usize, self.rows as usize * self.n_group as usize);
        for (name, index) in [("start", 0), ("wanted", 1), ("v", 4), ("moment", 5), ("square", 6)] {
            need(name, len[index], all)?;
        }
        need("scale", len[2], grids)?;
        need("zero", len[3], grids)
    }
}

#[allow(clippy::too_many_arguments, reason = "the kernel's bindings")]
pub(super) fn native(
    p: &AdaroundStepParams,
    _: &Constants,
    start: &[f32],
    wanted: &[f32],
    scale: &[f32],
    zero: &[f32],
    v: &mut [f32],
    moment: &mut [f32],
    square: &mut [f32],
    e: &mut [f32],
) {
    let (ld, ld_e, group, n_group) = (p.ld as usize, p.ld_e as usize, p.group as usize, p.n_group as usize);
    let (first, last) = (p.col0 as usize, (p.col0 + p.cols) as usize);
    let state = v.par_chunks_mut(ld).zip(moment.par_chunks_mut(ld)).zip(square.par_chunks_mut(ld)).zip(e.par_chunks_mut(ld_e));
    let rows = state.zip(start.par_chunks(ld)).zip(wanted.par_chunks(ld)).take(p.rows as usize);
    rows.enumerate().for_each(|(r, (((((v, moment), square), e), start), wanted))| {
        for g in first / group..last.div_ceil(group) {
            let columns = (g * group).max(first)..((g + 1) * group).min(last);
            let in_e = columns.start - first + p.e_col as usize..columns.end - first + p.e_col as usize;
            widest(Part {
                p,
                scale: scale[r * n_group + g],
                zero: zero[r * n_group + g],
                start: &start[columns.clone()],
                wanted: &wanted[columns.clone()],
                v: &mut v[columns.clone()],
                moment: &mut moment[columns.clone()],
                square: &mut square[columns.clone()],
                e: &mut e[in_e],
            });
        }
    });
}

/// One group of one row.
struct Part<'a> {
    p: &'a AdaroundStepParams,
    scale: f32,
    zero: f32,
    start: &'a [f32],
    wanted: &'a [f32],
    v: &'a mut [f32],
    moment: &'a mut [f32],
    square: &'a mut [f32],
    e: &'a mut [f32],
}

impl Loop for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Part { p, scale: s, zero: z, start, wanted, v, moment, square, e } = self;
        let most = p.max_code as f32;
        let whole = z.round_ties_even();
        let part = z - whole;
        // One length for all, so that no access needs a check.
        let n = start.len();
        let (wanted, v, moment, square, e) = (&wanted[..n], &mut v[..n], &mut moment[..n], &mut square[..n], &mut e[..n]);
        match p.phase {
            BEGIN => {
                for j in 0..n {
                    let steps = start[j] / s + part;
                    let share = steps - steps.floor();
                    v[j] = ln((share + 0.1) / (1.1 - share));
                    (moment[j], square[j]) = (0.0, 0.0);
                    e[j] = soft(steps.floor() + whole, v[j], s, z, most) - wanted[j];
                }
            }
            STEP | CHANGE => {
                for first in (0..n).step_by(BLOCK) {
                    let c = first..n.min(first + BLOCK);
                    let (start, wanted) = (&start[c.clone()], &wanted[c.clone()]);
                    let (v, moment, square, e) = (&mut v[c.clone()], &mut moment[c.clone()], &mut square[c.clone()], &mut e[c]);
                    if p.phase == CHANGE && at_rest(v, moment) {
                        e.fill(0.0);
                    } else {
                        step(Part { p, scale: s, zero: z, start, wanted, v, moment, square, e });
                    }
                }
            }
            ERROR => {
                for j in 0..n {
                    e[j] = soft((start[j] / s + part).floor() + whole, v[j], s, z, most) - wanted[j];
                }
            }
            _ => {
                for j in 0..n {
                    let below = (start[j] / s + part).floor() + whole;
                    let h = if v[j] >= 0.0 { 1.0 } else { 0.0 };
                    e[j] = s * ((below + h).clamp(0.0, most) - z);
                }
            }
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// h before it is clamped.
#[inline(always)]
fn stretched(sigmoid: f32) -> f32 {
    1.2 * sigmoid - 0.1
}

/// Is h, before it is clamped, at one of its ends?
#[inline(always)]
fn ended(stretched: f32) -> bool {
    (stretched <= 0.0) | (stretched >= 1.0)
}

/// 2h − 1
#[inline(always)]
fn off(h: f32) -> f32 {
    2.0 * h - 1.0
}

/// The softly rounded weight.
#[inline(always)]
fn soft(below: f32, v: f32, s: f32, z: f32, most: f32) -> f32 {
    rounded(below, stretched(sigmoid(v)), s, z, most)
}

/// The same from h before it is clamped.
#[inline(always)]
fn rounded(below: f32, stretched: f32, s: f32, z: f32, most: f32) -> f32 {
    s * ((below + stretched.clamp(0.0, 1.0)).clamp(0.0, most) - z)
}

/// Elements of a pass: few enough for the first-level cache.
const BLOCK: usize = 128;
/// From here on h(v) is 1, from its negative on 0: a little more than ln 11.
const END_OF_H: f32 = 2.398;

/// Are all of these weights at rest?
#[inline(always)]
fn at_rest(v: &[f32], moment: &[f32]) -> bool {
    v.iter().zip(moment).fold(true, |all, (v, moment)| all & (v.abs() >= END_OF_H) & (*moment == 0.0))
}

/// An iteration of at most `BLOCK` elements, in short passes: done at once, the chain of four exponentials and logarithms is longer than
/// what a core looks ahead, and the time is that of the chain. Without branches: selections can be vectorised.
#[inline(always)]
fn step(part: Part<'_>) {
    let Part { p, scale: s, zero: z, start, wanted, v, moment, square, e } = part;
    let (most, n) = (p.max_code as f32, start.len().min(BLOCK));
    let whole = z.round_ties_even();
    let part = z - whole;
    let (wanted, v, moment, square, e) = (&wanted[..n], &mut v[..n], &mut moment[..n], &mut square[..n], &mut e[..n]);
    let [mut below, mut sig, mut power] = [[0.0f32; BLOCK]; 3];
    let (below, sig, power) = (&mut below[..n], &mut sig[..n], &mut power[..n]);
    for j in 0..n {
        sig[j] = sigmoid(v[j]);
    }
    // |2h − 1|^(beta − 1)
    if p.lambda != 0.0 {
        for (power, sig) in power.iter_mut().zip(sig.iter()) {
            // Below 1e-30 the power is 0 for every beta in use.
            *power = ln(off(stretched(*sig)).abs().max(1e-30));
        }
        for power in power.iter_mut() {
            *power = exp((p.beta - 1.0) * *power);
        }
    }
    for j in 0..n {
        below[j] = (start[j] / s + part).floor() + whole;
        let h = stretched(sig[j]);
        let slope = if ended(h) { 0.0 } else { 1.2 * sig[j] * (1.0 - sig[j]) };
        let code = below[j] + h;
        let quadratic = p.quadratic * e[j] * s;
        let quadratic = if (code >= 0.0) & (code <= most) { quadratic } else { 0.0 };
        let regular = 2.0 * p.lambda * p.beta * power[j].copysign(off(h));
        let g = (quadratic - regular) * slope;
        let rests = ended(h) & (moment[j] == 0.0);
        moment[j] = 0.9 * moment[j] + 0.1 * g;
        square[j] = if rests { square[j] } else { 0.999 * square[j] + 0.001 * g * g };
    }
    for j in 0..n {
        let next = v[j] - p.rate * moment[j] / (p.root * square[j].sqrt() + 1e-8);
        moment[j] = if ended(stretched(sig[j])) & (next == v[j]) { 0.0 } else { moment[j] };
        v[j] = next;
    }
    if p.phase == CHANGE {
        for j in 0..n {
            e[j] = soft(below[j], v[j], s, z, most) - rounded(below[j], stretched(sig[j]), s, z, most);
        }
    } else {
        for j in 0..n {
            e[j] = soft(below[j], v[j], s, z, most) - wanted[j];
        }
    }
}
