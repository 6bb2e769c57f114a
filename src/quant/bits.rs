//! Dense bit packing on the host, in the layout of the `pack_bits` kernel: code k of a row occupies bits [k·bits, (k + 1)·bits) of a
//! stream of 32-bit words, lowest bit first. Codes straddle words where `bits` does not divide 32; bits after the last code are 0.

pub use crate::engine::kernels::pack_bits::words_per_row;

/// Packs a row of codes, each below 2^bits, bits in 1..=8, into its `words_per_row` words.
pub fn pack_row(codes: &[u8], bits: u32, words: &mut [u32]) {
    let mut codes = codes.iter();
    let (mut stream, mut filled) = (0u64, 0);
    for word in words {
        while filled < 32 {
            // After the last code, zeros fill the word.
            stream |= u64::from(codes.next().copied().unwrap_or(0)) << filled;
            filled += bits;
        }
        *word = stream as u32;
        stream >>= 32;
        filled -= 32;
    }
}

/// The first `codes.len()` codes of a packed row.
pub fn unpack_row(words: &[u32], bits: u32, codes: &mut [u8]) {
    let mut words = words.iter();
    let (mut stream, mut filled) = (0u64, 0);
    let mask = (1u64 << bits) - 1;
    for code in codes {
        if filled < bits {
            stream |= u64::from(words.next().copied().unwrap_or(0)) << filled;
            filled += 32;
        }
        *code = (stream & mask) as u8;
        stream >>= bits;
        filled -= bits;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::CpuEngine;
    use crate::engine::kernels::{self, pack_bits::PackBitsParams};
    use crate::engine::{Engine, Recording};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn words_written_by_hand() {
        let mut words = [u32::MAX; 2];
        pack_row(&[1, 2, 3, 4, 5, 6, 7, 8, 15], 4, &mut words);
        assert_eq!(words, [0x8765_4321, 0xf]);

        // Code 10 of a 3-bit row has its low two bits in word 0 and its high bit in word 1.
        let mut codes = [0u8; 12];
        (codes[0], codes[10], codes[11]) = (0b101, 0b110, 0b111);
        pack_row(&codes, 3, &mut words);
        assert_eq!(words, [0b101 | 0b10 << 30, 0b1 | 0b111 << 1]);
    }

    /// The rule itself, one bit at a time.
    fn oracle(codes: &[u8], bits: usize) -> Vec<u32> {
        let mut words = vec![0u32; (codes.len() * bits).div_ceil(32)];
        for (k, code) in codes.iter().enumerate() {
            for b in 0..bits {
                let position = k * bits + b;
                words[position / 32] |= u32::from(code >> b & 1) << (position % 32);
            }
        }
        words
    }

    #[test]
    fn random_rows_follow_the_rule_and_come_back() {
        for seed in 0..400 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let (bits, cols) = (rng.random_range(1..=8u32), rng.random_range(0..=200usize));
            let codes: Vec<u8> = (0..cols).map(|_| rng.random_range(0..1u16 << bits) as u8).collect();
            let mut words = vec![u32::MAX; words_per_row(cols, bits as usize)];
            pack_row(&codes, bits, &mut words);
            assert_eq!(words, oracle(&codes, bits as usize), "seed {seed}: {cols} codes of {bits} bits");
            let mut back = vec![u8::MAX; cols];
            unpack_row(&words, bits, &mut back);
            assert_eq!(back, codes, "seed {seed}");
        }
    }

    #[test]
    fn the_kernel_packs_the_same_words() {
        for bits in 1..=8u32 {
            let (rows, cols) = (3usize, 45usize);
            let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % (1 << bits)) as u8).collect();
            let width = words_per_row(cols, bits as usize);
            let mut words = vec![0; rows * width];
            words.chunks_mut(width).zip(codes.chunks(cols)).for_each(|(w, c)| pack_row(c, bits, w));

            let mut rec = Recording::new();
            let input = rec.upload("codes", codes.iter().map(|c| u32::from(*c)).collect::<Vec<_>>());
            let output = rec.zeros::<u32>("packed", rows * width);
            let p = PackBitsParams { rows: rows as u32, cols: cols as u32, ld: cols as u32, bits, words: width as u32 };
            kernels::pack_bits(&mut rec, p, input, output);
            let pending = rec.download(output);
            assert_eq!(CpuEngine::new().run(rec).unwrap().take(pending).unwrap(), words, "{bits} bits");
        }
    }
}
