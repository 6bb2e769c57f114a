//! Makes LLaMA-shaped checkpoints of real widths with random weights: what memory and time are measured on where no real model is at hand.
//!
//! usage: cargo bench --bench synthetic -- OUT_DIR 1b|8b|70b [BLOCKS]      (default: one block)
//!
//! Shapes are those of Llama 3.2 1B, 3.1 8B and 3.1 70B, embedding and head included; weights are bf16, about normal with variance 1 / d_in,
//! so that activations keep their size; the tokenizer is the demo model's, whose ids are all below the vocabulary's size. The same
//! arguments give the same bytes. A tensor at a time is in memory.

use aespa_gpu::model::unpack_demo;
use aespa_gpu::{Error, Result};
use half::bf16;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, View, serialize_to_file};
use serde_json::json;
use std::borrow::Cow;
use std::path::PathBuf;

struct Shape {
    name: &'static str,
    d_model: usize,
    d_ff: usize,
    n_head: usize,
    d_head: usize,
    tied: bool,
}

const SHAPES: [Shape; 3] = [
    Shape { name: "1b", d_model: 2048, d_ff: 8192, n_head: 32, d_head: 64, tied: true },
    Shape { name: "8b", d_model: 4096, d_ff: 14336, n_head: 32, d_head: 128, tied: false },
    Shape { name: "70b", d_model: 8192, d_ff: 28672, n_head: 64, d_head: 128, tied: false },
];
const N_KV: usize = 8;
const N_VOCAB: usize = 128_256;

/// A tensor that is made when it is written.
struct Random {
    shape: Vec<usize>,
    seed: u64,
}

impl Random {
    /// Row by row of its last dimension, so that all cores can work; ones for a norm's gain.
    fn values(&self) -> Vec<u8> {
        let width = self.shape.last().copied().unwrap_or(1);
        let mut bytes = vec![0; self.data_len()];
        let scale = (width as f32).sqrt().recip();
        bytes.par_chunks_mut(2 * width).enumerate().for_each(|(row, out)| {
            let mut state = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (row as u64).wrapping_mul(0xd1b5_4a32_d192_ed03) | 1;
            for value in out.as_chunks_mut::<2>().0 {
                let drawn = if self.shape.len() == 1 { 1.0 } else { scale * normal(&mut state) };
                *value = bf16::from_f32(drawn).to_le_bytes();
            }
        });
        bytes
    }
}

/// About normal: the sum of four uniform numbers, of variance 1. One step of xorshift64*.
fn normal(state: &mut u64) -> f32 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    let bits = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
    let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xffff).sum();
    (sum as f32 / 65536.0 - 2.0) * 3f32.sqrt()
}

impl View for Random {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.values())
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let usage = || Error::usage("arguments", "are OUT_DIR 1b|8b|70b [BLOCKS]");
    let [out, name, rest @ ..] = arguments.as_slice() else { return Err(usage()) };
    let shape = SHAPES.iter().find(|s| s.name == name).ok_or_else(usage)?;
    let blocks: usize = rest.first().map_or(Ok(1), |n| n.parse()).map_err(|_| usage())?;
    let out = PathBuf::from(out);
    let failed = |e: std::io::Error| Error::output(out.display(), "cannot be written").caused_by(e);
    std::fs::create_dir_all(&out).map_err(failed)?;
    // For its tokenizer; what differs is overwritten.
    unpack_demo(&out)?;

    let Shape { d_model, d_ff, n_head, d_head, tied, .. } = *shape;
    let (q, kv) = (n_head * d_head, N_KV * d_head);
    let mut tensors =
        vec![("model.embed_tokens.weight".to_owned(), vec![N_VOCAB, d_model]), ("model.norm.weight".to_owned(), vec![d_model])];
    if !tied {
        tensors.push(("lm_head.weight".to_owned(), vec![N_VOCAB, d_model]));
    }
    for block in 0..blocks {
        let of = |name: &str, shape: &[usize]| (format!("model.layers.{block}.{name}.weight"), shape.to_vec());
        tensors.extend([
            of("input_layernorm", &[d_model]),
            of("post_attention_layernorm", &[d_model]),
            of("self_attn.q_proj", &[q, d_model]),
            of("self_attn.k_proj", &[kv, d_model]),
            of("self_attn.v_proj", &[kv, d_model]),
            of("self_attn.o_proj", &[d_model, q]),
            of("mlp.gate_proj", &[d_ff, d_model]),
            of("mlp.up_proj", &[d_ff, d_model]),
            of("mlp.down_proj", &[d_model, d_ff]),
        ]);
    }
    let tensors = tensors.into_iter().enumerate().map(|(seed, (name, shape))| (name, Random { shape, seed: seed as u64 + 1 }));
    let path = out.join("model.safetensors");
    let cannot = |e| Error::output(path.display(), "cannot be written").caused_by(e);
    serialize_to_file(tensors, None, &path).map_err(cannot)?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": d_model,
        "intermediate_size": d_ff, "num_attention_heads": n_head, "num_key_value_heads": N_KV, "head_dim": d_head,
        "num_hidden_layers": blocks, "vocab_size": N_VOCAB, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "tie_word_embeddings": tied, "attention_bias": false, "mlp_bias": false, "torch_dtype": "bfloat16",
    });
    std::fs::write(out.join("config.json"), config.to_string()).map_err(failed)?;
    println!("{}: {blocks} blocks of {name} width", out.display());
    Ok(())
}
