//! A stream of hidden states on its way through one block, from linear input to linear input, so that the linears of one input can
//! be quantized before the next input is computed.
//!
//! Two streams can walk side by side: X through the quantized network, X̃ through the float one. Their moments H = Xᵀ X / n_tok and
//! C = (X̃ − X)ᵀ X / n_tok are what a linear needs to aim at the float model's outputs (asymmetric targets: QEP, NeurIPS 2025; GPTAQ,
//! ICML 2025), and where these are added to the residual stream R, D = (R̃ − R)ᵀ X / n_tok to make up for what that lacks.
//!
//! Between inputs a stream keeps its hidden states and, before the output projection, the heads' context where it waits. The MLP's
//! hidden units are computed twice (for the statistics, and again with the quantized Down): keeping them would take d_ff floats
//! per token.

use super::forward::Forward;
use super::gram::{Accumulator, finite};
use super::observer::Observer;
use super::residency::DeviceBlock;
use super::statistic::{Moments, Statistic};
use super::stream::HiddenStates;
use super::tier::{Leaving, Waiting};
use super::tokens::{RowWeights, TokenWeights};
use crate::engine::kernels::{self, axpy, gather_columns, matmul_tn};
use crate::engine::panels::PendingPanels;
use crate::engine::{Buffer, Elem, Engine, Limits, Mat, Panels, Recording, submit};
use crate::model::{Block, Input};
use crate::{Error, Result, interrupt};

/// One stream inside a block.
pub struct Walk<'h, E: Elem> {
    states: &'h mut HiddenStates,
    /// Per batch, the heads' context between `Input::Context` and the output projection.
    context: Waiting<E>,
}

/// What a batch leaves behind after an input was computed.
struct Left<E: Elem> {
    x: Option<Leaving<f32>>,
    context: Option<Leaving<E>>,
}

impl<'h, E: Elem> Walk<'h, E> {
    /// Contexts wait where the states do.
    ///
    /// # Errors
    /// Output, if that is on a disk that cannot be written.
    pub fn new(states: &'h mut HiddenStates) -> Result<Self> {
        let context = states.contexts()?;
        Ok(Self { states, context })
    }

    pub fn batches(&self) -> usize {
        self.states.batches()
    }

    /// Records the way of batch `index` to `input`, which must be the next one, and shows it to `observer`. With `finish`
    /// the last input's linear is applied too and the batch is through the block.
    #[allow(clippy::too_many_arguments, reason = "one step of a walk: what walks, where, to which input")]
    fn step<'a>(
        &'a self,
        rec: &mut Recording<'a>,
        forward: &Forward<'_, E>,
        device: &DeviceBlock,
        index: usize,
        input: Input,
        finish: bool,
        observer: &mut dyn Observer<E>,
    ) -> Result<Left<E>> {
        let states = self.states.waiting();
        let changed = input == Input::MlpNorm || finish;
        let x = states.enter(rec, index)?;
        let batch = self.states.batch(index);
        let mut left = Left { x: None, context: None };
        match input {
            Input::AttnNorm => {
                let a = forward.norm(rec, device.attn_norm(), x);
                observer.input(rec, input, a);
                a.free(rec);
            }
            Input::Context => {
                observer.residual(rec, x);
                let a = forward.norm(rec, device.attn_norm(), x);
                let context = forward.context(rec, device, a, batch, observer)?;
                a.free(rec);
                observer.input(rec, input, context);
                left.context = Some(self.context.leave(rec, context));
            }
            Input::MlpNorm => {
                let context = self.context.enter(rec, index)?;
                forward.add_context(rec, device, context, x)?;
                context.free(rec);
                let b = forward.norm(rec, device.mlp_norm(), x);
                observer.input(rec, input, b);
                b.free(rec);
            }
            Input::Hidden => {
                observer.residual(rec, x);
                let b = forward.norm(rec, device.mlp_norm(), x);
                forward.mlp(rec, device, b, finish.then_some(x), observer)?;
                b.free(rec);
            }
            Input::FinalNorm => return Err(Error::internal("walk", "the final norm is not in a block")),
        }
        if changed {
            left.x = Some(states.leave(rec, x));
        } else {
            states.done(rec, x);
        }
        Ok(left)
    }

    fn keep(&mut self, index: usize, left: Left<E>, downloads: &mut crate::engine::Downloads) -> Result<()> {
        if let Some(x) = left.x {
            self.states.waiting_mut().settle(index, x, downloads)?;
            self.context.forget(index);
        }
        if let Some(context) = left.context {
            self.context.settle(index, context, downloads)?;
        }
        Ok(())
    }

    /// Applies the last linear: the hidden states become the block's outputs.
    pub fn finish(mut self, engine: &mut dyn Engine, forward: &Forward<'_, E>, device: &DeviceBlock) -> Result<()> {
        for index in 0..self.batches() {
            interrupt::check()?;
            let mut rec = Recording::new();
            let left = self.step(&mut rec, forward, device, index, Input::Hidden, true, &mut ())?;
            let mut downloads = engine.run(rec)?;
            self.keep(index, left, &mut downloads)?;
        }
        self.states.turn();
        Ok(())
    }
}

/// What adds up the moments of one block's inputs.
pub struct Collector<'c, E: Elem> {
    pub forward: &'c Forward<'c, E>,
    pub block: &'c Block,
    /// How much tokens count; all the same where there are none.
    pub weights: Option<&'c TokenWeights>,
    /// Also what the residual stream lacks, for inputs of linears whose outputs are added to it.
    pub residual: bool,
}

/// A stream and the block that it goes through.
type Through<'s, 'h, E> = (&'s mut Walk<'h, E>, &'s DeviceBlock);

impl<E: Elem> Collector<'_, E> {
    /// Brings the stream X of the quantized network, and the stream X̃ of the float one where there is one, to `input` and adds up their
    /// moments. The float stream is through the block after its last input.
    pub fn collect(
        &self,
        engine: &mut dyn Engine,
        input: Input,
        (walk, device): Through<'_, '_, E>,
        mut float: Option<Through<'_, '_, E>>,
    ) -> Result<Statistic> {
        let Self { forward, block, weights, residual } = *self;
        let limits = engine.limits();
        let last = block.inputs().last() == Some(&input);
        let n = walk.batches();
        let halves = if n > 1 { vec![0..n / 2, n / 2..n] } else { std::iter::once(0..n).collect() };
        let mut moments = Vec::new();
        for half in halves {
            let mut sums = submit(engine, |rec| Sums::new(rec, block, input, float.is_some(), residual, limits))?;
            for index in half {
                interrupt::check()?;
                let mut rec = Recording::new();
                // All ranges of the float stream first, so that each can be paired with the same range of the other.
                let of_batch = weights.map(|w| w.rows(index..index + 1));
                let mut kept = Kept { copies: Vec::new(), residual: None, wants_residual: residual, weights: of_batch };
                let float_left = match &float {
                    Some((walk, device)) => Some(walk.step(&mut rec, forward, device, index, input, last, &mut kept)?),
                    None => None,
                };
                let Kept { copies, residual, .. } = kept;
                let missing = residual.map(|residual| Missing { residual, done: 0 });
                let mut paired = Paired { sums: &mut sums, float: copies.into_iter(), missing, weights: of_batch };
                let left = walk.step(&mut rec, forward, device, index, input, false, &mut paired)?;
                if let Some(missing) = paired.missing {
                    missing.residual.free(&mut rec);
                }
                let mut downloads = engine.run(rec)?;
                walk.keep(index, left, &mut downloads)?;
                if let (Some((walk, _)), Some(left)) = (&mut float, float_left) {
                    walk.keep(index, left, &mut downloads)?;
                }
            }
            moments.push(sums.read(engine)?);
        }
        if let Some((walk, _)) = float.filter(|_| last) {
            walk.states.turn();
        }
        Ok(Statistic::of_halves(moments))
    }
}

/// Keeps copies of a stream's activations, scaled where tokens have weights.
struct Kept<'w> {
    copies: Vec<Mat<f32>>,
    residual: Option<Mat<f32>>,
    wants_residual: bool,
    /// Of the whole batch, until inputs come.
    weights: Option<RowWeights<'w>>,
}

impl<E: Elem> Observer<E> for Kept<'_> {
    fn input(&mut self, rec: &mut Recording<'_>, _: Input, x: Mat<E>) {
        let copy = next_rows(rec, x, &mut self.weights);
        self.copies.push(copy);
    }

    fn residual(&mut self, rec: &mut Recording<'_>, x: Mat<f32>) {
        self.residual = self.wants_residual.then(|| next_rows(rec, x, &mut self.weights.clone()));
    }
}

/// Adds up the other stream, each range with its copy.
struct Paired<'s> {
    sums: &'s mut Sums,
    float: std::vec::IntoIter<Mat<f32>>,
    missing: Option<Missing>,
    weights: Option<RowWeights<'s>>,
}

/// What the residual stream of a batch lacks, R̃ − R, or R̃ until R is known; and the rows that were paired with their inputs.
#[derive(Clone, Copy)]
struct Missing {
    residual: Mat<f32>,
    done: usize,
}

impl<E: Elem> Observer<E> for Paired<'_> {
    fn input(&mut self, rec: &mut Recording<'_>, _: Input, x: Mat<E>) {
        match &mut self.weights {
            Some(weights) => {
                let scaled = weights.scaled(rec, x);
                self.sums.add(rec, scaled, self.float.next(), self.missing.as_mut());
                scaled.free(rec);
            }
            None => self.sums.add(rec, x, self.float.next(), self.missing.as_mut()),
        }
    }

    fn residual(&mut self, rec: &mut Recording<'_>, x: Mat<f32>) {
        if let Some(missing) = &self.missing {
            let own = next_rows(rec, x, &mut self.weights.clone());
            let p = axpy::AxpyParams { n: own.buffer.len() as u32, alpha: -1.0 };
            kernels::axpy(rec, p, own.buffer, missing.residual.buffer);
            own.free(rec);
        }
    }
}

/// A copy of a batch's next rows, scaled where tokens have weights.
fn next_rows<E: Elem>(rec: &mut Recording<'_>, x: Mat<E>, weights: &mut Option<RowWeights<'_>>) -> Mat<f32> {
    match weights {
        Some(weights) => weights.scaled(rec, x),
        None => to_f32(rec, x),
    }
}

/// The sums of one input on the device.
struct Sums {
    gram: Accumulator,
    n_tok: usize,
    /// C, if there is another stream.
    cross: Panels,
    /// The residual stream's moment, if it is wanted.
    residual: Panels,
}

impl Sums {
    fn new(rec: &mut Recording<'_>, block: &Block, input: Input, cross: bool, residual: bool, limits: Limits) -> Self {
        let d = block.width(input);
        let mut panels = |wanted: bool, rows: usize| match cross && wanted {
            true => Panels::zeros(rec, "cross moment", [rows, d], limits),
            false => Panels::default(),
        };
        let added = matches!(input, Input::Context | Input::Hidden);
        let residual = panels(residual && added, block.width(Input::AttnNorm));
        Self { cross: panels(true, d), residual, gram: Accumulator::new(rec, d, limits), n_tok: 0 }
    }

    /// Adds the rows of x, and of X̃ where there is one, which it frees, and the next rows of what the residual stream lacks.
    fn add<E: Elem>(&mut self, rec: &mut Recording<'_>, x: Mat<E>, float: Option<Mat<f32>>, missing: Option<&mut Missing>) {
        self.gram.add(rec, x, x.rows);
        self.n_tok += x.rows;
        let Some(difference) = float else { return };
        let own = to_f32(rec, x);
        kernels::axpy(rec, axpy::AxpyParams { n: own.buffer.len() as u32, alpha: -1.0 }, own.buffer, difference.buffer);
        own.free(rec);
        add_cross(rec, &self.cross, difference, 0, x);
        difference.free(rec);
        if let Some(missing) = missing {
            add_cross(rec, &self.residual, missing.residual, missing.done, x);
            missing.done += x.rows;
        }
    }

    fn read(self, engine: &mut dyn Engine) -> Result<Moments> {
        let mut rec = Recording::new();
        let gram = self.gram.download(&mut rec);
        let [cross, residual] = [self.cross, self.residual].map(|panels| {
            let pending = panels.download(&mut rec);
            panels.free(&mut rec);
            pending
        });
        let mut downloads = engine.run(rec)?;
        let gram = gram.take(&mut downloads, "Gram matrix")?;
        let scale = 1.0 / self.n_tok.max(1) as f32;
        let mut read = |panels: PendingPanels| -> Result<Option<Vec<f32>>> {
            let mut sums = panels.take(&mut downloads)?;
            if downloads.is_blank() {
                return Ok((!sums.is_empty()).then_some(sums));
            }
            sums.iter_mut().for_each(|v| *v *= scale);
            finite(&sums, "cross moment")?;
            Ok((!sums.is_empty()).then_some(sums))
        };
        Ok(Moments { gram, cross: read(cross)?, residual: read(residual)? })
    }
}

/// Adds differenceᵀ x to panels of rows, with the rows of the difference from `first` on.
fn add_cross<E: Elem>(rec: &mut Recording<'_>, panels: &Panels, difference: Mat<f32>, first: usize, x: Mat<E>) {
    for panel in panels.iter() {
        let p = matmul_tn::MatmulTnParams {
            n: panel.mat.rows as u32,
            m: x.cols as u32,
            k: x.rows as u32,
            lda: difference.ld as u32,
            ldb: x.ld as u32,
            ldc: panel.mat.ld as u32,
            a_offset: (first * difference.ld + panel.start) as u32,
            batches: 1,
            alpha: 1.0,
            beta: 1.0,
            ..Default::default()
        };
        kernels::matmul_tn(rec, p, difference.buffer, x.buffer, panel.mat.buffer);
    }
}

/// A copy in f32.
fn to_f32<E: Elem>(rec: &mut Recording<'_>, x: Mat<E>) -> Mat<f32> {
    let copy = Mat::alloc(rec, "activations in f32", x.rows, x.cols);
    let natural: Buffer<u32> = rec.upload("order", (0..x.cols as u32).collect::<Vec<_>>());
    let (rows, cols, ld_source, ld_to) = (x.rows as u32, x.cols as u32, x.ld as u32, copy.ld as u32);
    let p = gather_columns::GatherColumnsParams { rows, cols, ld_source, ld_to, row_source: 0, row_to: 0 };
    kernels::gather_columns(rec, p, natural, x.buffer.as_stored(), copy.buffer);
    rec.free(natural);
    copy
}
