//! One decoder block, recorded:
//!   a = norm(x);  x += O · attention(rope(Q a), rope(K a), V a);  b = norm(x);  x += Down · act(Gate b, Up b)
//! for a batch of sequences of equal length laid out one after the other, x [n_seq · seq_len, d_model] in place.
//!
//! An [`Observer`] sees the distinct inputs of the linears (a, the attention's context, b, the hidden units) and the attention's
//! operands as they come by.

use super::observer::{AttentionPoint, Observer};
use super::residency::{DeviceBlock, DeviceLinear, DeviceNorm};
use crate::Result;
use crate::engine::kernels::{self, attention, embed, layer_norm, matmul_nt, rms_norm, rope, swiglu};
use crate::engine::{Buffer, Elem, Limits, Mat, Recording, Weight, matrix};
use crate::model::{Activation, Input, ModelSpec, NormKind, Role};
use std::marker::PhantomData;

/// `n_seq` sequences of `seq_len` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    pub n_seq: usize,
    pub seq_len: usize,
}

impl Batch {
    pub fn n_tok(self) -> usize {
        self.n_seq * self.seq_len
    }
}

/// Which rows of an operand and of a result a product covers.
#[derive(Clone, Copy, Debug, Default)]
struct Rows {
    start: usize,
    count: usize,
}

/// Records forward passes of a model's blocks; `E` is the type of the operands of matrix products.
pub struct Forward<'m, E> {
    spec: &'m ModelSpec,
    limits: Limits,
    cos: Buffer<f32>,
    sin: Buffer<f32>,
    operands: PhantomData<E>,
}

impl<'m, E: Elem> Forward<'m, E> {
    /// Uploads the rotary tables for sequences of up to `seq_len` tokens.
    pub fn new(rec: &mut Recording<'_>, spec: &'m ModelSpec, seq_len: usize, limits: Limits) -> Self {
        let (cos, sin) = spec.rope.tables(spec.d_head, seq_len);
        Self { spec, limits, cos: rec.upload("rope", cos), sin: rec.upload("rope", sin), operands: PhantomData }
    }

    pub fn spec(&self) -> &'m ModelSpec {
        self.spec
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        rec.free(self.cos);
        rec.free(self.sin);
    }

    /// Runs the block on x in place and shows what it computes to `observer`. With `stop_after`, nothing after that input is computed
    /// and x is left in between.
    pub fn block(
        &self,
        rec: &mut Recording<'_>,
        block: &DeviceBlock,
        x: Mat<f32>,
        batch: Batch,
        observer: &mut dyn Observer<E>,
        stop_after: Option<Input>,
    ) -> Result<()> {
        let a = self.norm(rec, block.attn_norm(), x);
        observer.input(rec, Input::AttnNorm, a);
        if stop_after == Some(Input::AttnNorm) {
            a.free(rec);
            return Ok(());
        }
        observer.residual(rec, x);
        let context = self.context(rec, block, a, batch, observer)?;
        a.free(rec);
        observer.input(rec, Input::Context, context);
        if stop_after == Some(Input::Context) {
            context.free(rec);
            return Ok(());
        }
        self.add_context(rec, block, context, x)?;
        context.free(rec);
        let b = self.norm(rec, block.mlp_norm(), x);
        observer.input(rec, Input::MlpNorm, b);
        if stop_after != Some(Input::MlpNorm) {
            observer.residual(rec, x);
            let end = (stop_after != Some(Input::Hidden)).then_some(x);
            self.mlp(rec, block, b, end, observer)?;
        }
        b.free(rec);
        Ok(())
    }

    /// The heads' weighted values [n_tok, n_head · d_head] from the attention norm's output.
    pub fn context(
        &self,
        rec: &mut Recording<'_>,
        block: &DeviceBlock,
        a: Mat<E>,
        batch: Batch,
        observer: &mut dyn Observer<E>,
    ) -> Result<Mat<E>> {
        let spec = self.spec;
        let q = apply(rec, a, block, Role::Q)?;
        let k = apply(rec, a, block, Role::K)?;
        let v = apply(rec, a, block, Role::V)?;
        for (mat, heads) in [(q, spec.n_head), (k, spec.n_kv)] {
            let (n_tok, seq_len, d_head) = (batch.n_tok() as u32, batch.seq_len as u32, spec.d_head as u32);
            let p = rope::RopeParams { n_tok, seq_len, n_head: heads as u32, d_head, ld: mat.ld as u32 };
            kernels::rope(rec, p, self.cos, self.sin, mat.buffer);
        }
        let scale = (spec.d_head as f32).sqrt().recip();
        observer.attention(rec, &AttentionPoint { batch, a, q, k, v, scale });
        let context = Mat::<E>::alloc(rec, "context", a.rows, spec.n_head * spec.d_head);
        let p = attention::AttentionParams {
            n_seq: batch.n_seq as u32,
            seq_len: batch.seq_len as u32,
            n_head: spec.n_head as u32,
            n_kv: spec.n_kv as u32,
            d_head: spec.d_head as u32,
            ld_q: q.ld as u32,
            ld_kv: k.ld as u32,
            ld_out: context.ld as u32,
            scale,
        };
        kernels::attention(rec, p, q.buffer, k.buffer, v.buffer, context.buffer);
        [q, k, v].into_iter().for_each(|mat| mat.free(rec));
        Ok(context)
    }

    /// x += context Oᵀ.
    pub fn add_context(&self, rec: &mut Recording<'_>, block: &DeviceBlock, context: Mat<E>, x: Mat<f32>) -> Result<()> {
        let all = Rows { start: 0, count: x.rows };
        add_product(rec, context, all, (block, Role::O), x, all, 1.0)
    }

    /// Shows the hidden units of the MLP norm's output `b` to `observer`, a range of tokens at a time, and adds Down's outputs to `end`.
    pub fn mlp(
        &self,
        rec: &mut Recording<'_>,
        block: &DeviceBlock,
        b: Mat<E>,
        end: Option<Mat<f32>>,
        observer: &mut dyn Observer<E>,
    ) -> Result<()> {
        let spec = self.spec;
        // Hidden units are the widest activations: as many tokens at a time as fit a buffer.
        for range in matrix::row_panels(b.rows, 4 * matrix::stride(spec.d_ff), matrix::STRIDE_ALIGN, self.limits) {
            let rows = Rows { start: range.start, count: range.len() };
            let here = Rows { start: 0, count: rows.count };
            let gate = Mat::alloc(rec, "gate", rows.count, spec.d_ff);
            add_product(rec, b, rows, (block, Role::Gate), gate, here, 0.0)?;
            let up = Mat::alloc(rec, "up", rows.count, spec.d_ff);
            add_product(rec, b, rows, (block, Role::Up), up, here, 0.0)?;
            let hidden = Mat::<E>::alloc(rec, "hidden", rows.count, spec.d_ff);
            match spec.activation {
                Activation::Silu => {
                    let p = swiglu::SwigluParams { n: (rows.count * gate.ld) as u32 };
                    kernels::swiglu(rec, p, gate.buffer, up.buffer, hidden.buffer);
                }
            }
            gate.free(rec);
            up.free(rec);
            observer.input(rec, Input::Hidden, hidden);
            if let Some(x) = end {
                add_product(rec, hidden, here, (block, Role::Down), x, rows, 1.0)?;
            }
            hidden.free(rec);
        }
        Ok(())
    }

    /// norm(x) as an operand of products.
    pub fn norm(&self, rec: &mut Recording<'_>, norm: DeviceNorm, x: Mat<f32>) -> Mat<E> {
        let out = Mat::<E>::alloc(rec, "norm", x.rows, x.cols);
        let (n_tok, d, ld_x, ld_out, eps) = (x.rows as u32, x.cols as u32, x.ld as u32, out.ld as u32, self.spec.norm_eps);
        match self.spec.norm_kind {
            NormKind::Rms => {
                let p = rms_norm::RmsNormParams { n_tok, d, ld_x, ld_out, eps };
                kernels::rms_norm(rec, p, x.buffer, norm.gain, out.buffer);
            }
            NormKind::Layer => {
                let has_bias = u32::from(!norm.bias.is_empty());
                let p = layer_norm::LayerNormParams { n_tok, d, ld_x, ld_out, has_bias, eps };
                kernels::layer_norm(rec, p, x.buffer, norm.gain, norm.bias, out.buffer);
            }
        }
        out
    }
}

/// Hidden states of token ids, [n_tok, d_model].
pub fn embed_tokens(rec: &mut Recording<'_>, table: &Weight, ids: Buffer<u32>) -> Mat<f32> {
    let out = Mat::alloc(rec, "hidden states", ids.len(), table.cols);
    for panel in &table.panels {
        let p = embed::EmbedParams {
            n_tok: ids.len() as u32,
            d: table.cols as u32,
            ld_table: table.ld as u32,
            ld_out: out.ld as u32,
            row0: panel.start as u32,
            rows: panel.rows as u32,
        };
        kernels::embed(rec, p, ids, panel.buffer, out.buffer);
    }
    out
}

/// A new matrix x Wᵀ + b.
fn apply<E: Elem>(rec: &mut Recording<'_>, x: Mat<E>, block: &DeviceBlock, role: Role) -> Result<Mat<f32>> {
    let all = Rows { start: 0, count: x.rows };
    let linear = block.enter(rec, role)?;
    let out = Mat::alloc(rec, "linear", x.rows, linear.weight.rows);
    add_linear(rec, x, all, &linear, out, all, 0.0);
    block.leave(rec, linear);
    Ok(out)
}

/// out[to] = x[from] Wᵀ + b + beta · out[to].
fn add_product<E: Elem>(
    rec: &mut Recording<'_>,
    x: Mat<E>,
    from: Rows,
    (block, role): (&DeviceBlock, Role),
    out: Mat<f32>,
    to: Rows,
    beta: f32,
) -> Result<()> {
    let linear = block.enter(rec, role)?;
    add_linear(rec, x, from, &linear, out, to, beta);
    block.leave(rec, linear);
    Ok(())
}

/// The same, panel by panel of W.
fn add_linear<E: Elem>(rec: &mut Recording<'_>, x: Mat<E>, from: Rows, linear: &DeviceLinear, out: Mat<f32>, to: Rows, beta: f32) {
    let weight = &linear.weight;
    for panel in &weight.panels {
        let p = matmul_nt::MatmulNtParams {
            n: from.count as u32,
            m: panel.rows as u32,
            k: weight.cols as u32,
            lda: x.ld as u32,
            ldw: weight.ld as u32,
            ldc: out.ld as u32,
            a_offset: (from.start * x.ld) as u32,
            c_offset: (to.start * out.ld + panel.start) as u32,
            batches: 1,
            bias_offset: panel.start as u32,
            has_bias: u32::from(!linear.bias.is_empty()),
            alpha: 1.0,
            beta,
            ..Default::default()
        };
        kernels::matmul_nt(rec, p, x.buffer, panel.buffer, linear.bias, out.buffer);
    }
}
