//! `gguf-…`: one file for llama.cpp and what is built on it. The types of matrices are those that llama.cpp's own quantizer gives files of that
//! name (`mixes`); codes are solved on the very lattice of a type's blocks.
//!
//! Matrices whose rows no block divides stay floats, as do norms (f32) and biases. Rows of q and k are stored in another order (`names::row_order`); they are quantized in ours.

mod blocks;
mod check;
mod file;
mod metadata;
mod mixes;
mod names;
mod reader;
mod super_blocks;
mod tokenizer;
mod types;

pub use check::check;
pub use reader::Gguf;

use super::plan::{Shard, Stored};
use super::{Added, Container, Format, Layout, Sink};
use crate::model::{Checkpoint, Linear, ModelSpec, RawTensor};
use crate::quant::{Lattice, PackedLinear, Scheme};
use crate::tensor::Dtype;
use crate::{Error, Result};
use file::{ALIGNMENT, Info};
use mixes::{Base, MIXES, Mix};
use names::{linear_of, names, row_order};
use std::borrow::Cow;
use std::collections::BTreeMap;
use types::{FLOATS, Matrix, Type};

macro_rules! formats {
    ($($mix:literal)*) => {
        /// One format for each mix.
        pub static FORMATS: [Format; MIXES.len()] = [$(format::<$mix>()),*];
        static LAYOUTS: [Layout; MIXES.len()] = [$(Layout { names, plain: plain::<$mix>, convert: convert::<$mix>, added, files }),*];
    };
}
formats!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17);

const fn format<const MIX: usize>() -> Format {
    Format {
        name: MIXES[MIX].name,
        about: MIXES[MIX].about,
        container: Container::Other(&LAYOUTS[MIX]),
        own_scheme: true,
        check: check_fallbacks::<MIX>,
        lattice: lattice::<MIX>,
        tensors,
        encode,
        scratch: 2,
        fingerprint: |packed| Ok(packed.digest()),
    }
}

/// Says which matrices do not have the type that the format's name promises.
fn check_fallbacks<const MIX: usize>(_: Scheme, spec: &ModelSpec) -> Result<Vec<String>> {
    let mix = &MIXES[MIX];
    let mut fallen: BTreeMap<(usize, &str), usize> = BTreeMap::new();
    for linear in spec.matrices().filter(|l| mix.falls_back(spec, l)) {
        *fallen.entry((linear.d_in, mix.kind(spec, linear).map_or("floats", |kind| kind.name))).or_default() += 1;
    }
    let warning = |((d_in, instead), count)| {
        format!("{}: whole blocks do not divide rows of {d_in}; as in llama.cpp, stored as {instead}: {count} of the matrices", mix.name)
    };
    Ok(fallen.into_iter().map(warning).collect())
}

fn lattice<const MIX: usize>(scheme: Scheme, spec: &ModelSpec, linear: &Linear) -> Option<Lattice> {
    if linear.is_outer() && scheme.keep_embeddings {
        return None;
    }
    MIXES[MIX].kind(spec, linear).map(|kind| kind.lattice)
}

fn kind(lattice: Lattice) -> Result<&'static Type> {
    types::on(lattice).ok_or_else(|| Error::internal("GGUF", format!("has no type for {lattice:?}")))
}

fn tensors(_: &ModelSpec, linear: &Linear, lattice: Lattice) -> Vec<Stored> {
    let kind = types::on(lattice);
    let bytes = (linear.d_out * kind.map_or(0, |k| linear.d_in / k.elements * k.bytes)) as u64;
    vec![Stored { name: linear.weight(), dtype: kind.map_or("", |k| k.name).into(), shape: vec![linear.d_out, linear.d_in], bytes }]
}

/// Rows in the file's order, a few at a time.
fn encode(spec: &ModelSpec, linear: &Linear, packed: &PackedLinear, sink: &mut Sink<'_>) -> Result<()> {
    const BYTES: usize = 1 << 22;
    let (kind, matrix) = (kind(packed.lattice)?, Matrix::of(packed));
    let order = row_order(spec, linear.role);
    let mut bytes = Vec::new();
    for row in 0..packed.d_out {
        kind.encode_row(&matrix, order.as_ref().map_or(row, |order| order[row]), &mut bytes);
        if bytes.len() > BYTES || row + 1 == packed.d_out {
            sink(0, &bytes)?;
            bytes.clear();
        }
    }
    Ok(())
}

fn plain<const MIX: usize>(name: &str, raw: &RawTensor<'_>) -> Option<Stored> {
    let dtype = stored_dtype(&MIXES[MIX], raw)?;
    let label = FLOATS.iter().find(|f| f.2 == dtype)?.0;
    Some(Stored::new(name.to_owned(), label, dtype.size(), raw.shape.clone()))
}

/// Vectors are f32, matrices what the mix says, or what they are.
fn stored_dtype(mix: &Mix, raw: &RawTensor<'_>) -> Option<Dtype> {
    match mix.base {
        _ if raw.shape.len() < 2 => Some(Dtype::F32),
        Base::Floats(dtype) => Some(dtype),
        Base::Blocks(_) => raw.dtype.parse().ok(),
    }
}

fn convert<'a, const MIX: usize>(spec: &ModelSpec, name: &str, raw: RawTensor<'a>) -> Result<Cow<'a, [u8]>> {
    let unreadable = || Error::internal(name, format!("is of type {}", raw.dtype));
    let from: Dtype = raw.dtype.parse().map_err(|_| unreadable())?;
    let to = stored_dtype(&MIXES[MIX], &raw).ok_or_else(unreadable)?;
    let bytes = if from == to {
        Cow::Borrowed(raw.bytes)
    } else {
        let mut values = vec![0.0; raw.bytes.len() / from.size()];
        from.decode(raw.bytes, &mut values);
        if let Some(at) = values.iter().position(|v| v.is_finite() && !to.round(*v).is_finite()) {
            return Err(Error::numeric(
                name,
                format!("{:e} at element {at} is too large for {to}; gguf-bf16 and gguf-f32 hold it", values[at]),
            ));
        }
        Cow::Owned(to.to_bytes(&values))
    };
    let Some(order) = linear_of(spec, name).and_then(|l| row_order(spec, l.role)) else { return Ok(bytes) };
    let width = bytes.len() / order.len().max(1);
    Ok(Cow::Owned(order.iter().flat_map(|own| bytes[own * width..][..width].iter().copied()).collect()))
}

fn added(spec: &ModelSpec) -> Vec<Added> {
    let Some(factors) = metadata::rope_factors(spec) else { return Vec::new() };
    let bytes = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
    vec![(Stored::new(metadata::ROPE_FACTORS.to_owned(), "F32", 4, vec![factors.len()]), bytes)]
}

/// One file.
fn files(checkpoint: &Checkpoint, format: &Format, tensors: Vec<Stored>) -> Result<Vec<Shard>> {
    let mix = MIXES.iter().find(|m| m.name == format.name).ok_or_else(|| Error::internal(format.name, "is no mix"))?;
    let metadata = metadata::write(checkpoint, mix)?;
    let id = |label: &str| {
        let float = FLOATS.iter().find(|f| f.0 == label).map(|f| f.1);
        float.or_else(|| types::TYPES.iter().find(|t| t.name == label).map(|t| t.id))
    };
    let (mut infos, mut end) = (Vec::new(), 0u64);
    for t in &tensors {
        let kind = id(&t.dtype).ok_or_else(|| Error::internal(&t.name, format!("is of the unknown type {}", t.dtype)))?;
        infos.push(Info { name: t.name.clone(), shape: t.shape.clone(), kind, offset: end });
        end += t.bytes.next_multiple_of(ALIGNMENT);
    }
    let header = file::header(&metadata, &infos);
    let data = header.len() as u64;
    let tensors = tensors.into_iter().zip(&infos).map(|(t, info)| (t, data + info.offset)).collect();
    let file_name = format!("model-{}.gguf", mix.name.trim_start_matches("gguf-").to_uppercase());
    Ok(vec![Shard { file_name, header, tensors, len: data + end }])
}
