//! What a model computes on one short text, in full: hidden states between blocks and all logits. For comparing implementations.

use super::blocks::run_blocks;
use super::head::{HostHead, chunk_rows};
use crate::Result;
use crate::calib::{Forward, Streaming};
use crate::engine::{Elem, Engine, Recording, submit};
use crate::model::Weights;

/// The inputs of every block and of the final norm, and the logits.
#[derive(Clone, Debug)]
pub struct Trace {
    /// [n_layer + 1][n_tok · d_model].
    pub hidden: Vec<Vec<f32>>,
    /// [n_tok, n_vocab].
    pub logits: Vec<f32>,
}

/// Runs one sequence of token ids; memory grows with n_tok · n_vocab.
pub fn trace<E: Elem>(engine: &mut dyn Engine, weights: &dyn Weights, ids: &[u32]) -> Result<Trace> {
    let spec = weights.spec();
    let limits = engine.limits();
    let mut states = Vec::new();
    let hidden = run_blocks::<E, _>(engine, weights, &[ids], &Streaming::default(), &mut |hidden| {
        states.push(hidden.values(0)?.into_owned());
        Ok(())
    })?;

    let hosts = [HostHead::read(weights)?];
    let forward = submit(engine, |rec| Forward::<E>::new(rec, spec, 1, limits))?;
    let mut rec = Recording::new();
    let head = hosts[0].upload(&mut rec, chunk_rows(&hosts, ids.len(), limits));
    let x = hidden.upload(&mut rec, 0)?;
    let normed = head.norm(&mut rec, &forward, x);
    x.free(&mut rec);
    let mut pending = Vec::new();
    for panel in head.panels() {
        let logits = head.logits(&mut rec, normed, panel);
        pending.push((panel.start, panel.rows, logits.download(&mut rec)));
        logits.free(&mut rec);
    }
    normed.free(&mut rec);
    head.free(&mut rec);
    forward.free(&mut rec);
    let mut downloads = engine.run(rec)?;
    let mut logits = vec![0.0; ids.len() * spec.n_vocab];
    for (start, rows, chunk) in pending {
        let chunk = chunk.take(&mut downloads)?;
        for (row, values) in logits.chunks_mut(spec.n_vocab).zip(chunk.chunks(rows)) {
            row[start..start + rows].copy_from_slice(values);
        }
    }
    Ok(Trace { hidden: states, logits })
}
