//! Models made to break their readers: files that ask for more memory than a machine has, that never end, or that no kernel takes. Each is an
//! input error that names the file, at once. What random changes find is for `fuzz/`.

mod common;

use aespa_gpu::export::{self, Writer};
use aespa_gpu::model::{Checkpoint, Config};
use aespa_gpu::quant::Scheme;
use aespa_gpu::text::Tokenizer;
use aespa_gpu::{Error, Kind};
use common::rtn;
use common::tiny_model::{TinyLlama, write_raw_safetensors};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A folder with a model in `model`.
fn made(model: &TinyLlama) -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    TinyLlama { n_vocab: 256, tokenizer: true, ..model.clone() }.write(&dir);
    (root, dir)
}

/// The model in a format.
fn written(dir: &Path, format: &str, group: i64) -> PathBuf {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let (format, scheme) = (export::find(format).unwrap(), Scheme::new(4, group, false).unwrap());
    let out = dir.parent().unwrap().join(format.name);
    let mut writer = Writer::create(&out, false, format, &checkpoint, scheme).unwrap();
    let lattice = |linear: &_| (format.lattice)(scheme, checkpoint.spec(), linear);
    rtn::quantize_model(&checkpoint, lattice, |linear, packed| writer.put_linear(checkpoint.spec(), linear, &packed)).unwrap();
    writer.complete(&checkpoint).unwrap().publish(&[]).unwrap();
    export::verify(&out).unwrap();
    out
}

fn check<T>(result: Result<T, Error>, words: &[&str]) {
    let e = result.map(|_| ()).unwrap_err();
    assert_eq!(e.kind, Kind::Input, "{e}");
    words.iter().for_each(|word| assert!(e.to_string().contains(word), "no {word:?} in: {e}"));
}

#[test]
fn heads_that_no_kernel_takes_are_refused_by_eval() {
    let (root, wide) = made(&TinyLlama { d_head: 258, ..TinyLlama::default() });
    let (_other, fine) = made(&TinyLlama::default());
    let text = root.path().join("text.txt");
    fs::write(&text, "some text".repeat(10)).unwrap();
    for models in [vec![&wide], vec![&fine, &wide]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aespa-gpu"));
        command.arg("eval").arg(models[0]).arg("--text").arg(&text).args(["--window", "8", "--windows", "1", "--device", "cpu"]);
        if let Some(reference) = models.get(1) {
            command.arg("--reference").arg(reference);
        }
        let output = command.output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("heads of 258") && message.contains(wide.to_str().unwrap()), "{message}");
    }
}

/// A list of zero bytes takes no room on the disk and would take 32 times its length in memory.
#[test]
fn gguf_lists_that_fill_the_memory_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("model.gguf");
    let (elements, list, bytes) = (1u64 << 34, 9u32, 0u32);
    let mut head = b"GGUF\x03\0\0\0".to_vec();
    head.extend([0u64, 1, 1].map(u64::to_le_bytes).concat());
    head.push(b'k');
    head.extend([list, bytes].map(u32::to_le_bytes).concat());
    head.extend(elements.to_le_bytes());
    fs::write(&path, &head).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    if file.set_len(head.len() as u64 + elements).is_err() {
        eprintln!("SKIPPED: this file system has no files with holes");
        return;
    }
    check(export::open_packed(&path), &["model.gguf", "a list of 17179869184 values"]);
}

/// The factors of the rotary embedding are floats; others were once taken for none.
#[test]
fn gguf_factors_that_are_no_floats_are_refused() {
    let scaling = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}});
    let config = scaling.as_object().unwrap().clone();
    let (_root, dir) = made(&TinyLlama { d_model: 64, d_ff: 96, d_head: 64, n_layer: 1, config, ..TinyLlama::default() });
    let path = export::gguf_file(&written(&dir, "gguf-q4_0", -1)).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let name = b"rope_freqs.weight";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len();
    // After the number of dimensions and the only one comes the type: Q8_0.
    assert_eq!(bytes[at..][..16], [1, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes[at + 12] = 8;
    fs::write(&path, bytes).unwrap();
    check(export::open_packed(&path), &["rope_freqs.weight", "no list of floats"]);
}

/// Numbers that are none were once taken for missing, and a default for them.
#[test]
fn gguf_numbers_that_are_not_finite_are_refused() {
    let (_root, dir) = made(&TinyLlama { d_model: 64, d_ff: 96, d_head: 16, n_layer: 1, ..TinyLlama::default() });
    let path = export::gguf_file(&written(&dir, "gguf-q4_0", -1)).unwrap();
    let original = fs::read(&path).unwrap();
    for key in ["llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"] {
        for value in [f32::NAN, f32::INFINITY] {
            let mut bytes = original.clone();
            let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap() + key.len();
            assert_eq!(bytes[at..][..4], [6, 0, 0, 0], "no f32");
            bytes[at + 4..at + 8].copy_from_slice(&value.to_le_bytes());
            fs::write(&path, bytes).unwrap();
            check(export::open_packed(&path), &["model-Q4_0.gguf", key, "no finite number"]);
        }
    }
}

#[test]
fn shapes_without_end_are_refused() {
    let (_root, dir) = made(&TinyLlama::default());
    let header = json!({"a": {"dtype": "F32", "shape": vec![1; 1000], "data_offsets": [0, 4]}});
    write_raw_safetensors(&dir.join("model.safetensors"), &header.to_string(), &[0; 4]);
    check(Checkpoint::open(&dir), &["tensor a", "1000 dimensions"]);
}

/// Patterns that are short and stand for large automata, and many of them.
#[test]
fn targets_that_fill_the_memory_are_refused() {
    let (_root, dir) = made(&TinyLlama { d_model: 64, d_ff: 96, d_head: 16, n_layer: 1, ..TinyLlama::default() });
    let config = written(&dir, "compressed-tensors", 32).join("config.json");
    let original: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    let many: Vec<String> = (0..1000).map(|i| format!("re:x{i}")).collect();
    for (targets, words) in [(json!([r"re:(\w{200}){200}"]), "no regular expression"), (json!(many), "too many")] {
        let mut changed = original.clone();
        changed["quantization_config"]["config_groups"]["group_0"]["targets"] = targets;
        fs::write(&config, changed.to_string()).unwrap();
        check(export::open_packed(config.parent().unwrap()), &["config.json", "targets", words]);
    }
}

#[cfg(unix)]
#[test]
fn files_that_never_end_are_not_read() {
    let (root, dir) = made(&TinyLlama { d_model: 64, d_ff: 96, d_head: 16, n_layer: 1, ..TinyLlama::default() });
    let replace = |path: &Path| {
        fs::remove_file(path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path).unwrap();
    };
    let gptq = written(&dir, "gptq", 32);
    replace(&gptq.join("quantize_config.json"));
    check(export::verify(&gptq), &["quantize_config.json", "is not a file"]);
    replace(&dir.join("tokenizer.json"));
    check(Tokenizer::open(&dir), &["tokenizer.json", "is not a file"]);
    replace(&dir.join("config.json"));
    check(Config::open(&dir), &["config.json", "is not a file"]);
    let gguf = root.path().join("zero.gguf");
    std::os::unix::fs::symlink("/dev/zero", &gguf).unwrap();
    assert!(export::open_packed(&gguf).is_err());
}
