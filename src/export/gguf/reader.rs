//! Reads GGUF files of the `llama` architecture whose tensors are floats or of the types that we write.

use super::file::{self, Head, Info, Value};
use super::metadata::{self, ROPE_FACTORS};
use super::names::{names, row_order};
use super::types::{self, FLOATS, Matrix, Type};
use crate::export::Reader;
use crate::model::{Linear, Map, ModelSpec, Role, Weights};
use crate::quant::{Lattice, Offset, Offsets, PackedLinear};
use crate::tensor::{Dtype, Tensor};
use crate::{Error, Result};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

/// Bytes of the factors of a head that is wider than any.
const MAX_FACTORS: usize = 1 << 20;

#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Map,
    spec: ModelSpec,
    head: Head,
    /// Names in the file by names in the model.
    names: BTreeMap<String, String>,
    /// Of the weights and biases of all linears in blocks.
    roles: BTreeMap<String, Role>,
    tensors: BTreeMap<String, Stored>,
}

/// How a tensor is stored, and where in the file.
#[derive(Debug)]
struct Stored {
    shape: Vec<usize>,
    kind: Kind,
    bytes: std::ops::Range<usize>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Float(Dtype),
    Blocks(&'static Type),
}

impl Gguf {
    /// Opens a file and checks that every tensor of the model is there, in its shape and a type that can be read, and that nothing is left.
    pub fn open(path: &Path) -> Result<Self> {
        let map = Map::open(path)?;
        let head = file::parse(path, &map)?;
        let wrong = |name: &str, message: String| Error::input(format!("{}: tensor {name}", path.display()), message);
        let mut tensors = BTreeMap::new();
        for info in &head.tensors {
            let stored = place(&head, info, map.len()).map_err(|message| wrong(&info.name, message))?;
            if tensors.insert(info.name.clone(), stored).is_some() {
                return Err(wrong(&info.name, "is there twice".to_owned()));
            }
        }
        let factors = match tensors.get(ROPE_FACTORS) {
            None => None,
            Some(Stored { kind: Kind::Float(dtype), bytes, .. }) if bytes.len() <= MAX_FACTORS => {
                let mut values = vec![0.0; bytes.len() / dtype.size()];
                dtype.decode(&map[bytes.clone()], &mut values);
                Some(values)
            }
            Some(_) => return Err(wrong(ROPE_FACTORS, "is no list of floats for the pairs of a head".to_owned())),
        };
        let mut spec = metadata::read(path, &head, factors)?;
        let names = names(&spec);
        for tensor in spec.tensors() {
            let name = &names[&tensor.name];
            let stored = tensors.get(name).ok_or_else(|| wrong(name, "is missing".to_owned()))?;
            if stored.shape != tensor.shape {
                return Err(wrong(name, format!("has shape {:?} where {:?} is needed", stored.shape, tensor.shape)));
            }
            if !tensor.quantizable && matches!(stored.kind, Kind::Blocks(_)) {
                return Err(wrong(name, "is quantized, which only matrices may be".to_owned()));
            }
        }
        let known: HashSet<&String> = names.values().collect();
        if let Some(stray) = tensors.keys().find(|name| *name != ROPE_FACTORS && !known.contains(name)) {
            return Err(wrong(stray, "has no place in the model that the metadata describe".to_owned()));
        }
        if let Some(Stored { kind: Kind::Float(dtype), .. }) = tensors.get("token_embd.weight") {
            spec.dtype = *dtype;
        }
        let linears = spec.blocks.iter().flat_map(|block| &block.linears);
        let roles = linears.flat_map(|l| std::iter::once(l.weight()).chain(l.bias_name()).map(|name| (name, l.role))).collect();
        Ok(Self { path: path.to_owned(), map, spec, head, names, roles, tensors })
    }

    fn find(&self, name: &str) -> Result<(&str, &Stored)> {
        let in_file = self.names.get(name).ok_or_else(|| Error::internal(name, "is no tensor of the model"))?;
        let stored = self.tensors.get(in_file).ok_or_else(|| self.error(in_file, "is missing"))?;
        Ok((in_file, stored))
    }

    /// Of every tensor in the file's order: name, offset in the data, bytes.
    pub(super) fn places(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        self.head.tensors.iter().map(|info| {
            let bytes = self.tensors.get(&info.name).map_or(0, |stored| stored.bytes.len() as u64);
            (info.name.as_str(), info.offset, bytes)
        })
    }

    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.head.metadata.get(key)
    }

    pub(super) fn wrong_key(&self, key: &str, what: &str) -> Error {
        Error::input(self.path.display(), format!("`{key}` {what}"))
    }

    pub(super) fn error(&self, name: &str, message: impl std::fmt::Display) -> Error {
        Error::input(format!("{}: tensor {name}", self.path.display()), message)
    }

    /// Rows in the model's order.
    fn float(&self, name: &str) -> Result<Tensor<'_>> {
        let (in_file, stored) = self.find(name)?;
        let Kind::Float(dtype) = stored.kind else { return Err(self.error(in_file, "is quantized")) };
        let bytes = &self.map[stored.bytes.clone()];
        let order = self.roles.get(name).and_then(|role| row_order(&self.spec, *role));
        let data = match order {
            None => Cow::Borrowed(bytes),
            Some(order) => {
                let width = bytes.len() / order.len().max(1);
                let mut rows = vec![0; bytes.len()];
                order
                    .iter()
                    .enumerate()
                    .for_each(|(row, own)| rows[own * width..][..width].copy_from_slice(&bytes[row * width..][..width]));
                Cow::Owned(rows)
            }
        };
        let tensor = Tensor { dtype, shape: stored.shape.clone(), data };
        match tensor.to_f32().iter().position(|v| !v.is_finite()) {
            Some(at) => Err(self.error(in_file, format!("is not finite at element {at}"))),
            None => Ok(tensor),
        }
    }
}

/// Where a tensor lies in a file of `len` bytes, or what is wrong with it.
fn place(head: &Head, info: &Info, len: usize) -> std::result::Result<Stored, String> {
    let kind = match (FLOATS.iter().find(|f| f.1 == info.kind), types::TYPES.iter().find(|t| t.id == info.kind)) {
        (Some((_, _, dtype)), _) => Kind::Float(*dtype),
        (_, Some(kind)) => Kind::Blocks(kind),
        _ => return Err(format!("is of type number {}, which cannot be read", info.kind)),
    };
    let elements = info.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let row = info.shape.last().copied().unwrap_or(0);
    let bytes = match kind {
        Kind::Float(dtype) => elements.and_then(|n| n.checked_mul(dtype.size())),
        Kind::Blocks(kind) if row.is_multiple_of(kind.elements) => elements.and_then(|n| (n / kind.elements).checked_mul(kind.bytes)),
        Kind::Blocks(kind) => return Err(format!("has rows of {row}, which are no whole blocks of {}", kind.name)),
    };
    let start = head.data.checked_add(info.offset).and_then(|start| usize::try_from(start).ok());
    let range = start.zip(bytes).and_then(|(start, n)| Some(start..start.checked_add(n)?)).filter(|r| r.end <= len);
    let bytes = range.ok_or_else(|| "lies outside of the file, which may be cut off".to_owned())?;
    Ok(Stored { shape: info.shape.clone(), kind, bytes })
}

impl Weights for Gguf {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.float(name)
    }

    /// In f32, which holds what llama.cpp's kernels multiply with.
    fn linear(&self, linear: &Linear) -> Result<Tensor<'_>> {
        match self.packed(linear)? {
            Some(packed) => Tensor::from_f32(Dtype::F32, vec![linear.d_out, linear.d_in], &packed.dequantize()),
            None => self.float(&linear.weight()),
        }
    }

    fn release(&self) {
        self.map.release(0..self.map.len());
    }
}

impl Reader for Gguf {
    fn packed(&self, linear: &Linear) -> Result<Option<PackedLinear>> {
        let (in_file, stored) = self.find(&linear.weight())?;
        let Kind::Blocks(kind) = stored.kind else { return Ok(None) };
        let (d_out, d_in, lattice) = (linear.d_out, linear.d_in, kind.lattice);
        let order = row_order(&self.spec, linear.role);
        let mut matrix = Matrix::empty(kind, d_out, d_in);
        let rows = self.map[stored.bytes.clone()].chunks_exact(d_in / kind.elements * kind.bytes);
        for (row, bytes) in rows.enumerate() {
            kind.decode_row(bytes, &mut matrix, order.as_ref().map_or(row, |order| order[row]));
        }
        let Matrix { codes, scales, minima, steps, .. } = matrix;
        let offsets = if lattice.offset == Offset::Minimum { Offsets::Minima(minima) } else { Offsets::Centre };
        let packed = PackedLinear::from_codes(lattice, d_out, d_in, &codes, scales, offsets, steps);
        packed.map(Some).map_err(|e| self.error(in_file, e.message))
    }

    fn lattice(&self, linear: &Linear) -> Result<Option<Lattice>> {
        Ok(match self.find(&linear.weight())?.1.kind {
            Kind::Blocks(kind) => Some(kind.lattice),
            Kind::Float(_) => None,
        })
    }

    fn stored(&self, name: &str) -> Result<&[u8]> {
        let stored = self.tensors.get(name).ok_or_else(|| self.error(name, "is missing"))?;
        Ok(&self.map[stored.bytes.clone()])
    }
}
