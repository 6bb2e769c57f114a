//! The formats that one run writes. Formats whose lattices are the same share what is solved; the first one's results flow on to the next block.

use super::Run;
use crate::engine::{Weight, submit};
use crate::export::{Made, Writer};
use crate::method::{Solved, Solver};
use crate::metric::Heads;
use crate::model::{Linear, ModelSpec};
use crate::quant::Lattice;
use crate::report::{LayerReport, Weighing};
use crate::tensor::Tensor;
use crate::{Error, Result};
use std::collections::BTreeMap;

pub(super) struct Outputs {
    all: Vec<Output>,
}

/// One format: where it goes, and what was solved for it.
struct Output {
    /// Of the matrices that are quantized, by module.
    lattices: BTreeMap<String, Lattice>,
    /// An estimate has none.
    writer: Option<Writer>,
    layers: Vec<LayerReport>,
    /// Layers that the journal knows.
    told: usize,
}

impl Output {
    fn quantized(&self, linear: &Linear) -> Option<Lattice> {
        self.lattices.get(&linear.module).copied()
    }
}

/// A matrix to round, and how it is told in the report.
pub(super) struct Task<'t> {
    pub linear: &'t Linear,
    /// None for the embedding and the head.
    pub block: Option<usize>,
    pub weight: &'t Weight,
    pub heads: Heads<'t>,
    pub how: Weighing,
}

impl Run<'_> {
    /// Rounds a matrix for every lattice that is asked for and writes it. The values that flow on come back, if any do.
    pub(super) fn solve(&mut self, solver: &Solver, spec: &ModelSpec, task: &Task<'_>, outputs: &mut Outputs) -> Result<Option<Weight>> {
        let Task { linear, block, weight, heads, how } = task;
        let named = |e: Error| Error { subject: format!("{}: {}", linear.module, e.subject), ..e };
        let mut next = None;
        for lattice in outputs.lattices(linear) {
            let solved = solver.solve(self.engine, weight, lattice, *heads).map_err(named)?;
            let report = LayerReport::new(*block, linear, &solved, how, self.lap("solve"));
            let (w_hat, leads) = outputs.put(spec, linear, solved, &report)?;
            self.lap("write");
            match leads {
                true => next = Some(w_hat),
                false => submit(self.engine, |rec| w_hat.free(rec))?,
            }
        }
        Ok(next)
    }
}

impl Outputs {
    pub fn new(writers: Vec<Writer>) -> Self {
        let output = |writer: Writer| Output { lattices: writer.lattices().clone(), writer: Some(writer), layers: Vec::new(), told: 0 };
        Self { all: writers.into_iter().map(output).collect() }
    }

    /// For an estimate of what these writers will get.
    pub fn nowhere(writers: &[Writer]) -> Self {
        let output = |writer: &Writer| Output { lattices: writer.lattices().clone(), writer: None, layers: Vec::new(), told: 0 };
        Self { all: writers.iter().map(output).collect() }
    }

    /// The writers, each with what was solved for it.
    pub fn into_writers(self) -> impl Iterator<Item = (Writer, Vec<LayerReport>)> {
        self.all.into_iter().filter_map(|output| Some((output.writer?, output.layers)))
    }

    /// All lattices that are asked for of a matrix, each once, that of the first format that quantizes it first.
    pub fn lattices(&self, linear: &Linear) -> Vec<Lattice> {
        let mut found = Vec::new();
        for lattice in self.all.iter().filter_map(|output| output.quantized(linear)) {
            if !found.contains(&lattice) {
                found.push(lattice);
            }
        }
        found
    }

    /// The lattice of what flows on; `None`: the matrix as it is.
    pub fn leading(&self, linear: &Linear) -> Option<Lattice> {
        self.all.first().and_then(|output| output.quantized(linear))
    }

    /// As `leading`, for transforms, which rewrite all matrices of a block and so want all of them quantized, by every format.
    ///
    /// # Errors
    /// Usage, naming the matrix that a format leaves as it is.
    pub fn rewritable(&self, linear: &Linear) -> Result<Lattice> {
        let left = self.all.iter().any(|output| output.quantized(linear).is_none());
        self.leading(linear).filter(|_| !left).ok_or_else(|| {
            Error::usage(
                "--transform",
                format!("rewrites {}, which one of the formats leaves as it is; use --transform none", linear.module),
            )
        })
    }

    /// Writes what was solved to every format with its lattice. The values on the device come back if they flow on.
    fn put(&mut self, spec: &ModelSpec, linear: &Linear, solved: Solved, report: &LayerReport) -> Result<(Weight, bool)> {
        let leads = self.leading(linear) == Some(solved.packed.lattice);
        for output in self.all.iter_mut().filter(|output| output.quantized(linear) == Some(solved.packed.lattice)) {
            output.writer.as_mut().map_or(Ok(()), |writer| writer.put_linear(spec, linear, &solved.packed))?;
            output.layers.push(report.clone());
        }
        Ok((solved.w_hat, leads))
    }

    /// What was made for each format since the last call, durable on disk now.
    pub fn made(&mut self) -> Result<Vec<(Made, Vec<LayerReport>)>> {
        let made = |output: &mut Output| {
            let layers = output.layers[output.told..].to_vec();
            output.told = output.layers.len();
            Ok((output.writer.as_mut().map(Writer::made).transpose()?.unwrap_or_default(), layers))
        };
        self.all.iter_mut().map(made).collect()
    }

    /// Takes back what was written since [`Self::made`].
    pub fn forget(&mut self, spec: &ModelSpec) -> Result<()> {
        self.all.iter_mut().try_for_each(|output| {
            output.layers.truncate(output.told);
            output.writer.as_mut().map_or(Ok(()), |writer| writer.forget(spec))
        })
    }

    /// Takes over what an earlier run has made.
    pub fn restore(&mut self, spec: &ModelSpec, made: Vec<(Made, Vec<LayerReport>)>) -> Result<()> {
        for (output, (made, layers)) in self.all.iter_mut().zip(made) {
            output.writer.as_mut().map_or(Ok(()), |writer| writer.restore(spec, &made))?;
            output.layers.extend(layers);
            output.told = output.layers.len();
        }
        Ok(())
    }

    /// Writes a tensor that changed to all formats.
    pub fn put_tensor(&mut self, spec: &ModelSpec, name: &str, tensor: &Tensor<'_>) -> Result<()> {
        self.all.iter_mut().filter_map(|output| output.writer.as_mut()).try_for_each(|writer| writer.put_tensor(spec, name, tensor))
    }
}
