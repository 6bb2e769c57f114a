use super::pack_bits::{codes_and_words, sizes};
use super::{Case, Want};
use aespa_gpu::engine::kernels::pack_bits::words_per_row;
use aespa_gpu::engine::kernels::{self, unpack_bits::UnpackBitsParams};
use aespa_gpu::engine::matrix::stride;

pub fn cases() -> Vec<Case> {
    sizes().into_iter().map(|(rows, cols, bits)| case(rows, cols, bits)).collect()
}

fn case(rows: usize, cols: usize, bits: usize) -> Case {
    Case::new(format!("{rows} x {cols} of {bits} bits"), move |io| {
        let (ld, words) = (stride(cols), words_per_row(cols, bits));
        let (want, packed) = codes_and_words(io, rows, cols, bits);
        let (packed, codes) = (io.upload(packed), io.output::<u32>("codes", rows * ld));
        let p = UnpackBitsParams { rows: rows as u32, cols: cols as u32, ld: ld as u32, bits: bits as u32, words: words as u32 };
        kernels::unpack_bits(&mut io.rec, p, packed, codes.buffer);
        io.expect_matrix(codes, cols, ld, |r, k| Want::Bits(want[r * ld + k]));
    })
}
