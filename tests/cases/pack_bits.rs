use super::{AWKWARD, Case, Io, Want};
use aespa_gpu::engine::kernels::pack_bits::words_per_row;
use aespa_gpu::engine::kernels::{self, pack_bits::PackBitsParams};
use aespa_gpu::engine::matrix::stride;

pub fn cases() -> Vec<Case> {
    sizes().into_iter().map(|(rows, cols, bits)| case(rows, cols, bits)).collect()
}

/// (rows, cols, bits): every width of code, at every awkward length.
pub fn sizes() -> Vec<(usize, usize, usize)> {
    let lengths = AWKWARD.into_iter().filter(|c| *c > 0).chain([32, 1024]);
    lengths.flat_map(|cols| (1..=8).map(move |bits| (3, cols, bits))).chain([(0, 8, 4), (300, 8, 4)]).collect()
}

/// Random codes of `bits` bits [rows, ld] and the bytes of their stream, bit by bit.
pub fn codes_and_words(io: &mut Io, rows: usize, cols: usize, bits: usize) -> (Vec<u32>, Vec<u32>) {
    let (ld, words) = (stride(cols), words_per_row(cols, bits));
    let codes: Vec<u32> = (0..rows * ld).map(|_| io.rng.below(1 << bits) as u32).collect();
    let mut packed = vec![0u32; rows * words];
    for r in 0..rows {
        for (k, bit) in (0..cols).flat_map(|k| (0..bits).map(move |bit| (k, bit))) {
            let at = k * bits + bit;
            packed[r * words + at / 32] |= (codes[r * ld + k] >> bit & 1) << (at % 32);
        }
    }
    (codes, packed)
}

fn case(rows: usize, cols: usize, bits: usize) -> Case {
    Case::new(format!("{rows} x {cols} of {bits} bits"), move |io| {
        let (ld, words) = (stride(cols), words_per_row(cols, bits));
        let (codes, want) = codes_and_words(io, rows, cols, bits);
        let (codes, packed) = (io.upload(codes), io.output::<u32>("packed", rows * words));
        let p = PackBitsParams { rows: rows as u32, cols: cols as u32, ld: ld as u32, bits: bits as u32, words: words as u32 };
        kernels::pack_bits(&mut io.rec, p, codes, packed.buffer);
        io.expect(packed, |i| Want::Bits(want[i]));
    })
}
