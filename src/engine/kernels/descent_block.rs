//! Coordinate descent inside a block of columns, rows independent: every weight in turn moves to its best code while all others stay.
//!
//! With M = E H and a weight's error e_j the loss e H eᵀ is a parabola in e_j with its minimum at e_j − M_j / H_jj. In units of the scale
//! that is x = −M_j / (H_jj s) steps away from the code q, so
//!   q' = clamp(round(q + x + ε), 0, max_code);  δ = s (q' − q);  M_k += δ H_jk for the later columns k of the block.
//! A step n = q' − q lowers the loss by H_jj s² (2 n x − n²); it is taken where 2 n x > (1 + 1e-4) n², so that rounding errors in M cannot
//! move a weight to and fro between two codes that are equally good. Zero points cancel: only differences of codes count.
//!
//! Annealing: ε = √(T · heat_r / H_jj) / s times a normal number, a hash of (key, row, column). A noisy step is judged by x + ε, so it
//! is taken whatever it costs. Columns with H_jj = 0 do not matter and stay as they are.
//! M itself is not written: the product M += change · H over all columns follows, see `round::descent`.

use super::noise::{mix, normal};
use super::row_dot::check_groups;
use super::simd::{Loop, widest};
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, need, params, within};
use rayon::prelude::*;

/// Widest block of one launch: its square of H and a tile of rows fit the smallest workgroup memory.
pub const MAX_WIDTH: u32 = 32;

/// How much better than a tie a step must be.
pub(super) const MARGIN: f32 = 1e-4;

params! {
    /// h [h_row + width, ld_h]: rows of the metric, the block's square at row h_row and column h_col; scale [rows, n_group];
    /// heat [rows]; m [rows, ld]; codes [rows, ld]; change [rows, ld_change], written at columns change_col...; moves [rows].
    pub struct DescentBlockParams {
        pub rows: u32,
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

impl Launch for DescentBlockParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        [self.rows.div_ceil(64), 1, 1]
    }

    fn cost(&self) -> Cost {
        let width = f64::from(self.width);
        Cost { flops: f64::from(self.rows) * width * (width + 12.0) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_groups(self.cols, self.group, self.n_group)?;
        if self.width > MAX_WIDTH || self.col0 + self.width > self.cols || self.change_col + self.width > self.ld_change {
            return Err(format!("block {} + {} of {} columns", self.col0, self.width, self.cols));
        }
        within("m", self.cols, self.ld)?;
        within("h", self.h_col + self.width, self.ld_h)?;
        let (rows, all) = (self.rows as usize, self.rows as usize * self.ld as usize);
        let square = (self.h_row + self.width).saturating_sub(1) as usize * self.ld_h as usize + (self.h_col + self.width) as usize;
        need("h", len[0], square)?;
        need("scale", len[1], rows * self.n_group as usize)?;
        need("heat", len[2], rows)?;
        need("m", len[3], all)?;
        need("codes", len[4], all)?;
        need("change", len[5], rows * self.ld_change as usize)?;
        need("moves", len[6], rows)
    }
}

/// Rows that are swept together: two vector registers at best, so that their chains of operations overlap.
const LANES: usize = 32;
type Lanes = [f32; LANES];

#[allow(clippy::too_many_arguments, reason = "the kernel's bindings")]
pub(super) fn native(
    p: &DescentBlockParams,
    _: &Constants,
    h: &[f32],
    scale: &[f32],
    heat: &[f32],
    m: &[f32],
    codes: &mut [u32],
    change: &mut [f32],
    moves: &mut [u32],
) {
    let (ld, ld_change, n_group, total) = (p.ld as usize, p.ld_change as usize, p.n_group as usize, p.rows as usize);
    let tasks = codes.par_chunks_mut(LANES * ld).zip(change.par_chunks_mut(LANES * ld_change)).zip(moves.par_chunks_mut(LANES));
    tasks.take(total.div_ceil(LANES)).enumerate().for_each(|(i, ((codes, change), moves))| {
        let first = i * LANES;
        let rows = LANES.min(total - first);
        let scale = &scale[first * n_group..(first + rows) * n_group];
        widest(Rows { p, first, rows, h, scale, heat: &heat[first..], m: &m[first * ld..], codes, change, moves });
    });
}

/// At most `LANES` rows, and their parts of the buffers.
struct Rows<'a> {
    p: &'a DescentBlockParams,
    first: usize,
    rows: usize,
    h: &'a [f32],
    scale: &'a [f32],
    heat: &'a [f32],
    m: &'a [f32],
    codes: &'a mut [u32],
    change: &'a mut [f32],
    moves: &'a mut [u32],
}

impl Loop for Rows<'_> {
    type Output = ();

    /// Sweeps the rows together, transposed so that a column of the block is one vector.
    #[inline(always)]
    fn call(self) {
        let Rows { p, first, rows, h, scale, heat, m, codes, change, moves } = self;
        let (ld, ld_h, n_group) = (p.ld as usize, p.ld_h as usize, p.n_group as usize);
        let (col0, width, max) = (p.col0 as usize, p.width as usize, p.max_code as f32);
        let hot = p.temperature > 0.0;
        // M of a column until the column is done, then its change.
        let mut tile = [[0.0f32; LANES]; MAX_WIDTH as usize];
        let mut code = [[0u32; LANES]; MAX_WIDTH as usize];
        // Rows lie in different pages: all are asked for before any is turned, so that their misses overlap.
        let mut staged = [([0.0f32; MAX_WIDTH as usize], [0u32; MAX_WIDTH as usize]); LANES];
        for (r, staged) in staged[..rows].iter_mut().enumerate() {
            staged.0[..width].copy_from_slice(&m[r * ld + col0..][..width]);
            staged.1[..width].copy_from_slice(&codes[r * ld + col0..][..width]);
        }
        for (r, staged) in staged.iter().enumerate() {
            for j in 0..MAX_WIDTH as usize {
                (tile[j][r], code[j][r]) = (staged.0[j], staged.1[j]);
            }
        }
        let (mut s, mut inv_s, mut noise): (Lanes, Lanes, Lanes) = ([1.0; LANES], [1.0; LANES], [0.0; LANES]);
        let mut count = [0u32; LANES];
        let (mut root, mut seed): (Lanes, [u32; LANES]) = ([0.0; LANES], [0; LANES]);
        if hot {
            for r in 0..rows {
                root[r] = (p.temperature * heat[r]).sqrt();
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
            if hot {
                let spread = inverse.sqrt();
                for r in 0..LANES {
                    noise[r] = normal(mix(seed[r].wrapping_add(column as u32))) * root[r] * spread * inv_s[r];
                }
            }
            let (now, later) = tile[j..width].split_at_mut(1);
            let now = &mut now[0];
            let (q, mut moved) = (&mut code[j], 0);
            for r in 0..LANES {
                let before = q[r] as f32;
                let n = step(before, noise[r] - now[r] * inverse * inv_s[r], max);
                q[r] = whole(before + n);
                now[r] = n * s[r];
                count[r] += u32::from(n != 0.0);
                // An integer: a sum of floats would have an order.
                moved |= u32::from(n != 0.0);
            }
            if moved != 0 {
                for (later, h) in later.iter_mut().zip(&h_row[j + 1..]) {
                    for r in 0..LANES {
                        later[r] += now[r] * h;
                    }
                }
            }
        }
        for r in 0..rows {
            let codes = &mut codes[r * ld + col0..][..width];
            let change = &mut change[r * p.ld_change as usize + p.change_col as usize..][..width];
            for j in 0..width {
                codes[j] = code[j][r];
                change[j] = tile[j][r];
            }
            moves[r] += count[r];
        }
    }
}

/// Steps from code `q` to the best code, whose distance is `x`.
#[inline(always)]
pub(super) fn step(q: f32, x: f32, max_code: f32) -> f32 {
    let n = (q + x).round_ties_even().max(0.0).min(max_code) - q;
    if 2.0 * n * x > (1.0 + MARGIN) * n * n { n } else { 0.0 }
}

/// A whole number in 0..2^23 as an integer: a plain cast also looks after NaN and overflow, which keeps it out of vector registers.
#[inline(always)]
pub(super) fn whole(q: f32) -> u32 {
    const ONE: f32 = 8_388_608.0;
    (q + ONE).to_bits() - ONE.to_bits()
}
