//! The matrices outside of the blocks, where a format quantizes them: embedding and head.
//!
//! An embedding of its own is rounded first, by the squared error of its rows, so that the blocks are calibrated on what it really gives; the
//! head last, under the metric of what the quantized blocks really give it. A tied head is both: the float model runs once ahead to give its
//! metric, and it is rounded first.

use super::outputs::{Outputs, Task};
use super::{Progress, Run};
use crate::calib::{DeviceBlock, Forward, HiddenStates, Statistic, head_statistic};
use crate::engine::{Elem, Weight, submit};
use crate::method::{Damping, Inputs, Settings, Solver};
use crate::metric::{Heads, Metric};
use crate::model::{Checkpoint, Linear, Weights};
use crate::plan::Calibration;
use crate::report::Weighing;
use crate::round::Rounding;
use crate::scale::ScaleRule;
use crate::transform::Transform;
use crate::{Error, Result, interrupt};

impl Run<'_> {
    /// Rounds the embedding if it is to be: the quantized rows on the device, if they flow on.
    pub(super) fn embedding<E: Elem>(
        &mut self,
        checkpoint: &Checkpoint,
        calibration: Option<&Calibration>,
        forward: Option<&Forward<'_, E>>,
        outputs: &mut Outputs,
        progress: &mut dyn Progress,
    ) -> Result<Option<Weight>> {
        let spec = checkpoint.spec();
        let linear = if spec.tied_head { &spec.head } else { &spec.embedding };
        if outputs.lattices(linear).is_empty() {
            return Ok(None);
        }
        progress.step(0, &linear.role.to_string());
        let statistic = match (calibration, forward) {
            (Some(calibration), Some(forward)) if spec.tied_head => {
                let mut states = HiddenStates::embed(self.engine, checkpoint, &calibration.windows, &self.streaming.named("float"))?;
                for block in &spec.blocks {
                    interrupt::check()?;
                    let device = DeviceBlock::load_as(self.engine, checkpoint, block, self.streaming.weights)?;
                    states.advance(self.engine, forward, &device)?;
                    submit(self.engine, |rec| device.free(rec))?;
                }
                let statistic = head_statistic(self.engine, forward, checkpoint, &states)?;
                submit(self.engine, |rec| states.free(rec))?;
                Some(statistic)
            }
            _ => None,
        };
        self.lap("statistics");
        self.matrix(checkpoint, linear, statistic, outputs)
    }

    /// Rounds a head of its own if it is to be.
    pub(super) fn head<E: Elem>(
        &mut self,
        checkpoint: &Checkpoint,
        stream: Option<(&HiddenStates, &Forward<'_, E>)>,
        outputs: &mut Outputs,
    ) -> Result<()> {
        let spec = checkpoint.spec();
        if spec.tied_head || outputs.lattices(&spec.head).is_empty() {
            return Ok(());
        }
        let statistic = stream.map(|(states, forward)| head_statistic(self.engine, forward, checkpoint, states)).transpose()?;
        self.lap("statistics");
        match self.matrix(checkpoint, &spec.head, statistic, outputs)? {
            Some(w_hat) => submit(self.engine, |rec| w_hat.free(rec)),
            None => Ok(()),
        }
    }

    /// Rounds one matrix for every lattice and writes it; what flows on comes back.
    pub(super) fn matrix(
        &mut self,
        weights: &dyn Weights,
        linear: &Linear,
        statistic: Option<Statistic>,
        outputs: &mut Outputs,
    ) -> Result<Option<Weight>> {
        let named = |e: Error| Error { subject: format!("{}: {}", linear.module, e.subject), ..e };
        let (lattices, limits) = (outputs.lattices(linear), self.engine.limits());
        let tensor = weights.linear(linear)?;
        let weight = submit(self.engine, |rec| Weight::upload(rec, "matrix", &tensor, limits))?;
        drop(tensor);
        weights.release();
        let on: Vec<_> = lattices.first().map(|lattice| (&weight, *lattice)).into_iter().collect();
        let settings = self.damped(self.outer_settings(statistic.is_some()), statistic.as_ref(), &on).map_err(named)?;
        let gram = statistic.map(|s| s.into_whole().gram);
        let solver = Solver::new(self.engine, settings, linear.d_in, gram, None).map_err(named)?;
        let how = Weighing { metric: settings.method.metric, shrinkage: None, alpha: None, beta: None };
        let task = Task { linear, block: None, weight: &weight, heads: Heads::None, how };
        let next = self.solve(&solver, &task, outputs)?;
        // Larger than all others, and not to lie beside a block.
        outputs.settle()?;
        self.lap("write");
        solver.free(self.engine)?;
        submit(self.engine, |rec| weight.free(rec))?;
        Ok(next)
    }

    /// The method as it is for a matrix by itself: under the metric of its inputs, or by its own squared error where it has none.
    fn outer_settings(&self, calibrated: bool) -> Settings {
        let mut settings = self.settings;
        let method = &mut settings.method;
        (method.transform, method.inputs) = (Transform::None, Inputs::Block);
        if calibrated {
            method.metric = Metric::Layer;
            return settings;
        }
        (method.metric, method.rounding, method.damping) = (Metric::Identity, Rounding::NEAREST, Damping::Fixed(0.0));
        if method.scale != ScaleRule::MinMax {
            method.scale = ScaleRule::Mse;
        }
        settings
    }
}
