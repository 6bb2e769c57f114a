//! The block types of ggml that can be written and read, and the lattices that their blocks lie on.

use super::{blocks, super_blocks};
use crate::quant::{Lattice, Offset, Offsets, PackedLinear, Steps};
use crate::tensor::Dtype;

#[derive(Debug, PartialEq, Eq)]
pub struct Type {
    pub name: &'static str,
    /// Its number in files.
    pub id: u32,
    /// Elements of a block.
    pub elements: usize,
    /// Bytes of a block.
    pub bytes: usize,
    pub lattice: Lattice,
}

const fn block_type(name: &'static str, id: u32, bytes: usize, bits: u32, offset: Offset) -> Type {
    let lattice = Lattice { bits, group: Some(blocks::ELEMENTS), offset, dtype: Dtype::F16, steps: None };
    Type { name, id, elements: blocks::ELEMENTS, bytes, lattice }
}

const fn super_block_type(name: &'static str, id: u32, bytes: usize, bits: u32, offset: Offset, group: usize, count_bits: u32) -> Type {
    let steps = Some(Steps { columns: super_blocks::ELEMENTS, bits: count_bits });
    let lattice = Lattice { bits, group: Some(group), offset, dtype: Dtype::F16, steps };
    Type { name, id, elements: super_blocks::ELEMENTS, bytes, lattice }
}

pub static Q4_0: Type = block_type("Q4_0", 2, 18, 4, Offset::Signed);
pub static Q4_1: Type = block_type("Q4_1", 3, 20, 4, Offset::Minimum);
pub static Q5_0: Type = block_type("Q5_0", 6, 22, 5, Offset::Signed);
pub static Q5_1: Type = block_type("Q5_1", 7, 24, 5, Offset::Minimum);
pub static Q8_0: Type = block_type("Q8_0", 8, 34, 8, Offset::Signed);
pub static Q2_K: Type = super_block_type("Q2_K", 10, 84, 2, Offset::Minimum, 16, 4);
pub static Q3_K: Type = super_block_type("Q3_K", 11, 110, 3, Offset::Signed, 16, 6);
pub static Q4_K: Type = super_block_type("Q4_K", 12, 144, 4, Offset::Minimum, 32, 6);
pub static Q5_K: Type = super_block_type("Q5_K", 13, 176, 5, Offset::Minimum, 32, 6);
pub static Q6_K: Type = super_block_type("Q6_K", 14, 210, 6, Offset::Signed, 16, 8);

pub static TYPES: &[&Type] = &[&Q4_0, &Q4_1, &Q5_0, &Q5_1, &Q8_0, &Q2_K, &Q3_K, &Q4_K, &Q5_K, &Q6_K];

/// The float types: name, number, ours.
pub const FLOATS: &[(&str, u32, Dtype)] = &[("F32", 0, Dtype::F32), ("F16", 1, Dtype::F16), ("BF16", 30, Dtype::Bf16)];

/// The type whose blocks lie on a lattice.
pub fn on(lattice: Lattice) -> Option<&'static Type> {
    TYPES.iter().copied().find(|t| t.lattice == lattice)
}

/// A matrix as blocks see it: everything by groups of rows.
#[derive(Debug)]
pub struct Matrix {
    d_in: usize,
    pub codes: Vec<u8>,
    /// [d_out, n_group].
    pub scales: Vec<f32>,
    /// The same; zeros where there are none.
    pub minima: Vec<f32>,
    /// [d_out, n_super], and the counts of each group, for types of super-blocks.
    pub steps: Vec<[f32; 2]>,
    counts: Vec<[i32; 2]>,
}

impl Matrix {
    pub fn of(packed: &PackedLinear) -> Self {
        let minima = match &packed.offsets {
            Offsets::Minima(minima) => minima.clone(),
            _ => vec![0.0; packed.scales.len()],
        };
        let counts = if packed.lattice.steps.is_some() { packed.counts() } else { Vec::new() };
        Self { d_in: packed.d_in, codes: packed.codes(), scales: packed.scales.clone(), minima, steps: packed.steps.clone(), counts }
    }

    /// One that rows are to be decoded to.
    pub fn empty(kind: &Type, d_out: usize, d_in: usize) -> Self {
        let (n_group, n_super) = (d_out * kind.lattice.n_group(d_in), d_out * kind.lattice.n_super(d_in));
        let counts = vec![[0; 2]; if n_super == 0 { 0 } else { n_group }];
        let [scales, minima] = [(); 2].map(|()| vec![0.0; n_group]);
        Self { d_in, codes: vec![0; d_out * d_in], scales, minima, steps: vec![[0.0; 2]; n_super], counts }
    }
}

impl Type {
    /// Appends the blocks of a row.
    pub fn encode_row(&self, matrix: &Matrix, row: usize, out: &mut Vec<u8>) {
        let (per_row, per_block) = (self.lattice.n_group(matrix.d_in), self.elements / self.lattice.group_width(matrix.d_in));
        for (block, codes) in matrix.codes[row * matrix.d_in..][..matrix.d_in].chunks_exact(self.elements).enumerate() {
            let group = row * per_row + block * per_block;
            match self.lattice.steps {
                None => blocks::encode(self, codes, [matrix.scales[group], matrix.minima[group]], out),
                Some(_) => super_blocks::encode(self, codes, matrix.steps[group / per_block], &matrix.counts[group..][..per_block], out),
            }
        }
    }

    /// The reverse: a row's blocks to row `row` of a matrix.
    pub fn decode_row(&self, bytes: &[u8], matrix: &mut Matrix, row: usize) {
        let (per_row, per_block) = (self.lattice.n_group(matrix.d_in), self.elements / self.lattice.group_width(matrix.d_in));
        let codes = matrix.codes[row * matrix.d_in..][..matrix.d_in].chunks_exact_mut(self.elements);
        for (block, (bytes, codes)) in bytes.chunks_exact(self.bytes).zip(codes).enumerate() {
            let group = row * per_row + block * per_block;
            if self.lattice.steps.is_none() {
                [matrix.scales[group], matrix.minima[group]] = blocks::decode(self, bytes, codes);
                continue;
            }
            let counts = &mut matrix.counts[group..][..per_block];
            let steps = super_blocks::decode(self, bytes, codes, counts);
            for (i, count) in counts.iter().enumerate() {
                matrix.scales[group + i] = steps[0] * count[0] as f32;
                // No minus zero.
                matrix.minima[group + i] = 0.0 - steps[1] * count[1] as f32;
            }
            matrix.steps[group / per_block] = steps;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::golden;

    /// What llama.cpp's quantizer packed: decoded to the values that the `gguf` package reads, and encoded again byte for byte.
    #[test]
    fn what_llama_cpp_packed() {
        let file = include_bytes!("../../../tests/golden/packed-llama.cpp.safetensors");
        for kind in TYPES {
            let (want, [d_out, d_in]) = golden::values(file, &format!("{}.values", kind.name));
            let (_, shape, blocks) = golden::tensor(file, &format!("{}.blocks", kind.name));
            let (mut matrix, mut bytes) = (Matrix::empty(kind, d_out, d_in), Vec::new());
            blocks.chunks_exact(shape[1]).enumerate().for_each(|(row, blocks)| kind.decode_row(blocks, &mut matrix, row));
            (0..d_out).for_each(|row| kind.encode_row(&matrix, row, &mut bytes));
            assert!(bytes == blocks, "{}: the bytes differ", kind.name);
            let Matrix { codes, scales, minima, steps, .. } = matrix;
            let offsets = if kind.lattice.offset == Offset::Minimum { Offsets::Minima(minima) } else { Offsets::Centre };
            let packed = PackedLinear::from_codes(kind.lattice, d_out, d_in, &codes, scales, offsets, steps).unwrap();
            assert!(packed.dequantize() == want, "{}: the values differ", kind.name);
        }
    }

    #[test]
    fn rows_read_back_and_have_their_sizes() {
        for kind in TYPES {
            let (d_out, d_in) = (2, 512);
            let n_group = d_out * kind.lattice.n_group(d_in);
            let max = kind.lattice.max_code();
            let codes: Vec<u8> = (0..(d_out * d_in) as u32).map(|j| ((j * 37 + j / 41 + 5) & max) as u8).collect();
            let counts = kind.lattice.counts();
            let range = (counts.end() - counts.start() + 1).max(1);
            let steps: Vec<[f32; 2]> = (0..d_out * kind.lattice.n_super(d_in)).map(|i| [0.5 + i as f32, 0.25]).collect();
            let per_super = kind.lattice.groups_per_super(d_in).max(1);
            let (mut scales, mut minima) = (vec![0.5; n_group], vec![-1.25; n_group]);
            for at in (0..n_group).filter(|_| !steps.is_empty()) {
                let [step, step_minimum] = steps[at / per_super];
                scales[at] = step * ((at as i32 * 5 + 3) % range + counts.start()) as f32;
                minima[at] = 0.0 - step_minimum * (at as i32 * 7 % range) as f32;
            }
            let has_minima = kind.lattice.offset == Offset::Minimum;
            let offsets = if has_minima { Offsets::Minima(minima.clone()) } else { Offsets::Centre };
            let steps: Vec<[f32; 2]> = steps.into_iter().map(|[a, b]| [a, if has_minima { b } else { 0.0 }]).collect();
            let packed = PackedLinear::from_codes(kind.lattice, d_out, d_in, &codes, scales, offsets, steps.clone()).unwrap();
            let matrix = Matrix::of(&packed);
            let mut back = Matrix::empty(kind, d_out, d_in);
            for row in 0..d_out {
                let mut bytes = Vec::new();
                kind.encode_row(&matrix, row, &mut bytes);
                assert_eq!(bytes.len(), kind.bytes * d_in / kind.elements, "{}", kind.name);
                kind.decode_row(&bytes, &mut back, row);
            }
            assert_eq!((&back.codes, &back.scales, &back.steps), (&codes, &packed.scales, &steps), "{}", kind.name);
            assert_eq!((&back.minima, &back.counts), (&matrix.minima, &matrix.counts), "{}", kind.name);
            assert_eq!(on(kind.lattice), Some(*kind));
        }
    }
}
