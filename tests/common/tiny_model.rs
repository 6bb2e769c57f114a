//! Random LLaMA folders of any small shape, as a test needs them.
//!
//! ```ignore
//! let dir = tempfile::tempdir().unwrap();
//! let model = TinyLlama { n_kv: 1, dtype: Dtype::Bf16, ..TinyLlama::default() };
//! model.write(dir.path());
//! ```

use aespa_gpu::tensor::Dtype;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What to make. The default is small, has grouped queries and an untied head, and awkward sizes.
#[derive(Clone, Debug)]
pub struct TinyLlama {
    pub d_model: usize,
    pub d_ff: usize,
    pub n_head: usize,
    pub n_kv: usize,
    pub d_head: usize,
    pub n_vocab: usize,
    pub n_layer: usize,
    pub max_positions: usize,
    pub dtype: Dtype,
    pub tied: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    /// 1: model.safetensors; more: that many shards with an index.
    pub shards: usize,
    pub seed: u64,
    /// Keys to set in config.json, over what the fields above say.
    pub config: Map<String, Value>,
    /// Also write a tokenizer.json with one token per byte; needs `n_vocab` of at least 256.
    pub tokenizer: bool,
}

impl Default for TinyLlama {
    fn default() -> Self {
        Self {
            d_model: 24,
            d_ff: 40,
            n_head: 4,
            n_kv: 2,
            d_head: 6,
            n_vocab: 33,
            n_layer: 2,
            max_positions: 64,
            dtype: Dtype::F32,
            tied: false,
            attention_bias: false,
            mlp_bias: false,
            shards: 1,
            seed: 1,
            config: Map::new(),
            tokenizer: false,
        }
    }
}

/// Tensor name to shape and values, already rounded to the model's dtype.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

impl TinyLlama {
    /// Weights of the size that keeps activations near 1: uniform with variance 1 / d_in; gains near 1, small biases.
    pub fn tensors(&self) -> Tensors {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut uniform = move || f64::from(rng.next_u32()) / f64::from(u32::MAX) * 2.0 - 1.0;
        let mut tensors = Tensors::new();
        let mut add = |name: String, shape: &[usize], center: f64, spread: f64| {
            let n = shape.iter().product();
            let values = (0..n).map(|_| self.dtype.round((center + spread * uniform()) as f32)).collect();
            tensors.insert(name, (shape.to_vec(), values));
        };
        let (q, kv) = (self.n_head * self.d_head, self.n_kv * self.d_head);
        add("model.embed_tokens.weight".into(), &[self.n_vocab, self.d_model], 0.0, 1.0);
        for layer in 0..self.n_layer {
            let stem = format!("model.layers.{layer}");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(format!("{stem}.{norm}.weight"), &[self.d_model], 1.0, 0.3);
            }
            for (module, d_out, d_in, bias) in [
                ("self_attn.q_proj", q, self.d_model, self.attention_bias),
                ("self_attn.k_proj", kv, self.d_model, self.attention_bias),
                ("self_attn.v_proj", kv, self.d_model, self.attention_bias),
                ("self_attn.o_proj", self.d_model, q, self.attention_bias),
                ("mlp.gate_proj", self.d_ff, self.d_model, self.mlp_bias),
                ("mlp.up_proj", self.d_ff, self.d_model, self.mlp_bias),
                ("mlp.down_proj", self.d_model, self.d_ff, self.mlp_bias),
            ] {
                add(format!("{stem}.{module}.weight"), &[d_out, d_in], 0.0, (3.0 / d_in as f64).sqrt());
                if bias {
                    add(format!("{stem}.{module}.bias"), &[d_out], 0.0, 0.1);
                }
            }
        }
        add("model.norm.weight".into(), &[self.d_model], 1.0, 0.3);
        if !self.tied {
            add("lm_head.weight".into(), &[self.n_vocab, self.d_model], 0.0, (3.0 / self.d_model as f64).sqrt());
        }
        tensors
    }

    pub fn config_json(&self) -> Value {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self.d_model, "intermediate_size": self.d_ff, "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_kv, "head_dim": self.d_head, "num_hidden_layers": self.n_layer,
            "vocab_size": self.n_vocab, "max_position_embeddings": self.max_positions, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": self.tied, "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        });
        for (key, value) in &self.config {
            config[key] = value.clone();
        }
        config
    }

    /// Writes the whole folder.
    pub fn write(&self, dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("config.json"), self.config_json().to_string()).unwrap();
        if self.tokenizer {
            std::fs::write(dir.join("tokenizer.json"), byte_tokenizer().to_string()).unwrap();
        }
        let tensors = self.tensors();
        if self.shards == 1 {
            write_safetensors(&dir.join("model.safetensors"), self.dtype, &tensors);
            return;
        }
        let mut weight_map = Map::new();
        let mut shards = vec![Tensors::new(); self.shards];
        for (i, (name, tensor)) in tensors.into_iter().enumerate() {
            let shard = i % self.shards;
            weight_map.insert(name.clone(), shard_name(shard, self.shards).into());
            shards[shard].insert(name, tensor);
        }
        for (i, tensors) in shards.iter().enumerate() {
            write_safetensors(&dir.join(shard_name(i, self.shards)), self.dtype, tensors);
        }
        let index = json!({"metadata": {}, "weight_map": weight_map});
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

/// The name of shard `i`, counted from 0.
pub fn shard_name(i: usize, shards: usize) -> String {
    format!("model-{:05}-of-{shards:05}.safetensors", i + 1)
}

pub fn write_safetensors(path: &Path, dtype: Dtype, tensors: &Tensors) {
    let stored: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, values))| {
            let mut bytes = vec![0; values.len() * dtype.size()];
            dtype.encode(values, &mut bytes);
            (name, shape, bytes)
        })
        .collect();
    let kind = match dtype {
        Dtype::F32 => safetensors::Dtype::F32,
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::Bf16 => safetensors::Dtype::BF16,
    };
    let views = stored.iter().map(|(name, shape, bytes)| (*name, TensorView::new(kind, (*shape).clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A safetensors file with any header, truthful or not.
pub fn write_raw_safetensors(path: &Path, header: &str, data: &[u8]) {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(path, file).unwrap();
}

/// Byte-level BPE without merges: id = byte value.
pub fn byte_tokenizer() -> Value {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 256;
    let mut vocab = Map::new();
    for byte in 0..=255u8 {
        // GPT-2's table: bytes that do not print stand as the characters from U+0100 on.
        let code = if printable(byte) { u32::from(byte) } else { next };
        next += u32::from(!printable(byte));
        vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}
