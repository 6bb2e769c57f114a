//! Rotary position embedding in place, half-split layout (LLaMA as Hugging Face stores it): for i < d_head / 2
//!   x[i]          ← x[i] cos − x[i + d_head/2] sin
//!   x[i + d_head/2] ← x[i + d_head/2] cos + x[i] sin
//! at position (token mod seq_len). Frequencies and scaling are in the tables.

use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// cos, sin [seq_len, d_head / 2]; x [n_tok, ld] with heads side by side.
    pub struct RopeParams {
        pub n_tok: u32,
        pub seq_len: u32,
        pub n_head: u32,
        pub d_head: u32,
        pub ld: u32,
    }
}

impl Launch for RopeParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.n_tok as usize * self.n_head as usize * (self.d_head as usize / 2)).div_ceil(256))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 3.0 * f64::from(self.n_tok) * f64::from(self.n_head) * f64::from(self.d_head) }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        if self.seq_len == 0 || !self.d_head.is_multiple_of(2) {
            return Err(format!("sequences of {} tokens, heads of {}", self.seq_len, self.d_head));
        }
        within("x", self.n_head * self.d_head, self.ld)?;
        let table = self.seq_len as usize * self.d_head as usize / 2;
        need("cos", len[0], table)?;
        need("sin", len[1], table)?;
        need("x", len[2], self.n_tok as usize * self.ld as usize)
    }
}

pub(super) fn native(p: &RopeParams, _: &Constants, cos: &[f32], sin: &[f32], x: &mut [f32]) {
    let (d_head, half) = (p.d_head as usize, p.d_head as usize / 2);
    x.par_chunks_mut(p.ld as usize).take(p.n_tok as usize).enumerate().for_each(|(t, row)| {
        let at = t % p.seq_len as usize * half;
        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
        for head in row.chunks_exact_mut(d_head).take(p.n_head as usize) {
            let (low, high) = head.split_at_mut(half);
            for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
            }
        }
    });
}
