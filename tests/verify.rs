//! Every rule of `verify` has a folder that breaks it.

mod common;

use aespa_gpu::Kind;
use aespa_gpu::export::{self, Writer};
use aespa_gpu::model::{Checkpoint, DEMO_FILES, Linear};
use aespa_gpu::quant::Scheme;
use aespa_gpu::tensor::Dtype;
use common::rtn;
use common::tiny_model::TinyLlama;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

struct Setup {
    root: TempDir,
    checkpoint: Checkpoint,
}

impl Setup {
    /// Of a model whose tokenizer is one of SentencePiece's kind.
    fn sentencepiece() -> Self {
        let stories = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/models/stories260k");
        Self { root: tempfile::tempdir().unwrap(), checkpoint: Checkpoint::open(Path::new(stories)).unwrap() }
    }

    fn new(tied: bool) -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("model");
        let shape =
            TinyLlama { n_vocab: 2048, d_model: 64, d_ff: 96, d_head: 16, n_layer: 1, dtype: Dtype::F16, tied, ..TinyLlama::default() };
        shape.write(&dir);
        let tokenizer = DEMO_FILES.iter().find(|(name, _)| *name == "tokenizer.json").unwrap().1;
        fs::write(dir.join("tokenizer.json"), tokenizer).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        Self { root, checkpoint }
    }

    /// A folder of a format, rounded to nearest, in which all is well.
    fn written(&self, format: &str, bits: u32) -> PathBuf {
        let out = self.root.path().join(format!("{format}-{bits}"));
        let (format, scheme) = (export::find(format).unwrap(), Scheme::new(bits, 32, false).unwrap());
        let mut writer = Writer::create(&out, false, format, &self.checkpoint, scheme).unwrap();
        let spec = self.checkpoint.spec();
        let lattice = |linear: &Linear| (format.lattice)(scheme, spec, linear);
        rtn::quantize_model(&self.checkpoint, lattice, |linear, packed| writer.put_linear(spec, linear, &packed)).unwrap();
        writer.complete(&self.checkpoint).unwrap().publish(&[]).unwrap();
        export::verify(&out).unwrap();
        out
    }
}

/// The rule that is broken must be told by file and reason.
fn broken(path: &Path, file: &str, reason: &str) {
    let e = export::verify(path).unwrap_err();
    assert!(e.kind == Kind::Input && e.subject.contains(file) && e.message.contains(reason), "{e}");
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Rewrites the tensors of a folder with one weight file.
fn retensor(folder: &Path, change: impl FnOnce(&mut BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>)) {
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = file.tensors().into_iter().map(|(n, t)| (n, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(n, (dtype, shape, data))| (n.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(&path, safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()).unwrap();
}

#[test]
fn what_is_well_is_counted() {
    let setup = Setup::new(true);
    let verdict = |path: &Path| {
        let v = export::verify(path).unwrap();
        (v.format, v.quantized, v.plain)
    };
    assert_eq!(verdict(&setup.written("compressed-tensors", 4)), ("compressed-tensors", 7, 1));
    assert_eq!(verdict(&setup.written("gptq-v2", 4)), ("gptq-v2", 7, 1));
    assert_eq!(verdict(&setup.written("mlx", 3)), ("mlx", 8, 0));
    assert_eq!(verdict(&setup.written("gguf-q5_1", 4)), ("gguf", 8, 0));
    assert_eq!(verdict(&setup.written("dense", 4)), ("plain", 0, 8));
    assert_eq!(verdict(setup.checkpoint.dir()), ("plain", 0, 8));
}

#[test]
fn values_that_are_not_finite() {
    let folder = Setup::new(true);
    let folder = (folder.written("awq", 4), folder);
    retensor(&folder.0, |tensors| tensors.get_mut("model.layers.0.self_attn.o_proj.scales").unwrap().2[..2].copy_from_slice(&[0, 0x7c]));
    broken(&folder.0, "o_proj.scales", "f16");
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model_breaks_no_rule() {
    let setup = Setup::new(true);
    let folder = setup.written("mlx", 4);
    edit(&folder.join("tokenizer.json"), |t| {
        let added = json!({"id": 2048, "content": "<|more|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        t["added_tokens"].as_array_mut().unwrap().push(added);
    });
    // As people's fine-tunes have it, with a token for padding.
    export::verify(&folder).unwrap();
}

#[test]
fn fused_modules_of_different_kinds() {
    let setup = Setup::new(true);
    let (folder, other) = (setup.written("compressed-tensors", 4), setup.written("compressed-tensors", 8));
    let mut eight = BTreeMap::new();
    retensor(&other, |tensors| eight.clone_from(tensors));
    retensor(&folder, |tensors| {
        tensors.iter_mut().filter(|(name, _)| name.contains("k_proj")).for_each(|(name, tensor)| tensor.clone_from(&eight[name]));
    });
    edit(&folder.join("config.json"), |c| {
        let groups = c["quantization_config"]["config_groups"].as_object_mut().unwrap();
        let mut own = groups["group_0"].clone();
        own["targets"] = json!(["re:.*k_proj$"]);
        own["weights"]["num_bits"] = json!(8);
        groups.insert("group_1".to_owned(), own);
    });
    broken(&folder, "config.json", "q_proj and model.layers.0.self_attn.k_proj");
}

#[test]
fn plain_modules_that_the_config_does_not_name() {
    let setup = Setup::new(false);
    for (format, key) in [("compressed-tensors", "ignore"), ("awq", "modules_to_not_convert")] {
        let folder = setup.written(format, 4);
        edit(&folder.join("config.json"), |c| c["quantization_config"][key] = json!([]));
        broken(&folder, "config.json", "lm_head");
    }
}

#[test]
fn configs_that_differ() {
    let setup = Setup::new(true);
    let folder = setup.written("gptq", 4);
    edit(&folder.join("quantize_config.json"), |c| c["sym"] = json!(true));
    broken(&folder, "quantize_config.json", "differs");
    fs::remove_file(folder.join("quantize_config.json")).unwrap();
    broken(&folder, "quantize_config.json", "cannot be read");
    let folder = setup.written("mlx", 4);
    edit(&folder.join("config.json"), |c| drop(c.as_object_mut().unwrap().remove("quantization")));
    broken(&folder, "config.json", "`quantization`");
}

#[test]
fn parts_of_a_tied_head() {
    let setup = Setup::new(true);
    let folder = setup.written("mlx", 4);
    retensor(&folder, |tensors| {
        let scales = tensors["model.embed_tokens.scales"].clone();
        tensors.insert("lm_head.scales".to_owned(), scales);
    });
    broken(&folder, "lm_head.scales", "tied");
}

#[test]
fn gguf_files_that_llama_cpp_refuses() {
    let setup = Setup::new(true);
    let folder = setup.written("gguf-q8_0", 4);
    let path = export::gguf_file(&folder).unwrap();
    let original = fs::read(&path).unwrap();
    let with = |from: &[u8], to: &[u8], reason: &str| {
        let at = original.windows(from.len()).position(|w| w == from).unwrap();
        let mut damaged = original.clone();
        damaged[at..at + to.len()].copy_from_slice(to);
        fs::write(&path, damaged).unwrap();
        broken(&folder, "model-Q8_0.gguf", reason);
    };
    with(b"tokenizer.ggml.pre", b"tokenizer.ggml.prf", "`tokenizer.ggml.pre` is missing");
    with(b"tokenizer.ggml.token_type", b"tokenizer.ggml.token_typf", "`tokenizer.ggml.token_type` is missing");
    // The second tensor a block later, and so on top of the third.
    let name = b"blk.0.attn_norm.weight";
    let at = original.windows(name.len()).position(|w| w == name).unwrap() + name.len() + 4 + 8 + 4;
    let offset = u64::from_le_bytes(original[at..at + 8].try_into().unwrap());
    let mut damaged = original.clone();
    damaged[at..at + 8].copy_from_slice(&(offset + 32).to_le_bytes());
    fs::write(&path, damaged).unwrap();
    broken(&folder, "model-Q8_0.gguf", "behind the tensor before");
    fs::write(&path, original).unwrap();
    export::verify(&folder).unwrap();
}

#[test]
fn gguf_files_whose_sentencepiece_vocabulary_breaks_llama_cpp() {
    let setup = Setup::sentencepiece();
    let folder = setup.written("gguf-q8_0", 4);
    let path = export::gguf_file(&folder).unwrap();
    let original = fs::read(&path).unwrap();
    let after = |word: &[u8]| original.windows(word.len()).position(|w| w == word).unwrap() + word.len();
    let with = |change: &dyn Fn(&mut Vec<u8>), reason: &str| {
        let mut damaged = original.clone();
        change(&mut damaged);
        fs::write(&path, damaged).unwrap();
        broken(&folder, "model-Q8_0.gguf", reason);
    };
    // Behind the key are the kind of the value, the kind of its elements and their number.
    let key = after(b"tokenizer.ggml.scores");
    let (count, first) = (key + 8, key + 16);
    with(&|file| file[key - 1] = b'z', "`tokenizer.ggml.scores` has 0 entries");
    with(&|file| file[first + 12..first + 16].copy_from_slice(&f32::NAN.to_le_bytes()), "is no finite f32 at 3");
    with(&|file| file[key + 4] = 4, "is no finite f32 at 0");
    // Eight scores less, which is as much as the padding of the head.
    let fewer = |file: &mut Vec<u8>| {
        file[count..first].copy_from_slice(&504u64.to_le_bytes());
        file.drain(first..first + 32);
    };
    with(&fewer, "`tokenizer.ggml.scores` has 504 entries");
    let byte = after(b"<0xAB>");
    with(&|file| file[byte - 2] = b'C', "has \"<0xAC>\" twice");
    with(&|file| file[byte - 2] = b'x', "has no byte <0xAB>");
    fs::write(&path, original.clone()).unwrap();
    export::verify(&folder).unwrap();
}
