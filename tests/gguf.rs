//! GGUF files read back as what was decided, whatever their type; floats and biases in the order of rows that llama.cpp wants; damage is an
//! error. What llama.cpp itself makes of them is told by `tests/conformance`.

mod common;

use aespa_gpu::engine::DeviceChoice;
use aespa_gpu::export::{self, FORMATS, Format, Writer};
use aespa_gpu::method;
use aespa_gpu::model::{Checkpoint, DEMO_FILES, Linear, Role, Weights};
use aespa_gpu::pipeline::{self, Quiet};
use aespa_gpu::plan::{Plan, Request};
use aespa_gpu::quant::{PackedLinear, Scheme};
use aespa_gpu::tensor::Dtype;
use aespa_gpu::{Kind, Result};
use common::rtn;
use common::tiny_model::TinyLlama;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn formats() -> impl Iterator<Item = &'static Format> {
    FORMATS.iter().copied().filter(|f| f.name.starts_with("gguf"))
}

/// A model whose tokenizer is the demo's.
fn model(model: &TinyLlama) -> (TempDir, Checkpoint) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    model.write(&dir);
    let tokenizer = DEMO_FILES.iter().find(|(name, _)| *name == "tokenizer.json").unwrap().1;
    fs::write(dir.join("tokenizer.json"), tokenizer).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    (root, checkpoint)
}

/// Writes `checkpoint` rounded to nearest; the decided matrices.
fn write(checkpoint: &Checkpoint, format: &'static Format, out: &Path) -> Result<Vec<(Linear, PackedLinear)>> {
    let scheme = Scheme::new(4, -1, false)?;
    let mut writer = Writer::create(out, false, format, checkpoint, scheme)?;
    let lattice = |linear: &Linear| (format.lattice)(scheme, checkpoint.spec(), linear);
    let mut decided = Vec::new();
    rtn::quantize_model(checkpoint, lattice, |linear, packed| {
        writer.put_linear(checkpoint.spec(), linear, &packed)?;
        decided.push((linear.clone(), packed));
        Ok(())
    })?;
    let staged = writer.complete(checkpoint)?;
    staged.verify()?;
    staged.publish(&[])?;
    Ok(decided)
}

fn file_in(dir: &Path) -> PathBuf {
    export::gguf_file(dir).unwrap_or_else(|| panic!("no file in {}", dir.display()))
}

/// Rows of whole blocks and rows that are none, tied heads and own ones, biases, all types.
#[test]
fn every_type_reads_back() {
    let whole = TinyLlama { n_vocab: 2048, d_model: 64, d_ff: 96, d_head: 16, n_layer: 2, ..TinyLlama::default() };
    let shapes = [
        TinyLlama { tied: true, dtype: Dtype::F16, ..whole.clone() },
        TinyLlama { tied: false, attention_bias: true, dtype: Dtype::Bf16, ..whole.clone() },
        // Only down has rows of whole blocks.
        TinyLlama { tied: false, d_model: 40, d_head: 20, attention_bias: true, dtype: Dtype::F32, ..whole.clone() },
        // All have rows of whole super-blocks, or only down has.
        TinyLlama { tied: false, d_model: 256, d_ff: 512, dtype: Dtype::F32, ..whole.clone() },
        TinyLlama { tied: true, d_ff: 256, ..whole },
    ];
    for (i, shape) in shapes.iter().enumerate() {
        let (root, checkpoint) = model(shape);
        for format in formats() {
            let out = root.path().join(format.name);
            let decided = write(&checkpoint, format, &out).unwrap();
            let float = [("gguf-f16", Dtype::F16), ("gguf-bf16", Dtype::Bf16), ("gguf-f32", Dtype::F32)];
            let float = float.iter().find(|(name, _)| *name == format.name).map(|(_, dtype)| *dtype);
            assert_eq!(decided.len(), if float.is_some() { 0 } else { [2 * 7 + 1, 2 * 7 + 2, 2, 2 * 7 + 2, 2 * 7 + 1][i] });
            for path in [out.clone(), file_in(&out)] {
                let reader = export::open_packed(&path).unwrap();
                let spec = reader.spec();
                assert_eq!((spec.blocks.len(), spec.tied_head, spec.n_kv), (2, shape.tied, checkpoint.spec().n_kv));
                for linear in checkpoint.spec().matrices() {
                    let packed = decided.iter().find(|(l, _)| l.module == linear.module).map(|(_, packed)| packed);
                    assert_eq!(reader.packed(linear).unwrap().as_ref(), packed, "{}: {}", format.name, linear.module);
                    let values = reader.linear(linear).unwrap().to_f32();
                    let plain =
                        || checkpoint.linear(linear).unwrap().to_f32().iter().map(|v| float.map_or(*v, |to| to.round(*v))).collect();
                    let want = packed.map_or_else(plain, PackedLinear::dequantize);
                    assert_eq!(values, want, "{}: {}", format.name, linear.module);
                }
                for tensor in checkpoint.spec().tensors().iter().filter(|t| !t.quantizable) {
                    let (got, want) = (reader.tensor(&tensor.name).unwrap(), checkpoint.tensor(&tensor.name).unwrap());
                    assert_eq!((got.dtype, got.to_f32()), (Dtype::F32, want.to_f32()), "{}: {}", format.name, tensor.name);
                }
            }
        }
    }
}

#[test]
fn scaled_rotary_embeddings_are_a_tensor() {
    let scaling = serde_json::json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}});
    let shape = TinyLlama {
        n_vocab: 2048,
        d_model: 64,
        d_ff: 96,
        d_head: 16,
        config: scaling.as_object().unwrap().clone(),
        ..TinyLlama::default()
    };
    let (root, checkpoint) = model(&shape);
    let out = root.path().join("out");
    write(&checkpoint, export::find("gguf-q8_0").unwrap(), &out).unwrap();
    let reader = export::open(&out).unwrap();
    let [got, want] = [reader.spec(), checkpoint.spec()].map(|spec| spec.rope.inv_freq(16, 128));
    assert!(got.iter().zip(&want).all(|(got, want)| (got / want - 1.0).abs() < 1e-6), "{got:?} {want:?}");
    assert!(want[7] < 1e-4, "nothing is scaled: {want:?}");
}

/// Frequencies and the attention factor are those of the model, however they came about; what llama.cpp has no keys for is refused.
#[test]
fn yarn_reads_back() {
    let model = |scaling: serde_json::Value| {
        let config = serde_json::json!({"rope_scaling": scaling, "max_position_embeddings": 512});
        let shape = TinyLlama { n_vocab: 2048, d_model: 64, d_ff: 96, d_head: 32, n_layer: 1, ..TinyLlama::default() };
        model(&TinyLlama { config: config.as_object().unwrap().clone(), ..shape })
    };
    let (length, factor) = ("original_max_position_embeddings", "attention_factor");
    for (scaling, attention) in [
        (serde_json::json!({"rope_type": "yarn", "factor": 4.0, length: 128}), 1.138629436111989),
        (serde_json::json!({"rope_type": "yarn", length: 64}), 1.2079441541679836),
        (serde_json::json!({"rope_type": "yarn", "factor": 4.0, length: 128, factor: 1.0}), 1.0),
        (serde_json::json!({"type": "yarn", "factor": 2.5, "mscale": 0.7, "mscale_all_dim": 1.3}), 0.9508743010333485),
        (serde_json::json!({"type": "yarn", "factor": 1.0, factor: 1.5}), 1.5),
    ] {
        let (root, checkpoint) = model(scaling.clone());
        let out = root.path().join("out");
        write(&checkpoint, export::find("gguf-q8_0").unwrap(), &out).unwrap();
        let reader = export::open(&out).unwrap();
        let [got, want] = [reader.spec(), checkpoint.spec()].map(|spec| spec.rope.inv_freq(32, 512));
        assert!(got.iter().zip(&want).all(|(got, want)| (got / want - 1.0).abs() < 1e-6), "{scaling}: {got:?} {want:?}");
        let got = reader.spec().rope.attention_factor();
        let want = checkpoint.spec().rope.attention_factor();
        assert!((got - want).abs() < 1e-6 && (got - attention).abs() < 1e-6, "{scaling}: {got} {want}");
    }
    for (scaling, word) in [
        (serde_json::json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}), "`beta_fast` 16"),
        (serde_json::json!({"rope_type": "yarn", "factor": 4.0, "beta_slow": 2}), "`beta_slow` 2"),
        (serde_json::json!({"rope_type": "yarn", "factor": 4.0, "truncate": false}), "`truncate`"),
        (serde_json::json!({"rope_type": "yarn", length: 1024}), "factor 0.5"),
        (serde_json::json!({"rope_type": "dynamic", "factor": 4.0}), "dynamic"),
    ] {
        let (root, checkpoint) = model(scaling);
        let e = write(&checkpoint, export::find("gguf-q4_0").unwrap(), &root.path().join("out")).unwrap_err();
        assert!(e.kind == Kind::Usage && e.subject == "--format" && e.message.contains(word), "{e}");
        assert!(!root.path().join("out").exists());
    }
}

/// A whole run, on a model most of whose rows are no whole blocks: those matrices stay, and the others are quantized.
#[test]
fn rows_that_are_no_whole_blocks_stay_as_they_are() {
    let (root, checkpoint) = model(&TinyLlama { n_vocab: 2048, d_model: 40, d_head: 20, d_ff: 96, n_layer: 2, ..TinyLlama::default() });
    let request = |method: &str| Request {
        samples: Some(8),
        sequence_length: Some(32),
        device: DeviceChoice::Cpu,
        ..Request::new(
            checkpoint.dir().to_owned(),
            root.path().join(method),
            method::find(method).unwrap(),
            Scheme::new(4, -1, false).unwrap(),
            vec![export::find("gguf-q5_1").unwrap()],
        )
    };
    for method in ["rtn", "aespa"] {
        let reports = pipeline::run(Plan::new(request(method)).unwrap(), &mut Quiet).unwrap();
        assert_eq!(reports[0].layers.iter().map(|l| l.role.as_str()).collect::<Vec<_>>(), ["down", "down"], "{method}");
        let reader = export::open_packed(&root.path().join(method)).unwrap();
        for linear in checkpoint.spec().matrices() {
            let down = linear.role == Role::Down;
            assert_eq!(reader.packed(linear).unwrap().is_some(), down);
            assert_eq!(reader.linear(linear).unwrap().to_f32() == checkpoint.linear(linear).unwrap().to_f32(), !down, "{}", linear.module);
        }
    }
    // Factors would be moved between matrices of which only some are written.
    let e = pipeline::run(Plan::new(request("zfold")).unwrap(), &mut Quiet).unwrap_err();
    assert!(e.kind == Kind::Usage && e.message.contains("--transform none"), "{e}");
    assert!(!root.path().join("zfold").exists());
}

#[test]
fn damage_is_an_error_that_names_the_file() {
    let (root, checkpoint) = model(&TinyLlama { n_vocab: 2048, d_model: 64, d_ff: 96, d_head: 16, n_layer: 1, ..TinyLlama::default() });
    let out = root.path().join("out");
    write(&checkpoint, export::find("gguf-q4_1").unwrap(), &out).unwrap();
    let path = file_in(&out);
    let original = fs::read(&path).unwrap();
    let opened = || export::open_packed(&path).and_then(|reader| reader.spec().matrices().try_for_each(|l| reader.linear(l).map(|_| ())));
    // Cut off anywhere, in its head or its data.
    for part in 1..40 {
        fs::write(&path, &original[..original.len() * part / 40]).unwrap();
        let e = opened().unwrap_err();
        assert!(e.kind == Kind::Input && e.subject.contains("model-Q4_1.gguf"), "{e}");
    }
    // Single bytes of the head: an error or another model, never a panic.
    for at in (0..4000).step_by(7) {
        let mut damaged = original.clone();
        damaged[at] ^= 0xff;
        fs::write(&path, damaged).unwrap();
        if let Err(e) = opened() {
            assert!(e.kind == Kind::Input, "{e}");
        }
    }
    fs::write(&path, original).unwrap();
    opened().unwrap();
}

#[test]
fn a_tokenizer_that_cannot_be_stored_is_refused_at_once() {
    let (root, checkpoint) = model(&TinyLlama { n_vocab: 2048, d_model: 64, d_ff: 96, d_head: 16, ..TinyLlama::default() });
    let tokenizer = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}"#;
    fs::write(checkpoint.dir().join("tokenizer.json"), tokenizer).unwrap();
    let e = write(&checkpoint, export::find("gguf-q4_0").unwrap(), &root.path().join("out")).unwrap_err();
    assert!(e.kind == Kind::Input && e.subject.ends_with("tokenizer.json") && e.message.contains("byte-level BPE"), "{e}");
    assert!(!root.path().join("out").exists());
}
