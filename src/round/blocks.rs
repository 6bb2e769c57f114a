//! AdaRound block by block: the variables of some columns take a few steps while all others stay.
//!
//! With the columns B of a block the gradient 2 G E H of the others' errors is constant: M_B = G (C + E_B H_BB), C = Σ_k∉B E_k H_kB.
//! A visit makes C once, by products with all other columns, and then takes `steps` iterations, each with one product by H_BB; blocks are
//! visited in natural order, sweep after sweep, each reading what the ones before left (Gauss-Seidel). The moments of Adam, its bias
//! corrections and the regulariser's schedule go on from visit to visit, so that a weight sees what it would see in the whole matrix, but
//! for the neighbours' moves.
//!
//! Shapes: E [rows, d] and in a visit C, M and E_B [rows, width]. Cost of a sweep: rows · d² multiply-adds for C and steps · rows · d · width
//! for the steps, so that n iterations take n (1 / steps + width / d) full products instead of n. The host waits once a visit.

use super::adaround::{AdaRound, Learner};
use crate::engine::kernels::adaround_step::{self, AdaroundStepParams};
use crate::engine::kernels::{self, matmul_nt};
use crate::engine::{Buffer, Engine, Mat, Panel, Panels, Recording, submit};
use crate::{Error, Result, interrupt};
use serde::Serialize;
use std::ops::Range;

/// Starts of panels of H are multiples of it, and so are all blocks' where `width` divides it.
const PANEL_ALIGN: usize = 128;

/// How columns are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Blocks {
    /// Columns: 8, 16, 32, 64 or 128.
    pub width: usize,
    /// Iterations of a visit.
    pub steps: u32,
}

impl Blocks {
    pub const DEFAULT: Self = Self { width: 64, steps: 20 };
}

impl Learner<'_> {
    /// All iterations; E is up to date afterwards.
    pub(super) fn run_blocks(&mut self, engine: &mut dyn Engine, options: &AdaRound, blocks: Blocks, panels: &Panels) -> Result<()> {
        let Blocks { width, steps } = blocks;
        if width < 8 || !PANEL_ALIGN.is_multiple_of(width) || steps == 0 {
            return Err(Error::internal("AdaRound", format!("{steps} steps on blocks of {width} columns")));
        }
        for first in (0..options.iterations).step_by(steps as usize) {
            let iterations = first..options.iterations.min(first + steps);
            for panel in panels.iter() {
                let end = panel.range().end;
                for column in panel.range().step_by(width) {
                    interrupt::check()?;
                    let block = Block { columns: column..(column + width).min(end), panel };
                    submit(engine, |rec| self.visit(rec, options, &block, iterations.clone()))?;
                }
            }
        }
        Ok(())
    }

    /// Records the iterations of one block.
    fn visit(&self, rec: &mut Recording<'_>, options: &AdaRound, block: &Block<'_>, iterations: Range<u32>) {
        let (rows, d, columns) = (self.e.rows, self.e.cols, block.columns.clone());
        let of_block = |p: AdaroundStepParams| AdaroundStepParams { col0: columns.start as u32, cols: columns.len() as u32, ..p };
        let others = Mat::zeros(rec, "gradient of other columns", rows, columns.len());
        block.multiply(rec, self.e, 0, 0..columns.start, others);
        block.multiply(rec, self.e, 0, columns.end..d, others);
        let mut e: Option<Mat<f32>> = None;
        for index in iterations {
            let m = Mat::alloc(rec, "gradient of a block", rows, columns.len());
            rec.copy(others.buffer, m.buffer);
            match e {
                Some(e) => block.multiply(rec, e, columns.start, columns.clone(), m),
                None => block.multiply(rec, self.e, 0, columns.clone(), m),
            }
            let m = match self.problem.objective.rows {
                None => m,
                Some(rows) => {
                    let gm = rows.times(rec, m);
                    m.free(rec);
                    gm
                }
            };
            // The gradient becomes the next error in place.
            self.launch_on(rec, AdaroundStepParams { ld_e: m.ld as u32, ..of_block(self.step(options, index)) }, m.buffer);
            if let Some(before) = e.replace(m) {
                before.free(rec);
            }
        }
        others.free(rec);
        if let Some(e) = e {
            e.free(rec);
        }
        let p = AdaroundStepParams { phase: adaround_step::ERROR, e_col: columns.start as u32, ..of_block(self.params()) };
        self.launch_on(rec, p, self.e.buffer);
    }
}

/// Columns that are learnt together, and the panel of H [d, d] that has their rows.
struct Block<'h> {
    columns: Range<usize>,
    panel: &'h Panel,
}

impl Block<'_> {
    /// to += E[:, source] H[source, block], where the columns of `e` are those from `first` on.
    fn multiply(&self, rec: &mut Recording<'_>, e: Mat<f32>, first: usize, source: Range<usize>, to: Mat<f32>) {
        if source.is_empty() {
            return;
        }
        // H is symmetric: its columns are its rows.
        let p = matmul_nt::MatmulNtParams {
            n: e.rows as u32,
            m: self.columns.len() as u32,
            k: source.len() as u32,
            lda: e.ld as u32,
            ldw: self.panel.mat.ld as u32,
            ldc: to.ld as u32,
            a_offset: (source.start - first) as u32,
            w_offset: ((self.columns.start - self.panel.start) * self.panel.mat.ld + source.start) as u32,
            batches: 1,
            alpha: 1.0,
            beta: 1.0,
            ..Default::default()
        };
        kernels::matmul_nt(rec, p, e.buffer, self.panel.mat.buffer.as_stored(), Buffer::none(), to.buffer);
    }
}
