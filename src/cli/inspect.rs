//! `aespa-gpu inspect`.

use super::{print, print_json};
use crate::model::Checkpoint;
use crate::{Result, report};
use serde_json::json;
use std::path::Path;

pub fn run(model: &Path, json: bool) -> Result<()> {
    let checkpoint = Checkpoint::open(model)?;
    let spec = checkpoint.spec();
    let bytes: u64 = checkpoint.files().iter().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum();
    let parameters = report::parameters(spec);
    let quantization = checkpoint.quantization_config();
    if json {
        return print_json(&json!({
            "family": spec.family,
            "parameters": parameters,
            "dtype": spec.dtype,
            "bytes": bytes,
            "files": checkpoint.files().len(),
            "blocks": spec.n_layer,
            "d_model": spec.d_model,
            "d_ff": spec.d_ff,
            "n_head": spec.n_head,
            "n_kv": spec.n_kv,
            "d_head": spec.d_head,
            "n_vocab": spec.n_vocab,
            "max_positions": spec.max_positions,
            "tied_head": spec.tied_head,
            "rope": format!("{:?}", spec.rope),
            "linears": spec.blocks.first().map(|b| b.linears.iter().map(|l| json!({
                "role": l.role, "input": l.input, "d_out": l.d_out, "d_in": l.d_in, "bias": l.bias
            })).collect::<Vec<_>>()),
            "quantization_config": quantization,
        }));
    }
    let mut text = format!(
        "{}: {} model, {:.2} M parameters, {} ({:.1} MB in {} files)\n",
        model.display(),
        spec.family,
        parameters as f64 / 1e6,
        spec.dtype,
        bytes as f64 / 1e6,
        checkpoint.files().len()
    );
    text += &format!(
        "{} blocks, width {}, MLP {}, {} heads of {} ({} key/value), vocabulary {}, {} positions, {} head\nrope: {:?}\n",
        spec.n_layer,
        spec.d_model,
        spec.d_ff,
        spec.n_head,
        spec.d_head,
        spec.n_kv,
        spec.n_vocab,
        spec.max_positions,
        if spec.tied_head { "tied" } else { "untied" },
        spec.rope
    );
    for linear in spec.blocks.iter().take(1).flat_map(|b| &b.linears) {
        text += &format!("  {:<5} [{}, {}] reads {}\n", linear.role.to_string(), linear.d_out, linear.d_in, linear.input);
    }
    text += &match quantization {
        Some(config) => format!("quantized: {config}"),
        None => "not quantized".to_owned(),
    };
    print(&text)
}
