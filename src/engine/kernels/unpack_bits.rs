//! The reverse of `pack_bits`: a dense bit stream per row to one code per word.

use super::pack_bits::check_words;
use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// packed [rows, words] with words = ceil(cols · bits / 32); codes [rows, ld].
    pub struct UnpackBitsParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        pub bits: u32,
        pub words: u32,
    }
}

impl Launch for UnpackBitsParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.rows as usize * self.cols as usize).div_ceil(256))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 0.0 }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_words(self.cols, self.bits, self.words)?;
        within("codes", self.cols, self.ld)?;
        need("packed", len[0], self.rows as usize * self.words as usize)?;
        need("codes", len[1], self.rows as usize * self.ld as usize)
    }
}

pub(super) fn native(p: &UnpackBitsParams, _: &Constants, packed: &[u32], codes: &mut [u32]) {
    let (cols, bits) = (p.cols as usize, p.bits as usize);
    codes.par_chunks_mut(p.ld as usize).zip(packed.par_chunks((p.words as usize).max(1))).take(p.rows as usize).for_each(|(codes, packed)| {
        for (k, code) in codes[..cols].iter_mut().enumerate() {
            let (word, shift) = (k * bits / 32, k * bits % 32);
            let next = packed.get(word + 1).copied().unwrap_or(0);
            let pair = u64::from(packed[word]) | u64::from(next) << 32;
            *code = (pair >> shift) as u32 & ((1 << bits) - 1);
        }
    });
}
