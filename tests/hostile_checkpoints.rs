//! Damaged, lying and unsupported model folders: every one is an error that names the file and the tensor, and none is a panic.

mod common;

use aespa_gpu::model::{Checkpoint, Weights};
use aespa_gpu::tensor::Dtype;
use aespa_gpu::text::Tokenizer;
use aespa_gpu::{Error, Kind};
use common::tiny_model::{TinyLlama, shard_name, write_raw_safetensors, write_safetensors};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const Q0: &str = "model.layers.0.self_attn.q_proj.weight";

struct Folder(TempDir);

impl Folder {
    fn new(model: &TinyLlama) -> Self {
        let dir = tempfile::tempdir().unwrap();
        model.write(dir.path());
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn weights(&self) -> PathBuf {
        self.path().join("model.safetensors")
    }

    fn config(&self, change: impl FnOnce(&mut Value)) -> &Self {
        self.edit_json("config.json", change)
    }

    fn edit_json(&self, name: &str, change: impl FnOnce(&mut Value)) -> &Self {
        let path = self.path().join(name);
        let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(path, json.to_string()).unwrap();
        self
    }

    /// Changes the header of model.safetensors and keeps its data.
    fn header(&self, change: impl FnOnce(&mut Value)) -> &Self {
        let (mut header, data) = split(&fs::read(self.weights()).unwrap());
        change(&mut header);
        write_raw_safetensors(&self.weights(), &header.to_string(), &data);
        self
    }

    fn error(&self) -> Error {
        Checkpoint::open(self.path()).expect_err("the folder must be refused")
    }

    /// Opening fails with bad input, and the error has all of `words`.
    fn refuses(&self, words: &[&str]) {
        check(&self.error(), words);
    }
}

fn split(file: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&file[8..8 + length]).unwrap(), file[8 + length..].to_vec())
}

fn check(e: &Error, words: &[&str]) {
    assert_eq!(e.kind, Kind::Input, "{e}");
    for word in words {
        assert!(e.to_string().contains(word), "no {word:?} in: {e}");
    }
}

fn tiny() -> Folder {
    Folder::new(&TinyLlama::default())
}

#[test]
fn sound_folders_open_and_give_back_what_was_written() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for (tied, bias, n_kv, shards) in [(false, false, 2, 1), (true, true, 1, 3), (false, true, 4, 2), (true, false, 2, 1)] {
            let model = TinyLlama { dtype, tied, attention_bias: bias, mlp_bias: bias, n_kv, shards, ..TinyLlama::default() };
            let folder = Folder::new(&model);
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let written = model.tensors();
            assert_eq!(checkpoint.names().collect::<Vec<_>>(), written.keys().collect::<Vec<_>>());
            assert_eq!(checkpoint.files().len(), shards);
            assert_eq!((checkpoint.spec().dtype, checkpoint.spec().n_kv), (dtype, n_kv));
            for (name, (shape, values)) in &written {
                let tensor = checkpoint.tensor(name).unwrap();
                assert_eq!((&tensor.shape, &tensor.to_f32()), (shape, values), "{name}");
                assert_eq!(checkpoint.raw(name).unwrap().dtype, dtype.safetensors_name());
            }
            let spec = checkpoint.spec();
            let head = Weights::linear(&checkpoint, &spec.head).unwrap();
            assert_eq!(head.to_f32(), written[&spec.head.weight()].1);
            assert_eq!(spec.head.weight() == spec.embedding.weight(), tied);
        }
    }
}

#[test]
fn the_folder_itself() {
    let empty = tempfile::tempdir().unwrap();
    check(&Checkpoint::open(&empty.path().join("nothing")).unwrap_err(), &["nothing", "not a folder"]);
    check(&Checkpoint::open(empty.path()).unwrap_err(), &["config.json", "cannot be read"]);

    let folder = tiny();
    fs::remove_file(folder.weights()).unwrap();
    folder.refuses(&["holds no safetensors file"]);
    fs::write(folder.path().join("pytorch_model.bin"), "x").unwrap();
    folder.refuses(&["convert the PyTorch weights"]);
    fs::create_dir(folder.weights()).unwrap();
    folder.refuses(&["model.safetensors", "is not a file"]);

    let folder = tiny();
    fs::remove_file(folder.path().join("config.json")).unwrap();
    fs::create_dir(folder.path().join("config.json")).unwrap();
    folder.refuses(&["config.json", "is not a file"]);
}

#[test]
fn configs_that_make_no_sense() {
    for (text, word) in [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("\u{feff}{}", "not valid JSON"),
        ("{\"model_type\": \"llama\", \"model_type\": \"llama\"}", "appears twice"),
        ("{}", "`model_type` is missing"),
        ("{\"model_type\": 5}", "must be a string"),
        ("{\"model_type\": \"mamba\"}", "families (model types): llama"),
        ("{\"model_type\": \"llama\"}", "`hidden_size` is missing"),
    ] {
        let folder = tiny();
        fs::write(folder.path().join("config.json"), text).unwrap();
        folder.refuses(&["config.json", word]);
    }
    for (key, value) in [
        ("hidden_size", json!(0)),
        ("hidden_size", json!(24.0)),
        ("hidden_size", json!(u64::MAX)),
        ("num_hidden_layers", json!(4_000_000_000u64)),
        ("num_attention_heads", json!(3)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(5)),
        ("vocab_size", json!("33")),
        ("hidden_act", json!("gelu")),
        ("rope_scaling", json!({"type": "longrope"})),
        ("rope_theta", json!(-1)),
        ("partial_rotary_factor", json!(0.5)),
        ("sliding_window", json!(16)),
        ("num_local_experts", json!(8)),
        ("rms_norm_eps", json!("1e-5")),
        ("architectures", json!(["LlamaForSequenceClassification"])),
    ] {
        let folder = tiny();
        folder.config(|c| c[key] = value).refuses(&["config.json", key]);
    }
}

#[test]
fn configs_that_do_not_fit_the_tensors() {
    for (key, value, tensor) in [
        ("hidden_size", json!(28), "model.embed_tokens.weight"),
        ("intermediate_size", json!(41), "model.layers.0.mlp.gate_proj.weight"),
        ("head_dim", json!(8), Q0),
        ("num_key_value_heads", json!(1), "model.layers.0.self_attn.k_proj.weight"),
        ("vocab_size", json!(32), "model.embed_tokens.weight"),
        ("num_hidden_layers", json!(3), "model.layers.2.input_layernorm.weight"),
        ("mlp_bias", json!(true), "model.layers.0.mlp.gate_proj.bias"),
    ] {
        tiny().config(|c| c[key] = value).refuses(&[tensor]);
    }
    let biased = Folder::new(&TinyLlama { attention_bias: true, ..TinyLlama::default() });
    biased.config(|c| c["attention_bias"] = json!(false)).refuses(&["layers.0.self_attn.k_proj.bias", "has no place"]);
    tiny().config(|c| c["num_hidden_layers"] = json!(1)).refuses(&["model.layers.1.input_layernorm.weight", "has no place"]);
    let tied = Folder::new(&TinyLlama { tied: true, ..TinyLlama::default() });
    tied.config(|c| c["tie_word_embeddings"] = json!(false)).refuses(&["lm_head.weight", "is missing", "tie"]);
}

#[test]
fn files_that_are_cut_off() {
    let whole = fs::read(tiny().weights()).unwrap();
    for length in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
        let folder = tiny();
        fs::write(folder.weights(), &whole[..length]).unwrap();
        folder.refuses(&["model.safetensors", "truncated"]);
    }
    let folder = tiny();
    fs::write(folder.weights(), [&whole[..], b"x"].concat()).unwrap();
    folder.refuses(&["model.safetensors", "1 bytes after its last tensor"]);
}

#[test]
fn headers_that_are_no_headers() {
    for (header, word) in [
        ("{", "damaged header"),
        ("[]", "not a JSON object"),
        ("{\"a\": {}, \"a\": {}}", "\"a\" appears twice"),
        ("{\"a\": 5}", "tensor a: has a damaged description"),
        ("{\"a\": {\"dtype\": \"F32\", \"shape\": [1]}}", "tensor a"),
        ("{\"a\": {\"dtype\": \"F31\", \"shape\": [1], \"data_offsets\": [0, 4]}}", "tensor a"),
        ("{\"a\": {\"dtype\": \"F32\", \"shape\": [-1], \"data_offsets\": [0, 4]}}", "tensor a"),
        ("{\"a\": {\"dtype\": \"F32\", \"shape\": [1.5], \"data_offsets\": [0, 4]}}", "tensor a"),
        ("{}", "4 bytes after its last tensor"),
    ] {
        let folder = tiny();
        write_raw_safetensors(&folder.weights(), header, &[0; 4]);
        folder.refuses(&["model.safetensors", word]);
    }
    let folder = tiny();
    fs::write(folder.weights(), u64::MAX.to_le_bytes()).unwrap();
    folder.refuses(&["model.safetensors", "no header length"]);
    fs::write(folder.weights(), [&4u64.to_le_bytes()[..], b"\xff\xff\xff\xff"].concat()).unwrap();
    folder.refuses(&["model.safetensors", "damaged header"]);
}

#[test]
fn tensors_that_lie_about_offsets_or_shapes() {
    let offsets = |header: &mut Value, change: &dyn Fn(u64, u64) -> (u64, u64)| {
        let old = &header[Q0]["data_offsets"];
        let (start, end) = change(old[0].as_u64().unwrap(), old[1].as_u64().unwrap());
        header[Q0]["data_offsets"] = json!([start, end]);
    };
    tiny().header(|h| offsets(h, &|s, e| (e, s))).refuses(&[Q0, "backwards"]);
    tiny().header(|h| offsets(h, &|s, e| (s, e + 4))).refuses(&["model.safetensors: tensor", "bytes"]);
    tiny().header(|h| offsets(h, &|s, e| (s - 4, e - 4))).refuses(&["model.safetensors: tensor", "overlaps"]);
    tiny().header(|h| offsets(h, &|s, e| (s + 4, e + 4))).refuses(&[Q0, "gap"]);
    tiny().header(|h| offsets(h, &|s, _| (s, u64::MAX))).refuses(&[Q0, "truncated or damaged"]);
    tiny().header(|h| offsets(h, &|_, _| (u64::MAX, u64::MAX))).refuses(&["model.safetensors: tensor"]);
    for shape in [json!([24, 25]), json!([u64::MAX, u64::MAX]), json!([1u64 << 62, 4]), json!([]), json!([24, 24, 0])] {
        tiny().header(|h| h[Q0]["shape"] = shape.clone()).refuses(&[Q0, "does not fill"]);
    }
    tiny().header(|h| h[Q0]["shape"] = json!([12, 48])).refuses(&[Q0, "[12, 48]", "[24, 24]"]);
    tiny().header(|h| h[Q0]["shape"] = json!([576])).refuses(&[Q0, "[576]"]);
    tiny().header(|h| h[Q0]["dtype"] = json!("F16")).refuses(&[Q0, "does not fill"]);
    tiny().header(|h| h[Q0]["dtype"] = json!("I32")).refuses(&[Q0, "type I32"]);
    // Eight tensors of 2^61 bytes: their sum wraps around in 64 bits.
    let huge: Vec<String> = (0..8u64)
        .map(|i| {
            format!("\"t{i}\": {{\"dtype\": \"U8\", \"shape\": [{0}], \"data_offsets\": [{1}, {2}]}}", 1u64 << 61, i << 61, (i + 1) << 61)
        })
        .collect();
    let folder = tiny();
    write_raw_safetensors(&folder.weights(), &format!("{{{}}}", huge.join(", ")), &[]);
    folder.refuses(&["model.safetensors"]);
}

#[test]
fn tensors_that_are_missing_or_not_finite() {
    for name in [Q0, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"] {
        let folder = tiny();
        let mut tensors = TinyLlama::default().tensors();
        tensors.remove(name);
        write_safetensors(&folder.weights(), Dtype::F32, &tensors);
        folder.refuses(&[name, "is missing"]);
    }
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for (value, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            let folder = Folder::new(&TinyLlama { dtype, ..TinyLlama::default() });
            let mut tensors = TinyLlama::default().tensors();
            tensors.get_mut(Q0).unwrap().1[100] = value;
            write_safetensors(&folder.weights(), dtype, &tensors);
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            check(&checkpoint.tensor(Q0).unwrap_err(), &["model.safetensors", Q0, word, "element 100"]);
            assert!(checkpoint.tensor("model.norm.weight").is_ok());
            assert_eq!(checkpoint.raw(Q0).unwrap().bytes.len(), 576 * dtype.size());
        }
    }
    let folder = tiny();
    check(&Checkpoint::open(folder.path()).unwrap().tensor("nothing").unwrap_err(), &["nothing", "is missing"]);
}

#[test]
fn tensors_that_the_model_does_not_use() {
    let with = |model: &TinyLlama, name: &str, shape: Vec<usize>| {
        let folder = Folder::new(model);
        let mut tensors = model.tensors();
        let values = vec![1.0; shape.iter().product()];
        tensors.insert(name.to_owned(), (shape, values));
        write_safetensors(&folder.weights(), Dtype::F32, &tensors);
        folder
    };
    let (free, tied) = (TinyLlama::default(), TinyLlama { tied: true, ..TinyLlama::default() });
    for name in ["model.layers.0.self_attn.q_norm.weight", "lm_head.bias", "score.weight", "model.layers.1.mlp.up_proj.lora_A.weight"] {
        with(&free, name, vec![6]).refuses(&["model.safetensors", name, "has no place"]);
    }
    let buffer = with(&free, "model.layers.0.self_attn.rotary_emb.inv_freq", vec![3]);
    assert!(Checkpoint::open(buffer.path()).is_ok());
    let second_head = with(&tied, "lm_head.weight", vec![33, 24]);
    assert_eq!(Checkpoint::open(second_head.path()).unwrap().spec().head.weight(), "model.embed_tokens.weight");
}

#[test]
fn indexes_and_shards() {
    const INDEX: &str = "model.safetensors.index.json";
    let sharded = || Folder::new(&TinyLlama { shards: 2, ..TinyLlama::default() });
    let map = |folder: &Folder, file: Value| folder.edit_json(INDEX, |i| i["weight_map"][Q0] = file).error();
    check(&map(&sharded(), json!("../model.safetensors")), &[INDEX, Q0, "plain file name"]);
    check(&map(&sharded(), json!("/etc/passwd")), &[INDEX, Q0, "plain file name"]);
    check(&map(&sharded(), json!("..")), &[INDEX, Q0, "plain file name"]);
    check(&map(&sharded(), json!("")), &[INDEX, Q0, "plain file name"]);
    check(&map(&sharded(), json!("a\\b")), &[INDEX, Q0, "plain file name"]);
    check(&map(&sharded(), json!(7)), &[INDEX, Q0, "not to a file name"]);
    check(&map(&sharded(), json!("other.safetensors")), &[INDEX, Q0, "does not exist"]);
    for shard in 0..2 {
        let folder = sharded();
        fs::remove_file(folder.path().join(shard_name(shard, 2))).unwrap();
        folder.refuses(&[INDEX, &shard_name(shard, 2), "does not exist"]);
    }
    let folder = sharded();
    let right = folder.edit_json(INDEX, |_| ()).path().join(INDEX);
    let index: Value = serde_json::from_slice(&fs::read(right).unwrap()).unwrap();
    let other = if index["weight_map"][Q0] == json!(shard_name(0, 2)) { 1 } else { 0 };
    check(&map(&folder, json!(shard_name(other, 2))), &[&shard_name(other, 2), Q0, "promises"]);
    sharded().edit_json(INDEX, |i| i["weight_map"]["ghost"] = json!(shard_name(0, 2))).refuses(&["ghost", "promises"]);
    sharded().edit_json(INDEX, |i| i["weight_map"] = json!({})).refuses(&[INDEX, "weight_map"]);
    sharded().edit_json(INDEX, |i| *i = json!([])).refuses(&[INDEX, "weight_map"]);

    let folder = sharded();
    fs::write(folder.path().join(INDEX), "{\"weight_map\": {\"a\": \"b\", \"a\": \"b\"}}").unwrap();
    folder.refuses(&[INDEX, "appears twice"]);

    // A tensor in both shards: which one counts would depend on the order.
    let folder = sharded();
    let tensors = TinyLlama::default().tensors();
    let shards = [0, 1].map(|i| folder.path().join(shard_name(i, 2)));
    shards.iter().for_each(|s| write_safetensors(s, Dtype::F32, &tensors));
    folder.refuses(&[&shard_name(1, 2), "is also in", &shard_name(0, 2)]);

    let folder = sharded();
    fs::write(folder.path().join(shard_name(0, 2)), b"").unwrap();
    folder.refuses(&[&shard_name(0, 2), "empty"]);

    let folder = sharded();
    fs::remove_file(folder.path().join(INDEX)).unwrap();
    folder.refuses(&["2 safetensors files"]);
    fs::remove_file(folder.path().join(shard_name(1, 2))).unwrap();
    folder.refuses(&["is missing"]);
}

#[test]
fn a_quantized_folder_is_checked_except_for_its_linears() {
    let quantized = |remove: &str| {
        let folder = tiny();
        let mut tensors = TinyLlama::default().tensors();
        tensors.retain(|name, _| !name.contains(remove));
        write_safetensors(&folder.weights(), Dtype::F32, &tensors);
        folder.config(|c| c["quantization_config"] = json!({"quant_method": "gptq"}));
        folder
    };
    let folder = quantized("_proj");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.quantization_config().unwrap()["quant_method"], "gptq");
    let q = checkpoint.spec().blocks[0].linears[0].clone();
    check(&Weights::linear(&checkpoint, &q).unwrap_err(), &[Q0, "is missing"]);
    quantized("layernorm").refuses(&["model.layers.0.input_layernorm.weight", "is missing"]);
}

/// Cuts the file off, flips a bit, puts in another character or repeats a piece, somewhere in the first `reach` bytes.
fn damage(file: &mut Vec<u8>, reach: usize, below: &mut impl FnMut(usize) -> usize) {
    let reach = reach.min(file.len());
    let at = below(reach);
    match below(4) {
        0 => file.truncate(at),
        1 => file[at] ^= 1 << below(8),
        2 => {
            let characters = b"0123456789-.eE\"{}[]:, \n\xff";
            file[at] = characters[below(characters.len())];
        }
        _ => {
            let from = below(reach);
            let piece: Vec<u8> = file.iter().skip(from).take(1 + below(8)).copied().collect();
            file.splice(at..at, piece);
        }
    }
}

/// Flips, cuts and overwrites the parts of a folder that are parsed. Nothing may panic, and what still opens must still be readable.
#[test]
fn random_damage_never_panics() {
    let model = TinyLlama { d_model: 8, d_ff: 6, n_head: 2, n_kv: 1, d_head: 4, n_vocab: 5, n_layer: 1, shards: 2, ..TinyLlama::default() };
    let folder = Folder::new(&model);
    let names = ["config.json".to_owned(), "model.safetensors.index.json".to_owned(), shard_name(0, 2)];
    let seed = 20_240_601;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut below = |n: usize| (rng.next_u64() % n as u64) as usize;
    let mut opened = 0;
    for round in 0..900 {
        let path = folder.path().join(&names[round % names.len()]);
        let sound = fs::read(&path).unwrap();
        let mut damaged = sound.clone();
        // Mostly where the structure is: the front of a weight file is its header.
        let reach = if round % 7 == 0 { usize::MAX } else { 1500 };
        damage(&mut damaged, reach, &mut below);
        fs::write(&path, &damaged).unwrap();
        let outcome = std::panic::catch_unwind(|| match Checkpoint::open(folder.path()) {
            Ok(checkpoint) => {
                checkpoint.names().for_each(|name| drop((checkpoint.tensor(name), checkpoint.raw(name))));
                checkpoint.spec().rope.tables(checkpoint.spec().d_head, 4);
                true
            }
            Err(e) => {
                assert!(!e.subject.is_empty() && e.kind == Kind::Input, "{e}");
                false
            }
        });
        match outcome {
            Ok(sound) => opened += usize::from(sound),
            Err(_) => panic!("seed {seed}, round {round}: {} panicked: {:?}", path.display(), String::from_utf8_lossy(&damaged)),
        }
        fs::write(&path, &sound).unwrap();
    }
    assert!((10..600).contains(&opened), "the damage is too weak or too strong to test anything: {opened} of 900 opened");
}

#[test]
fn a_damaged_tokenizer_never_panics() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/stories260k/tokenizer.json");
    let sound = fs::read(source).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut below = |n: usize| (rng.next_u64() % n as u64) as usize;
    let mut opened = 0;
    for _ in 0..500 {
        let mut file = sound.clone();
        damage(&mut file, 1700, &mut below);
        fs::write(dir.path().join("tokenizer.json"), &file).unwrap();
        match Tokenizer::open(dir.path()).and_then(|t| t.encode("Once upon a time \u{1f600}")) {
            Ok(_) => opened += 1,
            Err(e) => check(&e, &["tokenizer.json"]),
        }
    }
    assert!((5..400).contains(&opened), "{opened} of 500 opened");
}
