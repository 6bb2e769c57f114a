//! Dense bit packing along a row: code k of `bits` bits occupies bits [k·bits, (k + 1)·bits) of a stream of 32-bit
//! little-endian words. Codes may straddle words. This is the layout of compressed-tensors, MLX and (along the other axis) GPTQ.

use crate::engine::kernel::{Constants, Cost, Launch, ParamsLayout, grid_1d, need, params, within};
use rayon::prelude::*;

params! {
    /// codes [rows, ld], each below 2^bits, bits 1..=8; packed [rows, words] with words = ceil(cols · bits / 32).
    pub struct PackBitsParams {
        pub rows: u32,
        pub cols: u32,
        pub ld: u32,
        pub bits: u32,
        pub words: u32,
    }
}

impl Launch for PackBitsParams {
    const LAYOUT: ParamsLayout = Self::PARAMS;

    fn grid(&self, _: &Constants) -> [u32; 3] {
        grid_1d((self.rows as usize * self.words as usize).div_ceil(256))
    }

    fn cost(&self) -> Cost {
        Cost { flops: 0.0 }
    }

    fn check(&self, len: &[usize]) -> Result<(), String> {
        check_words(self.cols, self.bits, self.words)?;
        within("codes", self.cols, self.ld)?;
        need("codes", len[0], self.rows as usize * self.ld as usize)?;
        need("packed", len[1], self.rows as usize * self.words as usize)
    }
}

/// 32-bit words that hold a row of `cols` codes.
pub fn words_per_row(cols: usize, bits: usize) -> usize {
    (cols * bits).div_ceil(32)
}

pub(super) fn check_words(cols: u32, bits: u32, words: u32) -> Result<(), String> {
    if !(1..=8).contains(&bits) || words as usize != words_per_row(cols as usize, bits as usize) {
        return Err(format!("{words} words do not hold {cols} codes of {bits} bits"));
    }
    Ok(())
}

pub(super) fn native(p: &PackBitsParams, _: &Constants, codes: &[u32], packed: &mut [u32]) {
    let (cols, bits) = (p.cols as usize, p.bits as usize);
    packed.par_chunks_mut((p.words as usize).max(1)).zip(codes.par_chunks(p.ld as usize)).take(p.rows as usize).for_each(|(packed, codes)| {
        let mut stream = 0u64;
        let mut filled = 0;
        let mut words = packed.iter_mut();
        for code in &codes[..cols] {
            stream |= u64::from(*code) << filled;
            filled += bits;
            if filled >= 32 {
                if let Some(word) = words.next() {
                    *word = stream as u32;
                }
                stream >>= 32;
                filled -= 32;
            }
        }
        if let Some(word) = words.next() {
            *word = stream as u32;
        }
    });
}
