//! LLaMA-shaped checkpoints with random weights: what memory and time are measured on where no real model is at hand.
//!
//! Weights are bf16, about normal with variance 1 / d_in, so that activations keep their size; the tokenizer is the demo model's. The same
//! shape gives the same bytes. A tensor at a time is in memory.

use super::unpack_demo;
use crate::{Error, Result};
use half::bf16;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, View, serialize_to_file};
use serde_json::json;
use std::borrow::Cow;
use std::path::Path;

#[derive(Clone, Copy, Debug)]
pub struct Synthetic {
    pub d_model: usize,
    pub d_ff: usize,
    pub n_head: usize,
    pub n_kv: usize,
    pub d_head: usize,
    /// At least the demo tokenizer's 2048.
    pub n_vocab: usize,
    pub tied: bool,
    pub blocks: usize,
}

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

impl Synthetic {
    /// Writes the checkpoint into `out`, which is made if need be.
    ///
    /// # Errors
    /// Output, if it cannot be written.
    pub fn write(&self, out: &Path) -> Result<()> {
        let failed = |e: std::io::Error| Error::output(out.display(), "cannot be written").caused_by(e);
        std::fs::create_dir_all(out).map_err(failed)?;
        // For its tokenizer; what differs is overwritten.
        unpack_demo(out)?;
        let tensors = self.tensors().into_iter().enumerate().map(|(seed, (name, shape))| (name, Random { shape, seed: seed as u64 + 1 }));
        let path = out.join("model.safetensors");
        let cannot = |e| Error::output(path.display(), "cannot be written").caused_by(e);
        serialize_to_file(tensors, None, &path).map_err(cannot)?;
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": self.d_model,
            "intermediate_size": self.d_ff, "num_attention_heads": self.n_head, "num_key_value_heads": self.n_kv, "head_dim": self.d_head,
            "num_hidden_layers": self.blocks, "vocab_size": self.n_vocab, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0, "tie_word_embeddings": self.tied, "attention_bias": false, "mlp_bias": false, "torch_dtype": "bfloat16",
        });
        std::fs::write(out.join("config.json"), config.to_string()).map_err(failed)
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let Self { d_model, d_ff, n_vocab, .. } = *self;
        let (q, kv) = (self.n_head * self.d_head, self.n_kv * self.d_head);
        let mut all =
            vec![("model.embed_tokens.weight".to_owned(), vec![n_vocab, d_model]), ("model.norm.weight".to_owned(), vec![d_model])];
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), vec![n_vocab, d_model]));
        }
        for block in 0..self.blocks {
            let of = |name: &str, shape: &[usize]| (format!("model.layers.{block}.{name}.weight"), shape.to_vec());
            all.extend([
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
        all
    }
}
