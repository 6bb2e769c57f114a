//! Byte-level BPE, which llama.cpp calls "gpt2".
//!
//! llama.cpp has no regular expressions of its own choice: it knows the pre-tokenizers of models by name. The name is found as its converter
//! finds it, by a hash of the ids of one text; of fine-tunes, whose added tokens change the hash, by the pre-tokenizer's own description.
//! Where neither is known the user can say it.

use super::{Described, Files, Token, Vocabulary, kind};
use crate::export::gguf::file::Value;
use crate::{Error, Result};
use serde_json::Value as Json;
use sha2::{Digest, Sha256};
use std::fmt::Write;

/// The text whose ids are hashed.
pub(super) const CHECK: &str = "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u{200d}🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL";

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

/// # Errors
/// Input, naming the file: it is damaged, or splits text in a way that no name of llama.cpp's is known for.
pub(super) fn describe(files: &Files<'_>, json: &Json) -> Result<Described> {
    let tokenizer = files.tokenizer()?;
    let wrong = |message: String| Error::input(tokenizer.path().display(), message);
    let vocabulary = vocabulary(files, json)?;
    let merges = super::merges(&json["model"]).ok_or_else(|| wrong("has merges that are no pairs".to_owned()))?;
    let name = match files.checkpoint.pre_tokenizer() {
        Some(name) => name,
        None => {
            let found = by_hash(&tokenizer.encode_with_special_tokens(CHECK)?).or_else(|| by_description(&json["pre_tokenizer"]));
            let unknown = "splits text in a way that llama.cpp has no name for that is known here; if you know it (that of the model that \
                this one was made from, such as llama-bpe), give it by --gguf-pre, or choose another --format";
            found.ok_or_else(|| wrong(unknown.to_owned()))?
        }
    };
    let keys = vec![
        ("model", Value::Text("gpt2".to_owned())),
        ("pre", Value::Text(name.to_owned())),
        // Byte-level texts hold no spaces.
        ("merges", Value::texts(merges.into_iter().map(|(left, right)| format!("{left} {right}")))),
    ];
    Ok(Described { path: tokenizer.path().to_owned(), vocabulary, keys, special_ids: [None; 4], adds_bos: false })
}

fn vocabulary(files: &Files<'_>, json: &Json) -> Result<Vocabulary> {
    let mut vocabulary = Vocabulary::new(files.checkpoint.spec().n_vocab);
    let wrong = |message: String| Error::input(files.dir().join("tokenizer.json").display(), message);
    for (text, id) in super::entries(json).map_err(wrong)? {
        vocabulary.put(id, Token::new(text, kind::NORMAL)).map_err(wrong)?;
    }
    for added in files.added_tokens()? {
        let kind = if added.special { kind::CONTROL } else { kind::USER_DEFINED };
        vocabulary.put(added.id, Token::new(added.text, kind)).map_err(wrong)?;
    }
    Ok(vocabulary)
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
