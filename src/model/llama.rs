//! The LLaMA architecture: RMS norms, rotary positions, grouped queries, a gated MLP, no dropout and no experts.
//!
//! Defaults are those of `transformers`' LlamaConfig and MistralConfig; keys without a sensible default must be given.

use super::config::{Config, Section};
use super::family::Family;
use super::graph::{Activation, Block, Fold, FoldSource, Input, Linear, ModelSpec, Norm, NormKind, Role, Tied};
use super::rope::Rope;
use crate::Result;
use crate::tensor::Dtype;

pub const FAMILY: Family = Family {
    name: "llama",
    model_types: &["llama", "mistral"],
    architectures: &["LlamaForCausalLM", "MistralForCausalLM"],
    about: "LLaMA 1, 2, 3 and 3.x, SmolLM2, TinyLlama, Mistral without sliding window, and other checkpoints with this layout",
    spec,
};

/// Far above every published model, and small enough that no product of two overflows and no list of blocks fills the memory.
const MAX_WIDTH: usize = 1 << 18;
const MAX_VOCAB: usize = 1 << 24;
const MAX_LAYERS: usize = 4096;
const MAX_POSITIONS: usize = 1 << 31;

/// Sizes that the blocks are built from.
struct Dims {
    d_model: usize,
    d_ff: usize,
    n_head: usize,
    n_kv: usize,
    d_head: usize,
    attention_bias: bool,
    mlp_bias: bool,
}

fn spec(config: &Config) -> Result<ModelSpec> {
    let root = config.root();
    let mistral = root.text("model_type")? == Some("mistral");
    let max_positions = root.size("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(if mistral { 4096 * 32 } else { 2048 });
    refuse_other_functions(&root, mistral, max_positions)?;

    let dims = dims(&root, mistral)?;
    let n_layer = root.required_size("num_hidden_layers", MAX_LAYERS)?;
    let n_vocab = root.required_size("vocab_size", MAX_VOCAB)?;
    let norm_eps = root.number_where("rms_norm_eps", "between 0 and 1", |e| (1e-30..1.0).contains(&e))?.unwrap_or(1e-6);
    let tied_head = root.flag("tie_word_embeddings")?.unwrap_or(false);
    let embedding = Linear {
        role: Role::Embedding,
        block: None,
        module: "model.embed_tokens".to_owned(),
        d_out: n_vocab,
        d_in: dims.d_model,
        bias: false,
        input: Input::FinalNorm,
    };
    let head = if tied_head { embedding.module.clone() } else { "lm_head".to_owned() };
    Ok(ModelSpec {
        family: FAMILY.name,
        d_model: dims.d_model,
        d_ff: dims.d_ff,
        n_head: dims.n_head,
        n_kv: dims.n_kv,
        d_head: dims.d_head,
        n_vocab,
        n_layer,
        max_positions,
        norm_kind: NormKind::Rms,
        norm_eps: norm_eps as f32,
        activation: Activation::Silu,
        rope: Rope::from_config(config, max_positions)?,
        tied_head,
        // The reader replaces it by what the files say.
        dtype: Dtype::F32,
        final_norm: norm("model.norm".to_owned()),
        head: Linear { role: Role::Head, module: head, ..embedding.clone() },
        embedding,
        blocks: (0..n_layer).map(|index| block(index, &dims)).collect(),
    })
}

fn dims(root: &Section<'_>, mistral: bool) -> Result<Dims> {
    let d_model = root.required_size("hidden_size", MAX_WIDTH)?;
    let n_head = root.required_size("num_attention_heads", MAX_WIDTH)?;
    let n_kv_default = if mistral && !root.mentions("num_key_value_heads") { 8 } else { n_head };
    let n_kv = root.size("num_key_value_heads", MAX_WIDTH)?.unwrap_or(n_kv_default);
    if n_head % n_kv != 0 {
        let message = format!("is {n_kv}, which does not divide `num_attention_heads` {n_head}");
        return Err(root.error("num_key_value_heads", message));
    }
    let d_head = match root.size("head_dim", MAX_WIDTH)? {
        Some(d_head) => d_head,
        None if d_model % n_head == 0 => d_model / n_head,
        None => return Err(root.error("num_attention_heads", format!("is {n_head}, which does not divide `hidden_size` {d_model}"))),
    };
    if d_head % 2 != 0 {
        return Err(root.error("head_dim", format!("must be even, since rotary embeddings turn pairs, but is {d_head}")));
    }
    if n_head * d_head > MAX_WIDTH {
        return Err(root.error("head_dim", format!("makes {n_head} heads of {d_head}, wider than {MAX_WIDTH} in all")));
    }
    Ok(Dims {
        d_model,
        d_ff: root.required_size("intermediate_size", MAX_WIDTH)?,
        n_head,
        n_kv,
        d_head,
        attention_bias: root.flag("attention_bias")?.unwrap_or(false),
        mlp_bias: root.flag("mlp_bias")?.unwrap_or(false),
    })
}

/// Refuses configs whose function is not the one that we compute.
fn refuse_other_functions(root: &Section<'_>, mistral: bool, max_positions: usize) -> Result<()> {
    match root.text("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(other) => return Err(root.error("hidden_act", format!("is {other:?}; only silu is supported"))),
    }
    for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
        if let Some(experts) = root.get(key).filter(|v| v.as_u64() != Some(0)) {
            return Err(root.error(key, format!("is {experts}: mixtures of experts are not supported")));
        }
    }
    // transformers gives Mistral a window of 4096 where the key is missing; null means none.
    let window = match root.size("sliding_window", usize::MAX)? {
        None if mistral && !root.mentions("sliding_window") => Some(4096),
        other => other,
    };
    if let Some(window) = window.filter(|w| *w < max_positions) {
        let message = format!("of {window} is in effect below {max_positions} positions; sliding windows are not supported");
        return Err(root.error("sliding_window", message));
    }
    if let Some(other) = root.texts("layer_types")?.unwrap_or_default().iter().find(|t| **t != "full_attention") {
        return Err(root.error("layer_types", format!("has {other:?}; only full_attention is supported")));
    }
    Ok(())
}

fn block(index: usize, d: &Dims) -> Block {
    let stem = format!("model.layers.{index}");
    let (q, kv) = (d.n_head * d.d_head, d.n_kv * d.d_head);
    let attention = |role, name: &str, d_out, d_in, input| Linear {
        role,
        block: Some(index),
        module: format!("{stem}.self_attn.{name}"),
        d_out,
        d_in,
        bias: d.attention_bias,
        input,
    };
    let mlp = |role, name: &str, d_out, d_in, input| Linear {
        role,
        block: Some(index),
        module: format!("{stem}.mlp.{name}"),
        d_out,
        d_in,
        bias: d.mlp_bias,
        input,
    };
    Block {
        index,
        attn_norm: norm(format!("{stem}.input_layernorm")),
        mlp_norm: norm(format!("{stem}.post_attention_layernorm")),
        linears: vec![
            attention(Role::Q, "q_proj", q, d.d_model, Input::AttnNorm),
            attention(Role::K, "k_proj", kv, d.d_model, Input::AttnNorm),
            attention(Role::V, "v_proj", kv, d.d_model, Input::AttnNorm),
            attention(Role::O, "o_proj", d.d_model, q, Input::Context),
            mlp(Role::Gate, "gate_proj", d.d_ff, d.d_model, Input::MlpNorm),
            mlp(Role::Up, "up_proj", d.d_ff, d.d_model, Input::MlpNorm),
            mlp(Role::Down, "down_proj", d.d_model, d.d_ff, Input::Hidden),
        ],
        folds: vec![
            Fold { from: FoldSource::Norm(Input::AttnNorm), into: vec![Role::Q, Role::K, Role::V], tied: Tied::None },
            Fold { from: FoldSource::Norm(Input::MlpNorm), into: vec![Role::Gate, Role::Up], tied: Tied::None },
            Fold {
                from: FoldSource::Linear(Role::V),
                into: vec![Role::O],
                tied: if d.n_kv == d.n_head { Tied::None } else { Tied::KvGroup },
            },
            // The gate passes through silu and cannot take a factor; the product with `up` can.
            Fold { from: FoldSource::Linear(Role::Up), into: vec![Role::Down], tied: Tied::None },
        ],
    }
}

fn norm(module: String) -> Norm {
    Norm { name: format!("{module}.weight"), bias: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn with(changes: Value) -> Result<ModelSpec> {
        let mut config = json!({"model_type": "llama", "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 6,
            "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 32, "max_position_embeddings": 64});
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        spec(&Config::parse("config.json".into(), config.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn a_block_has_four_inputs_and_shapes_that_fit() {
        let spec = with(json!({"head_dim": 4, "attention_bias": true})).unwrap();
        let block = &spec.blocks[1];
        assert_eq!(block.inputs(), [Input::AttnNorm, Input::Context, Input::MlpNorm, Input::Hidden]);
        assert_eq!(block.readers(Input::AttnNorm).map(|l| l.role).collect::<Vec<_>>(), [Role::Q, Role::K, Role::V]);
        let shape = |role| block.linear(role).map(|l| (l.d_out, l.d_in)).unwrap();
        assert_eq!((shape(Role::Q), shape(Role::V), shape(Role::O), shape(Role::Down)), ((24, 12), (8, 12), (12, 24), (12, 20)));
        assert_eq!(block.linear(Role::O).unwrap().bias_name().unwrap(), "model.layers.1.self_attn.o_proj.bias");
        assert_eq!(block.linear(Role::Up).unwrap().bias_name(), None);
        assert!(block.linear(Role::Head).is_err());
        assert_eq!(block.norm(Input::MlpNorm).unwrap().name, "model.layers.1.post_attention_layernorm.weight");
    }

    #[test]
    fn a_fold_names_every_reader_of_its_input_and_ties_only_shared_values() {
        for (n_kv, tied) in [(2, Tied::KvGroup), (6, Tied::None)] {
            let block = with(json!({"num_key_value_heads": n_kv})).unwrap().blocks.remove(0);
            for fold in &block.folds {
                let input = block.linear(fold.into[0]).unwrap().input;
                assert_eq!(block.readers(input).map(|l| l.role).collect::<Vec<_>>(), fold.into);
                let expect = if fold.from == FoldSource::Linear(Role::V) { tied } else { Tied::None };
                assert_eq!(fold.tied, expect);
            }
        }
    }

    #[test]
    fn a_tied_head_is_the_embedding() {
        let tied = with(json!({"tie_word_embeddings": true})).unwrap();
        assert_eq!(tied.head.module, tied.embedding.module);
        let free = with(json!({})).unwrap();
        assert_eq!(free.head.weight(), "lm_head.weight");
        assert_eq!(free.tensors().len(), tied.tensors().len() + 1);
        assert_eq!(tied.tensors().len(), 1 + 2 * 9 + 1);
    }

    #[test]
    fn mistral_defaults_are_its_own() {
        let window = with(json!({"model_type": "mistral", "max_position_embeddings": 32768})).unwrap_err();
        assert!(window.message.contains("`sliding_window`"), "{window}");
        let open = json!({"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": null});
        assert_eq!(with(open).unwrap().max_positions, 32768);
        assert!(with(json!({"model_type": "mistral", "sliding_window": 64})).is_ok());
        assert!(with(json!({"sliding_window": 63})).is_err());
    }

    #[test]
    fn absurd_values_are_errors_that_name_the_key() {
        for (key, value) in [
            ("hidden_size", json!(0)),
            ("hidden_size", json!(13)),
            ("hidden_size", json!(1e30)),
            ("hidden_size", json!(u64::MAX)),
            ("num_hidden_layers", json!(1_000_000_000)),
            ("num_hidden_layers", json!("2")),
            ("num_attention_heads", json!(5)),
            ("num_key_value_heads", json!(4)),
            ("num_key_value_heads", json!(-2)),
            ("head_dim", json!(3)),
            ("head_dim", json!(1 << 18)),
            ("head_dim", json!(2.0)),
            ("vocab_size", json!(null)),
            ("intermediate_size", json!([])),
            ("rms_norm_eps", json!(-1e-5)),
            ("rms_norm_eps", json!(true)),
            ("tie_word_embeddings", json!("yes")),
            ("attention_bias", json!(1)),
            ("hidden_act", json!("gelu")),
            ("num_local_experts", json!(8)),
            ("layer_types", json!(["sliding_attention"])),
            ("max_position_embeddings", json!(0)),
        ] {
            let e = with(json!({ key: value })).unwrap_err();
            assert!(e.subject == "config.json" && e.message.contains(&format!("`{key}`")), "{key}: {e}");
        }
    }
}
