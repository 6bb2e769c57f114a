//! `gptq` and `gptq-v2`: what GPTQModel, vLLM, SGLang and `transformers` load.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `X.qweight` | I32 | [d_in · bits / 32, d_out]: a dense bit stream down every **column**, which is one output channel |
//! | `X.qzeros` | I32 | [n_group, d_out · bits / 32]: a dense bit stream along every row |
//! | `X.scales` | F16 | [n_group, d_out] |
//! | `X.g_idx` | I32 | [d_in]: the group of each input column |
//!
//! The first version stores zero points less one, and every reader adds one again; it cannot hold z = 0, which would borrow from the
//! neighbouring field, so codes are solved with zero points from 1. `gptq-v2` stores them as they are. Symmetric is z = 2^(bits − 1), stored
//! all the same. Columns stay in their order: the groups of `--act-order` are static.

use super::packed::{Codec, Decoded, PackedFolder, Schemes, damaged, to_floats, to_words};
use super::plan::Stored;
use super::words::{transposed, words_of_rows};
use super::{Container, Folder, Format, Sink, check_divisible};
use crate::model::{Checkpoint, Linear, ModelSpec};
use crate::quant::bits::{unpack_row, words_per_row};
use crate::quant::{Lattice, Offset, Offsets, PackedLinear, Scheme};
use crate::tensor::Dtype;
use crate::{Error, Result};
use serde_json::{Map, Value, json};

pub const V1: Format = Format {
    name: "gptq",
    about: "GPTQ checkpoints, first version, for vLLM, SGLang, GPTQModel and transformers",
    container: Container::Safetensors(Folder {
        metadata: "pt",
        reads: |config| is_gptq(config) && matches!(version(config), None | Some("gptq")),
        config: |config, _, scheme| write(config, scheme, "gptq"),
        files: |scheme| vec![("quantize_config.json", quantize_config(scheme, "gptq"))],
        open: |checkpoint| open(checkpoint, CODEC_V1),
    }),
    check: |scheme, spec| {
        let mut warnings = check(scheme, spec)?;
        if !scheme.symmetric {
            warnings.push("GPTQModel reads asymmetric checkpoints of this version only if it wrote them itself: give it gptq-v2".into());
        }
        Ok(warnings)
    },
    lattice: |scheme, _, linear| (!linear.is_outer()).then(|| lattice(scheme, Dtype::F16, 1)),
    encode: |_, _, packed, sink| encode(packed, sink, 1),
    ..V2
};

pub const V2: Format = Format {
    name: "gptq-v2",
    about: "GPTQ checkpoints whose zero points are stored as they are, for newer readers",
    container: Container::Safetensors(Folder {
        metadata: "pt",
        reads: |config| is_gptq(config) && version(config) == Some("gptq_v2"),
        config: |config, _, scheme| write(config, scheme, "gptq_v2"),
        files: |scheme| vec![("quantize_config.json", quantize_config(scheme, "gptq_v2"))],
        open: |checkpoint| open(checkpoint, CODEC_V2),
    }),
    own_scheme: false,
    check,
    lattice: |scheme, _, linear| (!linear.is_outer()).then(|| lattice(scheme, Dtype::F16, 0)),
    tensors,
    encode: |_, _, packed, sink| encode(packed, sink, 0),
    scratch: 2,
    fingerprint: |packed| Ok(packed.digest()),
};

const CODEC_V1: Codec = Codec {
    lattice: |scheme, dtype| lattice(scheme, dtype, 1),
    decode: |linear, lattice, parts| decode(linear, lattice, parts, 1),
    ..CODEC_V2
};

const CODEC_V2: Codec = Codec {
    scale: "scales",
    marker: "qweight",
    scale_dtypes: &[Dtype::F16, Dtype::Bf16, Dtype::F32],
    lattice: |scheme, dtype| lattice(scheme, dtype, 0),
    tensors,
    decode: |linear, lattice, parts| decode(linear, lattice, parts, 0),
    values: |lattice| lattice.dtype,
};

const BITS: &[u32] = &[2, 3, 4, 8];

fn check(scheme: Scheme, spec: &ModelSpec) -> Result<Vec<String>> {
    if !BITS.contains(&scheme.bits) {
        let message = format!("{} cannot be stored in GPTQ checkpoints (2, 3, 4 and 8 can); compressed-tensors takes it", scheme.bits);
        return Err(Error::usage("--bits", message));
    }
    check_divisible(spec, "gptq", [32, 32])?;
    let fastest = scheme.symmetric && scheme.bits >= 4;
    Ok(if fastest { Vec::new() } else { vec!["vLLM reads GPTQ checkpoints fastest with 4 or 8 bits and --symmetric".into()] })
}

/// Zero points are from `lowest` where they are free.
fn lattice(scheme: Scheme, dtype: Dtype, lowest: u32) -> Lattice {
    let lattice = scheme.lattice(dtype);
    if lattice.is_centred() { lattice } else { Lattice { offset: Offset::Zero { lowest }, ..lattice } }
}

fn tensors(_: &ModelSpec, linear: &Linear, lattice: Lattice) -> Vec<Stored> {
    let (bits, n_group, dtype) = (lattice.bits as usize, lattice.n_group(linear.d_in), lattice.dtype);
    let name = |suffix: &str| format!("{}.{suffix}", linear.module);
    vec![
        Stored::new(name("qweight"), "I32", 4, vec![words_per_row(linear.d_in, bits), linear.d_out]),
        Stored::new(name("qzeros"), "I32", 4, vec![n_group, words_per_row(linear.d_out, bits)]),
        Stored::new(name("scales"), dtype.safetensors_name(), dtype.size(), vec![n_group, linear.d_out]),
        Stored::new(name("g_idx"), "I32", 4, vec![linear.d_in]),
    ]
}

/// `less` is subtracted from zero points.
fn encode(packed: &PackedLinear, sink: &mut Sink<'_>, less: u8) -> Result<()> {
    let (d_out, lattice) = (packed.d_out, packed.lattice);
    let n_group = lattice.n_group(packed.d_in);
    sink(0, &words_of_rows(&transposed(&packed.words, packed.words_per_row())))?;
    let zeros: Vec<u8> = match &packed.offsets {
        Offsets::Zeros(zeros) => transposed(zeros, n_group).into_iter().map(|z| z - less).collect(),
        _ => vec![lattice.centre() as u8 - less; n_group * d_out],
    };
    sink(1, &super::words::pack_rows(&zeros, d_out, lattice.bits))?;
    sink(2, &lattice.dtype.to_bytes(&transposed(&packed.scales, n_group)))?;
    let width = lattice.group_width(packed.d_in);
    let groups: Vec<u32> = (0..packed.d_in).map(|column| (column / width) as u32).collect();
    sink(3, &words_of_rows(&groups))
}

fn decode(linear: &Linear, lattice: Lattice, parts: &[&[u8]], less: u32) -> Decoded {
    let (d_out, d_in, n_group) = (linear.d_out, linear.d_in, lattice.n_group(linear.d_in));
    let width = lattice.group_width(d_in);
    if to_words(parts[3]).iter().enumerate().any(|(column, group)| *group as usize != column / width) {
        return Err((3, "has columns out of order, which cannot be read".to_owned()));
    }
    let words = transposed(&to_words(parts[0]), d_out);
    let scales = transposed(&to_floats(parts[2], lattice.dtype), d_out);
    let mut zeros = vec![0; n_group * d_out];
    let stream = to_words(parts[1]);
    let per_row = words_per_row(d_out, lattice.bits as usize).max(1);
    stream.chunks(per_row).zip(zeros.chunks_mut(d_out.max(1))).for_each(|(words, zeros)| unpack_row(words, lattice.bits, zeros));
    let zeros: Vec<u32> = transposed(&zeros, d_out).into_iter().map(|z| u32::from(z) + less).collect();
    let offsets = match zeros.iter().find(|z| !lattice.zeros().contains(z)) {
        Some(zero) => return Err((1, format!("holds the zero point {zero}, where {:?} is possible", lattice.zeros()))),
        None if lattice.is_centred() => Offsets::Centre,
        None => Offsets::Zeros(zeros.into_iter().map(|z| z as u8).collect()),
    };
    PackedLinear::new(lattice, d_out, d_in, words, scales, offsets, Vec::new()).map_err(damaged([0, 2]))
}

fn quantize_config(scheme: Scheme, checkpoint_format: &str) -> Value {
    json!({
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size(),
        "desc_act": false,
        "sym": scheme.symmetric,
        "lm_head": false,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "meta": { "quantizer": [concat!(env!("CARGO_PKG_NAME"), ":", env!("CARGO_PKG_VERSION"))] },
    })
}

fn write(config: &mut Map<String, Value>, scheme: Scheme, checkpoint_format: &str) {
    config.insert("quantization_config".into(), quantize_config(scheme, checkpoint_format));
}

fn is_gptq(config: &Value) -> bool {
    config.get("quant_method").and_then(Value::as_str) == Some("gptq")
}

fn version(config: &Value) -> Option<&str> {
    config.get("checkpoint_format").and_then(Value::as_str)
}

fn open(checkpoint: Checkpoint, codec: Codec) -> Result<Box<dyn super::Reader>> {
    let root = checkpoint.config().root();
    let section = root.section("quantization_config")?.ok_or_else(|| root.error("quantization_config", "is missing"))?;
    let (bits, symmetric) = (section.required_size("bits", 32)?, section.flag("sym")?.unwrap_or(true));
    let group_size = section.get("group_size").and_then(Value::as_i64).unwrap_or(-1);
    let scheme = Scheme::new(bits as u32, group_size, symmetric).map_err(|e| {
        let key = if e.subject == "--bits" { "bits" } else { "group_size" };
        section.error(key, e.message)
    })?;
    if section.get("dynamic").and_then(Value::as_object).is_some_and(|rules| !rules.is_empty()) {
        return Err(section.error("dynamic", "rules for single modules cannot be read"));
    }
    let schemes: Schemes = Box::new(move |_| Some(scheme));
    Ok(Box::new(PackedFolder::open(checkpoint, codec, schemes)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::golden;

    #[test]
    fn what_gptqmodel_packed() {
        let file = include_bytes!("../../tests/golden/packed-gptq.safetensors");
        for bits in BITS {
            let scheme = Scheme::new(*bits, 64, false).unwrap();
            golden::check(&V1, &CODEC_V1, scheme, file, &format!("gptq-{bits}"));
            golden::check(&V2, &CODEC_V2, scheme, file, &format!("gptq-v2-{bits}"));
        }
    }
}
