//! Coordinate descent inside a block of columns where the rows of a head are coupled: every weight in turn moves to its best code.
//!
//! With T = G E H the loss tr(G E H Eᵀ) is a parabola in the error of weight (r, j) with its minimum −T_rj / (G_rr H_jj) away. Columns
//! go one after the other and rows within a column too (Gauss-Seidel): with v = G δ over the rows done so far,
//!   x = −(T_rj + v_r H_jj) / (G_rr H_jj s_r);  n = the step to the nearest code as in `descent_block`;  v += G_:r s_r n.
//! After a column T_:k += v H_jk for the later columns k of the block. What is written is v, so that T += v H brings all columns up to date.
//!
//! Most weights stay where they are, so rows are not walked one by one: all of them are judged at once, the first that moves does, and
//! those after it are judged again. That visits the same codes with one round per move instead of one per row.

use super::descent_block::{step, whole};
use super::noise::{mix, normal};
use super::row_dot::check_groups;
use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

/// Widest block of one launch, and the most rows of a head: their tile fits the smallest workgroup memory.
pub const MAX_WIDTH: u32 = 16;
pub const MAX_HEAD: u32 = 128;

params! {
    /// g [n_head · d_head, ld_g]: row metrics of the heads; h: the metric, the block's square at row h_row and column h_col;
    /// scale [rows, n_group]; heat [rows]; t and codes [rows, ld]; change [rows, ld_change], written at columns change_col...;
    /// moves [rows]; rows = n_head · d_head.
    pub struct DescentHeadsParams {
        pub n_head: u32,
        pub d_head: u32,
        pub ld_g: u32,
        pub cols: u32,
        pub ld: u32,
        /// First column of the block, and how many it has.
        pub col0: u32,
        pub width: u32,
        pub h_row: u32,
        pub h_col: u32,
        pub ld_h: u32,
        pub ld_change: u32,
        pub change_col: u32,
        pub group: u32,
        pub n_group: u32,
        pub max_code: u32,
        /// Index of the first row in the noise: results do not depend on how rows are split.
        pub row0: u32,
        /// Names the sweep in the noise.
        pub key: u32,
        /// T, 0 for plain descent.
        pub temperature: f32,
    }
}

impl Launch for DescentHeadsParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d(self.n_head as usize)
    }

    /// Without the moves, whose number is not known: 2 d_head flops each.
    fn cost(&self) -> Cost {
        let width = f64::from(self.width);
        Cost { flops: f64::from(self.n_head) * f64::from(self.d_head) * width * (width + 12.0) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_groups(self.cols, self.group, self.n_group)?;
        if self.width > MAX_WIDTH || self.col0 + self.width > self.cols || self.change_col + self.width > self.ld_change {
            return Err(format!("block {} + {} of {} columns", self.col0, self.width, self.cols));
        }
        if self.d_head > MAX_HEAD {
            return Err(format!("heads of {} rows; at most {MAX_HEAD} are possible", self.d_head));
        }
        within("t", self.cols, self.ld)?;
        within("g", self.d_head, self.ld_g)?;
        within("h", self.h_col + self.width, self.ld_h)?;
        let rows = self.n_head as usize * self.d_head as usize;
        let square = (self.h_row + self.width).saturating_sub(1) as usize * self.ld_h as usize + (self.h_col + self.width) as usize;
        need("g", len[0], rows * self.ld_g as usize)?;
        need("h", len[1], square)?;
        need("scale", len[2], rows * self.n_group as usize)?;
        need("heat", len[3], rows)?;
        need("t", len[4], rows * self.ld as usize)?;
        need("codes", len[5], rows * self.ld as usize)?;
        need("change", len[6], rows * self.ld_change as usize)?;
        need("moves", len[7], rows)
    }
}

/// Rows that are judged at once.
const LANES: usize = 16;
/// A column of a head, filled up to whole vectors.
type Column = [f32; MAX_HEAD as usize];

#[allow(clippy::too_many_arguments, reason = "the kernel's bindings")]
pub(super) fn native(
    p: &DescentHeadsParams,
    _: &Constants,
    g: &[f32],
    h: &[f32],
    scale: &[f32],
    heat: &[f32],
    t: &[f32],
    codes: &mut [u32],
    change: &mut [f32],
    moves: &mut [u32],
) {
    let (d_head, ld, ld_g) = (p.d_head as usize, p.ld as usize, p.ld_g as usize);
    let tasks = codes.par_chunks_mut(d_head * ld).zip(change.par_chunks_mut(d_head * p.ld_change as usize)).zip(moves.par_chunks_mut(d_head));
    tasks.take(p.n_head as usize).enumerate().for_each(|(i, ((codes, change), moves))| {
        let first = i * d_head;
        let scale = &scale[first * p.n_group as usize..];
        widest(Head { p, first, g: &g[first * ld_g..], h, scale, heat: &heat[first..], t: &t[first * ld..], codes, change, moves });
    });
}

/// One head, and its parts of the buffers.
struct Head<'a> {
    p: &'a DescentHeadsParams,
    first: usize,
    g: &'a [f32],
    h: &'a [f32],
    scale: &'a [f32],
    heat: &'a [f32],
    t: &'a [f32],
    codes: &'a mut [u32],
    change: &'a mut [f32],
    moves: &'a mut [u32],
}

impl Loop for Head<'_> {
    type Output = ();

    /// Rows in lanes, columns one after the other.
    #[inline(always)]
    fn call(self) {
        let Head { p, first, g, h, scale, heat, t, codes, change, moves } = self;
        let (ld, ld_h, ld_g, n_group) = (p.ld as usize, p.ld_h as usize, p.ld_g as usize, p.n_group as usize);
        let (col0, width, rows, max) = (p.col0 as usize, p.width as usize, p.d_head as usize, p.max_code as f32);
        let hot = p.temperature > 0.0;
        // T of a column until the column is done, then G times its change.
        let mut tile = [[0.0f32; MAX_HEAD as usize]; MAX_WIDTH as usize];
        let mut code = [[0.0f32; MAX_HEAD as usize]; MAX_WIDTH as usize];
        // Rows lie in different pages: all are asked for before any is turned, so that their misses overlap.
        let mut staged = [([0.0f32; MAX_WIDTH as usize], [0u32; MAX_WIDTH as usize]); MAX_HEAD as usize];
        for (r, staged) in staged[..rows].iter_mut().enumerate() {
            staged.0[..width].copy_from_slice(&t[r * ld + col0..][..width]);
            staged.1[..width].copy_from_slice(&codes[r * ld + col0..][..width]);
        }
        for (r, staged) in staged[..rows].iter().enumerate() {
            for j in 0..MAX_WIDTH as usize {
                (tile[j][r], code[j][r]) = (staged.0[j], staged.1[j] as f32);
            }
        }
        let used = rows.next_multiple_of(LANES);
        let (mut s, mut inv_s, mut inv_g): (Column, Column, Column) =
            ([1.0; MAX_HEAD as usize], [1.0; MAX_HEAD as usize], [0.0; MAX_HEAD as usize]);
        let (mut root, mut seed) = ([0.0f32; MAX_HEAD as usize], [0u32; MAX_HEAD as usize]);
        for r in 0..rows {
            let diagonal = g[r * ld_g + r];
            inv_g[r] = if diagonal > 0.0 { 1.0 / diagonal } else { 0.0 };
            if hot {
                root[r] = (p.temperature * heat[r] * inv_g[r]).sqrt();
                seed[r] = mix((p.row0 as usize + first + r) as u32 ^ p.key);
            }
        }
        let mut group = usize::MAX;
        for j in 0..width {
            let column = col0 + j;
            if column / p.group as usize != group {
                group = column / p.group as usize;
                for r in 0..rows {
                    s[r] = scale[r * n_group + group];
                    inv_s[r] = 1.0 / s[r];
                }
            }
            let h_row = &h[(p.h_row as usize + j) * ld_h + p.h_col as usize..][..width];
            let inverse = if h_row[j] > 0.0 { 1.0 / h_row[j] } else { 0.0 };
            let (now, later) = tile[j..width].split_at_mut(1);
            let (now, q) = (&mut now[0][..used], &mut code[j][..used]);
            // x = still − pull · v.
            let (mut still, mut pull): (Column, Column) = ([0.0; MAX_HEAD as usize], [0.0; MAX_HEAD as usize]);
            for r in 0..used {
                let unit = inverse * inv_g[r] * inv_s[r];
                (still[r], pull[r]) = (-now[r] * unit, h_row[j] * unit);
            }
            if hot {
                let spread = inverse.sqrt();
                for r in 0..used {
                    still[r] += normal(mix(seed[r].wrapping_add(column as u32))) * root[r] * spread * inv_s[r];
                }
            }
            let mut v: Column = [0.0; MAX_HEAD as usize];
            let mut moved = false;
            for chunk in (0..used).step_by(LANES) {
                let mut open = u32::MAX;
                while open != 0 {
                    let (steps, moves_now) = judge(&still[chunk..], &pull[chunk..], &v[chunk..], &q[chunk..], max);
                    // The first that moves among those that have not had their turn.
                    let first = (moves_now & open).trailing_zeros();
                    let Some(n) = steps.get(first as usize) else { break };
                    let r = chunk + first as usize;
                    q[r] += n;
                    moves[r] += 1;
                    let delta = s[r] * n;
                    for (v, g) in v.iter_mut().zip(&g[r * ld_g..][..rows]) {
                        *v += g * delta;
                    }
                    moved = true;
                    open = u32::MAX << (first + 1);
                }
            }
            now.copy_from_slice(&v[..used]);
            if moved {
                for (later, h) in later.iter_mut().zip(&h_row[j + 1..]) {
                    for (later, v) in later[..used].iter_mut().zip(&v[..used]) {
                        *later += v * h;
                    }
                }
            }
        }
        for r in 0..rows {
            let codes = &mut codes[r * ld + col0..][..width];
            let change = &mut change[r * p.ld_change as usize + p.change_col as usize..][..width];
            for j in 0..width {
                codes[j] = whole(code[j][r]);
                change[j] = tile[j][r];
            }
        }
    }
}

/// Steps of the first `LANES` rows of these, and a bit for each that moves.
#[inline(always)]
fn judge(still: &[f32], pull: &[f32], v: &[f32], q: &[f32], max: f32) -> ([f32; LANES], u32) {
    let (still, pull, v, q) = (&still[..LANES], &pull[..LANES], &v[..LANES], &q[..LANES]);
    let (mut steps, mut moves) = ([0.0f32; LANES], 0u32);
    for i in 0..LANES {
        steps[i] = step(q[i], still[i] - pull[i] * v[i], max);
        moves |= u32::from(steps[i] != 0.0) << i;
    }
    (steps, moves)
}
