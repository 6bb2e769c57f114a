//! A folder's tokenizer as metadata. Byte-level BPE only so far; SentencePiece models are refused.
//!
//! llama.cpp has no regular expressions of its own choice: it knows the pre-tokenizers of models by name. The name is found as its converter
//! finds it, by a hash of the ids of one text; of fine-tunes, whose added tokens change the hash, by the pre-tokenizer's own description.

use super::file::Value;
use crate::model::Checkpoint;
use crate::text::Tokenizer;
use crate::{Error, Result};
use serde_json::Value as Json;
use sha2::{Digest, Sha256};
use std::fmt::Write;

/// The text whose ids are hashed.
const CHECK: &str = "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u{200d}🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL";

/// First bytes of hashes and the names they mean.
const HASHES: &[(&str, &str)] = &[
    ("0ef9807a4087ebef", "llama-bpe"),
    ("e636dc30a262dcc0", "qwen2"),
    ("d4540891389ea895", "qwen2"),
    ("d30d75d9059f1aa2", "qwen35"),
    ("1444df51289cfa80", "qwen35"),
    ("63b97e4253352e6f", "tekken"),
    ("855059429035d75a", "smollm"),
    ("3ce83efda5659b07", "gpt-2"),
    ("0fe1cf6eda062318", "gpt-2"),
    ("ccc2ef013c104be7", "gpt-4o"),
    ("d353350c764d8c3b", "llama4"),
    ("049ecf7629871e30", "deepseek-llm"),
    ("9d032fcbd5501f4a", "falcon3"),
    ("fcace8b9cac38ce8", "phi-2"),
    ("b6dc8df998e1cfbd", "olmo"),
    ("9c2227e4dd922002", "command-r"),
    ("35d91631860c815f", "starcoder"),
    ("32d85c31273f8019", "stablelm2"),
    ("a1336059768a55c9", "glm4"),
];

/// The splits of pre-tokenizers, where they have one, and the names of models that have it.
const SPLITS: &[(&str, &str)] = &[
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "llama-bpe"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "qwen2"),
];

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// All keys that begin with `tokenizer.`.
///
/// # Errors
/// Input, naming the file: a kind of tokenizer that cannot be stored, or one that no name of llama.cpp's is known for.
pub fn metadata(checkpoint: &Checkpoint) -> Result<Vec<(String, Value)>> {
    let dir = checkpoint.dir();
    let tokenizer = Tokenizer::open(dir)?;
    let wrong = |message: String| Error::input(tokenizer.path().display(), message);
    let json = read(&dir.join("tokenizer.json"))?.unwrap_or_default();
    let model = &json["model"];
    if model["type"] != "BPE" || model["byte_fallback"] == true || !mentions(&json["pre_tokenizer"], "ByteLevel") {
        return Err(wrong("is no byte-level BPE, the only kind that can be stored as GGUF so far; choose another --format".to_owned()));
    }
    let n_vocab = checkpoint.spec().n_vocab;
    let (tokens, kinds) = vocabulary(&json, n_vocab).map_err(wrong)?;
    let merges = merges(model).ok_or_else(|| wrong("has merges that are no pairs".to_owned()))?;
    let ids = tokenizer.encode_with_special_tokens(CHECK)?;
    let name = by_hash(&ids).or_else(|| by_description(&json["pre_tokenizer"]));
    let name = name.ok_or_else(|| wrong("splits text in a way that llama.cpp has no name for that is known here".to_owned()))?;

    let mut keys = vec![
        ("model", Value::Text("gpt2".to_owned())),
        ("pre", Value::Text(name.to_owned())),
        ("tokens", Value::texts(tokens)),
        ("token_type", Value::i32s(kinds)),
        ("merges", Value::texts(merges)),
    ];
    let settings = read(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let special = |key: &str| {
        let content = settings[key].as_str().or_else(|| settings[key]["content"].as_str());
        let of_config = checkpoint.config().json().get(&key.replace("token", "token_id")).and_then(Json::as_u64);
        content.and_then(|text| tokenizer.id(text)).or_else(|| of_config.and_then(|id| u32::try_from(id).ok()))
    };
    let bos = special("bos_token");
    let specials = [
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ];
    for (key, name) in specials {
        if let Some(id) = special(key).filter(|id| (*id as usize) < n_vocab) {
            keys.push((name, Value::U32(id)));
        }
    }
    let adds_bos = bos.is_some() && tokenizer.encode_with_special_tokens("a")?.first().copied() == bos;
    keys.push(("add_bos_token", Value::Bool(adds_bos)));
    let mut keys: Vec<(String, Value)> = keys.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    let file = std::fs::read_to_string(dir.join("chat_template.jinja")).ok();
    if let Some(template) = settings["chat_template"].as_str().map(str::to_owned).or(file) {
        keys.push(("tokenizer.chat_template".to_owned(), Value::Text(template)));
    }
    Ok(keys)
}

fn read(path: &std::path::Path) -> Result<Option<Json>> {
    let Ok(bytes) = std::fs::read(path) else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::input(path.display(), "is not valid JSON").caused_by(e))
}

/// Does a description hold a part of this type?
fn mentions(description: &Json, kind: &str) -> bool {
    match description {
        Json::Object(map) => map.get("type").is_some_and(|t| t == kind) || map.values().any(|v| mentions(v, kind)),
        Json::Array(parts) => parts.iter().any(|v| mentions(v, kind)),
        _ => false,
    }
}

/// Texts and kinds of all ids, as many as the embedding has rows.
fn vocabulary(json: &Json, n_vocab: usize) -> std::result::Result<(Vec<String>, Vec<i32>), String> {
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; n_vocab];
    let mut put = |id: u64, text: &str, kind: i32| match usize::try_from(id).ok().and_then(|id| tokens.get_mut(id)) {
        Some(slot) => {
            *slot = Some((text.to_owned(), kind));
            Ok(())
        }
        None => Err(format!("has the token {text:?} with the id {id}, and the model has {n_vocab}")),
    };
    for (text, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        put(id.as_u64().ok_or_else(|| format!("has a wrong id for {text:?}"))?, text, NORMAL)?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let (Some(id), Some(text)) = (added["id"].as_u64(), added["content"].as_str()) else {
            return Err("has a damaged added token".to_owned());
        };
        put(id, text, if added["special"] == true { CONTROL } else { USER_DEFINED })?;
    }
    Ok(tokens.into_iter().enumerate().map(|(id, token)| token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED))).unzip())
}

/// Pairs as "left right". Byte-level texts hold no spaces.
fn merges(model: &Json) -> Option<Vec<String>> {
    let pair = |merge: &Json| match merge {
        Json::String(pair) => Some(pair.clone()),
        Json::Array(pair) => Some(format!("{} {}", pair.first()?.as_str()?, pair.get(1)?.as_str()?)),
        _ => None,
    };
    model["merges"].as_array()?.iter().map(pair).collect()
}

fn by_hash(ids: &[u32]) -> Option<&'static str> {
    let list = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    let digest = Sha256::digest(format!("[{list}]"));
    let hex = digest.iter().take(8).fold(String::new(), |mut hex, byte| {
        // Writing to a text cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    HASHES.iter().find(|(hash, _)| *hash == hex).map(|(_, name)| *name)
}

/// By the parts of a pre-tokenizer: the byte level by itself splits as GPT-2 does.
fn by_description(pre: &Json) -> Option<&'static str> {
    let own = std::slice::from_ref(pre);
    let parts = pre["pretokenizers"].as_array().map_or(own, Vec::as_slice);
    match parts {
        [level] if level["type"] == "ByteLevel" && level["use_regex"] != false => Some("gpt-2"),
        [digits, level] if digits["type"] == "Digits" && digits["individual_digits"] == true && level["use_regex"] != false => {
            Some("smollm")
        }
        [split, _] => SPLITS.iter().find(|(regex, _)| split["pattern"]["Regex"] == *regex).map(|(_, name)| *name),
        _ => None,
    }
}
