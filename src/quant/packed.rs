//! A quantized matrix as solvers hand it over and exporters store it.

use super::bits::{pack_row, unpack_row, words_per_row};
use super::{Lattice, Offset};
use crate::{Error, Result};
use rayon::prelude::*;
use sha2::{Digest as _, Sha256};
use std::borrow::Cow;
use std::ops::Range;

/// A SHA-256.
pub type Digest = [u8; 32];

/// A quantized W [d_out, d_in]: element (o, i) is s (q − z) or s q + m with the scale and offset of group (o, i / group).
#[derive(Clone, Debug, PartialEq)]
pub struct PackedLinear {
    pub lattice: Lattice,
    pub d_out: usize,
    pub d_in: usize,
    /// [d_out, words_per_row]: codes as a dense bit stream per row, see [`super::bits`].
    pub words: Vec<u32>,
    /// [d_out, n_group], each exactly a value of the lattice's type.
    pub scales: Vec<f32>,
    pub offsets: Offsets,
    /// [d_out, n_super]: of a super-block the step of its scales and that of its minima (0 where there are none); empty for other lattices.
    pub steps: Vec<[f32; 2]>,
}

/// What the lattice's offset says there is for every group, [d_out, n_group].
#[derive(Clone, Debug, PartialEq)]
pub enum Offsets {
    Centre,
    Zeros(Vec<u8>),
    Minima(Vec<f32>),
}

impl PackedLinear {
    /// Checks everything that the fields promise.
    ///
    /// Errors: internal for sizes that do not fit, groups that do not divide `d_in`, bits set after a row's last code, a wrong kind
    /// of offset or zero point; numeric for a scale, minimum or step that is none that the file can hold, or so large that a code's
    /// value overflows the lattice's type.
    pub fn new(
        lattice: Lattice,
        d_out: usize,
        d_in: usize,
        words: Vec<u32>,
        scales: Vec<f32>,
        offsets: Offsets,
        steps: Vec<[f32; 2]>,
    ) -> Result<Self> {
        let packed = Self { lattice, d_out, d_in, words, scales, offsets, steps };
        packed.check_sizes()?;
        packed.check_parameters()?;
        Ok(packed)
    }

    /// Packs codes [d_out, d_in]. Errors as [`Self::new`], and an internal one for a code above 2^bits − 1.
    pub fn from_codes(
        lattice: Lattice,
        d_out: usize,
        d_in: usize,
        codes: &[u8],
        scales: Vec<f32>,
        offsets: Offsets,
        steps: Vec<[f32; 2]>,
    ) -> Result<Self> {
        if d_out.checked_mul(d_in) != Some(codes.len()) {
            return Err(broken(format!("{} codes are not [{d_out}, {d_in}]", codes.len())));
        }
        if let Some(position) = codes.par_iter().position_first(|c| u32::from(*c) > lattice.max_code()) {
            return Err(broken(format!("code {} at element {position} has more than {} bits", codes[position], lattice.bits)));
        }
        let width = words_per_row(d_in, lattice.bits as usize);
        let mut words = vec![0; d_out * width];
        if width > 0 {
            words.par_chunks_mut(width).zip(codes.par_chunks(d_in)).for_each(|(words, codes)| pack_row(codes, lattice.bits, words));
        }
        Self::new(lattice, d_out, d_in, words, scales, offsets, steps)
    }

    /// Codes [d_out, d_in].
    pub fn codes(&self) -> Vec<u8> {
        let mut codes = vec![0; self.d_out * self.d_in];
        if !codes.is_empty() {
            let rows = codes.par_chunks_mut(self.d_in).zip(self.words.par_chunks(self.words_per_row()));
            rows.for_each(|(codes, words)| unpack_row(words, self.lattice.bits, codes));
        }
        codes
    }

    /// W [d_out, d_in] in f32.
    pub fn dequantize(&self) -> Vec<f32> {
        self.dequantize_rows(0..self.d_out)
    }

    /// Rows of [`Self::dequantize`], for callers that must not hold the whole matrix; `rows` must lie within `d_out`.
    pub fn dequantize_rows(&self, rows: Range<usize>) -> Vec<f32> {
        let mut values = vec![0.0; rows.len() * self.d_in];
        if values.is_empty() {
            return values;
        }
        let (width, n_group) = (self.lattice.group_width(self.d_in), self.lattice.n_group(self.d_in));
        values.par_chunks_mut(self.d_in).zip(rows).for_each_init(
            || vec![0u8; self.d_in],
            |codes, (values, row)| {
                unpack_row(&self.words[row * self.words_per_row()..], self.lattice.bits, codes);
                for (group, (values, codes)) in values.chunks_mut(width).zip(codes.chunks(width)).enumerate() {
                    let at = row * n_group + group;
                    let scale = self.scales[at];
                    let values = values.iter_mut().zip(codes);
                    match &self.offsets {
                        Offsets::Minima(minima) => values.for_each(|(v, q)| *v = scale * f32::from(*q) + minima[at]),
                        Offsets::Zeros(zeros) => values.for_each(|(v, q)| *v = scale * (i32::from(*q) - i32::from(zeros[at])) as f32),
                        Offsets::Centre => values.for_each(|(v, q)| *v = scale * (i32::from(*q) - self.lattice.centre() as i32) as f32),
                    }
                }
            },
        );
        values
    }

    pub fn words_per_row(&self) -> usize {
        words_per_row(self.d_in, self.lattice.bits as usize)
    }

    /// The words as they lie in files, little-endian.
    pub fn word_bytes(&self) -> Cow<'_, [u8]> {
        le_bytes(&self.words)
    }

    /// The scales as they lie in files of lattices without steps: of the lattice's type, little-endian.
    pub fn scale_bytes(&self) -> Vec<u8> {
        self.lattice.dtype.to_bytes(&self.scales)
    }

    /// How many of its steps the scale and the minimum of each group have, the latter without its sign; [d_out, n_group].
    pub fn counts(&self) -> Vec<[i32; 2]> {
        let per_super = self.lattice.groups_per_super(self.d_in).max(1);
        let count = |value: f32, step: f32| if step == 0.0 { 0 } else { (value / step).round() as i32 };
        let of = |(at, scale): (usize, &f32)| {
            let [step, step_minimum] = self.steps[at / per_super];
            let minimum = match &self.offsets {
                Offsets::Minima(minima) => count(-minima[at], step_minimum),
                _ => 0,
            };
            [count(*scale, step), minimum]
        };
        self.scales.iter().enumerate().map(of).collect()
    }

    /// Identifies the whole content: two are equal exactly when all fields are, signs of zero scales included.
    pub fn digest(&self) -> Digest {
        let mut hasher = Sha256::new();
        let Lattice { bits, group, offset, dtype, steps } = self.lattice;
        let kind = match offset {
            Offset::Zero { .. } => 0,
            Offset::Centre => 1,
            Offset::Minimum => 2,
            Offset::Signed => 3,
        };
        let steps = steps.map_or([0, 0], |steps| [steps.columns, steps.bits as usize]);
        for number in [bits as usize, group.unwrap_or(0), kind, self.d_out, self.d_in].into_iter().chain(steps) {
            hasher.update((number as u64).to_le_bytes());
        }
        let stored = self.lattice.parameter_dtype();
        hasher.update(dtype.safetensors_name());
        hasher.update(self.word_bytes());
        hasher.update(stored.to_bytes(&self.scales));
        match &self.offsets {
            Offsets::Centre => {}
            Offsets::Zeros(zeros) => hasher.update(zeros),
            Offsets::Minima(minima) => hasher.update(stored.to_bytes(minima)),
        }
        hasher.update(dtype.to_bytes(self.steps.as_flattened()));
        hasher.finalize().into()
    }

    fn check_sizes(&self) -> Result<()> {
        let (d_out, d_in, lattice) = (self.d_out, self.d_in, self.lattice);
        let whole_groups = lattice.steps.is_none_or(|steps| steps.columns.is_multiple_of(lattice.group_width(d_in)));
        if !(1..=8).contains(&lattice.bits) || !lattice.divides(d_in) || !whole_groups {
            return Err(broken(format!("{d_in} columns cannot be stored on {lattice:?}")));
        }
        let (width, n_group) = (self.words_per_row(), lattice.n_group(d_in));
        let offsets = match (&self.offsets, lattice.offset) {
            (Offsets::Centre, Offset::Centre | Offset::Signed) => None,
            (Offsets::Zeros(zeros), Offset::Zero { .. }) => Some(("zero points", zeros.len(), n_group)),
            (Offsets::Minima(minima), Offset::Minimum) => Some(("minima", minima.len(), n_group)),
            _ => return Err(broken(format!("its offsets are not those of {lattice:?}"))),
        };
        let lens = [
            ("words", self.words.len(), width),
            ("scales", self.scales.len(), n_group),
            ("pairs of steps", self.steps.len(), lattice.n_super(d_in)),
        ];
        for (what, len, per_row) in lens.into_iter().chain(offsets) {
            if d_out.checked_mul(per_row) != Some(len) {
                return Err(broken(format!("{len} {what} are not [{d_out}, {per_row}]")));
            }
        }
        let used = d_in * lattice.bits as usize % 32;
        // Two matrices with the same codes must have the same words, or digests would differ for no reason.
        if used != 0 && self.words.chunks_exact(width).any(|row| row[width - 1] >> used != 0) {
            return Err(broken("a row has bits set after its last code"));
        }
        Ok(())
    }

    fn check_parameters(&self) -> Result<()> {
        let lattice = self.lattice;
        let (dtype, max_code, counts) = (lattice.dtype, lattice.max_code(), lattice.counts());
        let stored = |what: &str, value: f32, at: usize| {
            if value.is_finite() && dtype.round(value) == value {
                return Ok(());
            }
            Err(Error::numeric(what, format!("{value:e} at {at} is no value of {dtype}")))
        };
        for (at, step) in self.steps.iter().flatten().enumerate() {
            stored("step", *step, at)?;
        }
        let counted = lattice.steps.map(|_| self.counts());
        // Scales and minima are exactly what readers make of their counts, signs of zeros included: the file holds nothing else.
        let whole = |what: &str, value: f32, at: usize, which: usize| {
            let Some(all) = &counted else { return stored(what, value, at) };
            let step = self.steps[at / lattice.groups_per_super(self.d_in)][which];
            let count = all[at][which];
            let (lowest, made) = match which {
                0 => (*counts.start(), step * count as f32),
                _ => (0, 0.0 - step * count as f32),
            };
            if (lowest..=*counts.end()).contains(&count) && made.to_bits() == value.to_bits() {
                return Ok(());
            }
            Err(Error::numeric(what, format!("{value:e} at {at} is no whole number of steps of {step:e} that fits")))
        };
        for (at, scale) in self.scales.iter().enumerate() {
            whole("scale", *scale, at, 0)?;
            let (low, high) = match &self.offsets {
                Offsets::Minima(minima) => {
                    whole("minimum", minima[at], at, 1)?;
                    (minima[at], minima[at] + scale * max_code as f32)
                }
                Offsets::Zeros(zeros) if !lattice.zeros().contains(&u32::from(zeros[at])) => {
                    return Err(broken(format!("zero point {} at group {at} does not belong to {lattice:?}", zeros[at])));
                }
                Offsets::Zeros(zeros) => (scale * f32::from(zeros[at]), scale * (max_code - u32::from(zeros[at])) as f32),
                Offsets::Centre => (scale * lattice.centre() as f32, scale * (max_code - lattice.centre()) as f32),
            };
            let largest = low.abs().max(high.abs());
            if !dtype.round(largest).is_finite() {
                return Err(Error::numeric(
                    "scale",
                    format!("{scale:e} at group {at} makes weights up to {largest:e}, too large for {dtype}"),
                ));
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
    use crate::quant::Steps;
    use crate::tensor::Dtype;

    fn tiny() -> PackedLinear {
        let lattice = Lattice { bits: 3, group: Some(2), offset: Offset::Zero { lowest: 0 }, dtype: Dtype::F16, steps: None };
        let codes = [0, 1, 2, 3, 4, 5, 6, 7];
        PackedLinear::from_codes(lattice, 2, 4, &codes, vec![0.5, 1.0, -2.0, 0.25], Offsets::Zeros(vec![0, 7, 4, 3]), Vec::new()).unwrap()
    }

    fn with_minima() -> PackedLinear {
        let lattice = Lattice { offset: Offset::Minimum, ..tiny().lattice };
        PackedLinear::from_codes(lattice, 1, 4, &[0, 1, 2, 7], vec![0.5, 1.0], Offsets::Minima(vec![-0.25, 3.0]), Vec::new()).unwrap()
    }

    #[test]
    fn values_by_hand() {
        let p = tiny();
        assert_eq!(p.words, [(1 << 3) | (2 << 6) | (3 << 9), 4 | (5 << 3) | (6 << 6) | (7 << 9)]);
        assert_eq!(p.codes(), [0, 1, 2, 3, 4, 5, 6, 7]);
        let expect = [0.0, 0.5, -5.0, -4.0, 0.0, -2.0, 0.75, 1.0];
        assert_eq!(p.dequantize(), expect);
        assert_eq!(p.dequantize_rows(1..2), expect[4..]);
        assert_eq!(with_minima().dequantize(), [-0.25, 0.25, 5.0, 10.0]);
        let centred = Lattice { offset: Offset::Centre, ..p.lattice };
        let p = PackedLinear::from_codes(centred, 1, 2, &[0, 7], vec![0.5], Offsets::Centre, Vec::new()).unwrap();
        assert_eq!(p.dequantize(), [-2.0, 1.5]);
    }

    #[test]
    fn what_a_field_promises_is_checked() {
        let rebuild = |p: PackedLinear| PackedLinear::new(p.lattice, p.d_out, p.d_in, p.words, p.scales, p.offsets, p.steps);
        let with = |change: &dyn Fn(&mut PackedLinear)| {
            let mut p = tiny();
            change(&mut p);
            rebuild(p).map_err(|e| e.kind)
        };
        assert_eq!(with(&|_| ()), Ok(tiny()));
        assert_eq!(with(&|p| p.words.truncate(1)), Err(Kind::Internal));
        assert_eq!(with(&|p| p.words[0] |= 1 << 12), Err(Kind::Internal));
        assert_eq!(with(&|p| p.offsets = Offsets::Zeros(vec![8, 7, 4, 3])), Err(Kind::Internal));
        assert_eq!(with(&|p| p.offsets = Offsets::Centre), Err(Kind::Internal));
        // The first group has a zero point of 0.
        assert_eq!(with(&|p| p.lattice.offset = Offset::Zero { lowest: 1 }), Err(Kind::Internal));
        assert_eq!(with(&|p| p.lattice.group = Some(3)), Err(Kind::Internal));
        assert_eq!(with(&|p| p.scales[3] = f32::NAN), Err(Kind::Numeric));
        assert_eq!(with(&|p| p.scales[3] = 0.1), Err(Kind::Numeric));
        assert_eq!(with(&|p| p.scales[3] = 65504.0), Err(Kind::Numeric));
        let minima = |minima: Vec<f32>| rebuild(PackedLinear { offsets: Offsets::Minima(minima), ..with_minima() }).map_err(|e| e.kind);
        assert_eq!(minima(vec![0.0, 1.0 / 3.0]), Err(Kind::Numeric));
        // 65504 + 7 rounds to 65504; with a scale of 32 it would not be finite.
        assert!(minima(vec![0.0, 65504.0]).is_ok());
        assert!(
            PackedLinear::from_codes(tiny().lattice, 1, 4, &[0, 0, 0, 8], vec![1.0; 2], Offsets::Zeros(vec![0; 2]), Vec::new()).is_err()
        );
    }

    /// Scales and minima in whole steps: two super-blocks of two groups.
    fn stepped() -> PackedLinear {
        let lattice =
            Lattice { bits: 2, group: Some(2), offset: Offset::Minimum, dtype: Dtype::F16, steps: Some(Steps { columns: 4, bits: 4 }) };
        let minima = Offsets::Minima(vec![-0.75, 0.0, -15.0, -2.0]);
        let codes = [0, 1, 2, 3, 3, 2, 1, 0];
        PackedLinear::from_codes(lattice, 1, 8, &codes, vec![0.5, 7.5, 1.0, 3.0], minima, vec![[0.5, 0.25], [1.0, 1.0]]).unwrap()
    }

    #[test]
    fn two_levels_by_hand() {
        let p = stepped();
        assert_eq!(p.dequantize(), [-0.75, -0.25, 15.0, 22.5, -12.0, -13.0, 1.0, -2.0]);
        assert_eq!(p.counts(), [[1, 3], [15, 0], [1, 15], [3, 2]]);
        let with = |change: &dyn Fn(&mut PackedLinear)| {
            let mut p = stepped();
            change(&mut p);
            PackedLinear::new(p.lattice, p.d_out, p.d_in, p.words, p.scales, p.offsets, p.steps).map_err(|e| e.kind)
        };
        assert_eq!(with(&|_| ()), Ok(stepped()));
        // Sixteen steps, no whole number of them, a negative scale, a minimum above zero, a step that is no f16.
        assert_eq!(with(&|p| p.scales[1] = 8.0), Err(Kind::Numeric));
        assert_eq!(with(&|p| p.scales[1] = 0.75), Err(Kind::Numeric));
        assert_eq!(with(&|p| p.scales[1] = -0.5), Err(Kind::Numeric));
        assert_eq!(with(&|p| p.offsets = Offsets::Minima(vec![0.25, 0.0, -15.0, -2.0])), Err(Kind::Numeric));
        assert_eq!(with(&|p| p.steps[0] = [0.1, 0.25]), Err(Kind::Numeric));
        assert_eq!(with(&|p| p.steps.truncate(1)), Err(Kind::Internal));
        let mut other = stepped();
        other.steps[1][1] = 2.0;
        assert_ne!(other.digest(), stepped().digest());
    }

    #[test]
    fn the_digest_sees_every_field() {
        let base = tiny();
        let changes: [fn(&mut PackedLinear); 7] = [
            |p| p.words[1] ^= 1,
            |p| p.scales[2] = -p.scales[2],
            |p| p.offsets = Offsets::Zeros(vec![0, 7, 4, 2]),
            |p| (p.lattice.offset, p.offsets) = (Offset::Minimum, Offsets::Minima(vec![0.0; 4])),
            |p| p.lattice.group = None,
            |p| p.lattice.dtype = Dtype::Bf16,
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
