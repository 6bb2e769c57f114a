//! `mlx`: affine quantization as `mlx` and `mlx-lm` load it.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `X.weight` | U32 | [d_out, d_in · bits / 32]: a dense bit stream per row |
//! | `X.scales`, `X.biases` | the model's | [d_out, n_group] |
//!
//! w = s q + β: β is a float, so that the lattice has minima and no zero points. Groups of 32, 64 or 128. The same object stands in config.json
//! as `quantization`, which `mlx-lm` reads, and as `quantization_config`, by which the Hub knows. Modules without `X.scales` are not quantized;
//! embedding and head are, unless they are to be kept.

use super::packed::{Codec, Decoded, PackedFolder, Schemes, damaged, to_floats, to_words};
use super::plan::Stored;
use super::{Container, Folder, Format, Reader, Sink, check_divisible};
use crate::model::{Checkpoint, Linear, ModelSpec, Section};
use crate::quant::bits::words_per_row;
use crate::quant::{Lattice, Offset, Offsets, PackedLinear, Scheme};
use crate::tensor::Dtype;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

pub const FORMAT: Format = Format {
    name: "mlx",
    about: "affine quantization for mlx and mlx-lm (Apple silicon)",
    container: Container::Safetensors(Folder {
        metadata: "mlx",
        reads: |config| config.get("quant_method").is_none() && config.get("bits").is_some() && config.get("group_size").is_some(),
        config,
        files: |_| Vec::new(),
        open,
    }),
    own_scheme: false,
    check,
    lattice: |scheme, spec, linear| (!linear.is_outer() || !scheme.keep_embeddings).then(|| lattice(scheme, spec.dtype)),
    tensors,
    encode,
    scratch: 0,
    fingerprint: |packed| Ok(packed.digest()),
};

const CODEC: Codec = Codec {
    scale: "scales",
    marker: "scales",
    scale_dtypes: &[Dtype::F32, Dtype::F16, Dtype::Bf16],
    lattice,
    tensors,
    decode,
    // Its matrix products take s q + β as it is.
    values: |_| Dtype::F32,
};

const BITS: &[u32] = &[2, 3, 4, 5, 6, 8];

fn check(scheme: Scheme, spec: &ModelSpec) -> Result<Vec<String>> {
    if !BITS.contains(&scheme.bits) {
        return Err(Error::usage("--bits", format!("{} cannot be stored for mlx; compressed-tensors takes it", scheme.bits)));
    }
    if scheme.group.is_none() {
        return Err(Error::usage(
            "--group-size",
            "-1 cannot be stored for mlx, which has groups of 32, 64 and 128; gptq and compressed-tensors take it",
        ));
    }
    if scheme.symmetric {
        return Err(Error::usage("--symmetric", "makes no sense for mlx, which stores a minimum for every group anyway; leave it out"));
    }
    check_divisible(spec, "mlx", [1, 32])?;
    Ok(Vec::new())
}

fn lattice(scheme: Scheme, dtype: Dtype) -> Lattice {
    Lattice { offset: Offset::Minimum, ..scheme.lattice(dtype) }
}

fn tensors(_: &ModelSpec, linear: &Linear, lattice: Lattice) -> Vec<Stored> {
    let (n_group, dtype) = (lattice.n_group(linear.d_in), lattice.dtype);
    let name = |suffix: &str| format!("{}.{suffix}", linear.module);
    let floats = |suffix: &str| Stored::new(name(suffix), dtype.safetensors_name(), dtype.size(), vec![linear.d_out, n_group]);
    let codes = Stored::new(name("weight"), "U32", 4, vec![linear.d_out, words_per_row(linear.d_in, lattice.bits as usize)]);
    vec![codes, floats("scales"), floats("biases")]
}

fn encode(_: &ModelSpec, _: &Linear, packed: &PackedLinear, sink: &mut Sink<'_>) -> Result<()> {
    let Offsets::Minima(minima) = &packed.offsets else {
        return Err(Error::internal("mlx", "has no minima to store"));
    };
    sink(0, &packed.word_bytes())?;
    sink(1, &packed.scale_bytes())?;
    sink(2, &packed.lattice.dtype.to_bytes(minima))
}

fn decode(linear: &Linear, lattice: Lattice, parts: &[&[u8]]) -> Decoded {
    let offsets = Offsets::Minima(to_floats(parts[2], lattice.dtype));
    let scales = to_floats(parts[1], lattice.dtype);
    PackedLinear::new(lattice, linear.d_out, linear.d_in, to_words(parts[0]), scales, offsets, Vec::new()).map_err(damaged([0, 1]))
}

fn config(config: &mut Map<String, Value>, spec: &ModelSpec, scheme: Scheme) {
    // Where it is missing, mlx-lm ties the head.
    config.insert("tie_word_embeddings".into(), spec.tied_head.into());
    // It does not know what `transformers` 5 writes instead of these two.
    if let Some(Value::Object(rope)) = config.get("rope_parameters").cloned() {
        let scaled = rope.get("rope_type").is_some_and(|kind| kind != "default");
        if let Some(theta) = rope.get("rope_theta") {
            config.entry("rope_theta").or_insert(theta.clone());
        }
        if scaled && config.get("rope_scaling").is_none_or(Value::is_null) {
            config.insert("rope_scaling".into(), Value::Object(rope));
        }
    }
    let value = json!({ "group_size": scheme.group, "bits": scheme.bits, "mode": "affine" });
    config.insert("quantization".into(), value.clone());
    config.insert("quantization_config".into(), value);
}

fn open(checkpoint: Checkpoint) -> Result<Box<dyn Reader>> {
    let root = checkpoint.config().root();
    let section = root.section("quantization_config")?.ok_or_else(|| root.error("quantization_config", "is missing"))?;
    let all = scheme(&section)?;
    let mut own = BTreeMap::new();
    for key in section.keys() {
        if let Some(module) = section.get(key).filter(|v| v.is_object()).map(|_| section.section(key)).transpose()?.flatten() {
            own.insert(key.to_owned(), scheme(&module)?);
        }
    }
    let schemes: Schemes = Box::new(move |module| Some(own.get(module).copied().unwrap_or(all)));
    Ok(Box::new(PackedFolder::open(checkpoint, CODEC, schemes)?))
}

fn scheme(section: &Section<'_>) -> Result<Scheme> {
    if section.text("mode")?.is_some_and(|mode| mode != "affine") {
        return Err(section.error("mode", "must be affine; other modes cannot be read"));
    }
    let (bits, group) = (section.required_size("bits", 32)?, section.required_size("group_size", 1 << 20)?);
    Scheme::new(bits as u32, group as i64, false).map_err(|e| {
        let key = if e.subject == "--bits" { "bits" } else { "group_size" };
        section.error(key, e.message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::golden;

    #[test]
    fn the_config_has_the_keys_that_mlx_lm_knows() {
        let with = |text: &str, tied: bool| {
            let Value::Object(mut map) = serde_json::from_str(text).unwrap() else { panic!("{text}") };
            let mut spec = golden::any_model();
            spec.tied_head = tied;
            config(&mut map, &spec, Scheme::new(4, 64, false).unwrap());
            [map["tie_word_embeddings"].clone(), map["rope_theta"].clone(), map.get("rope_scaling").cloned().unwrap_or_default()]
        };
        let scaled = json!({"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0});
        let new = json!({ "rope_parameters": scaled }).to_string();
        assert_eq!(with(&new, false), [false.into(), 500000.0.into(), scaled]);
        let default = r#"{"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "rope_scaling": null}"#;
        assert_eq!(with(default, true), [true.into(), 1e5.into(), Value::Null]);
        let old = r#"{"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}"#;
        assert_eq!(with(old, true), [true.into(), 1e4.into(), json!({"type": "linear", "factor": 2.0})]);
    }

    #[test]
    fn what_mlx_packed() {
        let file = include_bytes!("../../tests/golden/packed-mlx.safetensors");
        for bits in BITS {
            golden::check(&FORMAT, &CODEC, Scheme::new(*bits, 64, false).unwrap(), file, &bits.to_string());
        }
    }
}
