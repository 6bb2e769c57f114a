//! What llama.cpp relies on in a file besides what reading it needs.

use super::file::{ALIGNMENT, Value};
use super::reader::Gguf;
use crate::Result;
use crate::model::Weights;
use std::collections::HashSet;

const TOKENS: &str = "tokenizer.ggml.tokens";

/// # Errors
/// Input, naming the file, and the key or tensor.
pub fn check(gguf: &Gguf) -> Result<()> {
    tensors_follow_each_other(gguf)?;
    tokens_are_complete(gguf)?;
    tokens_differ(gguf)?;
    if gguf.value("tokenizer.ggml.model").and_then(Value::text) == Some("llama") {
        scores_are_sound(gguf)?;
        bytes_have_tokens(gguf)?;
    }
    Ok(())
}

/// The reader of llama.cpp wants every offset to be the padded sum of the sizes before it.
fn tensors_follow_each_other(gguf: &Gguf) -> Result<()> {
    let mut end = 0;
    for (name, offset, bytes) in gguf.places() {
        if offset != end {
            return Err(gguf.error(name, format!("lies at {offset} of the data and not at {end}, behind the tensor before")));
        }
        end += bytes.next_multiple_of(ALIGNMENT);
    }
    Ok(())
}

/// As many tokens as rows, a kind for each, and special ids among them.
fn tokens_are_complete(gguf: &Gguf) -> Result<()> {
    let rows = gguf.spec().n_vocab;
    let len = |key: &str| match gguf.value(key) {
        Some(Value::Array(_, values)) => Ok(values.len()),
        _ => Err(gguf.wrong_key(key, "is missing or no list")),
    };
    for key in [TOKENS, "tokenizer.ggml.token_type"] {
        let found = len(key)?;
        if found != rows {
            return Err(gguf.wrong_key(key, &format!("has {found} entries, and the model has {rows} tokens")));
        }
    }
    for key in ["tokenizer.ggml.model", "tokenizer.ggml.pre"] {
        if gguf.value(key).and_then(Value::text).is_none() {
            return Err(gguf.wrong_key(key, "is missing"));
        }
    }
    if gguf.value("tokenizer.ggml.model").and_then(Value::text) == Some("gpt2") {
        len("tokenizer.ggml.merges")?;
    }
    for name in ["bos", "eos", "unknown", "padding"] {
        let key = format!("tokenizer.ggml.{name}_token_id");
        if gguf.value(&key).is_some_and(|id| id.whole().is_none_or(|id| id >= rows as u64)) {
            return Err(gguf.wrong_key(&key, "is no token of the model"));
        }
    }
    Ok(())
}

/// A list, which is there.
fn list<'g>(gguf: &'g Gguf, key: &str) -> &'g [Value] {
    match gguf.value(key) {
        Some(Value::Array(_, values)) => values,
        _ => &[],
    }
}

/// llama.cpp aborts where two ids have the same text.
fn tokens_differ(gguf: &Gguf) -> Result<()> {
    let mut texts = HashSet::new();
    match list(gguf, TOKENS).iter().filter_map(Value::text).find(|text| !texts.insert(*text)) {
        Some(text) => Err(gguf.wrong_key(TOKENS, &format!("has {text:?} twice"))),
        None => Ok(()),
    }
}

/// SentencePiece merges by them: one for each token, and each can be compared.
fn scores_are_sound(gguf: &Gguf) -> Result<()> {
    let key = "tokenizer.ggml.scores";
    let (scores, rows) = (list(gguf, key), gguf.spec().n_vocab);
    if scores.len() != rows {
        return Err(gguf.wrong_key(key, &format!("has {} entries, and the model has {rows} tokens", scores.len())));
    }
    let sound = |score: &Value| matches!(score, Value::F32(score) if score.is_finite());
    match scores.iter().position(|score| !sound(score)) {
        Some(at) => Err(gguf.wrong_key(key, &format!("is no finite f32 at {at}"))),
        None => Ok(()),
    }
}

/// llama.cpp spells characters that are no tokens by those of bytes, and throws where one is missing.
fn bytes_have_tokens(gguf: &Gguf) -> Result<()> {
    const BYTE: u64 = 6;
    let kinds = list(gguf, "tokenizer.ggml.token_type").iter().map(Value::whole);
    let texts = list(gguf, TOKENS).iter().filter_map(Value::text);
    let bytes: HashSet<&str> = texts.zip(kinds).filter(|(_, kind)| *kind == Some(BYTE)).map(|(text, _)| text).collect();
    match (0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")).find(|text| !bytes.contains(text.as_str())) {
        Some(text) => Err(gguf.wrong_key(TOKENS, &format!("has no byte {text}"))),
        None => Ok(()),
    }
}
