//! The block graph: which linears a block has, which input each reads, which norm feeds it, and what can be folded into what.

use super::rope::Rope;
use crate::tensor::Dtype;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// x / rms(x) * gain
    Rms,
    /// (x - mean(x)) / std(x) * gain + bias
    Layer,
}

/// The nonlinearity between the first and the last linears of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// hidden = silu(gate(x)) * up(x), silu(v) = v / (1 + exp(-v))
    Silu,
}

/// What a linear does in its block. The order is that of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
    Head,
    /// Looked up, not multiplied.
    Embedding,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Q => "q",
            Role::K => "k",
            Role::V => "v",
            Role::O => "o",
            Role::Gate => "gate",
            Role::Up => "up",
            Role::Down => "down",
            Role::Head => "head",
            Role::Embedding => "embedding",
        })
    }
}

/// A distinct activation that linears read. Linears with the same input share its Gram matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Input {
    /// The attention norm's output, [n_tok, d_model].
    AttnNorm,
    /// The heads' weighted values, [n_tok, n_head * d_head]: the output projection's input.
    Context,
    /// The MLP norm's output, [n_tok, d_model].
    MlpNorm,
    /// The activated hidden units, [n_tok, d_ff]: the down projection's input.
    Hidden,
    /// The final norm's output, [n_tok, d_model]: the head's input.
    FinalNorm,
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Input::AttnNorm => "attn-norm",
            Input::Context => "context",
            Input::MlpNorm => "mlp-norm",
            Input::Hidden => "hidden",
            Input::FinalNorm => "final-norm",
        })
    }
}

/// y = x Wᵀ + b with W [d_out, d_in] and b [d_out].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linear {
    pub role: Role,
    /// Its block; `None` for the embedding and the head.
    pub block: Option<usize>,
    /// The tensor names' common stem, as in `model.layers.0.self_attn.q_proj`. A tied head has the embedding's.
    pub module: String,
    pub d_out: usize,
    pub d_in: usize,
    pub bias: bool,
    pub input: Input,
}

impl Linear {
    /// The name of W.
    pub fn weight(&self) -> String {
        format!("{}.weight", self.module)
    }

    /// Is it the embedding or the head?
    pub fn is_outer(&self) -> bool {
        self.block.is_none()
    }

    /// The name of b, if there is one.
    pub fn bias_name(&self) -> Option<String> {
        self.bias.then(|| format!("{}.bias", self.module))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Norm {
    /// The name of the gain, [d_model].
    pub name: String,
    /// The name of the bias, [d_model], of a [`NormKind::Layer`] that has one.
    pub bias: Option<String>,
}

/// Where the factors of a fold come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoldSource {
    /// The gain (and bias) of the norm with this output.
    Norm(Input),
    /// The rows of this linear's W (and its bias).
    Linear(Role),
}

/// Which of a fold's factors must be equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tied {
    /// Every channel has its own factor.
    None,
    /// The source has n_kv * d_head channels, the readers n_head * d_head: factor (kv, i) serves channel i of every query head in
    /// the group of kv.
    KvGroup,
}

/// A pair that can exchange factors without changing the function: dividing the source's channel i by f[i] and multiplying
/// column i of the readers' W by f[i]. Readers are all the readers of that input, so none is left with a wrong one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fold {
    pub from: FoldSource,
    pub into: Vec<Role>,
    pub tied: Tied,
}

/// One decoder block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub index: usize,
    pub attn_norm: Norm,
    pub mlp_norm: Norm,
    /// In the order of the forward pass, which is the order to quantize them in.
    pub linears: Vec<Linear>,
    pub folds: Vec<Fold>,
}

impl Block {
    pub fn get(&self, role: Role) -> Option<&Linear> {
        self.linears.iter().find(|l| l.role == role)
    }

    /// An internal error where the block has no such linear: who asks knows the family.
    pub fn linear(&self, role: Role) -> Result<&Linear> {
        self.get(role).ok_or_else(|| Error::internal(format!("block {}", self.index), format!("has no {role} linear")))
    }

    /// The linears that read `input`, in order.
    pub fn readers(&self, input: Input) -> impl Iterator<Item = &Linear> {
        self.linears.iter().filter(move |l| l.input == input)
    }

    /// Channels of an input.
    pub fn width(&self, input: Input) -> usize {
        self.readers(input).next().map_or(0, |l| l.d_in)
    }

    /// The distinct inputs of the linears, in order of first use: 4 in a LLaMA block.
    pub fn inputs(&self) -> Vec<Input> {
        let mut inputs: Vec<Input> = Vec::new();
        for linear in &self.linears {
            if !inputs.contains(&linear.input) {
                inputs.push(linear.input);
            }
        }
        inputs
    }

    /// The norm whose output is `input`.
    pub fn norm(&self, input: Input) -> Option<&Norm> {
        match input {
            Input::AttnNorm => Some(&self.attn_norm),
            Input::MlpNorm => Some(&self.mlp_norm),
            Input::Context | Input::Hidden | Input::FinalNorm => None,
        }
    }
}

/// Everything about one model that is not in its weights.
#[derive(Clone, Debug)]
pub struct ModelSpec {
    pub family: &'static str,
    pub d_model: usize,
    pub d_ff: usize,
    pub n_head: usize,
    /// Key and value heads; `n_head / n_kv` query heads share one.
    pub n_kv: usize,
    pub d_head: usize,
    pub n_vocab: usize,
    pub n_layer: usize,
    /// The longest sequence that the model was made for.
    pub max_positions: usize,
    pub norm_kind: NormKind,
    pub norm_eps: f32,
    pub activation: Activation,
    pub rope: Rope,
    pub tied_head: bool,
    /// The type that the first linear is stored in (in a quantized folder: the embedding, or the final norm where that is quantized too).
    pub dtype: Dtype,
    /// [n_vocab, d_model]: a matrix like those of linears, but its rows are looked up. Its input is the head's, which it is where that is tied.
    pub embedding: Linear,
    pub final_norm: Norm,
    /// [n_vocab, d_model]; where it is tied, its module is the embedding's.
    pub head: Linear,
    pub blocks: Vec<Block>,
}

/// A tensor that a checkpoint must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
    /// It is a matrix that a quantized folder may store in another way.
    pub quantizable: bool,
}

impl ModelSpec {
    /// All matrices that a format may store quantized, each once: those of the blocks, an embedding that is not the head, the head.
    pub fn matrices(&self) -> impl Iterator<Item = &Linear> {
        let outer = (!self.tied_head).then_some(&self.embedding).into_iter().chain(Some(&self.head));
        self.blocks.iter().flat_map(|b| &b.linears).chain(outer)
    }

    /// All tensors of the model, each once: embedding, blocks in order, final norm, untied head.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let plain = |name: &str, shape: Vec<usize>| TensorSpec { name: name.to_owned(), shape, quantizable: false };
        let norm = |n: &Norm| {
            let gain = plain(&n.name, vec![self.d_model]);
            std::iter::once(gain).chain(n.bias.as_ref().map(|b| plain(b, vec![self.d_model]))).collect::<Vec<_>>()
        };
        let linear = |l: &Linear| {
            let weight = TensorSpec { name: l.weight(), shape: vec![l.d_out, l.d_in], quantizable: true };
            std::iter::once(weight).chain(l.bias_name().map(|b| plain(&b, vec![l.d_out]))).collect::<Vec<_>>()
        };
        let mut tensors: Vec<TensorSpec> = linear(&self.embedding);
        for block in &self.blocks {
            tensors.extend(norm(&block.attn_norm));
            tensors.extend(norm(&block.mlp_norm));
            tensors.extend(block.linears.iter().flat_map(linear));
        }
        tensors.extend(norm(&self.final_norm));
        if !self.tied_head {
            tensors.extend(linear(&self.head));
        }
        tensors
    }
}
