//! What llama.cpp relies on in a file besides what reading it needs.

use super::file::{ALIGNMENT, Value};
use super::reader::Gguf;
use crate::Result;
use crate::model::Weights;

/// # Errors
/// Input, naming the file, and the key or tensor.
pub fn check(gguf: &Gguf) -> Result<()> {
    tensors_follow_each_other(gguf)?;
    tokens_are_complete(gguf)
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
    for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type"] {
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
