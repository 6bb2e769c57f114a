//! What a GGUF file says about a model of the `llama` architecture besides its tokenizer, and that read back.

use super::file::{Head, Value};
use super::mixes::Mix;
use super::tokenizer;
use crate::model::{Checkpoint, Config, ModelSpec, Scaling, spec_of};
use crate::{Error, Result};
use serde_json::json;
use std::path::Path;

pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// All keys, in the order of llama.cpp's own converter.
///
/// # Errors
/// Those of the tokenizer, and a usage error for a model that llama.cpp has no keys for.
pub fn write(checkpoint: &Checkpoint, mix: &Mix) -> Result<Vec<(String, Value)>> {
    let spec = checkpoint.spec();
    let count = |n: usize| u32::try_from(n).map(Value::U32).map_err(|_| Error::internal("GGUF", format!("{n} is no count")));
    let dir = checkpoint.dir().canonicalize().unwrap_or_else(|_| checkpoint.dir().to_owned());
    let name = dir.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
    let mut keys = vec![
        ("general.architecture", Value::Text("llama".to_owned())),
        ("general.type", Value::Text("model".to_owned())),
        ("general.name", Value::Text(name)),
        ("general.file_type", Value::U32(mix.file_type)),
        ("general.quantization_version", Value::U32(2)),
        ("llama.block_count", count(spec.n_layer)?),
        ("llama.context_length", count(spec.max_positions)?),
        ("llama.embedding_length", count(spec.d_model)?),
        ("llama.feed_forward_length", count(spec.d_ff)?),
        ("llama.attention.head_count", count(spec.n_head)?),
        ("llama.attention.head_count_kv", count(spec.n_kv)?),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(spec.norm_eps)),
        ("llama.attention.key_length", count(spec.d_head)?),
        ("llama.attention.value_length", count(spec.d_head)?),
        ("llama.rope.freq_base", Value::F32(spec.rope.theta as f32)),
        ("llama.rope.dimension_count", count(spec.d_head)?),
        ("llama.vocab_size", count(spec.n_vocab)?),
    ];
    match spec.rope.scaling {
        // What changes single frequencies is a tensor.
        Scaling::Default | Scaling::Llama3 { .. } | Scaling::Factors(_) => {}
        Scaling::Linear { factor } => {
            keys.push(("llama.rope.scaling.type", Value::Text("linear".to_owned())));
            keys.push(("llama.rope.scaling.factor", Value::F32(factor as f32)));
        }
        Scaling::Yarn { factor, beta_fast, beta_slow, original_positions, truncate, attention_factor } => {
            let not_theirs = [
                (factor < 1.0, format!("the factor {factor}, where GGUF has none below 1")),
                (beta_fast != 32.0, format!("`beta_fast` {beta_fast}, and llama.cpp always takes 32")),
                (beta_slow != 1.0, format!("`beta_slow` {beta_slow}, and llama.cpp always takes 1")),
                (!truncate, "`truncate` false, and llama.cpp always truncates".to_owned()),
            ];
            if let Some((_, what)) = not_theirs.iter().find(|(set, _)| *set) {
                return Err(refused(&format!("YaRN with {what}")));
            }
            keys.push(("llama.rope.scaling.type", Value::Text("yarn".to_owned())));
            keys.push(("llama.rope.scaling.factor", Value::F32(factor as f32)));
            keys.push(("llama.rope.scaling.original_context_length", count(original_positions)?));
            let own = (attention_factor / yarn_temperature(factor)) as f32;
            if own != 1.0 {
                keys.push(("llama.rope.scaling.attn_factor", Value::F32(own)));
            }
        }
        Scaling::Dynamic { .. } => return Err(refused("a theta that grows with the text (dynamic NTK)")),
    }
    let mut keys: Vec<(String, Value)> = keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    keys.extend(tokenizer::metadata(checkpoint)?);
    Ok(keys)
}

/// A `rope_scaling` that llama.cpp has no keys for, or ignores the keys of in this architecture.
fn refused(what: &str) -> Error {
    Error::usage("--format", format!("gguf cannot store what `rope_scaling` asks for, {what}; mlx and the safetensors formats take it"))
}

/// What llama.cpp multiplies cos and sin with under YaRN, besides `attn_factor`. (In older versions it is a part of the rotation itself, in
/// newer ones it is also taken out there and put in again before.)
fn yarn_temperature(factor: f64) -> f64 {
    0.1 * factor.max(1.0).ln() + 1.0
}

/// The factors by which frequencies are divided, [d_head / 2], where they differ.
pub fn rope_factors(spec: &ModelSpec) -> Option<Vec<f32>> {
    match &spec.rope.scaling {
        Scaling::Llama3 { .. } => {
            let scaled = spec.rope.inv_freq(spec.d_head, spec.max_positions);
            let plain = (0..spec.d_head / 2).map(|j| spec.rope.theta.powf(-2.0 * j as f64 / spec.d_head as f64));
            Some(plain.zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect())
        }
        Scaling::Factors(factors) => Some(factors.iter().map(|f| *f as f32).collect()),
        _ => None,
    }
}

/// The model that a file describes. `factors`: those of its own tensor.
pub fn read(path: &Path, head: &Head, factors: Option<Vec<f32>>) -> Result<ModelSpec> {
    let wrong = |key: &str, what: &str| Error::input(path.display(), format!("`{key}` {what}"));
    let get = |key: &str| head.metadata.get(key);
    let architecture = get("general.architecture").and_then(Value::text).unwrap_or("no architecture");
    if architecture != "llama" {
        return Err(wrong("general.architecture", &format!("is {architecture:?}; only \"llama\" can be read")));
    }
    let whole = |key: &str| get(key).and_then(Value::whole).ok_or_else(|| wrong(key, "is missing or no count"));
    let has = |name: &str| head.tensors.iter().any(|t| t.name == name);
    let embedding = head.tensors.iter().find(|t| t.name == "token_embd.weight").ok_or_else(|| wrong("token_embd.weight", "is missing"))?;
    let (d_model, n_head) = (whole("llama.embedding_length")?, whole("llama.attention.head_count")?);
    let d_head = match get("llama.attention.key_length").and_then(Value::whole) {
        Some(d_head) => d_head,
        None => d_model.checked_div(n_head).ok_or_else(|| wrong("llama.attention.head_count", "is 0"))?,
    };
    if get("llama.rope.dimension_count").and_then(Value::whole).is_some_and(|d| d != d_head) {
        return Err(wrong("llama.rope.dimension_count", "is not the heads' width: heads that are rotated in part cannot be read"));
    }
    // JSON, which the config is, has none that are not finite: they would pass for missing, and a default for them.
    let number = |key: &str| match get(key) {
        None => Ok(None),
        Some(value) => value.number().filter(|n| n.is_finite()).map(Some).ok_or_else(|| wrong(key, "is no finite number")),
    };
    let eps = number("llama.attention.layer_norm_rms_epsilon")?;
    let mut config = json!({
        "model_type": "llama",
        "hidden_size": d_model,
        "intermediate_size": whole("llama.feed_forward_length")?,
        "num_hidden_layers": whole("llama.block_count")?,
        "num_attention_heads": n_head,
        "num_key_value_heads": get("llama.attention.head_count_kv").and_then(Value::whole).unwrap_or(n_head),
        "head_dim": d_head,
        "vocab_size": embedding.shape.first(),
        "max_position_embeddings": whole("llama.context_length")?,
        "rms_norm_eps": eps.ok_or_else(|| wrong("llama.attention.layer_norm_rms_epsilon", "is missing"))?,
        "rope_theta": number("llama.rope.freq_base")?.unwrap_or(10_000.0),
        "tie_word_embeddings": !has("output.weight"),
        "attention_bias": has("blk.0.attn_q.bias"),
        "mlp_bias": has("blk.0.ffn_up.bias"),
    });
    let text = |key: &str| get(key).map_or(Ok("none"), |value| value.text().ok_or_else(|| wrong(key, "is no text")));
    match text("llama.rope.scaling.type")? {
        "none" => {}
        "linear" => {
            let factor = number("llama.rope.scaling.factor")?;
            config["rope_scaling"] = json!({ "type": "linear", "factor": factor });
        }
        // llama.cpp reads no further keys (`yarn_beta_fast` and such) in this architecture.
        "yarn" => {
            if factors.is_some() {
                return Err(wrong(ROPE_FACTORS, "and YaRN cannot be read together"));
            }
            let factor = number("llama.rope.scaling.factor")?.filter(|f| *f != 0.0).unwrap_or(1.0);
            config["rope_scaling"] = json!({
                "type": "yarn",
                "factor": factor,
                "attention_factor": number("llama.rope.scaling.attn_factor")?.unwrap_or(1.0) * yarn_temperature(factor),
                "original_max_position_embeddings": get("llama.rope.scaling.original_context_length").and_then(Value::whole),
            });
        }
        other => return Err(wrong("llama.rope.scaling.type", &format!("is {other:?}, which cannot be read"))),
    }
    let mut spec = spec_of(&Config::parse(path.to_owned(), config.to_string().as_bytes())?)?;
    if let Some(factors) = factors {
        if factors.len() != spec.d_head / 2 || factors.iter().any(|f| !f.is_finite() || *f <= 0.0) {
            return Err(wrong(ROPE_FACTORS, "are no factors of this model's frequencies"));
        }
        spec.rope.scaling = Scaling::Factors(factors.into_iter().map(f64::from).collect());
    }
    Ok(spec)
}
