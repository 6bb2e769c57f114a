//! Small models in several formats, as the program writes them.

use crate::archive;
use crate::{rtn, tiny_model};
use aespa_gpu::Result;
use aespa_gpu::export::{self, Format, Writer};
use aespa_gpu::model::Checkpoint;
use aespa_gpu::quant::Scheme;
use aespa_gpu::tensor::Dtype;
use std::path::{Path, PathBuf};
use tiny_model::TinyLlama;

/// Rows of whole blocks; only down has whole super-blocks, which keeps files small.
fn shape() -> TinyLlama {
    TinyLlama {
        d_model: 32,
        d_ff: 256,
        n_head: 2,
        n_kv: 1,
        d_head: 16,
        n_vocab: 256,
        n_layer: 1,
        dtype: Dtype::F16,
        tied: true,
        tokenizer: true,
        ..TinyLlama::default()
    }
}

/// The bytes of a tokenizer that fits all of these.
pub fn tokenizer() -> Vec<u8> {
    tiny_model::byte_tokenizer().to_string().into_bytes()
}

fn write(checkpoint: &Checkpoint, format: &'static Format, scheme: Scheme, out: &Path, shard: u64) -> Result<()> {
    let mut writer = Writer::with_shard_size(out, false, format, checkpoint, scheme, shard)?;
    let lattice = |linear: &_| (format.lattice)(scheme, checkpoint.spec(), linear);
    rtn::quantize_model(checkpoint, lattice, |linear, packed| writer.put_linear(checkpoint.spec(), linear, &packed))?;
    writer.complete(checkpoint)?.publish(&[])
}

fn made(model: &TinyLlama, root: &Path, format: &str, bits: u32, group: i64, symmetric: bool, shard: u64) -> Result<PathBuf> {
    let dir = root.join("model");
    model.write(&dir);
    let checkpoint = Checkpoint::open(&dir)?.with_pre_tokenizer(Some("gpt-2".to_owned()));
    let out = root.join("out");
    write(&checkpoint, export::find(format)?, Scheme::new(bits, group, symmetric)?, &out, shard)?;
    Ok(out)
}

/// GGUF files, by name.
pub fn gguf() -> Vec<(String, Vec<u8>)> {
    let scaled = serde_json::json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}});
    let yarn = serde_json::json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}});
    let config = |value: &serde_json::Value| value.as_object().cloned().unwrap_or_default();
    let mut all = Vec::new();
    for format in export::FORMATS.iter().filter(|f| f.name.starts_with("gguf")) {
        let shapes = match format.name {
            "gguf-q8_0" => vec![shape(), TinyLlama { tied: false, attention_bias: true, config: config(&scaled), ..shape() }],
            "gguf-f32" => vec![TinyLlama { d_ff: 24, d_model: 12, d_head: 6, config: config(&yarn), ..shape() }],
            _ => vec![shape()],
        };
        for (i, shape) in shapes.iter().enumerate() {
            let root = tempfile::tempdir().expect("a temporary folder can be made");
            let out = made(shape, root.path(), format.name, 4, -1, false, export::MAX_SHARD).expect("a seed can be written");
            let file = export::gguf_file(&out).expect("there is a file");
            all.push((format!("{}-{i}", format.name), std::fs::read(file).expect("it can be read")));
        }
    }
    all
}

/// Folders of safetensors, packed, by name.
pub fn folders() -> Vec<(String, Vec<u8>)> {
    let odd = TinyLlama { d_model: 12, d_ff: 20, n_head: 2, n_kv: 2, d_head: 6, tied: false, mlp_bias: true, n_layer: 2, ..shape() };
    let whole = TinyLlama { d_ff: 64, n_kv: 2, ..shape() };
    let mut all = Vec::new();
    for (format, bits, group, symmetric, model, shard) in [
        ("compressed-tensors", 4, 32, false, &whole, export::MAX_SHARD),
        ("compressed-tensors", 3, -1, true, &odd, export::MAX_SHARD),
        ("compressed-tensors", 8, -1, false, &odd, 20_000),
        ("compressed-tensors-w8a8", 8, -1, true, &odd, export::MAX_SHARD),
        ("gptq", 4, 32, false, &whole, export::MAX_SHARD),
        ("gptq-v2", 3, 32, true, &whole, export::MAX_SHARD),
        ("awq", 4, 32, false, &whole, export::MAX_SHARD),
        ("mlx", 4, 32, false, &whole, export::MAX_SHARD),
        ("mlx", 3, 64, false, &TinyLlama { d_model: 64, d_head: 32, tied: false, ..whole.clone() }, export::MAX_SHARD),
        ("dense", 4, -1, false, &TinyLlama { dtype: Dtype::Bf16, ..odd.clone() }, export::MAX_SHARD),
    ] {
        let root = tempfile::tempdir().expect("a temporary folder can be made");
        let out = made(model, root.path(), format, bits, group, symmetric, shard).expect("a seed can be written");
        let mut files = archive::read(&out);
        // The tokenizer is the same in all; one has it, so that it is changed too.
        if format != "dense" {
            files.retain(|f| archive::NAMES[f.0] != "tokenizer.json");
        }
        all.push((format!("{format}-{bits}-{}", all.len()), archive::pack(&files)));
    }
    all
}

/// Puts seeds that are not there yet into the corpus, the first folder that libFuzzer is told.
pub fn plant(seeds: Vec<(String, Vec<u8>)>) {
    let Some(corpus) = std::env::args().skip(1).find(|a| Path::new(a).is_dir()) else { return };
    for (name, bytes) in seeds {
        let path = Path::new(&corpus).join(name);
        if !path.exists() {
            std::fs::write(path, bytes).expect("the corpus can be written");
        }
    }
}
