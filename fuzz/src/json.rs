//! JSON with one value, key or entry changed.

use crate::choice::Choice;
use serde_json::{Map, Value, json};

/// Keys that configs, headers, indexes and tokenizers have.
const KEYS: &[&str] = &[
    "model_type",
    "architectures",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "truncate",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "sliding_window",
    "layer_types",
    "num_local_experts",
    "quantization_config",
    "quantization",
    "quant_method",
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "checkpoint_format",
    "lm_head",
    "dynamic",
    "zero_point",
    "version",
    "modules_to_not_convert",
    "ignore",
    "format",
    "config_groups",
    "group_1",
    "targets",
    "weights",
    "num_bits",
    "symmetric",
    "strategy",
    "actorder",
    "input_activations",
    "mode",
    "quantization_status",
    "kv_cache_scheme",
    "model.embed_tokens",
    "lm_head.weight",
    "weight_map",
    "metadata",
    "__metadata__",
    "dtype",
    "shape",
    "data_offsets",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
    "vocab",
    "merges",
    "unk_token",
    "byte_fallback",
    "dropout",
    "content",
    "id",
    "special",
    "pattern",
    "behavior",
    "scores",
];

const WORDS: &[&str] = &[
    "",
    "llama",
    "mistral",
    "LlamaForCausalLM",
    "linear",
    "dynamic",
    "llama3",
    "yarn",
    "default",
    "gptq",
    "gptq_v2",
    "awq",
    "gemm",
    "mlx",
    "affine",
    "compressed-tensors",
    "pack-quantized",
    "int-quantized",
    "token",
    "compressed",
    "Linear",
    "re:.*",
    "re:(",
    "group",
    "channel",
    "static",
    "int",
    "silu",
    "full_attention",
    "F32",
    "F16",
    "BF16",
    "I32",
    "I8",
    "U32",
    "I64",
    "U8",
    "F4",
    "F8_E4M3",
    "BOOL",
    "BPE",
    "Unigram",
    "WordLevel",
    "ByteLevel",
    "Metaspace",
    "Split",
    "Sequence",
    "model-00001-of-00002.safetensors",
    "../model.safetensors",
    "\u{0}",
    "é\u{10ffff}",
];

/// Changes one or a few things.
pub fn mutate(root: &mut Value, choice: &mut Choice) {
    for _ in 0..1 + choice.below(3) {
        let donor = pick(root, choice).clone();
        change(pick_mut(root, choice), donor, choice);
    }
}

/// Any value of the tree, deep ones more often than not.
fn pick<'v>(value: &'v Value, choice: &mut Choice) -> &'v Value {
    let inner: Vec<&Value> = match value {
        Value::Array(items) => items.iter().collect(),
        Value::Object(map) => map.values().collect(),
        _ => Vec::new(),
    };
    if inner.is_empty() || choice.one_in(6) { value } else { pick(inner[choice.below(inner.len())], choice) }
}

fn pick_mut<'v>(value: &'v mut Value, choice: &mut Choice) -> &'v mut Value {
    let len = match value {
        Value::Array(items) => items.len(),
        Value::Object(map) => map.len(),
        _ => 0,
    };
    if len == 0 || choice.one_in(4) {
        return value;
    }
    let at = choice.below(len);
    let inner = match value {
        Value::Array(items) => &mut items[at],
        Value::Object(map) => map.values_mut().nth(at).expect("within the length"),
        _ => unreachable!("others have no length"),
    };
    pick_mut(inner, choice)
}

fn change(value: &mut Value, donor: Value, choice: &mut Choice) {
    if choice.one_in(8) {
        *value = donor;
        return;
    }
    match value {
        Value::Object(map) if !choice.one_in(10) => change_object(map, donor, choice),
        Value::Array(items) if !choice.one_in(10) => {
            let at = choice.below(items.len());
            match choice.below(4) {
                0 => items.insert(at, donor),
                1 if !items.is_empty() => drop(items.remove(at)),
                2 if !items.is_empty() => items.push(items[at].clone()),
                _ => items.push(any(choice)),
            }
        }
        Value::Number(number) if !choice.one_in(4) => {
            *value = match number.as_u64() {
                Some(n) => choice.near(n).into(),
                None => choice.float().into(),
            };
        }
        _ => *value = any(choice),
    }
}

fn change_object(map: &mut Map<String, Value>, donor: Value, choice: &mut Choice) {
    let key = map.keys().nth(choice.below(map.len())).cloned().unwrap_or_default();
    match choice.below(5) {
        0 => drop(map.shift_remove(&key)),
        1 => {
            if let Some(value) = map.shift_remove(&key) {
                map.insert(if choice.one_in(2) { format!("{key}0") } else { choice.of(KEYS).to_owned() }, value);
            }
        }
        2 => drop(map.insert(choice.of(KEYS).to_owned(), donor)),
        3 => {
            if let Some(value) = map.get(&key).cloned() {
                map.insert(key.replace(".0.", ".1."), value);
            }
        }
        _ => drop(map.insert(choice.of(KEYS).to_owned(), any(choice))),
    }
}

fn any(choice: &mut Choice) -> Value {
    match choice.below(9) {
        0 => Value::Null,
        1 => json!([]),
        2 => json!({}),
        3 => choice.one_in(2).into(),
        4 => choice.float().into(),
        5 => (-(choice.below(200) as i64)).into(),
        6 => choice.of(WORDS).into(),
        _ => choice.number().into(),
    }
}
