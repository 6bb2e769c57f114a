//! Folders that are written read back as what was decided, at every scheme and type, in one file or several.

mod common;

use aespa_gpu::Kind;
use aespa_gpu::export::{self, FORMATS, Verified, Writer};
use aespa_gpu::model::{Checkpoint, Linear, Weights};
use aespa_gpu::quant::{BITS, PackedLinear, Scheme};
use aespa_gpu::tensor::{Dtype, Tensor};
use common::rtn;
use common::tiny_model::{TinyLlama, write_safetensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A tiny model in `root/model` whose linears take groups of 32, and `root/out` to write to.
struct Setup {
    root: TempDir,
    checkpoint: Checkpoint,
}

impl Setup {
    fn new(model: &TinyLlama) -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("model");
        model.write(&dir);
        fs::write(dir.join("vocab.json"), [0xff, 0, 13, 10]).unwrap();
        fs::write(dir.join("LICENSE"), "terms").unwrap();
        fs::write(dir.join("pytorch_model.bin"), "weights of another framework").unwrap();
        fs::create_dir(dir.join("figures")).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        Self { root, checkpoint }
    }

    fn out(&self) -> PathBuf {
        self.root.path().join("out")
    }

    fn writer(&self, format: &str, scheme: Scheme, max_shard: u64) -> Writer {
        Writer::with_shard_size(&self.out(), false, export::find(format).unwrap(), &self.checkpoint, scheme, max_shard).unwrap()
    }

    /// Everything in `root` but the model, so that leftovers show.
    fn siblings(&self) -> Vec<String> {
        let names = fs::read_dir(self.root.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|n| n != "model").collect()
    }
}

fn groups_of_32() -> TinyLlama {
    TinyLlama { d_model: 64, d_ff: 96, d_head: 16, n_layer: 2, ..TinyLlama::default() }
}

fn decide(checkpoint: &Checkpoint, format: &str, scheme: Scheme) -> Vec<(Linear, PackedLinear)> {
    let (mut all, format) = (Vec::new(), export::find(format).unwrap());
    let lattice = |linear: &Linear| (format.lattice)(scheme, checkpoint.spec(), linear);
    rtn::quantize_model(checkpoint, lattice, |linear, packed| {
        all.push((linear.clone(), packed));
        Ok(())
    })
    .unwrap();
    all
}

fn put(setup: &Setup, writer: &mut Writer, decided: &[(Linear, PackedLinear)]) {
    // Any order will do.
    decided.iter().rev().for_each(|(linear, packed)| writer.put_linear(setup.checkpoint.spec(), linear, packed).unwrap());
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

#[test]
fn every_scheme_and_type_reads_back_bit_by_bit() {
    let (mut held, mut outer): (BTreeMap<&str, usize>, usize) = (BTreeMap::new(), 0);
    for (i, (bits, symmetric, group)) in
        BITS.iter().flat_map(|b| [(*b, true, -1), (*b, false, -1), (*b, true, 32), (*b, false, 32)]).enumerate()
    {
        let scheme = Scheme { keep_embeddings: i % 5 == 3, ..Scheme::new(bits, group, symmetric).unwrap() };
        // Awkward sizes where no group must divide them; tied and untied, with and without biases in turn.
        let bases = [(group == -1).then(TinyLlama::default), Some(groups_of_32())];
        for (base, (dtype, limit)) in bases.iter().flatten().flat_map(|base| {
            let types = [(Dtype::F16, 8_000), (Dtype::Bf16, export::MAX_SHARD), (Dtype::F32, export::MAX_SHARD)];
            types.map(|of_type| (base, of_type))
        }) {
            let setup = Setup::new(&TinyLlama { dtype, tied: i % 2 == 0, attention_bias: i % 3 == 0, seed: i as u64, ..base.clone() });
            for format in FORMATS.iter().filter(|f| !f.own_scheme) {
                let what = format!("{} {scheme:?} {dtype}", format.name);
                if let Err(e) = (format.check)(scheme, setup.checkpoint.spec()) {
                    assert_eq!(e.kind, Kind::Usage, "{what}: {e}");
                    continue;
                }
                *held.entry(format.name).or_default() += 1;
                let decided = decide(&setup.checkpoint, format.name, scheme);
                outer += decided.iter().filter(|(linear, _)| linear.is_outer()).count();
                let mut writer = setup.writer(format.name, scheme, limit);
                put(&setup, &mut writer, &decided);
                let staged = writer.complete(&setup.checkpoint).unwrap();
                let others = setup.checkpoint.names().count() - decided.len();
                assert_eq!(staged.verify().unwrap(), Verified { linears: decided.len(), tensors: others }, "{what}");
                assert!(!setup.out().exists());
                staged.publish(&[("report.json", b"{}")]).unwrap();
                assert_eq!(setup.siblings(), ["out"], "{what}");
                check_folder(&setup, &decided, format.name, limit, &what);
                fs::remove_dir_all(setup.out()).unwrap();
            }
        }
    }
    assert!(outer > 5);
    // Every format takes something: of seven widths, two kinds of zero points, three types, and one or two shapes with groups or without.
    let counts = [("awq", 12), ("compressed-tensors", 126), ("dense", 126), ("gptq", 48), ("gptq-v2", 48), ("mlx", 18)];
    assert_eq!(held.into_iter().collect::<Vec<_>>(), counts);
}

fn check_folder(setup: &Setup, decided: &[(Linear, PackedLinear)], format: &str, limit: u64, what: &str) {
    let quantized = format != "dense";
    let reader = export::open_packed(&setup.out()).unwrap();
    let weights = export::open(&setup.out()).unwrap();
    for (linear, packed) in decided {
        assert_eq!(reader.packed(linear).unwrap().as_ref(), quantized.then_some(packed), "{what}: {}", linear.module);
        let dtype = if format == "mlx" { Dtype::F32 } else { packed.lattice.dtype };
        let expected = Tensor::from_f32(dtype, vec![linear.d_out, linear.d_in], &packed.dequantize()).unwrap();
        let got = weights.linear(linear).unwrap();
        assert!(got.dtype == expected.dtype && got.shape == expected.shape && got.data == expected.data, "{what}: {}", linear.module);
    }
    for matrix in setup.checkpoint.spec().matrices().filter(|m| decided.iter().all(|(linear, _)| linear.module != m.module)) {
        assert_eq!(weights.linear(matrix).unwrap().data, Weights::linear(&setup.checkpoint, matrix).unwrap().data, "{what}");
    }

    let mut files = BTreeMap::new();
    for entry in fs::read_dir(setup.out()).unwrap().map(Result::unwrap) {
        files.insert(entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
    }
    assert_eq!(files["vocab.json"], [0xff, 0, 13, 10]);
    assert_eq!((files["LICENSE"].as_slice(), files["report.json"].as_slice()), ("terms".as_bytes(), "{}".as_bytes()));
    assert!(!files.contains_key("pytorch_model.bin") && !files.contains_key("figures"));
    let shards: Vec<_> = files.iter().filter(|(name, _)| name.ends_with(".safetensors")).collect();
    let tensors = |bytes: &[u8]| safetensors::SafeTensors::deserialize(bytes).unwrap().len();
    // A tensor that alone is larger has a file of its own.
    assert_eq!(shards.len() > 1, limit != export::MAX_SHARD, "{what}");
    assert!(shards.iter().all(|(_, bytes)| bytes.len() as u64 <= limit || tensors(bytes) == 1), "{what}");
    assert_eq!(files.contains_key("model.safetensors.index.json"), shards.len() > 1);
    assert_eq!(config(&setup.out()).get("quantization_config").is_some(), quantized);
    assert_eq!(files.contains_key("quantize_config.json"), format.starts_with("gptq"));
}

#[test]
fn the_config_keeps_its_keys_in_order() {
    let extra = serde_json::json!({"zzz": 1, "aaa": {"x": 1e-5}, "torch_dtype": "float32"});
    let model = TinyLlama { dtype: Dtype::Bf16, config: extra.as_object().unwrap().clone(), ..TinyLlama::default() };
    let setup = Setup::new(&model);
    let scheme = Scheme::new(4, -1, true).unwrap();
    let original = config(setup.checkpoint.dir());
    for (format, added, torch_dtype) in [("compressed-tensors", &["quantization_config"][..], "float32"), ("dense", &[], "bfloat16")] {
        let mut writer = setup.writer(format, scheme, export::MAX_SHARD);
        put(&setup, &mut writer, &decide(&setup.checkpoint, format, scheme));
        writer.complete(&setup.checkpoint).unwrap().publish(&[]).unwrap();
        let written = config(&setup.out());
        let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&written), [keys(&original), added.iter().map(|k| k.to_string()).collect()].concat());
        assert_eq!((&written["aaa"], &written["torch_dtype"]), (&original["aaa"], &torch_dtype.into()));
        assert!(setup.out().join("model.safetensors").exists() && !setup.out().join("model.safetensors.index.json").exists());
        fs::remove_dir_all(setup.out()).unwrap();
    }
}

/// The place of every tensor in every weight file of a folder.
fn tensors_of(dir: &Path) -> Vec<(PathBuf, String, std::ops::Range<usize>)> {
    let mut all = Vec::new();
    for path in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "safetensors")) {
        let bytes = fs::read(&path).unwrap();
        let (n, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        for (name, info) in metadata.tensors() {
            all.push((path.clone(), name, n + 8 + info.data_offsets.0..n + 8 + info.data_offsets.1));
        }
    }
    all
}

#[test]
fn one_flipped_bit_anywhere_in_the_weights_is_noticed() {
    let setup = Setup::new(&TinyLlama { dtype: Dtype::F16, n_layer: 1, attention_bias: true, ..groups_of_32() });
    for format in FORMATS.iter().filter(|f| !f.own_scheme) {
        let scheme = Scheme::new(4, 32, false).unwrap();
        let mut writer = setup.writer(format.name, scheme, 20_000);
        put(&setup, &mut writer, &decide(&setup.checkpoint, format.name, scheme));
        let staged = writer.complete(&setup.checkpoint).unwrap();
        staged.verify().unwrap();
        let tensors = tensors_of(staged.path());
        assert!(tensors.len() > 10);
        for (i, (path, name, range)) in tensors.into_iter().enumerate() {
            let original = fs::read(&path).unwrap();
            let mut damaged = original.clone();
            damaged[range.start + i * 7919 % range.len()] ^= 1 << (i % 8);
            fs::write(&path, damaged).unwrap();
            let e = staged.verify().unwrap_err();
            let module = name.rsplit_once('.').unwrap().0;
            assert!(matches!(e.kind, Kind::Output | Kind::Input) && e.subject.contains(module), "{name}: {e}");
            fs::write(&path, original).unwrap();
        }
        staged.verify().unwrap();
    }
}

#[test]
fn what_runtimes_would_refuse_is_noticed_before_it_is_published() {
    let setup = Setup::new(&groups_of_32());
    let scheme = Scheme::new(4, 32, false).unwrap();
    let mut writer = setup.writer("gptq-v2", scheme, export::MAX_SHARD);
    put(&setup, &mut writer, &decide(&setup.checkpoint, "gptq-v2", scheme));
    let staged = writer.complete(&setup.checkpoint).unwrap();
    staged.verify().unwrap();
    fs::remove_file(staged.path().join("quantize_config.json")).unwrap();
    let e = staged.verify().unwrap_err();
    assert!(e.kind == Kind::Input && e.subject.contains("quantize_config.json"), "{e}");
}

#[test]
fn a_changed_norm_is_written_and_verified_in_place_of_the_copy() {
    let setup = Setup::new(&groups_of_32());
    let scheme = Scheme::new(3, 32, true).unwrap();
    let mut writer = setup.writer("compressed-tensors", scheme, export::MAX_SHARD);
    put(&setup, &mut writer, &decide(&setup.checkpoint, "compressed-tensors", scheme));
    let norm = &setup.checkpoint.spec().final_norm.name;
    let gain = Tensor::from_f32(Dtype::F32, vec![64], &[0.25; 64]).unwrap();
    let wrong = Tensor::from_f32(Dtype::F16, vec![64], &[0.25; 64]).unwrap();
    assert_eq!(writer.put_tensor(setup.checkpoint.spec(), norm, &wrong).unwrap_err().kind, Kind::Internal);
    writer.put_tensor(setup.checkpoint.spec(), norm, &gain).unwrap();
    assert_eq!(writer.put_tensor(setup.checkpoint.spec(), norm, &gain).unwrap_err().kind, Kind::Internal);
    let staged = writer.complete(&setup.checkpoint).unwrap();
    staged.verify().unwrap();
    staged.publish(&[]).unwrap();
    assert_eq!(export::open(&setup.out()).unwrap().tensor(norm).unwrap().to_f32(), [0.25; 64]);
}

#[test]
fn what_is_missing_doubled_or_not_as_planned_is_a_bug_and_leaves_nothing() {
    let setup = Setup::new(&groups_of_32());
    let scheme = Scheme::new(4, 32, true).unwrap();
    let decided = decide(&setup.checkpoint, "compressed-tensors", scheme);
    let (linear, packed) = &decided[0];
    let mut writer = setup.writer("compressed-tensors", scheme, export::MAX_SHARD);
    assert_eq!(setup.siblings().len(), 1);
    writer.put_linear(setup.checkpoint.spec(), linear, packed).unwrap();
    assert_eq!(writer.put_linear(setup.checkpoint.spec(), linear, packed).unwrap_err().kind, Kind::Internal);
    let other = &decide(&setup.checkpoint, "compressed-tensors", Scheme::new(4, 32, false).unwrap())[1];
    assert_eq!(writer.put_linear(setup.checkpoint.spec(), &other.0, &other.1).unwrap_err().kind, Kind::Internal);
    assert_eq!(writer.put_linear(setup.checkpoint.spec(), &setup.checkpoint.spec().head, packed).unwrap_err().kind, Kind::Internal);
    assert_eq!(writer.complete(&setup.checkpoint).unwrap_err().kind, Kind::Internal);
    assert!(setup.siblings().is_empty());
}

#[test]
fn damaged_and_foreign_quantized_folders_are_refused_by_name() {
    let setup = Setup::new(&TinyLlama { n_layer: 1, ..groups_of_32() });
    let scheme = Scheme::new(4, 32, false).unwrap();
    let mut writer = setup.writer("compressed-tensors", scheme, export::MAX_SHARD);
    put(&setup, &mut writer, &decide(&setup.checkpoint, "compressed-tensors", scheme));
    writer.complete(&setup.checkpoint).unwrap().publish(&[]).unwrap();
    let weights = setup.out().join("model.safetensors");
    let original = fs::read(&weights).unwrap();
    // Headers are edited in place, at equal length: the offsets stay true.
    let refuses = |from: &str, to: &str, subject: &str| {
        assert_eq!(from.len(), to.len());
        let at = original.windows(from.len()).position(|w| w == from.as_bytes()).unwrap_or_else(|| panic!("no {from}"));
        let mut damaged = original.clone();
        damaged[at..at + from.len()].copy_from_slice(to.as_bytes());
        fs::write(&weights, damaged).unwrap();
        let e = export::open(&setup.out()).map(|_| ()).unwrap_err();
        assert!(e.kind == Kind::Input && e.subject.contains(subject), "{e}");
    };
    let q = "model.layers.0.self_attn.q_proj";
    refuses(&format!("{q}.weight_packed"), &format!("{q}.weight_pucked"), "q_proj.weight_packed");
    refuses(&format!("{q}.weight_scale"), &format!("{q}.weight_g_idx"), "q_proj");
    refuses(r#"q_proj.weight_packed":{"dtype":"I32""#, r#"q_proj.weight_packed":{"dtype":"U32""#, "q_proj.weight_packed");
    refuses(r#"q_proj.weight_packed":{"dtype":"I32","shape":[64,8]"#, r#"q_proj.weight_packed":{"dtype":"I32","shape":[8,64]"#, "packed");
    refuses(r#"q_proj.weight_scale":{"dtype":"F32","#, r#"q_proj.weight_scale":{"dtype":"I32","#, "q_proj.weight_scale");
    refuses(
        r#"q_proj.weight_zero_point":{"dtype":"I32","shape":[8,2]"#,
        r#"q_proj.weight_zero_point":{"dtype":"I32","shape":[2,8]"#,
        "zero",
    );
    fs::write(&weights, &original).unwrap();
    export::open(&setup.out()).unwrap();

    let text = fs::read_to_string(setup.out().join("config.json")).unwrap();
    fs::write(setup.out().join("config.json"), text.replace("\"compressed-tensors\"", "\"bitsandbytes\"")).unwrap();
    let e = export::open(&setup.out()).map(|_| ()).unwrap_err();
    assert!(e.subject.ends_with("config.json") && e.message.contains("bitsandbytes") && e.message.contains("compressed-tensors"), "{e}");
    fs::write(setup.out().join("config.json"), text.replace("\"symmetric\": false", "\"symmetric\": true")).unwrap();
    let e = export::open(&setup.out()).map(|_| ()).unwrap_err();
    assert!(e.subject.contains("weight_zero_point") && e.message.contains("no place"), "{e}");

    fs::write(setup.out().join("config.json"), text).unwrap();
    let quantized = Checkpoint::open(&setup.out()).unwrap();
    let again = Writer::create(&setup.root.path().join("again"), false, FORMATS[0], &quantized, scheme).unwrap_err();
    assert!(again.kind == Kind::Input && again.message.contains("quantized already"), "{again}");
}

/// Scales of a cache, a second head: runtimes that load codes do not take what they do not know.
#[test]
fn what_the_model_does_not_use_stays_behind() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    let shape = TinyLlama { tied: true, ..groups_of_32() };
    shape.write(&dir);
    let mut tensors = shape.tensors();
    tensors.insert("model.layers.0.self_attn.k_proj.k_scale".into(), (vec![1], vec![0.5]));
    tensors.insert("output.weight".into(), (vec![shape.n_vocab, shape.d_model], vec![0.0; shape.n_vocab * shape.d_model]));
    write_safetensors(&dir.join("model.safetensors"), Dtype::F32, &tensors);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    for format in FORMATS.iter().filter(|f| f.name != "dense" && !f.name.starts_with("gguf")) {
        let scheme =
            Scheme::new(if format.name.ends_with("w8a8") { 8 } else { 4 }, if format.name.ends_with("w8a8") { -1 } else { 32 }, false)
                .unwrap();
        let out = root.path().join(format.name);
        let mut writer = Writer::create(&out, false, format, &checkpoint, scheme).unwrap();
        for (linear, packed) in decide(&checkpoint, format.name, scheme) {
            writer.put_linear(checkpoint.spec(), &linear, &packed).unwrap();
        }
        writer.complete(&checkpoint).unwrap().publish(&[]).unwrap();
        export::verify(&out).unwrap();
        let file = fs::read(out.join("model.safetensors")).unwrap();
        let names: Vec<String> = safetensors::SafeTensors::deserialize(&file).unwrap().names().iter().map(|n| n.to_string()).collect();
        assert!(!names.iter().any(|n| n.ends_with("k_scale") || n.starts_with("output")), "{names:?}");
    }
}
