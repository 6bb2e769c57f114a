//! Blocks of 32 weights with a scale, and perhaps a minimum, of their own.
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

use super::types::Type;
use crate::quant::Offset;
use half::f16;

/// Elements of a block.
pub const ELEMENTS: usize = 32;

/// Appends a block of codes with its scale and, for types that have one, its minimum.
pub fn encode(kind: &Type, codes: &[u8], [scale, minimum]: [f32; 2], out: &mut Vec<u8>) {
    out.extend(f16::from_f32(scale).to_le_bytes());
    if kind.lattice.offset == Offset::Minimum {
        out.extend(f16::from_f32(minimum).to_le_bytes());
    }
    match kind.lattice.bits {
        8 => out.extend(codes.iter().map(|q| q.wrapping_sub(128))),
        bits => {
            if bits == 5 {
                let high = codes.iter().enumerate().fold(0u32, |h, (j, q)| h | u32::from(q >> 4) << j);
                out.extend(high.to_le_bytes());
            }
            let (low, high) = codes.split_at(ELEMENTS / 2);
            out.extend(low.iter().zip(high).map(|(a, b)| a & 15 | (b & 15) << 4));
        }
    }
}

/// The reverse: scale and minimum of a block of `kind.bytes` bytes, whose codes are written to `codes`.
pub fn decode(kind: &Type, block: &[u8], codes: &mut [u8]) -> [f32; 2] {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let has_minimum = kind.lattice.offset == Offset::Minimum;
    let (scale, minimum) = (half(0), if has_minimum { half(2) } else { 0.0 });
    let rest = &block[if has_minimum { 4 } else { 2 }..];
    match kind.lattice.bits {
        8 => codes.iter_mut().zip(rest).for_each(|(q, b)| *q = b.wrapping_add(128)),
        bits => {
            let (high, nibbles) = if bits == 5 { rest.split_at(4) } else { rest.split_at(0) };
            let (first, second) = codes.split_at_mut(ELEMENTS / 2);
            for ((a, b), byte) in first.iter_mut().zip(second).zip(nibbles) {
                (*a, *b) = (byte & 15, byte >> 4);
            }
            for (j, q) in codes.iter_mut().enumerate().filter(|_| bits == 5) {
                *q |= (high[j / 8] >> (j % 8) & 1) << 4;
            }
        }
    }
    [scale, minimum]
}

#[cfg(test)]
mod tests {
    use super::super::types::Q5_0;
    use super::*;

    /// Element 0 lies in the low nibble of byte 0, element 16 in its high one; the fifth bit of element 31 is bit 31.
    #[test]
    fn a_block_by_hand() {
        let mut codes = vec![0u8; ELEMENTS];
        (codes[0], codes[16], codes[31]) = (3, 12, 16);
        let mut block = Vec::new();
        encode(&Q5_0, &codes, [1.0, 0.0], &mut block);
        assert_eq!(block[..7], [0x00, 0x3c, 0, 0, 0, 0x80, 0xc3]);
    }
}
