//! The program as a user runs it, in temporary folders: results, files, messages, exit codes, and what is left behind.

mod common;

use common::tiny_model::TinyLlama;
use safetensors::tensor::TensorView;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder with a small model, a text, and the program.
struct Place {
    dir: tempfile::TempDir,
}

fn model() -> TinyLlama {
    let shape = TinyLlama { d_model: 64, d_ff: 96, n_head: 4, n_kv: 2, d_head: 16, n_vocab: 260, ..TinyLlama::default() };
    TinyLlama { tokenizer: true, ..shape }
}

impl Place {
    fn new() -> Self {
        Self::with(&model())
    }

    fn with(model: &TinyLlama) -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(place.path("model")).unwrap();
        model.write(&place.path("model"));
        let text: String = (0..3000).map(|i| format!("{} of {} ", i * i % 977, i)).collect();
        fs::write(place.path("text.txt"), text).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs the program here; words that name a path are relative to this folder.
    fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aespa-gpu"));
        command.args(arguments.split_whitespace()).current_dir(self.dir.path()).env_remove("RUST_LOG");
        command
    }

    fn ok(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &str) -> Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    /// The run fails with `code`, says all of `words`, never panics, and leaves the folder as it was.
    fn refused(&self, arguments: &str, code: i32, words: &[&str]) {
        let before = listing(self.dir.path());
        let output = self.run(arguments);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments}: {message}");
        assert!(!message.contains("panicked"), "{message}");
        for word in words {
            assert!(message.contains(word), "{arguments}: '{word}' is missing in: {message}");
        }
        assert_eq!(listing(self.dir.path()), before, "{arguments} left something behind");
    }
}

/// All paths under a folder, hidden ones too.
fn listing(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(listing(&path));
        }
        all.push(path);
    }
    all.sort();
    all
}

const SMALL: &str = "--device cpu --calibration text.txt --samples 16 --sequence-length 32";
const EVAL: &str = "--eval text.txt --eval-window 32 --eval-windows 8";

#[test]
fn quantize_eval_and_report_agree() {
    let place = Place::new();
    let template = "additional_chat_templates/tool_use.jinja";
    fs::create_dir(place.path("model/additional_chat_templates")).unwrap();
    fs::write(place.path("model").join(template), "{{ messages }}").unwrap();
    let out = place.ok(&format!("quantize model -o out --bits 3 --group-size 32 {SMALL} {EVAL}"));
    assert!(out.contains("down") && out.contains("bits per weight") && out.contains("perplexity"), "{out}");
    let report: Value = serde_json::from_slice(&fs::read(place.path("out/quantization_report.json")).unwrap()).unwrap();
    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 14);
    for layer in layers {
        let (loss, rtn) = (layer["loss"].as_f64().unwrap(), layer["loss_rtn"].as_f64().unwrap());
        assert!(loss > 0.0 && loss <= rtn, "{layer}");
        assert_eq!((layer["bits"].as_u64(), layer["group_size"].as_i64()), (Some(3), Some(32)));
        assert!(layer["damping"].as_f64().is_some() && layer["seconds"].as_f64().is_some());
    }
    for key in ["settings", "model", "device", "version", "bits_per_weight", "stages", "memory", "kernels"] {
        assert!(!report[key].is_null(), "{key}");
    }
    assert_eq!(report["model"]["files"].as_array().unwrap().len(), 2);
    let after = report["perplexity"]["after"]["perplexity"].as_f64().unwrap();
    let eval = place.json("eval out --text text.txt --window 32 --windows 8 --json --device cpu --reference model");
    assert_eq!(eval["perplexity"].as_f64().unwrap(), after);
    assert_eq!((eval["tokens"].as_u64(), eval["windows"].as_u64()), (Some(256), Some(8)));
    assert!(eval["kl_divergence"].as_f64().unwrap() > 0.0 && eval["top1_agreement"].as_f64().unwrap() > 0.0, "{eval}");
    let before = report["perplexity"]["before"]["perplexity"].as_f64().unwrap();
    assert_eq!(eval["reference_perplexity"].as_f64().unwrap(), before);
    // Everything that is not a weight is there, byte for byte.
    for file in ["tokenizer.json", template] {
        assert_eq!(fs::read(place.path("out").join(file)).unwrap(), fs::read(place.path("model").join(file)).unwrap());
    }
    let inspect = place.json("inspect out --json");
    assert_eq!(inspect["quantization_config"]["quant_method"], "compressed-tensors");
}

/// Several formats from one calibration: the first is what it would be alone, and each has a folder and a report of its own.
#[test]
fn several_formats_at_once() {
    let place = Place::new();
    place.ok(&format!("quantize model -o alone --bits 3 --group-size 32 {SMALL}"));
    let out = place.ok(&format!("quantize model -o out --format compressed-tensors,mlx,dense --bits 3 --group-size 32 {SMALL}"));
    let weights = |folder: &str| fs::read(place.path(folder).join("model.safetensors")).unwrap();
    assert!(weights("alone") == weights("out/compressed-tensors"));
    for format in ["compressed-tensors", "mlx", "dense"] {
        assert!(out.contains(&format!("wrote out/{format}")), "{out}");
        place.ok(&format!("verify out/{format}"));
        let report = fs::read(place.path(&format!("out/{format}/quantization_report.json"))).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        assert_eq!(report["settings"]["format"], format);
        // mlx has an embedding and a head besides, which are two matrices here.
        assert_eq!(report["layers"].as_array().unwrap().len(), if format == "mlx" { 16 } else { 14 }, "{format}");
    }
    // The same codes in two formats, and those of another lattice in the third.
    let eval = |folder: &str| {
        place.json(&format!("eval {folder} --text text.txt --window 32 --windows 4 --json --device cpu"))["perplexity"].as_f64().unwrap()
    };
    assert_eq!(eval("out/dense"), eval("out/compressed-tensors"));
    assert!(eval("out/mlx") != eval("out/dense"));
    place.refused(&format!("quantize model -o more --format mlx,mlx --group-size 32 {SMALL}"), 2, &["--format", "twice"]);
    place.refused(&format!("quantize model -o more --format compressed-tensors,mlx {SMALL} --group-size -1"), 2, &["--group-size", "mlx"]);
    place.refused(&format!("quantize model -o more --format gguf-q4_0 --bits 4 {SMALL}"), 2, &["--bits", "gguf-q4_0"]);
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let place = Place::new();
    for (out, seed) in [("a", 0), ("b", 0), ("c", 1)] {
        place.ok(&format!("quantize model -o {out} --group-size 32 --bits 2 --seed {seed} {SMALL}"));
    }
    let weights = |out: &str| fs::read(place.path(out).join("model.safetensors")).unwrap();
    assert!(weights("a") == weights("b") && weights("a") != weights("c"));
}

#[test]
fn dense_output_is_a_plain_model_with_the_same_function() {
    let place = Place::new();
    place.ok(&format!("quantize model -o packed --bits 4 --group-size -1 {SMALL}"));
    place.ok(&format!("quantize model -o plain --bits 4 --group-size -1 --format dense {SMALL}"));
    let eval = |folder: &str| place.json(&format!("eval {folder} --text text.txt --window 32 --windows 8 --json --device cpu"));
    let (packed, plain) = (eval("packed")["perplexity"].as_f64().unwrap(), eval("plain")["perplexity"].as_f64().unwrap());
    assert!((packed / plain - 1.0).abs() < 1e-5, "{packed} {plain}");
    assert!(place.json("inspect plain --json")["quantization_config"].is_null());
}

#[test]
fn rtn_needs_no_text_and_gptq_beats_it() {
    let place = Place::new();
    place.ok(&format!("quantize model -o rtn --method rtn --bits 2 --group-size 32 --device cpu {EVAL}"));
    place.ok(&format!("quantize model -o gptq --method gptq --bits 2 --group-size 32 {SMALL} {EVAL}"));
    let kl = |folder: &str| {
        let eval = place.json(&format!("eval {folder} --reference model --text text.txt --window 32 --json --device cpu"));
        eval["kl_divergence"].as_f64().unwrap()
    };
    assert!(kl("gptq") < kl("rtn"), "{} {}", kl("gptq"), kl("rtn"));
}

#[test]
fn an_existing_folder_is_replaced_only_when_asked() {
    let place = Place::new();
    let rtn = "quantize model -o out --method rtn --group-size 32 --device cpu";
    place.ok(rtn);
    let first = fs::read(place.path("out/model.safetensors")).unwrap();
    place.refused(&format!("{rtn} --bits 2"), 2, &["out", "--overwrite"]);
    assert_eq!(fs::read(place.path("out/model.safetensors")).unwrap(), first);
    place.ok(&format!("{rtn} --bits 2 --overwrite"));
    assert_ne!(fs::read(place.path("out/model.safetensors")).unwrap(), first);
    // Never over the model itself.
    place.refused("quantize model -o model --method rtn --group-size 32 --device cpu --overwrite", 2, &["model"]);
}

#[test]
fn every_gpu_agrees_with_the_cpu() {
    let place = Place::new();
    place.ok(&format!("quantize model -o cpu --bits 3 --group-size 32 {SMALL}"));
    let perplexity = |folder: &str| {
        place.json(&format!("eval {folder} --text text.txt --window 32 --windows 8 --json --device cpu"))["perplexity"].as_f64().unwrap()
    };
    for gpu in common::engines::gpu_indices() {
        let gpu_args = SMALL.replace("--device cpu", &format!("--device gpu:{gpu}"));
        place.ok(&format!("quantize model -o gpu{gpu} --bits 3 --group-size 32 {gpu_args}"));
        let (cpu, gpu) = (perplexity("cpu"), perplexity(&format!("gpu{gpu}")));
        assert!((cpu / gpu - 1.0).abs() < 5e-3, "{cpu} {gpu}");
    }
}

#[test]
fn bad_inputs_are_refused_with_their_names() {
    let place = Place::new();
    let quantize = |rest: &str| format!("quantize model -o out {rest}");
    place.refused("quantize nowhere -o out", 2, &["nowhere"]);
    place.refused("quantize text.txt -o out", 2, &["text.txt", "folder"]);
    place.refused(&quantize("--bits 9"), 2, &["--bits", "9"]);
    place.refused(&quantize("--group-size 48"), 2, &["--group-size", "48"]);
    place.refused(&quantize("--method magic"), 2, &["magic", "gptq"]);
    place.refused(&quantize("--group-size 32 --calibration missing.txt"), 2, &["missing.txt"]);
    place.refused(&quantize("--group-size 32 --device gpu:999"), 2, &["--device"]);
    place.refused(&quantize("--group-size 32 --device tpu"), 2, &["tpu"]);
    place.refused(&quantize(&format!("--group-size 32 {SMALL}").replace("--samples 16", "--samples 0")), 2, &["samples"]);
    place.refused(&quantize(&format!("--group-size 32 {SMALL}").replace("length 32", "length 1")), 2, &["--sequence-length", "1"]);
    place.refused(&quantize(&format!("--group-size 32 {SMALL}").replace("length 32", "length 65")), 2, &["--sequence-length", "64"]);
    place.refused("eval model --text text.txt --window 1 --device cpu", 2, &["--window", "1"]);
    place.refused("eval model --text text.txt --window 32 --windows 100000 --device cpu", 2, &["text.txt", "tokens"]);
    fs::write(place.path("short.txt"), "too little").unwrap();
    let short = format!("--group-size 32 {SMALL}").replace("text.txt", "short.txt");
    place.refused(&quantize(&short), 2, &["short.txt", "512 tokens"]);
    place.refused("quantize model -o text.txt/out --group-size 32 --method rtn", 1, &["text.txt"]);
    place.refused("quantize model -o /proc/out --group-size 32 --method rtn", 1, &["/proc", "written"]);
    place.refused("inspect nowhere", 2, &["nowhere"]);
}

/// A file of token ids [samples, length], counted through.
fn write_ids(path: &Path, samples: usize, length: usize, id: impl Fn(usize) -> i64) {
    let bytes: Vec<u8> = (0..samples * length).flat_map(|i| (id(i) as i32).to_le_bytes()).collect();
    let view = TensorView::new(safetensors::Dtype::I32, vec![samples, length], &bytes).unwrap();
    safetensors::serialize_to_file([("input_ids", view)], None, path).unwrap();
}

#[test]
fn token_ids_can_be_calibrated_on() {
    let place = Place::new();
    write_ids(&place.path("ids.safetensors"), 12, 32, |i| (i * i % 251) as i64);
    let quantize =
        |out: &str, rest: &str| format!("quantize model -o {out} --device cpu --group-size 32 --calibration ids.safetensors {rest}");
    let calibration = |out: &str| -> Value {
        let report: Value = serde_json::from_slice(&fs::read(place.path(out).join("quantization_report.json")).unwrap()).unwrap();
        report["settings"]["calibration"].clone()
    };
    place.ok(&quantize("all", EVAL));
    place.ok(&quantize("same", "--sequence-length 32 --samples 12"));
    place.ok(&quantize("few", "--samples 5"));
    for (out, samples) in [("all", 12), ("same", 12), ("few", 5)] {
        let report = calibration(out);
        assert_eq!((report["samples"].as_u64(), report["sequence_length"].as_u64()), (Some(samples), Some(32)), "{report}");
        assert!(report["text"].as_str().unwrap().ends_with("ids.safetensors") && report["sha256"].as_str().unwrap().len() == 64);
    }
    let weights = |out: &str| fs::read(place.path(out).join("model.safetensors")).unwrap();
    assert!(weights("all") == weights("same") && weights("all") != weights("few"));
    // The first windows are taken: the others play no part.
    write_ids(&place.path("ids.safetensors"), 5, 32, |i| (i * i % 251) as i64);
    place.ok(&quantize("five", ""));
    assert!(weights("five") == weights("few"));
    // Ids need no tokenizer, a text to judge on does.
    fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    place.ok(&quantize("ids", ""));
    assert!(weights("ids") == weights("few"));
    place.refused(&quantize("out", EVAL), 2, &["tokenizer.json"]);
}

#[test]
fn token_ids_that_cannot_be_used_are_refused() {
    let place = Place::new();
    let ids = place.path("ids.safetensors");
    let quantize = |rest: &str| format!("quantize model -o out --device cpu --group-size 32 --calibration ids.safetensors {rest}");
    write_ids(&ids, 4, 32, |i| (i % 260) as i64);
    place.refused(&quantize("--sequence-length 16"), 2, &["--sequence-length", "32 tokens", "ids.safetensors"]);
    place.refused(&quantize("--samples 5"), 2, &["--samples", "5", "4 windows", "ids.safetensors"]);
    place.refused(&quantize("--samples 0"), 2, &["--samples"]);
    let whole = fs::read(&ids).unwrap();
    for length in [whole.len() - 1, whole.len() / 2, 20, 0] {
        fs::write(&ids, &whole[..length]).unwrap();
        place.refused(&quantize(""), 2, &["ids.safetensors", "damaged"]);
    }
    write_ids(&ids, 4, 32, |i| if i == 77 { 260 } else { 0 });
    place.refused(&quantize(""), 2, &["ids.safetensors", "260"]);
    write_ids(&ids, 4, 32, |i| if i == 127 { -1 } else { 0 });
    place.refused(&quantize(""), 2, &["ids.safetensors", "-1"]);
    // Longer than the model can read.
    write_ids(&ids, 4, 65, |_| 1);
    place.refused(&quantize(""), 2, &["ids.safetensors", "64"]);
    fs::remove_file(&ids).unwrap();
    place.refused(&quantize(""), 2, &["ids.safetensors", "read"]);
    // A model's weights hold no ids; a text is not a token file whatever its name.
    fs::copy(place.path("model/model.safetensors"), &ids).unwrap();
    place.refused(&quantize(""), 2, &["ids.safetensors", "input_ids"]);
    fs::copy(place.path("text.txt"), &ids).unwrap();
    place.refused(&quantize(""), 2, &["ids.safetensors"]);
}

#[test]
fn every_method_makes_a_folder_that_can_be_judged() {
    let place = Place::with(&TinyLlama { n_layer: 1, d_model: 32, d_ff: 64, d_head: 8, ..model() });
    for method in ["aespa", "aespa-2024", "zfold", "gptq", "rtn"] {
        for group in ["32", "-1"] {
            let out = format!("{method}{group}");
            place.ok(&format!("quantize model -o {out} --method {method} --bits 3 --group-size {group} {SMALL}"));
            let report: Value = serde_json::from_slice(&fs::read(place.path(&out).join("quantization_report.json")).unwrap()).unwrap();
            assert_eq!(report["settings"]["method"]["name"], method);
            for layer in report["layers"].as_array().unwrap() {
                let (loss, rtn) = (layer["loss"].as_f64().unwrap(), layer["loss_rtn"].as_f64().unwrap());
                assert!(loss > 0.0 && loss <= rtn && (method == "rtn" || loss < rtn), "{method}: {layer}");
            }
            let eval = place.json(&format!("eval {out} --reference model --text text.txt --window 32 --windows 8 --json --device cpu"));
            let (perplexity, kl) = (eval["perplexity"].as_f64().unwrap(), eval["kl_divergence"].as_f64().unwrap());
            assert!(perplexity.is_finite() && kl > 0.0 && kl < 1.0, "{method}: {eval}");
        }
    }
}

/// Options that do not go together, or mean nothing, are refused before any work.
#[test]
fn choices_that_make_no_sense_are_refused() {
    let place = Place::new();
    let quantize = |rest: &str| format!("quantize model -o out --group-size 32 {SMALL} {rest}");
    for chain in ["nonsense", "", "descent", "gptq+", "gptq+nonsense", "gptq+descent+adaround", "gptq+adaround+adaround-blocks", "GPTQ"] {
        let mut command = place.command(&quantize(""));
        let output = command.arg("--rounding").arg(chain).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{chain}: {message}");
        assert!(message.contains("--rounding") && message.contains(chain), "{chain}: {message}");
    }
    for option in ["--sweeps 3", "--temperature 0.1", "--no-refit", "--refit-zero"] {
        place.refused(&quantize(&format!("--method gptq {option}")), 2, &["--sweeps", "descent"]);
        place.refused(&quantize(&format!("--method aespa --rounding gptq {option}")), 2, &["--sweeps", "descent"]);
    }
    place.refused(&quantize("--method gptq --orders 0"), 2, &["--orders"]);
    place.refused(&quantize("--method gptq --rounding nearest --orders 4"), 2, &["--orders", "gptq"]);
    place.refused(&quantize("--metric identity --rounding gptq"), 2, &["--metric", "identity"]);
    place.refused(&quantize("--metric identity --rounding gptq+descent"), 2, &["--metric", "identity"]);
    place.refused(&quantize("--metric identity --rounding nearest --inputs asymmetric"), 2, &["--inputs"]);
    for option in ["--metric", "--transform", "--inputs", "--scale"] {
        place.refused(&quantize(&format!("{option} nonsense")), 2, &[option, "nonsense"]);
    }
    for (option, values) in [("--alpha", ["2", "-1", "nan"]), ("--damping", ["-1", "nan", "inf"])] {
        for value in values {
            place.refused(&quantize(&format!("--method aespa {option}={value}")), 2, &[option]);
        }
    }
    place.refused(&quantize("--method gptq --alpha 0.5"), 2, &["--alpha", "asymmetric"]);
    place.refused(&quantize("--gguf-pre llama-bpe"), 2, &["--gguf-pre", "gguf-"]);
    place.refused(&quantize("--format mlx,gguf-q4_0 --gguf-pre="), 2, &["--gguf-pre", "empty"]);
    place.refused(&format!("plan model -o out --group-size 32 {SMALL} --restart"), 2, &["--restart", "plan"]);
    place.refused("plan --demo", 2, &["--demo", "MODEL_DIR"]);
    assert!(!place.path("out").exists());
}

/// A group that does not divide every width gives way to the largest smaller one that does, and the user is told.
#[test]
fn groups_shrink_where_they_do_not_divide() {
    let place = Place::with(&TinyLlama { d_model: 96, d_ff: 128, ..model() });
    let output = place.run(&format!("quantize model -o out --bits 4 --group-size 128 {SMALL} {EVAL}"));
    assert!(output.status.success() && String::from_utf8_lossy(&output.stderr).contains("groups of 32"), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("groups of 32"), "{output:?}");
    let report: Value = serde_json::from_slice(&fs::read(place.path("out/quantization_report.json")).unwrap()).unwrap();
    assert!(report["layers"].as_array().unwrap().iter().all(|l| l["group_size"] == 32), "{report}");
    let after = report["perplexity"]["after"]["perplexity"].as_f64().unwrap();
    assert_eq!(place.json("eval out --text text.txt --window 32 --windows 8 --json --device cpu")["perplexity"].as_f64(), Some(after));
}

/// What a format's readers cannot read is said, and once.
#[test]
fn warnings_come_once() {
    let place = Place::new();
    let output = place.run("quantize model -o out --method rtn --bits 3 --group-size 32 --device cpu");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.matches("cannot read 3 bits").count() == 1, "{said}");
}

#[test]
fn a_group_that_fits_nowhere_is_refused() {
    let place = Place::with(&TinyLlama { d_ff: 40, ..model() });
    place.refused("quantize model -o out --group-size 32 --method rtn --device cpu", 2, &["--group-size", "40", "down_proj", "-1"]);
}

#[test]
fn damaged_models_are_refused_with_file_and_tensor() {
    let rtn = "quantize model -o out --group-size 32 --method rtn --device cpu";
    let place = Place::new();
    let file = place.path("model/model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 100]).unwrap();
    place.refused(rtn, 2, &["model.safetensors"]);
    // A NaN in the very last weight is found before any work.
    let mut poisoned = bytes.clone();
    let end = poisoned.len();
    poisoned[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&file, &poisoned).unwrap();
    place.refused(rtn, 2, &["model.safetensors", "tensor"]);
    fs::write(&file, &bytes).unwrap();
    let config = place.path("model/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"llama\"", "\"lllama\"").replace("LlamaFor", "LllamaFor")).unwrap();
    place.refused(rtn, 2, &["config.json", "llama"]);
}

/// A disk that is full: the output's size is known, so it is refused before the work.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_refused_at_once() {
    let place = Place::new();
    fs::create_dir(place.path("small")).unwrap();
    let program = env!("CARGO_BIN_EXE_aespa-gpu");
    let script = format!(
        "mount -t tmpfs -o size=64k none small || exit 99; {program} quantize model -o small/out --group-size 32 --method rtn --device cpu; \
         code=$?; ls -A small; exit $code"
    );
    let output = Command::new("unshare").args(["-rm", "sh", "-c", &script]).current_dir(place.dir.path()).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() == Some(99) || message.contains("unshare") {
        eprintln!("no small file system can be mounted here: {message}");
        return;
    }
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("small"), "{message}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "something was left behind");
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_nothing_behind() {
    let place = Place::with(&TinyLlama { n_layer: 60, ..model() });
    let before = listing(place.dir.path());
    let arguments = "quantize model -o out --group-size 32 --device cpu --calibration text.txt --samples 256 --sequence-length 32";
    let mut child = place.command(arguments).stderr(std::process::Stdio::piped()).spawn().unwrap();
    // Wait until the output has been begun, so that there is something to clean up.
    let begun = std::time::Instant::now();
    while listing(place.dir.path()) == before {
        assert!(begun.elapsed().as_secs() < 60 && child.try_wait().unwrap().is_none(), "ended before it could be interrupted");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // The shell's own `kill`: a bare system has no program of that name.
    let killed = Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).status().unwrap();
    assert!(killed.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(listing(place.dir.path()), before);
}

#[test]
fn the_demo_compares_rtn_and_gptq() {
    let place = Place::new();
    let out = place.ok("quantize --demo -o demo --device cpu --samples 64");
    assert!(out.contains("rtn") && out.contains("gptq"), "{out}");
    let perplexity = |folder: &str| {
        let report: Value = serde_json::from_slice(&fs::read(place.path(folder).join("quantization_report.json")).unwrap()).unwrap();
        report["perplexity"]["after"]["perplexity"].as_f64().unwrap()
    };
    let (rtn, gptq) = (perplexity("demo/rtn-w3"), perplexity("demo/gptq-w3"));
    assert!(gptq < rtn && gptq > 39.0, "{gptq} {rtn}");
    place.refused("quantize --demo -o demo --device cpu", 2, &["demo", "--overwrite"]);
    place.refused("quantize --demo -o other --method rtn", 2, &["--demo", "--method"]);
}

#[test]
fn help_and_devices_tell_what_there_is() {
    let place = Place::new();
    let help = place.ok("quantize --help");
    for word in
        ["--method", "gptq", "rtn", "--bits", "--group-size", "--symmetric", "--format", "compressed-tensors", "dense", "--overwrite"]
    {
        assert!(help.contains(word), "{word}");
    }
    let devices = place.json("devices --json");
    assert!(devices["adapters"].is_array() && devices["auto"].is_string(), "{devices}");
    assert!(place.ok("devices").contains("--device auto takes"));
    assert!(place.ok("--version").contains(env!("CARGO_PKG_VERSION")));
}
