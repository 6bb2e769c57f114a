//! Hidden states of many windows, on the device, in memory or on disk between blocks, and their way through the device in batches.

use super::forward::{Batch, Forward, embed_tokens};
use super::gram::{Gram, GramSet};
use super::observer::Observer;
use super::residency::{DeviceBlock, Residency};
use super::spill::{Place, SPILLED, Spill};
use super::tier::{Tier, Waiting};
use super::tokens::TokenWeights;
use crate::engine::{Elem, Engine, Limits, Mat, Recording, Weight, matrix, submit};
use crate::model::{Block, Input, ModelSpec, Weights};
use crate::tensor::Dtype;
use crate::{Error, Result, interrupt};
use serde::Serialize;
use std::borrow::Cow;
use std::ops::Range;

/// How hidden states wait between blocks, how many of them go through the device at a time, and how the weights get there.
#[derive(Clone, Debug, Serialize)]
pub struct Streaming {
    /// Tokens per batch at most, but one window at least.
    pub batch_tokens: usize,
    /// Where they wait.
    pub tier: Tier,
    pub weights: Residency,
}

impl Default for Streaming {
    /// Enough tokens to keep a device busy, few enough that one sum over a batch stays accurate.
    fn default() -> Self {
        Self { batch_tokens: 4096, tier: Tier::Memory, weights: Residency::Block }
    }
}

impl Streaming {
    /// For the stream called `name`.
    pub fn named(&self, name: &str) -> Self {
        Self { tier: self.tier.named(name), ..*self }
    }

    /// How many windows of `seq_len` tokens a batch has, the last one perhaps fewer, such that activations as wide as the model's fit the device's
    /// buffers; the MLP's hidden units are split by tokens where they are wider.
    pub fn windows_per_batch(&self, n_seq: usize, seq_len: usize, spec: &ModelSpec, limits: Limits) -> usize {
        let width = spec.d_model.max(spec.n_head * spec.d_head);
        let fit = usize::try_from(limits.max_buffer).unwrap_or(usize::MAX) / (4 * matrix::stride(width)).max(1);
        let most = (self.batch_tokens.min(fit) / seq_len.max(1)).max(1);
        // An even number, alike: split-half tests compare the first half of them with the second.
        let number = match n_seq.div_ceil(most) {
            0 | 1 => 1,
            more => more.next_multiple_of(2),
        };
        n_seq.div_ceil(number).max(1)
    }

    fn batches(&self, n_seq: usize, seq_len: usize, spec: &ModelSpec, limits: Limits) -> Vec<Batch> {
        let each = self.windows_per_batch(n_seq, seq_len, spec, limits);
        (0..n_seq).step_by(each).map(|first| Batch { n_seq: each.min(n_seq - first), seq_len }).collect()
    }
}

/// Of buffers and errors.
const LABEL: &str = "hidden states";

/// The hidden states of all windows between two blocks: [n_seq · seq_len, d_model] per batch. What is on the device lives until
/// [`Self::free`].
#[derive(Debug)]
pub struct HiddenStates {
    pub d_model: usize,
    /// Width of the heads' context.
    d_context: usize,
    batches: Vec<Batch>,
    tier: Tier,
    waiting: Waiting<f32>,
    /// A copy on disk of what waits elsewhere, from the last time that it was saved.
    saved: Option<Spill>,
}

impl HiddenStates {
    /// For windows in `batches`, where `waiting` makes their place.
    fn of(spec: &ModelSpec, how: &Streaming, batches: Vec<Batch>, waiting: Waiting<f32>) -> Self {
        Self { d_model: spec.d_model, d_context: spec.n_head * spec.d_head, batches, tier: how.tier.clone(), waiting, saved: None }
    }

    /// For `n_seq` windows of `seq_len` tokens; no states yet.
    fn new(n_seq: usize, seq_len: usize, spec: &ModelSpec, how: &Streaming, limits: Limits) -> Result<Self> {
        let batches = how.batches(n_seq, seq_len, spec, limits);
        let waiting = Waiting::new(&how.tier, LABEL, shapes(&batches, spec.d_model))?;
        Ok(Self::of(spec, how, batches, waiting))
    }

    /// The embeddings of `windows`, which all have the same length. Only the rows that are needed are read.
    ///
    /// Errors name the tensor, if it cannot be read or a token is beyond its last row.
    pub fn embed<W: AsRef<[u32]>>(engine: &mut dyn Engine, weights: &dyn Weights, windows: &[W], how: &Streaming) -> Result<Self> {
        let spec = weights.spec();
        if engine.estimates() {
            let batches = how.batches(windows.len(), length(windows), spec, engine.limits());
            let waiting = Waiting::blank(engine, &how.tier, LABEL, shapes(&batches, spec.d_model))?;
            return Ok(Self::of(spec, how, batches, waiting));
        }
        let table = weights.linear(&spec.embedding)?;
        let (rows, d) = table.rows_cols();
        let bytes = d * table.dtype.size();
        let mut states = Self::new(windows.len(), length(windows), spec, how, engine.limits())?;
        let mut windows = windows.iter();
        for index in 0..states.batches() {
            let batch = states.batch(index);
            let ids = windows.by_ref().take(batch.n_seq).flat_map(|w| w.as_ref());
            let mut values = vec![0.0; batch.n_tok() * d];
            for (id, out) in ids.zip(values.chunks_mut(d.max(1))) {
                let row = Some(*id as usize).filter(|row| *row < rows);
                let row = row.ok_or_else(|| Error::internal(&spec.embedding.module, format!("has {rows} rows, but a token is {id}")))?;
                table.dtype.decode(&table.data[row * bytes..(row + 1) * bytes], out);
            }
            states.waiting.put(engine, index, values)?;
        }
        states.turn();
        drop(table);
        weights.release();
        Ok(states)
    }

    /// The rows of an embedding on the device for `windows`, which all have the same length.
    pub fn look_up<W: AsRef<[u32]>>(
        engine: &mut dyn Engine,
        spec: &ModelSpec,
        table: &Weight,
        windows: &[W],
        how: &Streaming,
    ) -> Result<Self> {
        let mut states = Self::new(windows.len(), length(windows), spec, how, engine.limits())?;
        let mut windows = windows.iter();
        for index in 0..states.batches() {
            let ids: Vec<u32> = windows.by_ref().take(states.batch(index).n_seq).flat_map(|w| w.as_ref().iter().copied()).collect();
            let mut rec = Recording::new();
            let ids = rec.upload("token ids", ids);
            let x = embed_tokens(&mut rec, table, ids);
            let leaving = states.waiting.leave(&mut rec, x);
            rec.free(ids);
            let mut downloads = engine.run(rec)?;
            states.waiting.settle(index, leaving, &mut downloads)?;
        }
        states.turn();
        Ok(states)
    }

    /// The same states in another tier.
    pub fn duplicate(&self, engine: &mut dyn Engine, tier: Tier) -> Result<Self> {
        let waiting = Waiting::new(&tier, LABEL, shapes(&self.batches, self.d_model))?;
        let mut copy = Self { d_model: self.d_model, d_context: self.d_context, batches: self.batches.clone(), tier, waiting, saved: None };
        for index in 0..self.batches() {
            let values = self.read(engine, index)?.into_owned();
            copy.waiting.put(engine, index, values)?;
        }
        copy.turn();
        Ok(copy)
    }

    /// Makes the states between two blocks durable: as files at `place`, or where they wait on disk. The number that comes back tells
    /// [`Self::restore`] which files hold them; those of the time before stay as they are until the next block has begun. From the device
    /// they are read back a batch at a time.
    pub fn save(&mut self, engine: &mut dyn Engine, place: &Place) -> Result<usize> {
        if let Some(spill) = self.waiting.spill() {
            return spill.sync();
        }
        let saved = match &mut self.saved {
            Some(saved) => saved,
            saved => saved.insert(Spill::open(place, Dtype::F32, lengths(&self.batches, self.d_model), None)?),
        };
        for index in 0..self.batches.len() {
            saved.write(index, &self.waiting.read(engine, index)?)?;
        }
        saved.turn();
        saved.sync()
    }

    /// The states of `n_seq` windows of `seq_len` tokens as [`Self::save`] left them.
    pub fn restore(
        engine: &mut dyn Engine,
        spec: &ModelSpec,
        [n_seq, seq_len]: [usize; 2],
        how: &Streaming,
        place: &Place,
        front: usize,
    ) -> Result<Self> {
        let batches = how.batches(n_seq, seq_len, spec, engine.limits());
        let lengths = lengths(&batches, spec.d_model);
        if let Tier::Disk(place) = &how.tier {
            let spill = Spill::open(place, SPILLED, lengths, Some(front))?;
            let waiting = Waiting::on_disk(spill, LABEL, shapes(&batches, spec.d_model));
            return Ok(Self::of(spec, how, batches, waiting));
        }
        let saved = Spill::open(place, Dtype::F32, lengths, Some(front))?;
        let mut waiting = Waiting::new(&how.tier, LABEL, shapes(&batches, spec.d_model))?;
        (0..batches.len()).try_for_each(|index| waiting.put(engine, index, saved.read(index)?))?;
        Ok(Self { saved: Some(saved), ..Self::of(spec, how, batches, waiting) })
    }

    /// Gives back what is on the device.
    pub fn free(self, rec: &mut Recording<'_>) {
        self.waiting.free(rec);
    }

    pub fn batches(&self) -> usize {
        self.batches.len()
    }

    pub fn batch(&self, index: usize) -> Batch {
        self.batches[index]
    }

    /// Batch `index` as it is now, [n_tok, d_model], where it does not wait on the device.
    ///
    /// # Errors
    /// Output, if it waits on a disk that cannot be read; internal, if on the device.
    pub fn values(&self, index: usize) -> Result<Cow<'_, [f32]>> {
        self.waiting.on_host(index)
    }

    /// The same, read back if it waits on the device.
    pub fn read(&self, engine: &mut dyn Engine, index: usize) -> Result<Cow<'_, [f32]>> {
        self.waiting.read(engine, index)
    }

    pub(super) fn waiting(&self) -> &Waiting<f32> {
        &self.waiting
    }

    pub(super) fn waiting_mut(&mut self) -> &mut Waiting<f32> {
        &mut self.waiting
    }

    /// A block is done: what all batches are now is what the next one reads.
    pub(super) fn turn(&mut self) {
        self.waiting.turn();
    }

    /// Nothing yet, where the heads' context of all batches can wait as the states do.
    pub(super) fn contexts<E: Elem>(&self) -> Result<Waiting<E>> {
        self.waiting.beside(&self.tier, "context", self.d_context)
    }

    /// Records a copy of batch `index` on the device, which is the caller's.
    pub fn upload<'a>(&'a self, rec: &mut Recording<'a>, index: usize) -> Result<Mat<f32>> {
        self.waiting.copy(rec, index)
    }

    /// Runs all batches through a block: the hidden states become its outputs.
    pub fn advance<E: Elem>(&mut self, engine: &mut dyn Engine, forward: &Forward<'_, E>, block: &DeviceBlock) -> Result<()> {
        for index in 0..self.batches.len() {
            interrupt::check()?;
            let mut rec = Recording::new();
            let x = self.waiting.enter(&mut rec, index)?;
            forward.block(&mut rec, block, x, self.batch(index), &mut (), None)?;
            let leaving = self.waiting.leave(&mut rec, x);
            let mut downloads = engine.run(rec)?;
            self.waiting.settle(index, leaving, &mut downloads)?;
        }
        self.turn();
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
            let x = self.upload(&mut rec, index)?;
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

/// [n_tok, cols] of each batch.
fn shapes(batches: &[Batch], cols: usize) -> Vec<[usize; 2]> {
    batches.iter().map(|batch| [batch.n_tok(), cols]).collect()
}

/// Values of each batch.
fn lengths(batches: &[Batch], cols: usize) -> Vec<usize> {
    batches.iter().map(|batch| batch.n_tok() * cols).collect()
}

/// Of windows that all have the same length.
fn length<W: AsRef<[u32]>>(windows: &[W]) -> usize {
    windows.first().map_or(0, |w| w.as_ref().len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Config, spec_of};

    #[test]
    fn batches_are_alike_and_of_an_even_number() {
        let config = r#"{"model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 4}"#;
        let spec = spec_of(&Config::parse("config.json".into(), config.as_bytes()).unwrap()).unwrap();
        let sizes = |n_seq: usize, seq_len: usize| -> Vec<usize> {
            let limits = Limits { max_buffer: 1 << 30, f16_operands: false };
            Streaming::default().batches(n_seq, seq_len, &spec, limits).iter().map(|batch| batch.n_seq).collect()
        };
        assert_eq!((sizes(128, 512), sizes(8, 512), sizes(9, 512)), (vec![8; 16], vec![8], vec![5, 4]));
        assert_eq!((sizes(24, 512), sizes(33, 128), sizes(3, 8192), sizes(0, 512)), (vec![6; 4], vec![17, 16], vec![1; 3], vec![]));
    }
}
