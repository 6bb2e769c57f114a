//! `awq`: AutoAWQ's GEMM layout, what vLLM, SGLang, TGI and `transformers` load as AWQ. The name is that of a layout: the codes are whatever
//! the chosen method finds.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `X.qweight` | I32 | [d_in, d_out / 8] |
//! | `X.qzeros` | I32 | [n_group, d_out / 8] |
//! | `X.scales` | F16 | [n_group, d_out] |
//!
//! 4 bits only. Eight neighbouring output channels share a word: the nibble at bit 4 i is channel `ORDER[i]` of the eight. Zero points are
//! stored as they are, in the same order.

use super::packed::{Codec, Decoded, PackedFolder, Schemes, damaged, to_floats, to_words};
use super::plan::Stored;
use super::words::{transposed, words_of_rows};
use super::{Container, Folder, Format, Reader, Sink, check_divisible, in_blocks};
use crate::model::{Checkpoint, Linear, ModelSpec};
use crate::quant::{Lattice, Offsets, PackedLinear, Scheme};
use crate::tensor::Dtype;
use crate::{Error, Result};
use serde_json::{Map, Value, json};

pub const FORMAT: Format = Format {
    name: "awq",
    about: "AutoAWQ's GEMM layout (4 bits), for vLLM, SGLang, TGI and transformers",
    container: Container::Safetensors(Folder {
        metadata: "pt",
        reads: |config| config.get("quant_method").and_then(Value::as_str) == Some("awq"),
        config,
        files: |_| Vec::new(),
        open,
    }),
    own_scheme: false,
    check,
    lattice: |scheme, _, linear| in_blocks(scheme, linear, Dtype::F16),
    tensors,
    encode,
    scratch: 3,
    fingerprint: |packed| Ok(packed.digest()),
};

const CODEC: Codec = Codec {
    scale: "scales",
    marker: "qweight",
    scale_dtypes: &[Dtype::F16, Dtype::Bf16],
    lattice: |scheme, dtype| scheme.lattice(dtype),
    tensors,
    decode,
    values: |lattice| lattice.dtype,
};

const BITS: u32 = 4;
/// Which channel of eight each nibble of a word holds.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

fn check(scheme: Scheme, spec: &ModelSpec) -> Result<Vec<String>> {
    if scheme.bits != BITS {
        let message = format!("{} cannot be stored as awq, which has 4 bits; gptq, mlx and compressed-tensors take others", scheme.bits);
        return Err(Error::usage("--bits", message));
    }
    check_divisible(spec, "awq", [8, 1])?;
    Ok(Vec::new())
}

fn tensors(_: &ModelSpec, linear: &Linear, lattice: Lattice) -> Vec<Stored> {
    let (n_group, dtype) = (lattice.n_group(linear.d_in), lattice.dtype);
    let name = |suffix: &str| format!("{}.{suffix}", linear.module);
    vec![
        Stored::new(name("qweight"), "I32", 4, vec![linear.d_in, linear.d_out / 8]),
        Stored::new(name("qzeros"), "I32", 4, vec![n_group, linear.d_out / 8]),
        Stored::new(name("scales"), dtype.safetensors_name(), dtype.size(), vec![n_group, linear.d_out]),
    ]
}

/// Codes of output channels, eight to a word.
fn interleave(codes: &[u8]) -> Vec<u8> {
    let word = |eight: &[u8; 8]| ORDER.iter().enumerate().fold(0u32, |word, (i, channel)| word | u32::from(eight[*channel]) << (4 * i));
    words_of_rows(&codes.as_chunks::<8>().0.iter().map(word).collect::<Vec<_>>())
}

fn separate(words: &[u32]) -> Vec<u8> {
    let mut codes = vec![0; 8 * words.len()];
    for (eight, word) in codes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        ORDER.iter().enumerate().for_each(|(i, channel)| eight[*channel] = (word >> (4 * i) & 15) as u8);
    }
    codes
}

fn encode(_: &ModelSpec, _: &Linear, packed: &PackedLinear, sink: &mut Sink<'_>) -> Result<()> {
    let lattice = packed.lattice;
    let n_group = lattice.n_group(packed.d_in);
    sink(0, &interleave(&transposed(&packed.codes(), packed.d_in)))?;
    let zeros = match &packed.offsets {
        Offsets::Zeros(zeros) => transposed(zeros, n_group),
        _ => vec![lattice.centre() as u8; n_group * packed.d_out],
    };
    sink(1, &interleave(&zeros))?;
    sink(2, &lattice.dtype.to_bytes(&transposed(&packed.scales, n_group)))
}

fn decode(linear: &Linear, lattice: Lattice, parts: &[&[u8]]) -> Decoded {
    let (d_out, d_in) = (linear.d_out, linear.d_in);
    let codes = transposed(&separate(&to_words(parts[0])), d_out);
    let zeros = transposed(&separate(&to_words(parts[1])), d_out);
    let offsets = match zeros.iter().all(|z| u32::from(*z) == lattice.centre()) {
        _ if !lattice.is_centred() => Offsets::Zeros(zeros),
        true => Offsets::Centre,
        false => return Err((1, "holds zero points that are not in the middle, but config.json has no `zero_point`".to_owned())),
    };
    let scales = transposed(&to_floats(parts[2], lattice.dtype), d_out);
    PackedLinear::from_codes(lattice, d_out, d_in, &codes, scales, offsets, Vec::new()).map_err(damaged([0, 2]))
}

fn config(config: &mut Map<String, Value>, spec: &ModelSpec, scheme: Scheme) {
    let head = if spec.tied_head { "lm_head" } else { &spec.head.module };
    let value = json!({
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.group_size(),
        "zero_point": !scheme.symmetric,
        "version": "gemm",
        "modules_to_not_convert": [head],
    });
    config.insert("quantization_config".into(), value);
}

fn open(checkpoint: Checkpoint) -> Result<Box<dyn Reader>> {
    let root = checkpoint.config().root();
    let section = root.section("quantization_config")?.ok_or_else(|| root.error("quantization_config", "is missing"))?;
    if section.required_size("bits", 32)? != BITS as usize {
        return Err(section.error("bits", "must be 4"));
    }
    if section.text("version")?.is_some_and(|version| !version.eq_ignore_ascii_case("gemm")) {
        return Err(section.error("version", "must be gemm; other layouts cannot be read"));
    }
    let group_size = section.get("group_size").and_then(Value::as_i64).unwrap_or(128);
    let symmetric = !section.flag("zero_point")?.unwrap_or(true);
    let scheme = Scheme::new(BITS, group_size, symmetric).map_err(|e| section.error("group_size", e.message))?;
    let schemes: Schemes = Box::new(move |_| Some(scheme));
    Ok(Box::new(PackedFolder::open(checkpoint, CODEC, schemes)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::golden;

    #[test]
    fn what_gptqmodel_packed() {
        let file = include_bytes!("../../tests/golden/packed-gptq.safetensors");
        golden::check(&FORMAT, &CODEC, Scheme::new(4, 64, false).unwrap(), file, "awq-4");
    }

    #[test]
    fn channels_lie_in_autoawqs_order() {
        // From the lowest nibble up: channels 0, 2, 4, 6, 1, 3, 5, 7.
        let codes: Vec<u8> = (0..8).chain([15, 0, 0, 0, 0, 0, 0, 1]).collect();
        let bytes = interleave(&codes);
        assert_eq!(to_words(&bytes), [0x7531_6420, 0x1000_000f]);
        assert_eq!(separate(&to_words(&bytes)), codes);
    }
}
