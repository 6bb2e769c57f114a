//! `compressed-tensors`, format `pack-quantized`: what vLLM, SGLang and `transformers` load.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `X.weight_packed` | I32 | [d_out, ceil(d_in · bits / 32)]: a dense bit stream per row |
//! | `X.weight_scale` | the model's | [d_out, n_group] |
//! | `X.weight_zero_point` | I32 | [ceil(d_out · bits / 32), n_group]: a dense bit stream per **column**; asymmetric only |
//! | `X.weight_shape` | I64 | [2], d_out and d_in |
//!
//! The library's codes and zero points are signed, and its packer adds 2^(bits − 1) to both: the stored bits are our unsigned ones.
//! Dense packing came with its version 0.17; older ones left bits of a word unused where `bits` does not divide 32.

mod config;
mod integer;
mod targets;

pub use integer::FORMAT as W8A8;

use super::packed::{Codec, Decoded, PackedFolder, damaged, to_floats, to_words};
use super::plan::Stored;
use super::{Container, Folder, Format, Sink, in_blocks};
use crate::Result;
use crate::model::{Linear, ModelSpec};
use crate::quant::bits::{pack_row, unpack_row, words_per_row};
use crate::quant::{Lattice, Offsets, PackedLinear, Scheme};
use crate::tensor::Dtype;

pub const FORMAT: Format = Format {
    name: "compressed-tensors",
    about: "pack-quantized safetensors for vLLM, SGLang and transformers",
    container: Container::Safetensors(Folder {
        metadata: "pt",
        reads: |config| config::PACKED.reads(config),
        config: |config, spec, scheme| config::write(config, spec, scheme, config::PACKED),
        files: |_| Vec::new(),
        open: |checkpoint| {
            let schemes = config::read(checkpoint.config(), config::PACKED)?;
            Ok(Box::new(PackedFolder::open(checkpoint, CODEC, Box::new(move |module| schemes.scheme(module)))?))
        },
    }),
    own_scheme: false,
    check,
    lattice: |scheme, spec, linear| in_blocks(scheme, linear, spec.dtype),
    tensors,
    encode,
    scratch: 0,
    fingerprint: |packed| Ok(packed.digest()),
};

const CODEC: Codec = Codec {
    scale: SCALE,
    marker: PACKED,
    scale_dtypes: &[Dtype::F32, Dtype::F16, Dtype::Bf16],
    lattice: |scheme, dtype| scheme.lattice(dtype),
    tensors,
    decode,
    // As the library's own decompression does.
    values: |lattice| lattice.dtype,
};

/// The four tensors' names after the module's, in the order in which they are stored.
const PACKED: &str = "weight_packed";
const SCALE: &str = "weight_scale";
const SHAPE: &str = "weight_shape";
const ZERO_POINT: &str = "weight_zero_point";

fn check(scheme: Scheme, _: &ModelSpec) -> Result<Vec<String>> {
    if config::same_in_old_versions(scheme) {
        return Ok(Vec::new());
    }
    let (version, bits) = (config::VERSION, scheme.bits);
    Ok(vec![format!("compressed-tensors before version {version} cannot read {bits} bits: it packed them differently")])
}

fn tensors(_: &ModelSpec, linear: &Linear, lattice: Lattice) -> Vec<Stored> {
    let (bits, n_group, dtype) = (lattice.bits as usize, lattice.n_group(linear.d_in), lattice.dtype);
    let name = |suffix: &str| format!("{}.{suffix}", linear.module);
    let mut tensors = vec![
        Stored::new(name(PACKED), "I32", 4, vec![linear.d_out, words_per_row(linear.d_in, bits)]),
        Stored::new(name(SCALE), dtype.safetensors_name(), dtype.size(), vec![linear.d_out, n_group]),
        Stored::new(name(SHAPE), "I64", 8, vec![2]),
    ];
    if !lattice.is_centred() {
        tensors.push(Stored::new(name(ZERO_POINT), "I32", 4, vec![words_per_row(linear.d_out, bits), n_group]));
    }
    tensors
}

fn encode(_: &ModelSpec, _: &Linear, packed: &PackedLinear, sink: &mut Sink<'_>) -> Result<()> {
    sink(0, &packed.word_bytes())?;
    sink(1, &packed.scale_bytes())?;
    let shape = [packed.d_out, packed.d_in].map(|d| (d as i64).to_le_bytes());
    sink(2, shape.as_flattened())?;
    if let Offsets::Zeros(zeros) = &packed.offsets {
        let words = pack_zeros(zeros, packed.d_out, packed.lattice.n_group(packed.d_in), packed.lattice.bits);
        sink(3, &words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>())?;
    }
    Ok(())
}

fn decode(linear: &Linear, lattice: Lattice, parts: &[&[u8]]) -> Decoded {
    let (d_out, d_in) = (linear.d_out, linear.d_in);
    let shape: Vec<i64> = parts[2].as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
    if shape != [d_out as i64, d_in as i64] {
        return Err((2, format!("says {shape:?} where config.json makes it [{d_out}, {d_in}]")));
    }
    let offsets = match parts.get(3) {
        Some(bytes) => Offsets::Zeros(unpack_zeros(&to_words(bytes), d_out, lattice.n_group(d_in), lattice.bits)),
        None => Offsets::Centre,
    };
    PackedLinear::new(lattice, d_out, d_in, to_words(parts[0]), to_floats(parts[1], lattice.dtype), offsets, Vec::new())
        .map_err(damaged([0, 1]))
}

/// Zero points [d_out, n_group] to words [words_per_row(d_out), n_group]: each column is a bit stream.
fn pack_zeros(zeros: &[u8], d_out: usize, n_group: usize, bits: u32) -> Vec<u32> {
    let height = words_per_row(d_out, bits as usize);
    let mut words = vec![0; height * n_group];
    let mut stream = vec![0; height];
    for group in 0..n_group {
        let column: Vec<u8> = zeros.iter().skip(group).step_by(n_group).copied().collect();
        pack_row(&column, bits, &mut stream);
        words.iter_mut().skip(group).step_by(n_group).zip(&stream).for_each(|(to, from)| *to = *from);
    }
    words
}

/// The reverse of [`pack_zeros`].
fn unpack_zeros(words: &[u32], d_out: usize, n_group: usize, bits: u32) -> Vec<u8> {
    let mut zeros = vec![0; d_out * n_group];
    let mut column = vec![0; d_out];
    for group in 0..n_group {
        let stream: Vec<u32> = words.iter().skip(group).step_by(n_group).copied().collect();
        unpack_row(&stream, bits, &mut column);
        zeros.iter_mut().skip(group).step_by(n_group).zip(&column).for_each(|(to, from)| *to = *from);
    }
    zeros
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::golden;
    use crate::quant::BITS;

    #[test]
    fn what_the_library_packed() {
        let file = include_bytes!("../../../tests/golden/packed-compressed-tensors.safetensors");
        for bits in BITS {
            golden::check(&FORMAT, &CODEC, Scheme::new(*bits, 64, false).unwrap(), file, &bits.to_string());
        }
    }

    #[test]
    fn zero_points_are_packed_down_the_columns() {
        // Nine rows of two groups: the ninth nibble opens the second word of each column.
        let zeros: Vec<u8> = (1..=9).flat_map(|row| [row, 15 - row]).collect();
        let words = pack_zeros(&zeros, 9, 2, 4);
        assert_eq!(words, [0x8765_4321, 0x789a_bcde, 0x9, 0x6]);
        for bits in [2, 3, 5, 7, 8] {
            let zeros: Vec<u8> = (0..35 * 3).map(|i| (i * 7 % (1 << bits)) as u8).collect();
            assert_eq!(unpack_zeros(&pack_zeros(&zeros, 35, 3, bits), 35, 3, bits), zeros);
        }
    }
}
