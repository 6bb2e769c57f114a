//! `compressed-tensors`, format `int-quantized`: weights and inputs of 8 bits, W8A8, for integer matrix products.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `X.weight` | I8 | [d_out, d_in] |
//! | `X.weight_scale` | the model's | [d_out, 1] |
//!
//! Runtimes round the inputs of a product themselves, every token by its own largest value. What we calculate with these weights takes inputs
//! as they are.

use super::config::{self, INTEGER};
use crate::Result;
use crate::export::packed::{Codec, Decoded, PackedFolder, damaged, to_floats};
use crate::export::plan::Stored;
use crate::export::{Container, Folder, Format, Sink};
use crate::model::{Linear, ModelSpec};
use crate::quant::{Lattice, Offsets, PackedLinear, Scheme};
use crate::tensor::Dtype;

pub const FORMAT: Format = Format {
    name: "compressed-tensors-w8a8",
    about: "int-quantized safetensors for vLLM: 8 bits, inputs rounded to 8 bits at run time",
    container: Container::Safetensors(Folder {
        metadata: "pt",
        reads: |config| INTEGER.reads(config),
        config: |config, spec, _| config::write(config, spec, SCHEME, INTEGER),
        files: |_| Vec::new(),
        open: |checkpoint| {
            let schemes = config::read(checkpoint.config(), INTEGER)?;
            tracing::info!("inputs are taken as they are; runtimes round them to 8 bits");
            Ok(Box::new(PackedFolder::open(checkpoint, CODEC, Box::new(move |module| schemes.scheme(module)))?))
        },
    }),
    own_scheme: true,
    check: |_, _| Ok(Vec::new()),
    lattice: |_, spec, linear| (!linear.is_outer()).then(|| SCHEME.lattice(spec.dtype)),
    tensors,
    encode,
    scratch: 2,
    fingerprint: |packed| Ok(packed.digest()),
};

const SCHEME: Scheme = Scheme { bits: 8, group: None, symmetric: true, keep_embeddings: false };

const CODEC: Codec = Codec {
    scale: "weight_scale",
    marker: "weight_scale",
    scale_dtypes: &[Dtype::F32, Dtype::F16, Dtype::Bf16],
    lattice: |scheme, dtype| scheme.lattice(dtype),
    tensors,
    decode,
    values: |lattice| lattice.dtype,
};

fn tensors(_: &ModelSpec, linear: &Linear, lattice: Lattice) -> Vec<Stored> {
    let (d_out, d_in, dtype) = (linear.d_out, linear.d_in, lattice.dtype);
    vec![
        Stored::new(linear.weight(), "I8", 1, vec![d_out, d_in]),
        Stored::new(format!("{}.weight_scale", linear.module), dtype.safetensors_name(), dtype.size(), vec![d_out, lattice.n_group(d_in)]),
    ]
}

/// Codes are signed in files, and count from the middle here.
fn encode(_: &ModelSpec, _: &Linear, packed: &PackedLinear, sink: &mut Sink<'_>) -> Result<()> {
    let signed: Vec<u8> = packed.codes().into_iter().map(|q| q.wrapping_sub(128)).collect();
    sink(0, &signed)?;
    sink(1, &packed.scale_bytes())
}

fn decode(linear: &Linear, lattice: Lattice, parts: &[&[u8]]) -> Decoded {
    if lattice.bits != 8 || !lattice.is_centred() {
        return Err((0, format!("holds codes of {} bits; symmetric ones of 8 can be read", lattice.bits)));
    }
    let codes: Vec<u8> = parts[0].iter().map(|q| q.wrapping_add(128)).collect();
    let scales = to_floats(parts[1], lattice.dtype);
    PackedLinear::from_codes(lattice, linear.d_out, linear.d_in, &codes, scales, Offsets::Centre, Vec::new()).map_err(damaged([0, 1]))
}
