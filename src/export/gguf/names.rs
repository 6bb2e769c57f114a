//! The names that llama.cpp has for a model's tensors, and the order in which it wants rows.

use crate::model::{Linear, ModelSpec, Role};
use std::collections::BTreeMap;

/// Names in files by names in the model.
pub fn names(spec: &ModelSpec) -> BTreeMap<String, String> {
    let mut names = BTreeMap::new();
    let mut linear = |l: &Linear, stem: &str| {
        names.insert(l.weight(), format!("{stem}.weight"));
        if let Some(bias) = l.bias_name() {
            names.insert(bias, format!("{stem}.bias"));
        }
    };
    if !spec.tied_head {
        linear(&spec.head, "output");
    }
    linear(&spec.embedding, "token_embd");
    for block in &spec.blocks {
        block.linears.iter().for_each(|l| linear(l, &format!("blk.{}.{}", block.index, part(l.role))));
    }
    for block in &spec.blocks {
        names.insert(block.attn_norm.name.clone(), format!("blk.{}.attn_norm.weight", block.index));
        names.insert(block.mlp_norm.name.clone(), format!("blk.{}.ffn_norm.weight", block.index));
    }
    names.insert(spec.final_norm.name.clone(), "output_norm.weight".to_owned());
    names
}

fn part(role: Role) -> &'static str {
    match role {
        Role::Q => "attn_q",
        Role::K => "attn_k",
        Role::V => "attn_v",
        Role::O => "attn_output",
        Role::Gate => "ffn_gate",
        Role::Up => "ffn_up",
        Role::Down => "ffn_down",
        Role::Head => "output",
        Role::Embedding => "token_embd",
    }
}

/// Which of the model's rows each row in the file is; `None`: the same. Rotary pairs are neighbours there and half a head apart here.
pub fn row_order(spec: &ModelSpec, role: Role) -> Option<Vec<usize>> {
    let heads = match role {
        Role::Q => spec.n_head,
        Role::K => spec.n_kv,
        _ => return None,
    };
    let (d, half) = (spec.d_head, spec.d_head / 2);
    Some((0..heads * d).map(|row| row / d * d + row % 2 * half + row % d / 2).collect())
}

/// The linear that a tensor is the weight or the bias of.
pub fn linear_of<'s>(spec: &'s ModelSpec, name: &str) -> Option<&'s Linear> {
    let module = name.rsplit_once('.')?.0;
    spec.matrices().find(|l| l.module == module)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Config;

    #[test]
    fn rotary_pairs_become_neighbours() {
        let config = r#"{"model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2,
            "num_hidden_layers": 1, "vocab_size": 4, "tie_word_embeddings": true}"#;
        let spec = crate::model::spec_of(&Config::parse("config.json".into(), config.as_bytes()).unwrap()).unwrap();
        // Pairs of a head of 8 are (0, 4), (1, 5), (2, 6), (3, 7).
        assert_eq!(row_order(&spec, Role::Q).unwrap(), [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]);
        assert_eq!(row_order(&spec, Role::V), None);
        let names = names(&spec);
        assert_eq!(names["model.layers.0.self_attn.o_proj.weight"], "blk.0.attn_output.weight");
        assert_eq!((names["model.embed_tokens.weight"].as_str(), names.len()), ("token_embd.weight", 1 + 7 + 2 + 1));
    }
}
