//! Reads folders whose linears are stored as several tensors of codes, scales and offsets. A format says which tensors these are, and what
//! their bytes mean; everything that can be checked without knowing that is checked here.

use super::Reader;
use super::plan::Stored;
use crate::model::{Checkpoint, Linear, ModelSpec, Weights};
use crate::quant::{Lattice, PackedLinear, Scheme};
use crate::tensor::{Dtype, Tensor};
use crate::{Error, Kind, Result};
use std::collections::{BTreeSet, HashSet};

/// What a format knows about the tensors of a linear.
#[derive(Clone, Copy)]
pub(super) struct Codec {
    /// Scales: the suffix of their name, and the types that they may have.
    pub scale: &'static str,
    /// What says that a linear is packed: a tensor with this suffix.
    pub marker: &'static str,
    pub scale_dtypes: &'static [Dtype],
    /// On which lattice codes with scales of this type lie.
    pub lattice: fn(Scheme, Dtype) -> Lattice,
    /// As the writer's.
    pub tensors: fn(&ModelSpec, &Linear, Lattice) -> Vec<Stored>,
    /// The bytes of those tensors, which have the right lengths. An error tells which of them is damaged, and how.
    pub decode: fn(&Linear, Lattice, &[&[u8]]) -> Decoded,
    /// The type of the values that the format's own reader makes.
    pub values: fn(Lattice) -> Dtype,
}

/// The number of a tensor in the order of [`Codec::tensors`], and what is wrong with it.
pub(super) type Damage = (usize, String);

pub(super) type Decoded = std::result::Result<PackedLinear, Damage>;

/// What is wrong with a matrix that was made from files: what would be a bug in a solver's result is damage here, of its scales or codes.
pub(super) fn damaged([codes, scales]: [usize; 2]) -> impl Fn(Error) -> Damage {
    move |e| (if e.kind == Kind::Numeric { scales } else { codes }, e.message)
}

/// The scheme of a module, if a folder's config has one for it.
pub(super) type Schemes = Box<dyn Fn(&str) -> Option<Scheme> + Send + Sync>;

pub(super) struct PackedFolder {
    checkpoint: Checkpoint,
    codec: Codec,
    scheme: Schemes,
}

impl std::fmt::Debug for PackedFolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedFolder").field("checkpoint", &self.checkpoint).finish_non_exhaustive()
    }
}

impl PackedFolder {
    /// Checks that every linear is there, that no tensor is left over, and the types and shapes of all tensors of packed linears; no data are
    /// read.
    pub fn open(checkpoint: Checkpoint, codec: Codec, scheme: Schemes) -> Result<Self> {
        let folder = Self { checkpoint, codec, scheme };
        let spec = folder.checkpoint.spec();
        // What the model has no place for would be dropped silently, and another model judged.
        let mut known: HashSet<String> = spec.tensors().into_iter().map(|t| t.name).collect();
        let mut modules = BTreeSet::new();
        for linear in spec.matrices() {
            if folder.is_packed(linear)? {
                known.remove(&linear.weight());
                known.extend(folder.parts(linear)?.1.into_iter().map(|(stored, _)| stored.name));
            }
            modules.insert(linear.module.as_str());
        }
        // A tied head may be stored a second time; the config decides.
        let second_head = |n: &str| spec.tied_head && n == "lm_head.weight";
        let belongs =
            |n: &str| n.ends_with(".weight") || n.ends_with(".bias") || n.rsplit_once('.').is_some_and(|(m, _)| modules.contains(m));
        if let Some(stray) = folder.checkpoint.names().find(|n| belongs(n) && !known.contains(*n) && !second_head(n)) {
            return Err(folder.error(stray, format!("has no place in the {} model that config.json describes", spec.family)));
        }
        Ok(folder)
    }

    /// A linear is packed if its codes are there, and plain if only its weight is: lists of what was left out need not be understood.
    fn is_packed(&self, linear: &Linear) -> Result<bool> {
        let (marker, weight) = (format!("{}.{}", linear.module, self.codec.marker), linear.weight());
        let plain = self.checkpoint.has(&weight);
        if !self.checkpoint.has(&marker) {
            return if plain { Ok(false) } else { Err(self.error(&marker, "is missing, and so is the plain weight")) };
        }
        // Some formats store codes under the weight's name.
        let lattice = self.stored_lattice(linear)?;
        match plain && !(self.codec.tensors)(self.checkpoint.spec(), linear, lattice).iter().any(|t| t.name == weight) {
            true => Err(self.error(&marker, "is there, and so is the plain weight")),
            false => Ok(true),
        }
    }

    fn stored_lattice(&self, linear: &Linear) -> Result<Lattice> {
        let name = format!("{}.{}", linear.module, self.codec.scale);
        let message = "is quantized, but config.json does not say how";
        let scheme = (self.scheme)(&linear.module).ok_or_else(|| self.error(&linear.module, message))?;
        if !scheme.divides(linear.d_in) {
            let message = format!("groups of {} do not divide the {} columns of {}", scheme.group_size(), linear.d_in, linear.module);
            return Err(self.error(&name, message));
        }
        let raw = self.checkpoint.raw(&name)?;
        match raw.dtype.parse::<Dtype>() {
            Ok(dtype) if self.codec.scale_dtypes.contains(&dtype) => Ok((self.codec.lattice)(scheme, dtype)),
            _ => {
                let allowed: Vec<&str> = self.codec.scale_dtypes.iter().map(|d| d.safetensors_name()).collect();
                Err(self.error(&name, format!("is of type {}; {} is needed", raw.dtype, allowed.join(" or "))))
            }
        }
    }

    /// The tensors of a packed linear, of the right types and shapes, with their bytes.
    fn parts(&self, linear: &Linear) -> Result<(Lattice, Vec<Part<'_>>)> {
        let lattice = self.stored_lattice(linear)?;
        let mut parts = Vec::new();
        for stored in (self.codec.tensors)(self.checkpoint.spec(), linear, lattice) {
            let raw = self.checkpoint.raw(&stored.name)?;
            if raw.dtype != stored.dtype {
                return Err(self.error(&stored.name, format!("is of type {}; {} is needed", raw.dtype, stored.dtype)));
            }
            if raw.shape != stored.shape {
                return Err(self.error(&stored.name, format!("has shape {:?} where {:?} is needed", raw.shape, stored.shape)));
            }
            parts.push((stored, raw.bytes));
        }
        Ok((lattice, parts))
    }

    fn error(&self, name: &str, message: impl std::fmt::Display) -> Error {
        Error::input(self.checkpoint.subject(name), message)
    }
}

impl Weights for PackedFolder {
    fn spec(&self) -> &ModelSpec {
        self.checkpoint.spec()
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.checkpoint.tensor(name)
    }

    fn linear(&self, linear: &Linear) -> Result<Tensor<'_>> {
        match self.packed(linear)? {
            Some(packed) => Tensor::from_f32((self.codec.values)(packed.lattice), vec![linear.d_out, linear.d_in], &packed.dequantize()),
            None => Weights::linear(&self.checkpoint, linear),
        }
    }

    fn release(&self) {
        self.checkpoint.release();
    }
}

impl Reader for PackedFolder {
    fn packed(&self, linear: &Linear) -> Result<Option<PackedLinear>> {
        if !self.is_packed(linear)? {
            return Ok(None);
        }
        let (lattice, parts) = self.parts(linear)?;
        let bytes: Vec<&[u8]> = parts.iter().map(|(_, bytes)| *bytes).collect();
        let named = |(index, message): Damage| {
            let name = parts.get(index).map_or(linear.module.as_str(), |(stored, _)| &stored.name);
            self.error(name, message)
        };
        (self.codec.decode)(linear, lattice, &bytes).map(Some).map_err(named)
    }

    fn lattice(&self, linear: &Linear) -> Result<Option<Lattice>> {
        self.is_packed(linear)?.then(|| self.stored_lattice(linear)).transpose()
    }

    fn stored(&self, name: &str) -> Result<&[u8]> {
        Ok(self.checkpoint.raw(name)?.bytes)
    }
}

/// A tensor and its bytes.
type Part<'a> = (Stored, &'a [u8]);

/// Little-endian words.
pub(super) fn to_words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

pub(super) fn to_floats(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    dtype.decode(bytes, &mut values);
    values
}
