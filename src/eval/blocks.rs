//! Windows through all blocks of a model; blocks stream through the device one at a time.

use crate::Result;
use crate::calib::{DeviceBlock, Forward, HiddenStates, Streaming};
use crate::engine::{Elem, Engine, submit};
use crate::model::Weights;

/// The inputs of the final norm. `each` sees the hidden states before the first block and after every block.
pub(super) fn run_blocks<E: Elem, W: AsRef<[u32]>>(
    engine: &mut dyn Engine,
    weights: &dyn Weights,
    windows: &[W],
    how: &Streaming,
    each: &mut dyn FnMut(&HiddenStates) -> Result<()>,
) -> Result<HiddenStates> {
    let spec = weights.spec();
    let limits = engine.limits();
    let mut hidden = HiddenStates::embed(engine, weights, windows, how)?;
    each(&hidden)?;
    let seq_len = windows.first().map_or(0, |w| w.as_ref().len());
    let forward = submit(engine, |rec| Forward::<E>::new(rec, spec, seq_len, limits))?;
    for block in &spec.blocks {
        let device = DeviceBlock::load_as(engine, weights, block, how.weights)?;
        if let Some(next) = spec.blocks.get(block.index + 1) {
            weights.prefetch(next);
        }
        hidden.advance(engine, &forward, &device)?;
        submit(engine, |rec| device.free(rec))?;
        each(&hidden)?;
    }
    submit(engine, |rec| forward.free(rec))?;
    Ok(hidden)
}
