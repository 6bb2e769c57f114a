//! Host tensors: element types, borrowed views as they lie in a checkpoint, and exact conversions to and from f32.

mod dtype;

pub use dtype::{Dtype, ParseDtypeError};

use crate::{Error, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::borrow::Cow;

/// A dense row-major tensor as it is stored: little-endian bytes of one of the three float types.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Cow<'a, [u8]>,
}

impl<'a> Tensor<'a> {
    /// `data` must hold exactly the elements of `shape`; otherwise an internal error, since readers check their input first.
    pub fn new(dtype: Dtype, shape: Vec<usize>, data: Cow<'a, [u8]>) -> Result<Self> {
        let n = shape.iter().try_fold(dtype.size(), |n, d| n.checked_mul(*d));
        if n != Some(data.len()) {
            return Err(Error::internal("tensor", format!("shape {shape:?} of {dtype} does not hold {} bytes", data.len())));
        }
        Ok(Self { dtype, shape, data })
    }

    /// A tensor of `dtype` from f32 values, rounded to nearest, ties to even.
    pub fn from_f32(dtype: Dtype, shape: Vec<usize>, values: &[f32]) -> Result<Tensor<'static>> {
        let mut data = vec![0u8; values.len() * dtype.size()];
        dtype.encode(values, &mut data);
        Tensor::new(dtype, shape, Cow::Owned(data))
    }

    pub fn len(&self) -> usize {
        self.data.len() / self.dtype.size()
    }

    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Rows and columns of a matrix; a vector is one row.
    pub fn rows_cols(&self) -> (usize, usize) {
        match self.shape.as_slice() {
            [rows, cols] => (*rows, *cols),
            other => (1, other.iter().product()),
        }
    }

    /// All elements as f32: exact for every dtype.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.dtype.decode(&self.data, &mut out);
        out
    }
}

impl Dtype {
    /// Little-endian bytes to f32. Checkpoint data may lie at any address, so nothing here assumes alignment.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        // The fast path reads in place; the odd, unaligned one goes through a small buffer.
        const CHUNK: usize = 4096;
        match self {
            Dtype::F32 => out.iter_mut().zip(bytes.chunks_exact(4)).for_each(|(o, b)| *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Dtype::F16 => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
                Ok(halves) => halves.convert_to_f32_slice(out),
                Err(_) => out.chunks_mut(CHUNK).zip(bytes.chunks(2 * CHUNK)).for_each(|(o, b)| {
                    bytemuck::pod_collect_to_vec::<u8, f16>(b).convert_to_f32_slice(o);
                }),
            },
            Dtype::Bf16 => out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(o, b)| {
                *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }),
        }
    }

    /// f32 to little-endian bytes, rounded to nearest, ties to even.
    pub fn encode(self, values: &[f32], out: &mut [u8]) {
        match self {
            Dtype::F32 => out.chunks_exact_mut(4).zip(values).for_each(|(o, v)| o.copy_from_slice(&v.to_le_bytes())),
            Dtype::F16 => out.chunks_exact_mut(2).zip(values).for_each(|(o, v)| o.copy_from_slice(&f16::from_f32(*v).to_le_bytes())),
            Dtype::Bf16 => out.chunks_exact_mut(2).zip(values).for_each(|(o, v)| o.copy_from_slice(&bf16::from_f32(*v).to_le_bytes())),
        }
    }

    /// `values` as a file of this type holds them, little-endian.
    pub fn to_bytes(self, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * self.size()];
        self.encode(values, &mut bytes);
        bytes
    }

    /// `value` rounded to this type and back: what a file of this type would hold.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Dtype::F32 => value,
            Dtype::F16 => f16::from_f32(value).to_f32(),
            Dtype::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_and_bf16_value_survives_the_round_trip_at_any_alignment() {
        for dtype in [Dtype::F16, Dtype::Bf16] {
            let bits: Vec<u16> = (0..=u16::MAX).collect();
            let mut bytes = vec![0u8];
            bytes.extend(bits.iter().flat_map(|b| b.to_le_bytes()));
            for offset in [0, 1] {
                // Shift by one byte so that one of the two runs is unaligned whatever the allocator does.
                let shifted: Vec<u8> = bytes[1 - offset..].to_vec();
                let src = &shifted[offset..offset + 2 * 65536];
                let expect: Vec<f32> = src
                    .chunks_exact(2)
                    .map(|b| match dtype {
                        Dtype::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
                        _ => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                    })
                    .collect();
                let mut got = vec![0.0f32; 65536];
                dtype.decode(src, &mut got);
                for (g, e) in got.iter().zip(&expect) {
                    assert!(g == e || (g.is_nan() && e.is_nan()), "{dtype}: {g} != {e}");
                }
                let mut back = vec![0u8; 2 * 65536];
                dtype.encode(&got, &mut back);
                for (i, (a, b)) in back.chunks(2).zip(src.chunks(2)).enumerate() {
                    assert!(a == b || got[i].is_nan(), "{dtype} element {i}");
                }
            }
        }
    }

    #[test]
    fn a_shape_that_does_not_hold_its_bytes_is_refused() {
        assert!(Tensor::new(Dtype::F16, vec![2, 3], Cow::Owned(vec![0; 11])).is_err());
        assert!(Tensor::new(Dtype::F32, vec![usize::MAX, 3], Cow::Owned(vec![0; 12])).is_err());
    }
}
