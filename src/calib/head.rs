//! The statistic of the head's input: what the final norm makes of the last block's outputs.

use super::forward::Forward;
use super::gram::Accumulator;
use super::residency::upload_norm;
use super::statistic::{Moments, Statistic};
use super::stream::HiddenStates;
use crate::engine::{Elem, Engine, Recording, submit};
use crate::model::Weights;
use crate::{Result, interrupt};

/// H of the final norm's outputs, of all windows and of each half of them. `states` are the last block's outputs.
pub fn head_statistic<E: Elem>(
    engine: &mut dyn Engine,
    forward: &Forward<'_, E>,
    weights: &dyn Weights,
    states: &HiddenStates,
) -> Result<Statistic> {
    let (spec, limits, n) = (forward.spec(), engine.limits(), states.batches());
    let gain = weights.tensor(&spec.final_norm.name)?.to_f32();
    let bias = spec.final_norm.bias.as_deref().map(|name| weights.tensor(name).map(|t| t.to_f32())).transpose()?;
    let norm = submit(engine, |rec| upload_norm(rec, &gain, bias.as_deref()))?;
    let halves = if n > 1 { vec![0..n / 2, n / 2..n] } else { std::iter::once(0..n).collect() };
    let mut moments = Vec::new();
    for half in halves {
        let mut sum = submit(engine, |rec| Accumulator::new(rec, spec.d_model, limits))?;
        for index in half {
            interrupt::check()?;
            let mut rec = Recording::new();
            let x = states.upload(&mut rec, index)?;
            let a = forward.norm(&mut rec, norm, x);
            sum.add(&mut rec, a, a.rows);
            a.free(&mut rec);
            x.free(&mut rec);
            engine.run(rec)?;
        }
        let mut rec = Recording::new();
        let pending = sum.download(&mut rec);
        let gram = pending.take(&mut engine.run(rec)?, "Gram matrix of the head's input")?;
        moments.push(Moments { gram, cross: None, residual: None });
    }
    submit(engine, |rec| {
        rec.free(norm.gain);
        rec.free(norm.bias);
    })?;
    Ok(Statistic::of_halves(moments))
}
