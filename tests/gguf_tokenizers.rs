//! Tokenizers in GGUF files: what their keys say, and what is refused. That llama.cpp makes the same tokens of texts is told by
//! `tests/conformance`.

mod common;

use aespa_gpu::export::{self, Writer};
use aespa_gpu::model::{Checkpoint, DEMO_FILES, Linear};
use aespa_gpu::quant::Scheme;
use aespa_gpu::{Error, Kind};
use common::rtn;
use common::tiny_model::TinyLlama;
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const STORIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/models/stories260k");

/// A metadata value, by a reader that shares no code with the program.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Number(f64),
    Text(String),
    List(Vec<Value>),
}

impl Value {
    fn list(&self) -> &[Value] {
        match self {
            Self::List(values) => values,
            other => panic!("{other:?} is no list"),
        }
    }
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn number<const N: usize>(&mut self) -> [u8; N] {
        let (taken, rest) = self.0.split_first_chunk().unwrap();
        self.0 = rest;
        *taken
    }

    fn len(&mut self) -> usize {
        u64::from_le_bytes(self.number()) as usize
    }

    fn text(&mut self) -> String {
        let n = self.len();
        let (taken, rest) = self.0.split_at(n);
        self.0 = rest;
        String::from_utf8(taken.to_vec()).unwrap()
    }

    fn value(&mut self, kind: u32) -> Value {
        match kind {
            4 => Value::Number(u32::from_le_bytes(self.number()).into()),
            5 => Value::Number(i32::from_le_bytes(self.number()).into()),
            6 => Value::Number(f32::from_le_bytes(self.number()).into()),
            7 => Value::Number(u8::from_le_bytes(self.number()).into()),
            8 => Value::Text(self.text()),
            9 => {
                let kind = u32::from_le_bytes(self.number());
                let n = self.len();
                Value::List((0..n).map(|_| self.value(kind)).collect())
            }
            other => panic!("no key needs a value of kind {other}"),
        }
    }
}

/// The keys below `tokenizer.ggml.` of the file in a folder.
fn keys(folder: &Path) -> BTreeMap<String, Value> {
    let file = fs::read(export::gguf_file(folder).unwrap()).unwrap();
    let n = u64::from_le_bytes(file[16..24].try_into().unwrap());
    let mut bytes = Bytes(&file[24..]);
    let mut keys = BTreeMap::new();
    for _ in 0..n {
        let key = bytes.text();
        let kind = u32::from_le_bytes(bytes.number());
        let value = bytes.value(kind);
        keys.extend(key.strip_prefix("tokenizer.ggml.").map(|key| (key.to_owned(), value)));
    }
    keys
}

/// A folder of a random model with the tokenizer files that a test writes into it.
struct Folder {
    root: TempDir,
}

impl Folder {
    fn new(n_vocab: usize) -> Self {
        let root = tempfile::tempdir().unwrap();
        TinyLlama { n_vocab, d_model: 32, d_ff: 32, d_head: 8, n_layer: 1, ..TinyLlama::default() }.write(&root.path().join("model"));
        Self { root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("model").join(name)
    }

    fn with(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        fs::write(self.path(name), content).unwrap();
        self
    }

    /// The keys of its file.
    fn written(&self, pre: Option<&str>) -> Result<BTreeMap<String, Value>, Error> {
        let out = tempfile::tempdir_in(self.root.path()).unwrap();
        let out = out.path().join("out");
        let checkpoint = Checkpoint::open(&self.root.path().join("model")).unwrap().with_pre_tokenizer(pre.map(str::to_owned));
        let written = write(&checkpoint, &out);
        assert_eq!(written.is_ok(), out.exists());
        written.map(|()| keys(&out))
    }

    /// Refused before any work, by the file's name and for that reason.
    fn refused(&self, pre: Option<&str>, subject: &str, reason: &str) {
        let e = self.written(pre).unwrap_err();
        assert!([Kind::Input, Kind::Usage].contains(&e.kind) && e.subject.ends_with(subject) && e.message.contains(reason), "{e}");
    }
}

fn write(checkpoint: &Checkpoint, out: &Path) -> Result<(), Error> {
    let (format, scheme, spec) = (export::find("gguf-q4_0")?, Scheme::new(4, -1, false)?, checkpoint.spec());
    let mut writer = Writer::create(out, false, format, checkpoint, scheme)?;
    let lattice = |linear: &Linear| (format.lattice)(scheme, spec, linear);
    rtn::quantize_model(checkpoint, lattice, |linear, packed| writer.put_linear(spec, linear, &packed))?;
    let staged = writer.complete(checkpoint)?;
    staged.verify()?;
    staged.publish(&[])?;
    let verdict = export::verify(out)?;
    assert_eq!(verdict.format, "gguf");
    Ok(())
}

/// A field of a protocol buffer: a number.
fn varint(number: u64, value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for mut part in [number << 3, value] {
        while part >= 0x80 {
            bytes.push(part as u8 | 0x80);
            part >>= 7;
        }
        bytes.push(part as u8);
    }
    bytes
}

/// The same: a text or message.
fn message(number: u64, content: &[u8]) -> Vec<u8> {
    let mut bytes = varint(number, content.len() as u64);
    // The tag's lowest bits say what follows; fields up to 15 have a tag of one byte.
    bytes[0] |= 2;
    bytes.extend(content);
    bytes
}

/// A `tokenizer.model`: text, score and type of pieces after the usual three and those of bytes, and fields of the two settings.
fn sentencepiece(pieces: &[(&str, f32, u64)], trainer: &[(u64, u64)], normalizer: &[(u64, u64)]) -> Vec<u8> {
    let bytes = (0..256).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6));
    let first = [("<unk>", 2), ("<s>", 3), ("</s>", 3)].map(|(text, kind)| (text.to_owned(), 0.0, kind));
    let rest = pieces.iter().map(|(text, score, kind)| ((*text).to_owned(), *score, *kind));
    let mut model = Vec::new();
    for (text, score, kind) in first.into_iter().chain(bytes).chain(rest) {
        let score: Vec<u8> = [0x15].into_iter().chain(f32::to_le_bytes(score)).collect();
        model.extend(message(1, &[message(1, text.as_bytes()), score, varint(3, kind)].concat()));
    }
    let fields = |fields: &[(u64, u64)]| fields.iter().flat_map(|(number, value)| varint(*number, *value)).collect::<Vec<_>>();
    model.extend(message(2, &fields(trainer)));
    model.extend(message(3, &fields(normalizer)));
    model
}

const PIECES: &[(&str, f32, u64)] =
    &[("▁a", 0.0, 1), ("ab", -1.0, 1), ("▁", -2.0, 1), ("a", -3.0, 1), ("b", -4.5, 1), ("<sep▁1>", 0.0, 4), ("", 0.0, 5)];
/// BPE, and no padding token.
const BPE: &[(u64, u64)] = &[(3, 2), (43, u64::MAX)];
/// Spaces stay.
const PLAIN: &[(u64, u64)] = &[(4, 0)];
/// Three special ones, bytes, those above, and two rows without a token.
const ROWS: usize = 3 + 256 + PIECES.len() + 2;

#[test]
fn merges_of_a_tokenizer_json_become_scores() {
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("out");
    write(&Checkpoint::open(Path::new(STORIES)).unwrap(), &out).unwrap();
    let keys = keys(&out);
    let text = |key: &str| match &keys[key] {
        Value::Text(text) => text.as_str(),
        other => panic!("{other:?}"),
    };
    assert_eq!((text("model"), text("pre")), ("llama", "default"));
    let number = |key: &str| match keys[key] {
        Value::Number(number) => number,
        ref other => panic!("{other:?}"),
    };
    let ids = ["unknown_token_id", "bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token", "add_space_prefix"].map(number);
    assert_eq!(ids, [0.0, 1.0, 2.0, 1.0, 0.0, 1.0]);
    assert!(!keys.contains_key("padding_token_id") && !keys.contains_key("merges"));
    let json: Json = serde_json::from_slice(&fs::read(Path::new(STORIES).join("tokenizer.json")).unwrap()).unwrap();
    let [tokens, scores, kinds] = ["tokens", "scores", "token_type"].map(|key| keys[key].list());
    assert_eq!((tokens.len(), scores.len(), kinds.len()), (512, 512, 512));
    for (id, token) in tokens.iter().enumerate() {
        let Value::Text(token) = token else { panic!("{token:?}") };
        assert_eq!(json["model"]["vocab"][token], id);
        let kind = [2.0, 3.0, 3.0].get(id).copied().unwrap_or(if token.starts_with("<0x") { 6.0 } else { 1.0 });
        assert_eq!(kinds[id], Value::Number(kind), "{token}");
        let merges = json["model"]["merges"].as_array().unwrap();
        let makes = |merge: &Json| format!("{}{}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap()) == *token;
        if let Some(rank) = merges.iter().position(makes) {
            assert_eq!(scores[id], Value::Number(-(rank as f64)), "{token}");
        }
    }
}

#[test]
fn pieces_of_a_tokenizer_model_are_stored() {
    let folder = Folder::new(ROWS).with("tokenizer.model", sentencepiece(PIECES, BPE, PLAIN));
    let keys = folder.written(None).unwrap();
    let text = |text: &str| Value::Text(text.to_owned());
    let ids = ["bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token", "add_eos_token", "add_space_prefix"];
    assert_eq!(ids.map(|key| keys[key].clone()), [1.0, 2.0, 0.0, 1.0, 0.0, 1.0].map(Value::Number));
    assert!(keys["model"] == text("llama") && !keys.contains_key("padding_token_id"));
    let last = |key: &str| keys[key].list()[ROWS - 9..].to_vec();
    // What users define is looked for before spaces are escaped.
    let padding = format!("[PAD{}]", ROWS - 1);
    assert_eq!(last("tokens")[..6], ["▁a", "ab", "▁", "a", "b", "<sep 1>"].map(text));
    assert_eq!(last("tokens")[8], text(&padding));
    assert_eq!(last("scores"), [0.0, -1.0, -2.0, -3.0, -4.5, 0.0, 0.0, -1000.0, -1000.0].map(Value::Number));
    assert_eq!(last("token_type"), [1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 5.0, 5.0, 5.0].map(Value::Number));
    assert_eq!(keys["token_type"].list()[..4], [2.0, 3.0, 3.0, 6.0].map(Value::Number));

    // No prefix, other ids, and what the files beside it add.
    let other = sentencepiece(PIECES, &[(3, 2), (41, 2), (42, 1), (43, 0)], &[(3, 0), (4, 0)]);
    let settings = json!({"add_bos_token": false, "add_eos_token": true, "added_tokens_decoder": {
        (ROWS - 2).to_string(): {"content": "<|im_end|>", "special": true}}, "eos_token": {"content": "<|im_end|>"}});
    let folder = Folder::new(ROWS)
        .with("tokenizer.model", other)
        .with("tokenizer_config.json", settings.to_string())
        .with("added_tokens.json", json!({"▁tool▁": ROWS - 1}).to_string());
    let keys = folder.written(None).unwrap();
    let expect = [2.0, (ROWS - 2) as f64, 0.0, 0.0, 1.0, 0.0].map(Value::Number);
    assert_eq!(ids.map(|key| keys[key].clone()), expect);
    assert_eq!(keys["padding_token_id"], Value::Number(0.0));
    assert_eq!(keys["tokens"].list()[ROWS - 2..], ["<|im_end|>", " tool "].map(text));
    assert_eq!(keys["token_type"].list()[ROWS - 2..], [3.0, 4.0].map(Value::Number));
}

#[test]
fn a_damaged_tokenizer_model_is_an_error_that_names_it() {
    let whole = sentencepiece(PIECES, BPE, PLAIN);
    let folder = Folder::new(ROWS);
    for n in (0..whole.len()).step_by(13).chain(whole.len() - 12..whole.len()) {
        fs::write(folder.path("tokenizer.model"), &whole[..n]).unwrap();
        folder.refused(None, "tokenizer.model", "");
    }
    // Single bytes: an error or another model, never a panic.
    for at in (0..whole.len()).step_by(17) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0xff;
        fs::write(folder.path("tokenizer.model"), damaged).unwrap();
        if let Err(e) = folder.written(None) {
            assert_eq!(e.kind, Kind::Input, "{e}");
        }
    }
    let infinite = sentencepiece(&[("x", f32::INFINITY, 1)], BPE, PLAIN);
    folder.with("tokenizer.model", infinite).refused(None, "tokenizer.model", "score inf");
}

#[test]
fn what_llama_cpp_would_tokenize_differently_is_refused() {
    let model = |pieces: &[(&str, f32, u64)], trainer, normalizer, reason: &str| {
        let folder = Folder::new(ROWS).with("tokenizer.model", sentencepiece(pieces, trainer, normalizer));
        folder.refused(None, "tokenizer.model", reason);
    };
    model(PIECES, &[], PLAIN, "Unigram");
    model(PIECES, &[(3, 4)], PLAIN, "characters");
    model(PIECES, BPE, &[], "remove_extra_whitespaces");
    model(PIECES, BPE, &[(4, 0), (5, 0)], "escape_whitespaces");
    model(PIECES, &[(3, 2), (24, 1)], PLAIN, "treat_whitespace_as_suffix");
    model(&[("▁▁", 0.0, 4)], BPE, PLAIN, "user-defined");
    model(&[("<s>", 0.0, 1)], BPE, PLAIN, "\"<s>\" with the ids 1 and 259");
    model(&[("x", 0.0, 1); ROWS], BPE, PLAIN, "the model has");
    // A byte less, under a name of the same length.
    let mut missing = sentencepiece(PIECES, BPE, PLAIN);
    let at = missing.windows(6).position(|w| w == b"<0xAB>").unwrap();
    missing[at + 1] = b'1';
    Folder::new(ROWS).with("tokenizer.model", missing).refused(None, "tokenizer.model", "<0xAB>");

    let json = |change: fn(&mut Json), reason: &str| {
        let mut json: Json = serde_json::from_slice(&fs::read(Path::new(STORIES).join("tokenizer.json")).unwrap()).unwrap();
        change(&mut json);
        Folder::new(512).with("tokenizer.json", json.to_string()).refused(None, "tokenizer.json", reason);
    };
    // llama.cpp joins "▁t" and "he" all the same.
    json(|t| t["model"]["merges"].as_array_mut().unwrap().retain(|m| *m != json!(["▁t", "he"])), "\"▁the");
    json(|t| t["normalizer"]["normalizers"].as_array_mut().unwrap().push(json!({"type": "Lowercase"})), "llama.cpp would make");
    json(|t| t["model"] = json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}), "byte-level BPE");

    // Two files that do not agree.
    let folder = Folder::new(512).with("tokenizer.json", fs::read(Path::new(STORIES).join("tokenizer.json")).unwrap());
    folder.with("tokenizer.model", sentencepiece(PIECES, BPE, PLAIN)).refused(None, "tokenizer.json", "remove the file that is wrong");
    // And none.
    Folder::new(512).refused(None, "tokenizer.json", "needs a tokenizer.json");
}

#[test]
fn the_name_of_a_pre_tokenizer_can_be_given() {
    let demo = DEMO_FILES.iter().find(|(name, _)| *name == "tokenizer.json").unwrap().1;
    let mut json: Json = serde_json::from_slice(demo).unwrap();
    let folder = Folder::new(2048).with("tokenizer.json", json.to_string());
    assert_eq!(folder.written(None).unwrap()["pre"], Value::Text("gpt-2".to_owned()));
    json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-z]"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]});
    let folder = folder.with("tokenizer.json", json.to_string());
    folder.refused(None, "tokenizer.json", "--gguf-pre");
    assert_eq!(folder.written(Some("llama-bpe")).unwrap()["pre"], Value::Text("llama-bpe".to_owned()));
    // SentencePiece has none.
    let stories = Folder::new(512).with("tokenizer.json", fs::read(Path::new(STORIES).join("tokenizer.json")).unwrap());
    stories.refused(Some("llama-bpe"), "--gguf-pre", "tokenizer.json");
}
