//! Perplexity over windows of a text, and divergence from a reference model.
//!
//! Protocol: the whole text is tokenized once, nothing is added; consecutive windows of equal length without overlap; in each
//! window tokens 1.. are predicted from those before; perplexity = exp(mean over windows of the mean loss of the window).
//! Divergence is KL(reference ‖ model), mean over all predicted positions; top-1 agreement is the share of positions where both
//! prefer the same token.
//!
//! Blocks stream through the device one at a time; hidden states of all windows wait on the device, in memory or on disk.

use super::blocks::run_blocks;
use super::head::{DeviceHead, HostHead, add_cross_entropy, add_divergence, chunk_rows, comparable};
use crate::calib::{Batch, Forward, HiddenStates, Streaming};
use crate::engine::{Elem, Engine, Recording, submit};
use crate::model::Weights;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Tokens of the shortest window that predicts anything.
pub const MIN_WINDOW: usize = 2;

/// What `eval` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub perplexity: f64,
    /// Mean loss in nats.
    pub loss: f64,
    /// Tokens read, over all windows.
    pub tokens: usize,
    pub windows: usize,
    pub window: usize,
    /// Mean KL(reference ‖ model) in nats per predicted token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_divergence: Option<f64>,
    /// Share of predicted positions where model and reference prefer the same token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_perplexity: Option<f64>,
}

/// Sums over windows.
#[derive(Default)]
struct Totals {
    windows: usize,
    loss: f64,
    reference_loss: f64,
    positions: usize,
    kl: f64,
    agree: usize,
}

/// Judges `weights` on `windows`, which have the same length of at least two; `how` tells where hidden states wait, and `step` is called after each block with the
/// number of steps done and of all.
///
/// # Errors
/// Usage when there is no window or a reference of another vocabulary; what reading the weights and running the engine gives.
pub fn evaluate<E: Elem>(
    engine: &mut dyn Engine,
    weights: &dyn Weights,
    reference: Option<&dyn Weights>,
    windows: &[&[u32]],
    how: &Streaming,
    step: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Evaluation> {
    let window = windows.first().map_or(0, |w| w.len());
    if window < MIN_WINDOW || windows.iter().any(|w| w.len() != window) {
        return Err(Error::usage("--window", "perplexity needs at least one window of two tokens or more, all of one length"));
    }
    if reference.is_some_and(|r| !comparable(weights.spec(), r.spec())) {
        return Err(Error::usage("--reference", "has another vocabulary than the model: their predictions cannot be compared"));
    }
    let models: Vec<&dyn Weights> = std::iter::once(weights).chain(reference).collect();
    let all: usize = models.iter().map(|m| m.spec().blocks.len() + 1).sum();
    let mut done = 0;
    let mut hidden = Vec::new();
    for (index, model) in models.iter().enumerate() {
        let how = Streaming { tier: how.tier.beside(&index.to_string()), ..*how };
        hidden.push(run_blocks::<E, _>(engine, *model, windows, &how, &mut |_| {
            step(done, all)?;
            done += 1;
            Ok(())
        })?);
    }
    let totals = run_heads::<E>(engine, &models, &hidden, windows)?;
    submit(engine, |rec| hidden.into_iter().for_each(|states| states.free(rec)))?;
    step(all, all)?;

    let loss = totals.loss / totals.windows as f64;
    if !loss.is_finite() {
        return Err(Error::numeric("evaluation", "the loss is not finite: activations overflow in this model"));
    }
    let per_position = |sum: f64| reference.map(|_| sum / totals.positions as f64);
    Ok(Evaluation {
        perplexity: loss.exp(),
        loss,
        tokens: window * windows.len(),
        windows: windows.len(),
        window,
        kl_divergence: per_position(totals.kl),
        top1_agreement: per_position(totals.agree as f64),
        reference_perplexity: reference.map(|_| (totals.reference_loss / totals.windows as f64).exp()),
    })
}

/// The heads of one or two models over the same windows, side by side.
fn run_heads<E: Elem>(engine: &mut dyn Engine, models: &[&dyn Weights], hidden: &[HiddenStates], windows: &[&[u32]]) -> Result<Totals> {
    let limits = engine.limits();
    let hosts = models.iter().map(|m| HostHead::read(*m)).collect::<Result<Vec<_>>>()?;
    let n_tok = (0..hidden[0].batches()).map(|i| hidden[0].batch(i).n_tok()).max().unwrap_or(0);
    let chunk = chunk_rows(&hosts, n_tok, limits);
    let heads: Vec<DeviceHead> = submit(engine, |rec| hosts.iter().map(|h| h.upload(rec, chunk)).collect())?;
    let forwards: Vec<Forward<'_, E>> = submit(engine, |rec| models.iter().map(|m| Forward::new(rec, m.spec(), 1, limits)).collect())?;

    let mut totals = Totals::default();
    let mut start = 0;
    for index in 0..hidden[0].batches() {
        let batch = hidden[0].batch(index);
        let group = &windows[start..start + batch.n_seq];
        start += batch.n_seq;
        // Position t predicts token t + 1; the last of a window predicts nothing, its target is never looked at.
        let target: Vec<u32> = group.iter().flat_map(|w| w[1..].iter().copied().chain([0])).collect();
        let mut rec = Recording::new();
        let target = rec.upload("targets", target);
        let mut normed = Vec::new();
        for ((hidden, head), forward) in hidden.iter().zip(&heads).zip(&forwards) {
            let x = hidden.upload(&mut rec, index)?;
            normed.push(head.norm(&mut rec, forward, x));
            x.free(&mut rec);
        }
        let states: Vec<_> = models.iter().map(|_| rec.alloc("loss state", batch.n_tok() * 4)).collect();
        let divergence = rec.alloc("divergence state", batch.n_tok() * 8);
        for c in 0..heads[0].panels().len() {
            let mut logits = Vec::new();
            for (i, head) in heads.iter().enumerate() {
                let panel = &head.panels()[c];
                logits.push(head.logits(&mut rec, normed[i], panel));
                add_cross_entropy(&mut rec, logits[i], panel, target, states[i]);
            }
            if let [model, reference] = logits[..] {
                add_divergence(&mut rec, model, reference, &heads[0].panels()[c], divergence);
            }
            logits.into_iter().for_each(|l| l.free(&mut rec));
        }
        let back: Vec<_> = states.iter().map(|s| rec.download(*s)).collect();
        let back_divergence = (models.len() == 2).then(|| rec.download(divergence));
        states.into_iter().for_each(|s| rec.free(s));
        rec.free(divergence);
        normed.into_iter().for_each(|x| x.free(&mut rec));
        rec.free(target);
        let mut downloads = engine.run(rec)?;
        for (i, state) in back.into_iter().enumerate() {
            totals.add_loss(batch, &downloads.take(state)?, i == 1);
        }
        if let Some(state) = back_divergence {
            totals.add_divergence(batch, &downloads.take(state)?);
        }
    }
    submit(engine, |rec| {
        heads.into_iter().for_each(|h| h.free(rec));
        forwards.into_iter().for_each(|f| f.free(rec));
    })?;
    Ok(totals)
}

impl Totals {
    /// `state` is [n_tok, 4] of `cross_entropy`.
    fn add_loss(&mut self, batch: Batch, state: &[f32], reference: bool) {
        for window in state.chunks(batch.seq_len * 4) {
            let predicted = window.chunks(4).take(batch.seq_len - 1);
            let loss =
                predicted.map(|s| f64::from(s[0]) + f64::from(s[1]).ln() - f64::from(s[2])).sum::<f64>() / (batch.seq_len - 1) as f64;
            if reference {
                self.reference_loss += loss;
            } else {
                self.loss += loss;
                self.windows += 1;
            }
        }
    }

    /// `state` is [n_tok, 8] of `kl_divergence`.
    fn add_divergence(&mut self, batch: Batch, state: &[f32]) {
        for window in state.chunks(batch.seq_len * 8) {
            for s in window.chunks(8).take(batch.seq_len - 1) {
                let log_partition = |max: f32, sum: f32| f64::from(max) + f64::from(sum).ln();
                // Rounding can leave a divergence of zero a little below it.
                let kl = f64::from(s[4]) / f64::from(s[3]) - log_partition(s[2], s[3]) + log_partition(s[0], s[1]);
                self.kl += kl.max(0.0);
                self.agree += usize::from(s[5] == s[6]);
                self.positions += 1;
            }
        }
    }
}
