//! Super-blocks of 256 weights in groups of 16 or 32, whose scales a, and perhaps minima b, are counts of the super-block's steps d and e.
//!
//! | type | bytes | fields | value |
//! |---|---|---|---|
//! | Q2_K | 84 | u8 s[16]; u8 q[64]; f16 d, e | groups of 16: d (s & 15) q − e (s >> 4) |
//! | Q3_K | 110 | u8 h[32]; u8 q[64]; u8 s[12]; f16 d | groups of 16: d (a − 32) (q − 4), a of 6 bits |
//! | Q4_K | 144 | f16 d, e; u8 s[12]; u8 q[128] | groups of 32: d a q − e b, a and b of 6 bits |
//! | Q5_K | 176 | f16 d, e; u8 s[12]; u8 h[32]; u8 q[128] | as Q4_K |
//! | Q6_K | 210 | u8 l[128]; u8 h[64]; i8 a[16]; f16 d | groups of 16: d a (q − 32) |
//!
//! Bits of codes, of element 128 i + 32 j + k (i < 2, j < 4, k < 32):
//! - two bits (q of Q2_K and Q3_K, h of Q6_K): bits 2 j of byte 32 i + k;
//! - four bits of Q4_K and Q5_K: the nibble j mod 2 of byte 64 i + 32 (j div 2) + k; of Q6_K the nibble j div 2 of byte 64 i + 32 (j mod 2) + k;
//! - one bit (h of Q3_K and Q5_K): bit 4 i + j of byte k.

use super::types::Type;
use crate::quant::Offset;
use half::f16;

/// Elements of a super-block.
pub const ELEMENTS: usize = 256;

/// Where the parts of a block begin.
struct Layout {
    /// Two bits of each code, or four where `nibbles`, low ones first.
    low: usize,
    /// Further bits above them: their place, and how many there are.
    high: Option<(usize, u32)>,
    nibbles: Option<Nibbles>,
    counts: usize,
    steps: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Nibbles {
    /// Neighbouring groups of 32 share bytes.
    Pairs,
    /// Groups of 32 that are 64 apart share bytes.
    Halves,
}

fn layout(kind: &Type) -> Layout {
    match kind.lattice.bits {
        2 => Layout { low: 16, high: None, nibbles: None, counts: 0, steps: 80 },
        3 => Layout { low: 32, high: Some((0, 1)), nibbles: None, counts: 96, steps: 108 },
        4 => Layout { low: 16, high: None, nibbles: Some(Nibbles::Pairs), counts: 4, steps: 0 },
        5 => Layout { low: 48, high: Some((16, 1)), nibbles: Some(Nibbles::Pairs), counts: 4, steps: 0 },
        _ => Layout { low: 0, high: Some((128, 2)), nibbles: Some(Nibbles::Halves), counts: 192, steps: 208 },
    }
}

impl Layout {
    /// Bits of the codes that stand together.
    fn low_bits(&self) -> u32 {
        if self.nibbles.is_some() { 4 } else { 2 }
    }

    /// Byte and shift of the low bits of an element.
    fn low_place(&self, element: usize) -> (usize, usize) {
        let (i, j, k) = (element / 128, element / 32 % 4, element % 32);
        let (byte, shift) = match self.nibbles {
            None => (32 * i + k, 2 * j),
            Some(Nibbles::Pairs) => (64 * i + 32 * (j / 2) + k, 4 * (j % 2)),
            Some(Nibbles::Halves) => (64 * i + 32 * (j % 2) + k, 4 * (j / 2)),
        };
        (self.low + byte, shift)
    }

    /// Byte, shift and number of the high bits of an element, if codes have some.
    fn high_place(&self, element: usize) -> Option<(usize, usize, u32)> {
        let (i, j, k) = (element / 128, element / 32 % 4, element % 32);
        self.high.map(|(start, bits)| if bits == 1 { (start + k, 4 * i + j, 1) } else { (start + 32 * i + k, 2 * j, 2) })
    }
}

/// Appends a super-block of codes with the counts of its groups' scales and minima.
pub fn encode(kind: &Type, codes: &[u8], steps: [f32; 2], counts: &[[i32; 2]], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + kind.bytes, 0);
    let (block, layout) = (&mut out[start..], layout(kind));
    for (element, code) in codes.iter().enumerate() {
        let (byte, shift) = layout.low_place(element);
        block[byte] |= (code & ((1 << layout.low_bits()) - 1)) << shift;
        if let Some((byte, shift, _)) = layout.high_place(element) {
            block[byte] |= (code >> layout.low_bits()) << shift;
        }
    }
    encode_counts(kind, counts, &mut block[layout.counts..]);
    let n_steps = if kind.lattice.offset == Offset::Minimum { 2 } else { 1 };
    for (to, step) in block[layout.steps..].chunks_exact_mut(2).zip(&steps[..n_steps]) {
        to.copy_from_slice(&f16::from_f32(*step).to_le_bytes());
    }
}

/// The reverse: the steps of a block of `kind.bytes` bytes, whose codes and counts are written to `codes` and `counts`.
pub fn decode(kind: &Type, block: &[u8], codes: &mut [u8], counts: &mut [[i32; 2]]) -> [f32; 2] {
    let layout = layout(kind);
    for (element, code) in codes.iter_mut().enumerate() {
        let (byte, shift) = layout.low_place(element);
        *code = block[byte] >> shift & ((1 << layout.low_bits()) - 1);
        if let Some((byte, shift, bits)) = layout.high_place(element) {
            *code |= (block[byte] >> shift & ((1 << bits) - 1)) << layout.low_bits();
        }
    }
    decode_counts(kind, &block[layout.counts..], counts);
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    [half(layout.steps), if kind.lattice.offset == Offset::Minimum { half(layout.steps + 2) } else { 0.0 }]
}

fn encode_counts(kind: &Type, counts: &[[i32; 2]], to: &mut [u8]) {
    match kind.lattice.bits {
        2 => to.iter_mut().zip(counts).for_each(|(to, [a, b])| *to = *a as u8 | (*b as u8) << 4),
        3 => {
            for (j, [a, _]) in counts.iter().enumerate() {
                let a = (a + 32) as u8;
                to[j % 8] |= (a & 15) << (j / 8 * 4);
                to[8 + j % 4] |= (a >> 4) << (j / 4 * 2);
            }
        }
        6 => to.iter_mut().zip(counts).for_each(|(to, [a, _])| *to = *a as i8 as u8),
        // The first four groups have a byte for each count; its two spare bits hold what the others have above their four.
        _ => {
            for (j, [a, b]) in counts.iter().enumerate() {
                let (a, b) = (*a as u8, *b as u8);
                if j < 4 {
                    to[j] |= a;
                    to[j + 4] |= b;
                } else {
                    to[j + 4] = a & 15 | b << 4;
                    to[j - 4] |= a >> 4 << 6;
                    to[j] |= b >> 4 << 6;
                }
            }
        }
    }
}

fn decode_counts(kind: &Type, from: &[u8], counts: &mut [[i32; 2]]) {
    for (j, count) in counts.iter_mut().enumerate() {
        let [a, b] = match kind.lattice.bits {
            2 => [from[j] & 15, from[j] >> 4],
            3 => [from[j % 8] >> (j / 8 * 4) & 15 | (from[8 + j % 4] >> (j / 4 * 2) & 3) << 4, 0],
            6 => [from[j], 0],
            _ if j < 4 => [from[j] & 63, from[j + 4] & 63],
            _ => [from[j + 4] & 15 | from[j - 4] >> 6 << 4, from[j + 4] >> 4 | from[j] >> 6 << 4],
        };
        *count = match kind.lattice.bits {
            3 => [i32::from(a) - 32, 0],
            6 => [i32::from(a as i8), 0],
            _ => [i32::from(a), i32::from(b)],
        };
    }
}

#[cfg(test)]
mod tests {
    use super::super::types::{Q2_K, Q3_K, Q4_K, Q6_K};
    use super::*;

    fn encoded(kind: &Type, set: &[(usize, u8)], counts: &[[i32; 2]]) -> Vec<u8> {
        let mut codes = vec![0; ELEMENTS];
        set.iter().for_each(|(element, code)| codes[*element] = *code);
        let mut out = Vec::new();
        encode(kind, &codes, [1.0, 2.0], counts, &mut out);
        out
    }

    #[test]
    fn blocks_by_hand() {
        let mut counts = [[0; 2]; 16];
        counts[15] = [5, 9];
        let b = encoded(&Q2_K, &[(33, 3), (255, 2)], &counts);
        // Element 33: bits 2 of byte 1; element 255: bits 6 of byte 63. One and two as f16.
        assert_eq!((b[15], b[16 + 1], b[16 + 63], &b[80..]), (0x95, 3 << 2, 2 << 6, [0, 0x3c, 0, 0x40].as_slice()));

        counts = [[-32, 0]; 16];
        counts[9] = [-32 + 0b11_0101, 0];
        let b = encoded(&Q3_K, &[(0, 4), (160, 7)], &counts);
        // The third bits: bit 0 of byte 0, and bit 5 of byte 0 for element 160 = 128 + 32.
        assert_eq!((b[0], b[32 + 32], b[96 + 1], b[96 + 8 + 1], &b[108..]), (0b10_0001, 3 << 2, 5 << 4, 3 << 4, [0, 0x3c].as_slice()));

        let mut counts = [[0; 2]; 8];
        counts[1] = [63, 1];
        counts[6] = [0b10_0110, 0b01_1001];
        let b = encoded(&Q4_K, &[(32, 9), (96, 4)], &counts);
        // Scales from byte 4 on: group 1 in bytes 1 and 5, group 6 in byte 10 and above groups 2.
        assert_eq!((b[4 + 1], b[4 + 5], b[4 + 10], b[4 + 2], b[4 + 6]), (63, 1, 0x96, 2 << 6, 1 << 6));
        assert_eq!((b[16], b[16 + 32]), (9 << 4, 4 << 4));

        let mut counts = [[0; 2]; 16];
        counts[2] = [-128, 0];
        let b = encoded(&Q6_K, &[(64, 0b11_0110), (224, 0b01_0101)], &counts);
        assert_eq!((b[0], b[128], b[64 + 32], b[128 + 32], b[192 + 2]), (6 << 4, 3 << 4, 5 << 4, 1 << 6, 0x80));
    }
}
