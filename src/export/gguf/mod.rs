//! `gguf-…`: one file for llama.cpp and what is built on it. The type of a format's name is that of the matrices of blocks; codes are solved on
//! the very lattice of its blocks.
//!
//! Matrices whose rows are no whole blocks stay floats, as do norms (f32) and biases. The head, and an embedding that is the head, are Q8_0.
//! Rows of q and k are stored in another order (`names::row_order`); they are quantized in ours.

mod check;
mod file;
mod metadata;
mod names;
mod reader;
mod tokenizer;
mod types;

pub use check::check;
pub use reader::Gguf;

use super::plan::{Shard, Stored};
use super::{Added, Container, Format, Layout, Sink};
use crate::model::{Checkpoint, Linear, ModelSpec, RawTensor, Role};
use crate::quant::{Lattice, Offsets, PackedLinear, Scheme};
use crate::tensor::Dtype;
use crate::{Error, Result};
use file::{ALIGNMENT, Info};
use names::{linear_of, row_order};
use std::borrow::Cow;
use types::{BLOCK, FLOATS, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Type};

/// Which types a file has.
pub struct Mix {
    pub name: &'static str,
    /// llama.cpp's number for it.
    pub file_type: u32,
    /// Of the matrices of blocks.
    base: &'static Type,
}

static MIXES: [Mix; 5] = [
    Mix { name: "gguf-q4_0", file_type: 2, base: &Q4_0 },
    Mix { name: "gguf-q4_1", file_type: 3, base: &Q4_1 },
    Mix { name: "gguf-q5_0", file_type: 8, base: &Q5_0 },
    Mix { name: "gguf-q5_1", file_type: 9, base: &Q5_1 },
    Mix { name: "gguf-q8_0", file_type: 7, base: &Q8_0 },
];

/// One format for each mix.
pub static FORMATS: [Format; 5] = [
    format::<0>("GGUF for llama.cpp, 4 bits, symmetric, 4.5 bits per weight"),
    format::<1>("GGUF for llama.cpp, 4 bits with minima, 5 bits per weight"),
    format::<2>("GGUF for llama.cpp, 5 bits, symmetric, 5.5 bits per weight"),
    format::<3>("GGUF for llama.cpp, 5 bits with minima, 6 bits per weight"),
    format::<4>("GGUF for llama.cpp, 8 bits, symmetric, 8.5 bits per weight"),
];

const fn format<const MIX: usize>(about: &'static str) -> Format {
    Format {
        name: MIXES[MIX].name,
        about,
        container: Container::Other(&LAYOUT),
        own_scheme: true,
        reads: |_| false,
        check: |_, _| Ok(()),
        lattice: lattice::<MIX>,
        tensors,
        encode,
        config: |_, _, _| (),
        files: |_| Vec::new(),
        fingerprint: |packed| Ok(packed.digest()),
        open: |checkpoint| Err(Error::internal(checkpoint.dir().display(), "is a folder of safetensors, not GGUF")),
    }
}

static LAYOUT: Layout = Layout { plain, convert, added, files };

fn lattice<const MIX: usize>(scheme: Scheme, spec: &ModelSpec, linear: &Linear) -> Option<Lattice> {
    let outer = match linear.role {
        _ if linear.is_outer() && scheme.keep_embeddings => return None,
        Role::Head => Some(&Q8_0),
        Role::Embedding if spec.tied_head => Some(&Q8_0),
        _ => None,
    };
    let kind = outer.unwrap_or(MIXES[MIX].base);
    linear.d_in.is_multiple_of(BLOCK).then_some(kind.lattice)
}

fn kind(lattice: Lattice) -> Result<&'static Type> {
    types::on(lattice).ok_or_else(|| Error::internal("GGUF", format!("has no type for {lattice:?}")))
}

fn tensors(spec: &ModelSpec, linear: &Linear, lattice: Lattice) -> Vec<Stored> {
    let weight = linear.weight();
    let name = names::names(spec).remove(&weight).unwrap_or(weight);
    let kind = types::on(lattice);
    let bytes = (linear.d_out * linear.d_in / BLOCK * kind.map_or(0, |k| k.bytes)) as u64;
    vec![Stored { name, dtype: kind.map_or("", |k| k.name).into(), shape: vec![linear.d_out, linear.d_in], bytes }]
}

/// Rows in the file's order, a few at a time.
fn encode(spec: &ModelSpec, linear: &Linear, packed: &PackedLinear, sink: &mut Sink<'_>) -> Result<()> {
    const BYTES: usize = 1 << 22;
    let (kind, d_in) = (kind(packed.lattice)?, packed.d_in);
    let n_group = packed.lattice.n_group(d_in);
    let order = row_order(spec, linear.role);
    let codes = packed.codes();
    let mut bytes = Vec::new();
    for row in 0..packed.d_out {
        let own = order.as_ref().map_or(row, |order| order[row]);
        for (group, codes) in codes[own * d_in..(own + 1) * d_in].chunks(BLOCK).enumerate() {
            let at = own * n_group + group;
            let minimum = match &packed.offsets {
                Offsets::Minima(minima) => minima[at],
                _ => 0.0,
            };
            kind.encode(codes, packed.scales[at], minimum, &mut bytes);
        }
        if bytes.len() > BYTES || row + 1 == packed.d_out {
            sink(0, &bytes)?;
            bytes.clear();
        }
    }
    Ok(())
}

fn plain(spec: &ModelSpec, name: &str, raw: &RawTensor<'_>) -> Option<Stored> {
    // Buffers that the model does not need have no place here.
    let name = names::names(spec).remove(name)?;
    let dtype = stored_dtype(raw)?;
    let label = FLOATS.iter().find(|f| f.2 == dtype)?.0;
    Some(Stored::new(name, label, dtype.size(), raw.shape.clone()))
}

/// Vectors are f32, matrices what they are.
fn stored_dtype(raw: &RawTensor<'_>) -> Option<Dtype> {
    if raw.shape.len() < 2 { Some(Dtype::F32) } else { raw.dtype.parse().ok() }
}

fn convert<'a>(spec: &ModelSpec, name: &str, raw: RawTensor<'a>) -> Result<Cow<'a, [u8]>> {
    let unreadable = || Error::internal(name, format!("is of type {}", raw.dtype));
    let from: Dtype = raw.dtype.parse().map_err(|_| unreadable())?;
    let to = stored_dtype(&raw).ok_or_else(unreadable)?;
    let bytes = if from == to {
        Cow::Borrowed(raw.bytes)
    } else {
        let mut values = vec![0.0; raw.bytes.len() / from.size()];
        from.decode(raw.bytes, &mut values);
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
