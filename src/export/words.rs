//! Matrices of codes and words as files turn them.

use crate::quant::bits::{pack_row, words_per_row};

/// [rows, cols] to [cols, rows].
pub(super) fn transposed<T: Copy>(values: &[T], cols: usize) -> Vec<T> {
    let cols = cols.max(1);
    let mut out = Vec::with_capacity(values.len());
    (0..cols).for_each(|column| out.extend(values.iter().skip(column).step_by(cols)));
    out
}

/// Rows of `cols` codes as dense bit streams, each in words of its own, little-endian.
pub(super) fn pack_rows(codes: &[u8], cols: usize, bits: u32) -> Vec<u8> {
    let mut stream = vec![0; words_per_row(cols, bits as usize)];
    let pack = |row: &[u8]| {
        pack_row(row, bits, &mut stream);
        words_of_rows(&stream)
    };
    codes.chunks(cols.max(1)).flat_map(pack).collect()
}

/// Words as they lie in files.
pub(super) fn words_of_rows(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}
