//! A quantized matrix as solvers hand it over and exporters store it.

use super::bits::{pack_row, unpack_row, words_per_row};
use super::scheme::Scheme;
use crate::tensor::Dtype;
use crate::{Error, Result};
use rayon::prelude::*;
use sha2::{Digest as _, Sha256};
use std::borrow::Cow;
use std::ops::Range;

/// A SHA-256.
pub type Digest = [u8; 32];

/// A quantized W [d_out, d_in]: element (o, i) is s (q − z) with the scale and zero point of group (o, i / group).
#[derive(Clone, Debug, PartialEq)]
pub struct PackedLinear {
    pub scheme: Scheme,
    pub d_out: usize,
    pub d_in: usize,
    /// The type that scales are stored in.
    pub scale_dtype: Dtype,
    /// [d_out, words_per_row]: codes as a dense bit stream per row, see [`super::bits`].
    pub words: Vec<u32>,
    /// [d_out, n_group], each exactly a value of `scale_dtype`.
    pub scales: Vec<f32>,
    /// [d_out, n_group], at most 2^bits − 1; in symmetric schemes all 2^(bits − 1).
    pub zeros: Vec<u8>,
}

impl PackedLinear {
    /// Checks everything that the fields promise.
    ///
    /// Errors: internal for sizes that do not fit, groups that do not divide `d_in`, bits set after a row's last code, a wrong zero
    /// point; numeric for a scale that `scale_dtype` does not hold exactly, or so large that a code's value overflows that type.
    pub fn new(
        scheme: Scheme,
        d_out: usize,
        d_in: usize,
        scale_dtype: Dtype,
        words: Vec<u32>,
        scales: Vec<f32>,
        zeros: Vec<u8>,
    ) -> Result<Self> {
        let packed = Self { scheme, d_out, d_in, scale_dtype, words, scales, zeros };
        packed.check_sizes()?;
        packed.check_parameters()?;
        Ok(packed)
    }

    /// Packs codes [d_out, d_in]. Errors as [`Self::new`], and an internal one for a code above 2^bits − 1.
    pub fn from_codes(
        scheme: Scheme,
        d_out: usize,
        d_in: usize,
        scale_dtype: Dtype,
        codes: &[u8],
        scales: Vec<f32>,
        zeros: Vec<u8>,
    ) -> Result<Self> {
        if d_out.checked_mul(d_in) != Some(codes.len()) {
            return Err(broken(format!("{} codes are not [{d_out}, {d_in}]", codes.len())));
        }
        if let Some(position) = codes.par_iter().position_first(|c| u32::from(*c) > scheme.max_code()) {
            return Err(broken(format!("code {} at element {position} has more than {} bits", codes[position], scheme.bits)));
        }
        let width = words_per_row(d_in, scheme.bits as usize);
        let mut words = vec![0; d_out * width];
        if width > 0 {
            words.par_chunks_mut(width).zip(codes.par_chunks(d_in)).for_each(|(words, codes)| pack_row(codes, scheme.bits, words));
        }
        Self::new(scheme, d_out, d_in, scale_dtype, words, scales, zeros)
    }

    /// Codes [d_out, d_in].
    pub fn codes(&self) -> Vec<u8> {
        let mut codes = vec![0; self.d_out * self.d_in];
        if !codes.is_empty() {
            let rows = codes.par_chunks_mut(self.d_in).zip(self.words.par_chunks(self.words_per_row()));
            rows.for_each(|(codes, words)| unpack_row(words, self.scheme.bits, codes));
        }
        codes
    }

    /// W [d_out, d_in], s (q − z) in f32.
    pub fn dequantize(&self) -> Vec<f32> {
        self.dequantize_rows(0..self.d_out)
    }

    /// Rows of [`Self::dequantize`], for callers that must not hold the whole matrix; `rows` must lie within `d_out`.
    pub fn dequantize_rows(&self, rows: Range<usize>) -> Vec<f32> {
        let mut values = vec![0.0; rows.len() * self.d_in];
        if values.is_empty() {
            return values;
        }
        let (width, n_group) = (self.scheme.group_width(self.d_in), self.scheme.n_group(self.d_in));
        values.par_chunks_mut(self.d_in).zip(rows).for_each_init(
            || vec![0u8; self.d_in],
            |codes, (values, row)| {
                unpack_row(&self.words[row * self.words_per_row()..], self.scheme.bits, codes);
                for (group, (values, codes)) in values.chunks_mut(width).zip(codes.chunks(width)).enumerate() {
                    let scale = self.scales[row * n_group + group];
                    let zero = i32::from(self.zeros[row * n_group + group]);
                    values.iter_mut().zip(codes).for_each(|(v, q)| *v = scale * (i32::from(*q) - zero) as f32);
                }
            },
        );
        values
    }

    /// Bytes of the stored matrix: packed codes, scales, and packed zero points where they are free.
    pub fn bytes(&self) -> usize {
        self.scheme.stored_bytes(self.d_out, self.d_in, self.scale_dtype)
    }

    pub fn words_per_row(&self) -> usize {
        words_per_row(self.d_in, self.scheme.bits as usize)
    }

    /// The words as they lie in files, little-endian.
    pub fn word_bytes(&self) -> Cow<'_, [u8]> {
        le_bytes(&self.words)
    }

    /// The scales as they lie in files: `scale_dtype`, little-endian.
    pub fn scale_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.scales.len() * self.scale_dtype.size()];
        self.scale_dtype.encode(&self.scales, &mut bytes);
        bytes
    }

    /// Identifies the whole content: two are equal exactly when all fields are, signs of zero scales included.
    pub fn digest(&self) -> Digest {
        let mut hasher = Sha256::new();
        let group = self.scheme.group.unwrap_or(0) as u64;
        for number in [u64::from(self.scheme.bits), group, u64::from(self.scheme.symmetric), self.d_out as u64, self.d_in as u64] {
            hasher.update(number.to_le_bytes());
        }
        hasher.update(self.scale_dtype.safetensors_name());
        hasher.update(self.word_bytes());
        hasher.update(self.scale_bytes());
        hasher.update(&self.zeros);
        hasher.finalize().into()
    }

    fn check_sizes(&self) -> Result<()> {
        let (d_out, d_in, scheme) = (self.d_out, self.d_in, self.scheme);
        if !(1..=8).contains(&scheme.bits) || !d_in.is_multiple_of(scheme.group_width(d_in)) {
            return Err(broken(format!("{d_in} columns cannot be stored as {scheme:?}")));
        }
        let width = self.words_per_row();
        let lens = [("words", self.words.len(), width), ("scales", self.scales.len(), scheme.n_group(d_in))];
        for (what, len, per_row) in lens.into_iter().chain([("zero points", self.zeros.len(), scheme.n_group(d_in))]) {
            if d_out.checked_mul(per_row) != Some(len) {
                return Err(broken(format!("{len} {what} are not [{d_out}, {per_row}]")));
            }
        }
        let used = d_in * scheme.bits as usize % 32;
        // Two matrices with the same codes must have the same words, or digests would differ for no reason.
        if used != 0 && self.words.chunks_exact(width).any(|row| row[width - 1] >> used != 0) {
            return Err(broken("a row has bits set after its last code"));
        }
        Ok(())
    }

    fn check_parameters(&self) -> Result<()> {
        let max_code = self.scheme.max_code();
        for (position, (scale, zero)) in self.scales.iter().zip(&self.zeros).enumerate() {
            let zero = u32::from(*zero);
            if zero > max_code || (self.scheme.symmetric && zero != self.scheme.symmetric_zero()) {
                return Err(broken(format!("zero point {zero} at group {position} does not belong to {:?}", self.scheme)));
            }
            if !scale.is_finite() || self.scale_dtype.round(*scale) != *scale {
                return Err(Error::numeric("scale", format!("{scale:e} at group {position} is no value of {}", self.scale_dtype)));
            }
            let largest = scale * zero.max(max_code - zero) as f32;
            if !self.scale_dtype.round(largest).is_finite() {
                let message = format!("{scale:e} at group {position} makes weights up to {largest:e}, too large for {}", self.scale_dtype);
                return Err(Error::numeric("scale", message));
            }
        }
        Ok(())
    }
}

/// Words as little-endian bytes, borrowed where the machine is little-endian.
pub(crate) fn le_bytes(words: &[u32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(words))
    } else {
        Cow::Owned(words.iter().flat_map(|w| w.to_le_bytes()).collect())
    }
}

fn broken(message: impl std::fmt::Display) -> Error {
    Error::internal("packed matrix", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    fn tiny() -> PackedLinear {
        let scheme = Scheme { bits: 3, group: Some(2), symmetric: false };
        let codes = [0, 1, 2, 3, 4, 5, 6, 7];
        PackedLinear::from_codes(scheme, 2, 4, Dtype::F16, &codes, vec![0.5, 1.0, -2.0, 0.25], vec![0, 7, 4, 3]).unwrap()
    }

    #[test]
    fn values_by_hand() {
        let p = tiny();
        assert_eq!(p.words, [(1 << 3) | (2 << 6) | (3 << 9), 4 | (5 << 3) | (6 << 6) | (7 << 9)]);
        assert_eq!(p.codes(), [0, 1, 2, 3, 4, 5, 6, 7]);
        let expect = [0.0, 0.5, -5.0, -4.0, 0.0, -2.0, 0.75, 1.0];
        assert_eq!(p.dequantize(), expect);
        assert_eq!(p.dequantize_rows(1..2), expect[4..]);
        // 2 words of codes, 4 scales, 2 groups times one word of zero points.
        assert_eq!(p.bytes(), 2 * 4 + 4 * 2 + 2 * 4);
    }

    #[test]
    fn what_a_field_promises_is_checked() {
        let rebuild = |p: PackedLinear| PackedLinear::new(p.scheme, p.d_out, p.d_in, p.scale_dtype, p.words, p.scales, p.zeros);
        let with = |change: &dyn Fn(&mut PackedLinear)| {
            let mut p = tiny();
            change(&mut p);
            rebuild(p).map_err(|e| e.kind)
        };
        assert_eq!(with(&|_| ()), Ok(tiny()));
        assert_eq!(with(&|p| p.words.truncate(1)), Err(Kind::Internal));
        assert_eq!(with(&|p| p.words[0] |= 1 << 12), Err(Kind::Internal));
        assert_eq!(with(&|p| p.zeros[0] = 8), Err(Kind::Internal));
        assert_eq!(with(&|p| p.scheme.symmetric = true), Err(Kind::Internal));
        assert_eq!(with(&|p| p.scheme.group = Some(3)), Err(Kind::Internal));
        assert_eq!(with(&|p| p.scales[3] = f32::NAN), Err(Kind::Numeric));
        assert_eq!(with(&|p| p.scales[3] = 0.1), Err(Kind::Numeric));
        assert_eq!(with(&|p| p.scales[3] = 65504.0), Err(Kind::Numeric));
        assert!(PackedLinear::from_codes(tiny().scheme, 1, 4, Dtype::F16, &[0, 0, 0, 8], vec![1.0; 2], vec![0; 2]).is_err());
    }

    #[test]
    fn the_digest_sees_every_field() {
        let base = tiny();
        let changes: [fn(&mut PackedLinear); 6] = [
            |p| p.words[1] ^= 1,
            |p| p.scales[2] = -p.scales[2],
            |p| p.zeros[3] ^= 1,
            |p| p.scheme.group = None,
            |p| p.scale_dtype = Dtype::Bf16,
            |p| (p.d_out, p.d_in) = (p.d_in, p.d_out),
        ];
        let mut seen = vec![base.digest()];
        for change in changes {
            let mut p = base.clone();
            change(&mut p);
            assert!(!seen.contains(&p.digest()));
            seen.push(p.digest());
        }
    }
}
