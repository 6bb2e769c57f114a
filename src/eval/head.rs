//! The model's head over hidden states: final norm, logits in chunks of the vocabulary, running statistics per token.
//!
//! No [n_tok, n_vocab] buffer exists: a chunk of logits is at most a panel of the head's weight wide.

use crate::Result;
use crate::calib::{DeviceNorm, Forward, upload_norm};
use crate::engine::kernels::{self, cross_entropy, kl_divergence, matmul_nt};
use crate::engine::matrix::{self, StoredPanel};
use crate::engine::{Buffer, Elem, Limits, Mat, Recording, Weight};
use crate::model::{ModelSpec, Weights};
use crate::tensor::Tensor;

/// Vocabulary entries per chunk of logits at most.
const CHUNK: usize = 4096;

/// Vocabulary entries per chunk such that a panel of every head and the logits of `n_tok` tokens fit the device's buffers; the same
/// for all heads, so that their chunks can be compared.
pub(super) fn chunk_rows(heads: &[HostHead<'_>], n_tok: usize, limits: Limits) -> usize {
    let fit = |width: usize| usize::try_from(limits.max_buffer).unwrap_or(usize::MAX) / (size_of::<f32>() * width.max(1));
    let panels = heads.iter().map(|h| fit(matrix::stride(h.weight.rows_cols().1))).min().unwrap_or(CHUNK);
    CHUNK.min(panels).min(fit(n_tok)).max(matrix::STRIDE_ALIGN)
}

/// Head tensors on the host.
pub(super) struct HostHead<'w> {
    gain: Vec<f32>,
    norm_bias: Option<Vec<f32>>,
    weight: Tensor<'w>,
    bias: Option<Vec<f32>>,
}

impl<'w> HostHead<'w> {
    pub fn read(weights: &'w dyn Weights) -> Result<Self> {
        let spec = weights.spec();
        let vector = |name: &str| weights.tensor(name).map(|t| t.to_f32());
        Ok(Self {
            gain: vector(&spec.final_norm.name)?,
            norm_bias: spec.final_norm.bias.as_deref().map(vector).transpose()?,
            weight: weights.linear(&spec.head)?,
            bias: spec.head.bias_name().as_deref().map(vector).transpose()?,
        })
    }

    /// Panels of `chunk` rows, so that a panel's logits are one chunk.
    pub fn upload<'a>(&'a self, rec: &mut Recording<'a>, chunk: usize) -> DeviceHead {
        let (_, cols) = self.weight.rows_cols();
        let max_buffer = (chunk * matrix::stride(cols) * size_of::<f32>()) as u64;
        let limits = Limits { max_buffer, f16_operands: false };
        DeviceHead {
            norm: upload_norm(rec, &self.gain, self.norm_bias.as_deref()),
            weight: Weight::upload(rec, "head", &self.weight, limits),
            bias: self.bias.as_deref().map_or(Buffer::none(), |b| rec.upload("bias", b)),
        }
    }
}

/// Head tensors on the device.
pub(super) struct DeviceHead {
    norm: DeviceNorm,
    weight: Weight,
    bias: Buffer<f32>,
}

impl DeviceHead {
    pub fn free(self, rec: &mut Recording<'_>) {
        rec.free(self.norm.gain);
        rec.free(self.norm.bias);
        self.weight.free(rec);
        rec.free(self.bias);
    }

    /// The chunks of the vocabulary.
    pub fn panels(&self) -> &[StoredPanel] {
        &self.weight.panels
    }

    pub fn norm<E: Elem>(&self, rec: &mut Recording<'_>, forward: &Forward<'_, E>, x: Mat<f32>) -> Mat<E> {
        forward.norm(rec, self.norm, x)
    }

    /// Logits [n_tok, panel.rows] of the vocabulary entries in `panel`.
    pub fn logits<E: Elem>(&self, rec: &mut Recording<'_>, normed: Mat<E>, panel: &StoredPanel) -> Mat<f32> {
        let out = Mat::alloc(rec, "logits", normed.rows, panel.rows);
        let p = matmul_nt::MatmulNtParams {
            n: normed.rows as u32,
            m: panel.rows as u32,
            k: self.weight.cols as u32,
            lda: normed.ld as u32,
            ldw: self.weight.ld as u32,
            ldc: out.ld as u32,
            batches: 1,
            bias_offset: panel.start as u32,
            has_bias: u32::from(!self.bias.is_empty()),
            alpha: 1.0,
            ..Default::default()
        };
        kernels::matmul_nt(rec, p, normed.buffer, panel.buffer, self.bias, out.buffer);
        out
    }
}

/// Adds a chunk of logits to the cross-entropy state [n_tok, 4].
pub(super) fn add_cross_entropy(rec: &mut Recording<'_>, logits: Mat<f32>, panel: &StoredPanel, target: Buffer<u32>, state: Buffer<f32>) {
    let p = cross_entropy::CrossEntropyParams {
        n_tok: logits.rows as u32,
        cols: logits.cols as u32,
        ld: logits.ld as u32,
        col0: panel.start as u32,
        first: u32::from(panel.start == 0),
    };
    kernels::cross_entropy(rec, p, logits.buffer, target, state);
}

/// Adds a chunk of two models' logits to the divergence state [n_tok, 8].
pub(super) fn add_divergence(rec: &mut Recording<'_>, logits: Mat<f32>, reference: Mat<f32>, panel: &StoredPanel, state: Buffer<f32>) {
    let p = kl_divergence::KlDivergenceParams {
        n_tok: logits.rows as u32,
        cols: logits.cols as u32,
        ld: logits.ld as u32,
        col0: panel.start as u32,
        first: u32::from(panel.start == 0),
    };
    kernels::kl_divergence(rec, p, logits.buffer, reference.buffer, state);
}

/// Do two models speak of the same tokens, so that their logits can be compared?
pub(super) fn comparable(a: &ModelSpec, b: &ModelSpec) -> bool {
    a.n_vocab == b.n_vocab
}
