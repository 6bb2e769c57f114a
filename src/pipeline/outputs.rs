//! The formats that one run writes. Formats whose lattices are the same share what is solved; the first one's results flow on to the next block.

use super::Run;
use super::scribe::Scribe;
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
use std::sync::Arc;

pub(super) struct Outputs {
    all: Vec<Output>,
}

/// One format: where it goes, and what was solved for it.
struct Output {
    /// Of the matrices that are quantized, by module.
    lattices: BTreeMap<String, Lattice>,
    scribe: Scribe,
    layers: Vec<LayerReport>,
    /// Layers that the journal knows.
    told: usize,
}

impl Output {
    fn new(lattices: BTreeMap<String, Lattice>, scribe: Scribe) -> Self {
        Self { lattices, scribe, layers: Vec::new(), told: 0 }
    }

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
    pub(super) fn solve(&mut self, solver: &Solver, task: &Task<'_>, outputs: &mut Outputs) -> Result<Option<Weight>> {
        let Task { linear, block, weight, heads, how } = task;
        let named = |e: Error| Error { subject: format!("{}: {}", linear.module, e.subject), ..e };
        let mut next = None;
        for lattice in outputs.lattices(linear) {
            let solved = solver.solve(self.engine, weight, lattice, *heads).map_err(named)?;
            let report = LayerReport::new(*block, linear, &solved, how, self.lap("solve"));
            let (w_hat, leads) = outputs.put(linear, solved, &report)?;
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
    pub fn new(spec: &ModelSpec, writers: Vec<Writer>) -> Self {
        let spec = Arc::new(spec.clone());
        Self {
            all: writers
                .into_iter()
                .map(|writer| Output::new(writer.lattices().clone(), Scribe::new(&spec, writer.format(), Some(writer))))
                .collect(),
        }
    }

    /// For an estimate of what these writers will get.
    pub fn nowhere(spec: &ModelSpec, writers: &[Writer]) -> Self {
        let spec = Arc::new(spec.clone());
        Self {
            all: writers.iter().map(|writer| Output::new(writer.lattices().clone(), Scribe::new(&spec, writer.format(), None))).collect(),
        }
    }

    /// The writers, each with what was solved for it.
    ///
    /// # Errors
    /// Those of the last writes.
    pub fn into_writers(self) -> Result<Vec<(Writer, Vec<LayerReport>)>> {
        let done = |output: Output| Ok(output.scribe.into_writer()?.map(|writer| (writer, output.layers)));
        self.all.into_iter().filter_map(|output| done(output).transpose()).collect()
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

    /// Gives what was solved to the writer of every format with its lattice. The values on the device come back, and whether they flow on.
    fn put(&mut self, linear: &Linear, solved: Solved, report: &LayerReport) -> Result<(Weight, bool)> {
        let packed = Arc::new(solved.packed);
        for output in self.all.iter_mut().filter(|output| output.quantized(linear) == Some(packed.lattice)) {
            output.scribe.put_linear(linear, &packed)?;
            output.layers.push(report.clone());
        }
        Ok((solved.w_hat, self.leading(linear) == Some(packed.lattice)))
    }

    /// Waits until what was given to the writers is written.
    pub fn settle(&mut self) -> Result<()> {
        self.all.iter_mut().try_for_each(|output| output.scribe.writer().map(drop))
    }

    /// What was made for each format since the last call, durable on disk now.
    pub fn made(&mut self) -> Result<Vec<(Made, Vec<LayerReport>)>> {
        let made = |output: &mut Output| {
            let layers = output.layers[output.told..].to_vec();
            output.told = output.layers.len();
            Ok((output.scribe.writer()?.map(Writer::made).transpose()?.unwrap_or_default(), layers))
        };
        self.all.iter_mut().map(made).collect()
    }

    /// Takes back what was written since [`Self::made`].
    pub fn forget(&mut self, spec: &ModelSpec) -> Result<()> {
        self.all.iter_mut().try_for_each(|output| {
            output.layers.truncate(output.told);
            output.scribe.writer()?.map_or(Ok(()), |writer| writer.forget(spec))
        })
    }

    /// Takes over what an earlier run has made.
    pub fn restore(&mut self, spec: &ModelSpec, made: Vec<(Made, Vec<LayerReport>)>) -> Result<()> {
        for (output, (made, layers)) in self.all.iter_mut().zip(made) {
            output.scribe.writer()?.map_or(Ok(()), |writer| writer.restore(spec, &made))?;
            output.layers.extend(layers);
            output.told = output.layers.len();
        }
        Ok(())
    }

    /// Writes a tensor that changed to all formats.
    pub fn put_tensor(&mut self, spec: &ModelSpec, name: &str, tensor: &Tensor<'_>) -> Result<()> {
        let put = |output: &mut Output| output.scribe.writer()?.map_or(Ok(()), |writer| writer.put_tensor(spec, name, tensor));
        self.all.iter_mut().try_for_each(put)
    }
}
