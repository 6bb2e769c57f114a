//! Hidden states of many windows, on the host between blocks, and their way through the device in batches.

use super::forward::{Batch, Forward, embed_tokens};
use super::gram::{Gram, GramSet};
use super::observer::Observer;
use super::residency::DeviceBlock;
use super::tokens::TokenWeights;
use crate::engine::{Elem, Engine, Limits, Mat, Recording, Weight, matrix, submit};
use crate::model::{Block, Input, ModelSpec, Weights};
use crate::{Result, interrupt};
use std::ops::Range;

/// Tokens per batch at most: enough to keep a device busy, few enough that one sum over a batch stays accurate.
const BATCH_TOKENS: usize = 4096;

/// Windows of `seq_len` tokens per batch, such that activations of width `width` fit the device's buffers.
pub fn batch_windows(seq_len: usize, width: usize, limits: Limits) -> usize {
    let fit = usize::try_from(limits.max_buffer).unwrap_or(usize::MAX) / (4 * matrix::stride(width)).max(1);
    (BATCH_TOKENS.min(fit) / seq_len.max(1)).max(1)
}

/// The hidden states of all windows between two blocks: [n_seq · seq_len, d_model] per batch.
#[derive(Clone)]
pub struct HiddenStates {
    pub d_model: usize,
    batches: Vec<(Batch, Vec<f32>)>,
}

impl HiddenStates {
    /// The embeddings of `windows`, which all have the same length.
    pub fn embed<W: AsRef<[u32]>>(engine: &mut dyn Engine, weights: &dyn Weights, windows: &[W]) -> Result<Self> {
        let (spec, limits) = (weights.spec(), engine.limits());
        let tensor = weights.linear(&spec.embedding)?;
        let table = submit(engine, |rec| Weight::upload(rec, "embedding", &tensor, limits))?;
        let states = Self::look_up(engine, spec, &table, windows)?;
        submit(engine, |rec| table.free(rec))?;
        Ok(states)
    }

    /// The rows of an embedding on the device for `windows`, which all have the same length.
    pub fn look_up<W: AsRef<[u32]>>(engine: &mut dyn Engine, spec: &ModelSpec, table: &Weight, windows: &[W]) -> Result<Self> {
        let limits = engine.limits();
        let seq_len = windows.first().map_or(0, |w| w.as_ref().len());
        let mut rec = Recording::new();
        let mut pending = Vec::new();
        for group in windows.chunks(batch_windows(seq_len, widest(spec), limits)) {
            let ids: Vec<u32> = group.iter().flat_map(|w| w.as_ref().iter().copied()).collect();
            let ids = rec.upload("token ids", ids);
            let x = embed_tokens(&mut rec, table, ids);
            pending.push((Batch { n_seq: group.len(), seq_len }, x.download(&mut rec)));
            x.free(&mut rec);
            rec.free(ids);
        }
        let mut downloads = engine.run(rec)?;
        let batches = pending.into_iter().map(|(batch, x)| Ok((batch, x.take(&mut downloads)?))).collect::<Result<_>>()?;
        Ok(Self { d_model: spec.d_model, batches })
    }

    pub fn batches(&self) -> usize {
        self.batches.len()
    }

    pub fn batch(&self, index: usize) -> Batch {
        self.batches[index].0
    }

    /// Batch `index` as it is now, [n_tok, d_model].
    pub fn values(&self, index: usize) -> &[f32] {
        &self.batches[index].1
    }

    pub(super) fn set(&mut self, index: usize, values: Vec<f32>) {
        self.batches[index].1 = values;
    }

    /// Records the upload of batch `index`.
    pub fn upload<'a>(&'a self, rec: &mut Recording<'a>, index: usize) -> Mat<f32> {
        let (batch, x) = &self.batches[index];
        Mat::upload(rec, "hidden states", batch.n_tok(), self.d_model, x)
    }

    /// Runs all batches through a block: the hidden states become its outputs.
    pub fn advance<E: Elem>(&mut self, engine: &mut dyn Engine, forward: &Forward<'_, E>, block: &DeviceBlock) -> Result<()> {
        for index in 0..self.batches.len() {
            interrupt::check()?;
            let mut rec = Recording::new();
            let x = self.upload(&mut rec, index);
            forward.block(&mut rec, block, x, self.batch(index), &mut (), None)?;
            let pending = x.download(&mut rec);
            x.free(&mut rec);
            let mut downloads = engine.run(rec)?;
            self.batches[index].1 = pending.take(&mut downloads)?;
        }
        Ok(())
    }

    /// Runs some batches through a block as far as the input `stop_after` and shows what it computes to `observer`.
    pub fn observe<E: Elem>(
        &self,
        engine: &mut dyn Engine,
        forward: &Forward<'_, E>,
        device: &DeviceBlock,
        batches: Range<usize>,
        observer: &mut dyn Observer<E>,
        stop_after: Input,
    ) -> Result<()> {
        for index in batches {
            interrupt::check()?;
            let mut rec = Recording::new();
            let x = self.upload(&mut rec, index);
            forward.block(&mut rec, device, x, self.batch(index), observer, Some(stop_after))?;
            x.free(&mut rec);
            engine.run(rec)?;
        }
        Ok(())
    }

    /// Runs all batches through a block as far as its last linear's input and adds up the Gram matrices of all inputs, tokens by
    /// `weights` where there are some.
    pub fn collect<E: Elem>(
        &self,
        engine: &mut dyn Engine,
        forward: &Forward<'_, E>,
        block: &Block,
        device: &DeviceBlock,
        weights: Option<&TokenWeights>,
    ) -> Result<Vec<(Input, Gram)>> {
        let limits = engine.limits();
        let weights = weights.map(|w| w.rows(0..self.batches.len()));
        let mut grams = submit(engine, |rec| GramSet::new(rec, block, weights, limits))?;
        let last = block.inputs().last().copied().unwrap_or(Input::AttnNorm);
        self.observe(engine, forward, device, 0..self.batches.len(), &mut grams, last)?;
        let mut rec = Recording::new();
        let pending = grams.download(&mut rec);
        pending.take(&mut engine.run(rec)?)
    }
}

/// The widest activation of a whole batch; the MLP's hidden units are split by tokens where they are wider.
fn widest(spec: &ModelSpec) -> usize {
    spec.d_model.max(spec.n_head * spec.d_head)
}
