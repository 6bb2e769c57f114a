//! `dense`: the dequantized model as an ordinary folder, for any reader and for comparing formats.

use super::plan::Stored;
use super::{Container, Folder, Format, Reader, Sink, in_blocks};
use crate::model::{Checkpoint, Linear, ModelSpec};
use crate::quant::{Digest, Lattice, PackedLinear, Scheme};
use crate::tensor::Dtype;
use crate::{Error, Result};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

pub const FORMAT: Format = Format {
    name: "dense",
    about: "the dequantized weights as an ordinary model folder",
    container: Container::Safetensors(Folder {
        metadata: "pt",
        reads: |_| false,
        config,
        files: |_| Vec::new(),
        open: |checkpoint| Ok(Box::new(checkpoint)),
    }),
    own_scheme: false,
    check: |_, _| Ok(Vec::new()),
    lattice: |scheme, spec, linear| in_blocks(scheme, linear, spec.dtype),
    tensors,
    encode: |_, _, packed, sink| encode(packed, sink),
    scratch: 0,
    fingerprint,
};

impl Reader for Checkpoint {
    fn packed(&self, _: &Linear) -> Result<Option<PackedLinear>> {
        Ok(None)
    }

    fn lattice(&self, _: &Linear) -> Result<Option<Lattice>> {
        Ok(None)
    }

    fn stored(&self, name: &str) -> Result<&[u8]> {
        Ok(self.raw(name)?.bytes)
    }
}

fn tensors(_: &ModelSpec, linear: &Linear, Lattice { dtype, .. }: Lattice) -> Vec<Stored> {
    vec![Stored::new(linear.weight(), dtype.safetensors_name(), dtype.size(), vec![linear.d_out, linear.d_in])]
}

/// The values, rounded once to the scales' type, a few rows at a time.
fn encode(packed: &PackedLinear, sink: &mut Sink<'_>) -> Result<()> {
    const VALUES: usize = 1 << 22; // 16 MiB of f32
    let rows = (VALUES / packed.d_in.max(1)).max(1);
    let mut bytes = Vec::new();
    for start in (0..packed.d_out).step_by(rows) {
        let values = packed.dequantize_rows(start..(start + rows).min(packed.d_out));
        bytes.resize(values.len() * packed.lattice.dtype.size(), 0);
        packed.lattice.dtype.encode(&values, &mut bytes);
        sink(0, &bytes)?;
    }
    Ok(())
}

fn config(config: &mut Map<String, Value>, spec: &ModelSpec, _: Scheme) {
    config.shift_remove("quantization_config");
    let torch = match spec.dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::Bf16 => "bfloat16",
    };
    // `transformers` renamed the key and reads both.
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(key.into(), torch.into());
    if config.contains_key("torch_dtype") {
        config.insert("torch_dtype".into(), torch.into());
    }
}

fn fingerprint(packed: &PackedLinear) -> Result<Digest> {
    let mut hasher = Sha256::new();
    hasher.update(packed.lattice.dtype.safetensors_name());
    encode(packed, &mut |_, bytes| {
        hasher.update(bytes);
        Ok(())
    })?;
    Ok(hasher.finalize().into())
}

/// The fingerprint of a matrix that is stored as plain floats.
pub(super) fn stored_fingerprint(reader: &dyn Reader, linear: &Linear) -> Result<Digest> {
    let tensor = reader.linear(linear)?;
    if tensor.shape != [linear.d_out, linear.d_in] {
        return Err(Error::internal(linear.weight(), format!("has shape {:?}", tensor.shape)));
    }
    let mut hasher = Sha256::new();
    hasher.update(tensor.dtype.safetensors_name());
    hasher.update(&tensor.data);
    Ok(hasher.finalize().into())
}
