//! The block types of ggml that have a scale, and perhaps a minimum, of their own for every 32 weights.
//!
//! d may be negative.
//!
//! | type | bytes | fields | value |
//! |---|---|---|---|
//! | Q8_0 | 34 | f16 d; i8 q[32] | d q |
//! | Q4_0 | 18 | f16 d; u8 q[16] | d (q − 8), byte j holds elements j (low) and j + 16 |
//! | Q4_1 | 20 | f16 d, m; u8 q[16] | d q + m |
//! | Q5_0 | 22 | f16 d; u32 h; u8 q[16] | d (q − 16), bit j of h is the fifth of element j |
//! | Q5_1 | 24 | f16 d, m; u32 h; u8 q[16] | d q + m |

use crate::quant::{Lattice, Offset};
use crate::tensor::Dtype;
use half::f16;

/// Elements of a block.
pub const BLOCK: usize = 32;

#[derive(Debug, PartialEq, Eq)]
pub struct Type {
    pub name: &'static str,
    /// Its number in files.
    pub id: u32,
    /// Of a block.
    pub bytes: usize,
    pub lattice: Lattice,
}

const fn block_type(name: &'static str, id: u32, bytes: usize, bits: u32, offset: Offset) -> Type {
    Type { name, id, bytes, lattice: Lattice { bits, group: Some(BLOCK), offset, dtype: Dtype::F16 } }
}

pub static Q4_0: Type = block_type("Q4_0", 2, 18, 4, Offset::Signed);
pub static Q4_1: Type = block_type("Q4_1", 3, 20, 4, Offset::Minimum);
pub static Q5_0: Type = block_type("Q5_0", 6, 22, 5, Offset::Signed);
pub static Q5_1: Type = block_type("Q5_1", 7, 24, 5, Offset::Minimum);
pub static Q8_0: Type = block_type("Q8_0", 8, 34, 8, Offset::Signed);

pub static TYPES: &[&Type] = &[&Q4_0, &Q4_1, &Q5_0, &Q5_1, &Q8_0];

/// The float types: name, number, ours.
pub const FLOATS: &[(&str, u32, Dtype)] = &[("F32", 0, Dtype::F32), ("F16", 1, Dtype::F16), ("BF16", 30, Dtype::Bf16)];

/// The type whose blocks lie on a lattice.
pub fn on(lattice: Lattice) -> Option<&'static Type> {
    TYPES.iter().copied().find(|t| t.lattice == lattice)
}

impl Type {
    /// Appends a block of `BLOCK` codes with its scale and, for types that have one, its minimum.
    pub fn encode(&self, codes: &[u8], scale: f32, minimum: f32, out: &mut Vec<u8>) {
        out.extend(f16::from_f32(scale).to_le_bytes());
        if self.lattice.offset == Offset::Minimum {
            out.extend(f16::from_f32(minimum).to_le_bytes());
        }
        match self.lattice.bits {
            8 => out.extend(codes.iter().map(|q| q.wrapping_sub(128))),
            bits => {
                if bits == 5 {
                    let high = codes.iter().enumerate().fold(0u32, |h, (j, q)| h | u32::from(q >> 4) << j);
                    out.extend(high.to_le_bytes());
                }
                let (low, high) = codes.split_at(BLOCK / 2);
                out.extend(low.iter().zip(high).map(|(a, b)| a & 15 | (b & 15) << 4));
            }
        }
    }

    /// The reverse: scale and minimum of a block of `self.bytes` bytes, whose codes are written to `codes`.
    pub fn decode(&self, block: &[u8], codes: &mut [u8]) -> (f32, f32) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let has_minimum = self.lattice.offset == Offset::Minimum;
        let (scale, minimum) = (half(0), if has_minimum { half(2) } else { 0.0 });
        let rest = &block[if has_minimum { 4 } else { 2 }..];
        match self.lattice.bits {
            8 => codes.iter_mut().zip(rest).for_each(|(q, b)| *q = b.wrapping_add(128)),
            bits => {
                let (high, nibbles) = if bits == 5 { rest.split_at(4) } else { rest.split_at(0) };
                let (first, second) = codes.split_at_mut(BLOCK / 2);
                for ((a, b), byte) in first.iter_mut().zip(second).zip(nibbles) {
                    (*a, *b) = (byte & 15, byte >> 4);
                }
                for (j, q) in codes.iter_mut().enumerate().filter(|_| bits == 5) {
                    *q |= (high[j / 8] >> (j % 8) & 1) << 4;
                }
            }
        }
        (scale, minimum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_read_back_and_have_their_sizes() {
        for kind in TYPES {
            let codes: Vec<u8> = (0..BLOCK as u32).map(|j| (j * 37 + 5) as u8 & kind.lattice.max_code() as u8).collect();
            let mut block = Vec::new();
            kind.encode(&codes, 0.5, -1.25, &mut block);
            assert_eq!(block.len(), kind.bytes, "{}", kind.name);
            let mut back = vec![0; BLOCK];
            let minimum = if kind.lattice.offset == Offset::Minimum { -1.25 } else { 0.0 };
            assert_eq!(kind.decode(&block, &mut back), (0.5, minimum));
            assert_eq!(back, codes, "{}", kind.name);
            assert_eq!(on(kind.lattice), Some(*kind));
        }
        // By hand: element 0 in the low nibble of byte 0, element 16 in its high one; the fifth bit of element 31 is bit 31.
        let mut codes = vec![0u8; BLOCK];
        (codes[0], codes[16], codes[31]) = (3, 12, 16);
        let mut block = Vec::new();
        Q5_0.encode(&codes, 1.0, 0.0, &mut block);
        assert_eq!(block[..7], [0x00, 0x3c, 0, 0, 0, 0x80, 0xc3]);
    }
}
