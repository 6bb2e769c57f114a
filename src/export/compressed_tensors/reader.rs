//! Reads a `pack-quantized` folder: ours, or one that another tool wrote within what `config` accepts.

use super::super::Reader;
use super::targets::Schemes;
use super::{PACKED, SCALE, SHAPE, ZERO_POINT, config, unpack_zeros};
use crate::model::{Checkpoint, Linear, ModelSpec, RawTensor, Weights};
use crate::quant::bits::words_per_row;
use crate::quant::{Lattice, Offsets, PackedLinear, Scheme};
use crate::tensor::{Dtype, Tensor};
use crate::{Error, Kind, Result};
use std::collections::HashSet;

#[derive(Debug)]
pub(super) struct CompressedTensors {
    checkpoint: Checkpoint,
    schemes: Schemes,
}

impl CompressedTensors {
    /// Checks the config, that no tensor is left over, and the types and shapes of all linears' tensors; no data are read.
    pub fn new(checkpoint: Checkpoint) -> Result<Self> {
        let schemes = config::read(checkpoint.config())?;
        let reader = Self { checkpoint, schemes };
        let spec = reader.checkpoint.spec();
        let linears = || spec.blocks.iter().flat_map(|b| &b.linears).chain((!spec.tied_head).then_some(&spec.head));
        for linear in linears() {
            if reader.is_packed(linear)? {
                reader.parts(linear)?;
            }
        }
        // What the model has no place for would be dropped silently, and another model judged.
        let mut known: HashSet<String> = spec.tensors().into_iter().map(|t| t.name).collect();
        known.extend(linears().map(|l| name(l, PACKED)));
        let is_weight = |n: &&str| n.ends_with(".weight") || n.ends_with(".bias") || n.ends_with(PACKED);
        // A tied head may be stored a second time; the config decides.
        let second_head = |n: &str| spec.tied_head && n == "lm_head.weight";
        if let Some(stray) = reader.checkpoint.names().filter(is_weight).find(|n| !known.contains(*n) && !second_head(n)) {
            return Err(reader.error(stray, format!("has no place in the {} model that config.json describes", spec.family)));
        }
        Ok(reader)
    }

    /// A linear is packed if its codes are there, and plain if its weight is: the ignore list need not be understood.
    fn is_packed(&self, linear: &Linear) -> Result<bool> {
        let packed = name(linear, PACKED);
        match (self.checkpoint.has(&packed), self.checkpoint.has(&linear.weight())) {
            (true, false) => Ok(true),
            (false, true) => Ok(false),
            (true, true) => Err(self.error(&packed, "is there, and so is the plain weight")),
            (false, false) => Err(self.error(&packed, "is missing, and so is the plain weight")),
        }
    }

    fn scheme(&self, linear: &Linear) -> Result<Scheme> {
        let message = "is quantized, but no target of `config_groups` in config.json names its module";
        self.schemes.scheme(&linear.module).ok_or_else(|| self.error(&name(linear, PACKED), message))
    }

    fn parts(&self, linear: &Linear) -> Result<Parts<'_>> {
        let (scheme, d_out, d_in) = (self.scheme(linear)?, linear.d_out, linear.d_in);
        if !scheme.divides(d_in) {
            let message = format!("groups of {} do not divide the {d_in} columns of {}", scheme.group_size(), linear.module);
            return Err(self.error(&name(linear, SCALE), message));
        }
        let (bits, n_group) = (scheme.bits as usize, scheme.lattice(Dtype::F32).n_group(d_in));
        let g_idx = name(linear, "weight_g_idx");
        if self.checkpoint.has(&g_idx) {
            return Err(self.error(&g_idx, "is there, but folders with reordered columns cannot be read"));
        }
        let zero_name = name(linear, ZERO_POINT);
        let zeros = match scheme.symmetric {
            false => Some(self.part(&zero_name, "I32", &[words_per_row(d_out, bits), n_group])?),
            true if self.checkpoint.has(&zero_name) => return Err(self.error(&zero_name, "is there, but config.json says `symmetric`")),
            true => None,
        };
        let scale_name = name(linear, SCALE);
        let scales = self.checkpoint.raw(&scale_name)?;
        let Ok(scale_dtype) = scales.dtype.parse::<Dtype>() else {
            return Err(self.error(&scale_name, format!("is of type {}; F32, F16 or BF16 is needed", scales.dtype)));
        };
        self.check_shape(&scale_name, &scales, &[d_out, n_group])?;
        let shape_name = name(linear, SHAPE);
        let shape = self.part(&shape_name, "I64", &[2])?;
        let shape: Vec<i64> = shape.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
        if shape != [d_out as i64, d_in as i64] {
            return Err(self.error(&shape_name, format!("says {shape:?} where config.json makes it [{d_out}, {d_in}]")));
        }
        let words = self.part(&name(linear, PACKED), "I32", &[d_out, words_per_row(d_in, bits)])?;
        Ok(Parts { lattice: scheme.lattice(scale_dtype), words, scales: scales.bytes, zeros })
    }

    fn part(&self, name: &str, dtype: &str, shape: &[usize]) -> Result<&[u8]> {
        let raw = self.checkpoint.raw(name)?;
        if raw.dtype != dtype {
            return Err(self.error(name, format!("is of type {}; {dtype} is needed", raw.dtype)));
        }
        self.check_shape(name, &raw, shape)?;
        Ok(raw.bytes)
    }

    fn check_shape(&self, name: &str, raw: &RawTensor<'_>, shape: &[usize]) -> Result<()> {
        if raw.shape != shape {
            return Err(self.error(name, format!("has shape {:?} where {shape:?} is needed", raw.shape)));
        }
        Ok(())
    }

    fn error(&self, name: &str, message: impl std::fmt::Display) -> Error {
        Error::input(self.checkpoint.subject(name), message)
    }

    fn unpack(&self, linear: &Linear) -> Result<PackedLinear> {
        let Parts { lattice, words, scales, zeros } = self.parts(linear)?;
        let (d_out, d_in, n_group) = (linear.d_out, linear.d_in, lattice.n_group(linear.d_in));
        let mut scale_values = vec![0.0; d_out * n_group];
        lattice.dtype.decode(scales, &mut scale_values);
        let offsets = match zeros {
            Some(bytes) => Offsets::Zeros(unpack_zeros(&to_words(bytes), d_out, n_group, lattice.bits)),
            None => Offsets::Centre,
        };
        PackedLinear::new(lattice, d_out, d_in, to_words(words), scale_values, offsets).map_err(|e| {
            // What would be a bug in a solver's result is damage in a file.
            let part = if e.kind == Kind::Numeric { SCALE } else { PACKED };
            self.error(&name(linear, part), e.message)
        })
    }
}

/// The stored bytes of one linear, of the right lengths.
struct Parts<'a> {
    lattice: Lattice,
    words: &'a [u8],
    scales: &'a [u8],
    zeros: Option<&'a [u8]>,
}

fn name(linear: &Linear, suffix: &str) -> String {
    format!("{}.{suffix}", linear.module)
}

fn to_words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

impl Weights for CompressedTensors {
    fn spec(&self) -> &ModelSpec {
        self.checkpoint.spec()
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.checkpoint.tensor(name)
    }

    /// Rounded to the scales' type, as the library's own decompression does.
    fn linear(&self, linear: &Linear) -> Result<Tensor<'_>> {
        match self.packed(linear)? {
            Some(packed) => Tensor::from_f32(packed.lattice.dtype, vec![linear.d_out, linear.d_in], &packed.dequantize()),
            None => Weights::linear(&self.checkpoint, linear),
        }
    }
}

impl Reader for CompressedTensors {
    fn packed(&self, linear: &Linear) -> Result<Option<PackedLinear>> {
        if self.is_packed(linear)? { self.unpack(linear).map(Some) } else { Ok(None) }
    }
}
