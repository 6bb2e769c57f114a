//! Random matrices of every lattice, shape and width come back as they were: from memory, and from files of every format. A case that fails
//! names its seed.

mod common;

use aespa_gpu::export::{self, Container, FORMATS, Format, Writer};
use aespa_gpu::model::{Checkpoint, Linear};
use aespa_gpu::quant::{BITS, Lattice, Offset, Offsets, PackedLinear, Scheme, Steps};
use aespa_gpu::tensor::{Dtype, Tensor};
use aespa_gpu::{Kind, Result};
use common::random_packed::{Parts, below, of};
use common::tiny_model::TinyLlama;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// Any lattice, and a width that its groups divide.
fn lattice(rng: &mut ChaCha8Rng) -> (Lattice, usize) {
    let bits = 1 + below(rng, 8) as u32;
    let max_code = (1 << bits) - 1;
    let offset = match below(rng, 4) {
        0 => Offset::Centre,
        1 => Offset::Signed,
        2 => Offset::Zero { lowest: below(rng, max_code + 1) as u32 },
        _ => Offset::Minimum,
    };
    let plain = Lattice { bits, group: None, offset, dtype: of(rng, &DTYPES), steps: None };
    let group = 1 + below(rng, 40);
    match below(rng, 3) {
        0 => (plain, 1 + below(rng, 300)),
        1 => (Lattice { group: Some(group), ..plain }, group * (1 + below(rng, 9))),
        _ => {
            let columns = group * (1 + below(rng, 5));
            let steps = Some(Steps { columns, bits: 1 + below(rng, 8) as u32 });
            // Steps are small numbers of few bits, so that counts times them are exact: f32 ones need not be.
            let dtype = of(rng, &[Dtype::F16, Dtype::Bf16]);
            (Lattice { group: Some(group), dtype, steps, ..plain }, columns * (1 + below(rng, 4)))
        }
    }
}

#[test]
fn packed_matrices_are_what_they_are_made_of() {
    for seed in 0..600 {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let (lattice, d_in) = lattice(rng);
        let d_out = below(rng, 8);
        let parts = Parts::new(rng, lattice, d_out, d_in);
        let packed = parts.pack().unwrap_or_else(|e| panic!("seed {seed}: {lattice:?} [{d_out}, {d_in}]: {e}"));
        assert_eq!(packed.codes(), parts.codes, "seed {seed}");
        let values = parts.values();
        assert!(packed.dequantize().iter().map(|v| v.to_bits()).eq(values.iter().map(|v| v.to_bits())), "seed {seed}: {lattice:?}");
        let (first, end) = (below(rng, d_out + 1), d_out);
        assert_eq!(packed.dequantize_rows(first..end), values[first * d_in..end * d_in], "seed {seed}");
        let PackedLinear { words, scales, offsets, steps, .. } = packed.clone();
        let again = PackedLinear::new(lattice, d_out, d_in, words, scales, offsets, steps).unwrap();
        assert_eq!((&again, again.digest()), (&packed, packed.digest()), "seed {seed}");
        if lattice.steps.is_some() {
            for (at, [count, count_minimum]) in packed.counts().into_iter().enumerate() {
                let [step, step_minimum] = packed.steps[at / lattice.groups_per_super(d_in)];
                assert_eq!(packed.scales[at], step * count as f32, "seed {seed}");
                if let Offsets::Minima(minima) = &packed.offsets {
                    assert_eq!(minima[at], -step_minimum * count_minimum as f32, "seed {seed}");
                }
            }
        }
        if d_out > 0 {
            changes_show(rng, &parts, &packed, seed);
        }
    }
}

/// One code more or less is another matrix, and what the lattice cannot hold is refused.
fn changes_show(rng: &mut ChaCha8Rng, parts: &Parts, packed: &PackedLinear, seed: u64) {
    let (lattice, max_code) = (parts.lattice, parts.lattice.max_code());
    let at = below(rng, parts.codes.len());
    let mut other = parts.clone();
    other.codes[at] = if other.codes[at] == 0 { 1 } else { other.codes[at] - 1 };
    assert_ne!(other.pack().unwrap().digest(), packed.digest(), "seed {seed}");
    let refused = |change: &dyn Fn(&mut Parts), kind: Kind| {
        let mut bad = parts.clone();
        change(&mut bad);
        assert_eq!(bad.pack().unwrap_err().kind, kind, "seed {seed}: {lattice:?}");
    };
    if max_code < 255 {
        refused(&|p| p.codes[at] = max_code as u8 + 1, Kind::Internal);
    }
    refused(&|p| p.codes.truncate(at), Kind::Internal);
    refused(&|p| p.scales.push(1.0), Kind::Internal);
    refused(&|p| p.lattice.bits = 9, Kind::Internal);
    refused(&|p| p.lattice.group = Some(parts.d_in + 1), Kind::Internal);
    let group = below(rng, parts.scales.len());
    refused(&|p| p.scales[group] = f32::NAN, Kind::Numeric);
    if lattice.steps.is_some() && parts.scales[group] == 0.0 {
        refused(&|p| p.scales[group] = -p.scales[group], Kind::Numeric);
    }
    refused(&|p| p.scales[group] = f32::INFINITY, Kind::Numeric);
    if lattice.dtype != Dtype::F32 {
        refused(&|p| p.scales[group] = 1.0 + f32::EPSILON, Kind::Numeric);
    }
    match lattice.offset {
        Offset::Zero { lowest } => {
            let outside = if lowest > 0 { lowest - 1 } else { max_code + 1 };
            if let Ok(outside) = u8::try_from(outside) {
                refused(&|p| p.offsets = Offsets::Zeros(vec![outside; parts.scales.len()]), Kind::Internal);
            }
        }
        Offset::Minimum => refused(&|p| p.offsets = Offsets::Centre, Kind::Internal),
        _ => refused(&|p| p.offsets = Offsets::Zeros(vec![0; parts.scales.len()]), Kind::Internal),
    }
    let used = parts.d_in * lattice.bits as usize % 32;
    if used != 0 {
        let PackedLinear { mut words, scales, offsets, steps, .. } = packed.clone();
        words[packed.words_per_row() - 1] |= 1 << used;
        let e = PackedLinear::new(lattice, parts.d_out, parts.d_in, words, scales, offsets, steps).unwrap_err();
        assert_eq!(e.kind, Kind::Internal, "seed {seed}");
    }
}

/// A model of random shape: of whole groups, or awkward.
fn model(rng: &mut ChaCha8Rng, unit: Option<usize>, format: &Format) -> TinyLlama {
    let gguf = matches!(format.container, Container::Other(_));
    let (n_kv, repeats) = (1 + below(rng, 2), 1 + below(rng, 2));
    let n_head = n_kv * repeats;
    // Heads are even; their widths together are of whole groups too.
    let d_head = unit.map_or(2 * (1 + below(rng, 9)), |unit| unit / n_kv * (1 + below(rng, 2)));
    let width = |rng: &mut ChaCha8Rng| unit.map_or(3 + below(rng, 60), |unit| unit * (1 + below(rng, 2)));
    TinyLlama {
        d_model: width(rng),
        d_ff: width(rng),
        n_head,
        n_kv,
        d_head,
        n_vocab: if gguf { 256 } else { 24 + 8 * below(rng, 3) },
        n_layer: 1,
        dtype: of(rng, &DTYPES),
        tied: below(rng, 2) == 0,
        attention_bias: below(rng, 2) == 0,
        mlp_bias: below(rng, 2) == 0,
        seed: below(rng, 1000) as u64,
        tokenizer: gguf,
        ..TinyLlama::default()
    }
}

/// Writes random matrices on the lattices of a format, or says why it cannot hold them.
fn write(
    rng: &mut ChaCha8Rng,
    checkpoint: &Checkpoint,
    format: &'static Format,
    scheme: Scheme,
    out: &Path,
) -> Result<Vec<(Linear, PackedLinear)>> {
    let spec = checkpoint.spec();
    // Every file is flushed to the disk: few cases have several.
    let shard = of(rng, &[10_000, export::MAX_SHARD, export::MAX_SHARD, export::MAX_SHARD]);
    let mut writer = Writer::with_shard_size(out, false, format, checkpoint, scheme, shard)?;
    let mut put = Vec::new();
    for linear in spec.matrices() {
        let Some(lattice) = (format.lattice)(scheme, spec, linear) else { continue };
        let packed = Parts::new(rng, lattice, linear.d_out, linear.d_in).pack()?;
        writer.put_linear(spec, linear, &packed)?;
        put.push((linear.clone(), packed));
    }
    let staged = writer.complete(checkpoint)?;
    staged.verify()?;
    staged.publish(&[])?;
    Ok(put)
}

fn check(out: &Path, checkpoint: &Checkpoint, format: &Format, put: &[(Linear, PackedLinear)], what: &str) {
    let reader = export::open_packed(out).unwrap();
    for linear in checkpoint.spec().matrices() {
        let Some((_, packed)) = put.iter().find(|(l, _)| l.module == linear.module) else {
            assert_eq!(reader.packed(linear).unwrap(), None, "{what}: {}", linear.module);
            continue;
        };
        let fingerprint = (format.fingerprint)(packed).unwrap();
        assert_eq!(reader.fingerprint(linear).unwrap(), fingerprint, "{what}: {}", linear.module);
        // Floats have no codes.
        let codes = (format.name != "dense").then_some(packed);
        assert_eq!(reader.packed(linear).unwrap().as_ref(), codes, "{what}: {}", linear.module);
        let dtype = if format.name == "mlx" || format.name.starts_with("gguf") { Dtype::F32 } else { packed.lattice.dtype };
        let want = Tensor::from_f32(dtype, vec![linear.d_out, linear.d_in], &packed.dequantize()).unwrap();
        let got = reader.linear(linear).unwrap();
        assert!(got.dtype == want.dtype && got.shape == want.shape && got.data == want.data, "{what}: {}", linear.module);
    }
}

/// Every format with every width, group and symmetry, each on shapes of whole groups and on awkward ones; `gguf` has schemes of its own.
#[test]
fn every_format_reads_back_what_it_can_hold_and_refuses_the_rest() {
    let (mut held, mut refused): (BTreeMap<&str, usize>, BTreeMap<&str, usize>) = Default::default();
    for (number, format) in FORMATS.iter().enumerate() {
        let mut schemes = Vec::new();
        for bits in BITS.iter().filter(|bits| !format.own_scheme || **bits == 4) {
            for (group, symmetric) in [(-1, true), (-1, false), (32, true), (64, false), (128, false), (64, true), (32, false)] {
                if !format.own_scheme || (group == -1 && !symmetric) {
                    schemes.push(Scheme::new(*bits, group, symmetric).unwrap());
                }
            }
        }
        for (i, scheme) in schemes.into_iter().enumerate() {
            // K types have super-blocks of 256 columns.
            let units = match (format.own_scheme, i % 2) {
                (true, _) => vec![Some(256), Some(32), None],
                (false, 0) => vec![Some(scheme.group.unwrap_or(32)), None],
                (false, _) => vec![Some(scheme.group.unwrap_or(32))],
            };
            for (j, unit) in units.into_iter().enumerate() {
                let seed = (number * 1000 + i * 10 + j) as u64;
                let rng = &mut ChaCha8Rng::seed_from_u64(seed);
                let root = tempfile::tempdir().unwrap();
                let (dir, out) = (root.path().join("model"), root.path().join("out"));
                let shape = model(rng, unit, format);
                shape.write(&dir);
                let checkpoint = Checkpoint::open(&dir).unwrap().with_pre_tokenizer(Some("gpt-2".to_owned()));
                let what = format!("seed {seed}: {} {scheme:?} {shape:?}", format.name);
                match write(rng, &checkpoint, format, scheme, &out) {
                    Ok(put) => {
                        *held.entry(format.name).or_default() += put.len();
                        check(&out, &checkpoint, format, &put, &what);
                    }
                    Err(e) => {
                        assert_eq!(e.kind, Kind::Usage, "{what}: {e}");
                        *refused.entry(format.name).or_default() += 1;
                        let left: Vec<_> = fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
                        assert_eq!(left, ["model"], "{what}");
                    }
                }
            }
        }
    }
    for format in FORMATS.iter() {
        let floats = ["gguf-f16", "gguf-bf16", "gguf-f32"].contains(&format.name);
        assert_eq!(held.get(format.name).is_some_and(|n| *n > 0), !floats, "{}", format.name);
    }
    for name in ["compressed-tensors", "gptq", "gptq-v2", "awq", "mlx", "dense"] {
        assert!(refused[name] > 0, "{name} refused nothing");
    }
}

/// A matrix on another lattice than the format's is a bug that is noticed, whatever differs.
#[test]
fn matrices_on_other_lattices_are_not_written() {
    for (number, format) in FORMATS.iter().enumerate() {
        let rng = &mut ChaCha8Rng::seed_from_u64(number as u64);
        let root = tempfile::tempdir().unwrap();
        let (dir, out) = (root.path().join("model"), root.path().join("out"));
        TinyLlama { d_ff: 256, ..model(rng, Some(32), format) }.write(&dir);
        let checkpoint = Checkpoint::open(&dir).unwrap().with_pre_tokenizer(Some("gpt-2".to_owned()));
        let (scheme, spec) = (Scheme::new(4, 32, false).unwrap(), checkpoint.spec());
        let Some((linear, own)) = spec.matrices().find_map(|l| Some((l, (format.lattice)(scheme, spec, l)?))) else { continue };
        let others = [
            Lattice { bits: 9 - own.bits, ..own },
            Lattice { dtype: if own.dtype == Dtype::F16 { Dtype::Bf16 } else { Dtype::F16 }, ..own },
            Lattice { offset: if own.offset == Offset::Minimum { Offset::Signed } else { Offset::Minimum }, ..own },
            Lattice { group: Some(8), steps: own.steps.is_none().then_some(Steps { columns: 32, bits: 6 }), ..own },
        ];
        for other in others.into_iter().filter(|other| *other != own && other.divides(linear.d_in)) {
            let mut writer = Writer::create(&out, false, format, &checkpoint, scheme).unwrap();
            let packed = Parts::new(rng, other, linear.d_out, linear.d_in).pack().unwrap();
            let e = writer.put_linear(spec, linear, &packed).unwrap_err();
            assert_eq!(e.kind, Kind::Internal, "{}: {other:?}: {e}", format.name);
            drop(writer);
            assert!(fs::read_dir(root.path()).unwrap().all(|e| e.unwrap().file_name() == "model"), "{}", format.name);
        }
    }
}
