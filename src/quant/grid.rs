//! Grids on the device, and what is done with any of them: nearest codes, the values of codes, errors.

use super::Lattice;
use crate::Result;
use crate::engine::kernels::{self, axpy, dequantize, quantize};
use crate::engine::{Buffer, Downloads, Mat, Pending, Recording};

/// What a grid is for: a matrix [rows, cols], and what its groups can stand for.
#[derive(Clone, Copy, Debug)]
pub struct GridShape {
    pub lattice: Lattice,
    pub rows: usize,
    pub cols: usize,
}

impl GridShape {
    /// Columns per scale.
    pub fn group(&self) -> usize {
        self.lattice.group_width(self.cols)
    }

    /// Scales per row.
    pub fn n_group(&self) -> usize {
        self.lattice.n_group(self.cols)
    }

    /// Scales (and zero points) of the whole matrix.
    pub fn scales(&self) -> usize {
        self.rows * self.n_group()
    }

    /// Steps of the whole matrix, two for each super-block.
    pub fn steps(&self) -> usize {
        self.rows * self.lattice.n_super(self.cols) * 2
    }
}

/// Scales s and zero points z on the device, [rows, n_group] each; dequantized s (q − z). z is whole on integer lattices; on those with a
/// minimum m it is −m / s.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    pub scale: Buffer<f32>,
    pub zero: Buffer<f32>,
    /// [rows, n_super, 2]: what scales and minima are whole multiples of, on lattices with steps; else nothing.
    pub steps: Buffer<f32>,
}

/// A [`Grid`] on the host.
#[derive(Clone, Debug, Default)]
pub struct HostGrid {
    pub scale: Vec<f32>,
    pub zero: Vec<f32>,
    pub steps: Vec<f32>,
}

/// A [`HostGrid`] on its way.
pub struct PendingGrid([Option<Pending<f32>>; 3]);

impl PendingGrid {
    pub fn take(self, back: &mut Downloads) -> Result<HostGrid> {
        let [scale, zero, steps] = self.0.map(|pending| pending.map_or(Ok(Vec::new()), |pending| back.take(pending)));
        Ok(HostGrid { scale: scale?, zero: zero?, steps: steps? })
    }
}

impl HostGrid {
    /// Replaces row `row` of a matrix of this many rows by that of `other`.
    pub fn copy_row(&mut self, other: &Self, row: usize, rows: usize) {
        let pairs = [(&mut self.scale, &other.scale), (&mut self.zero, &other.zero), (&mut self.steps, &other.steps)];
        for (to, from) in pairs {
            let range = row * from.len() / rows..(row + 1) * from.len() / rows;
            to[range.clone()].copy_from_slice(&from[range]);
        }
    }
}

impl Grid {
    /// A grid whose scales are no multiples of steps.
    pub fn without_steps(scale: Buffer<f32>, zero: Buffer<f32>) -> Self {
        Self { scale, zero, steps: Buffer::none() }
    }

    pub fn upload(rec: &mut Recording<'_>, grid: HostGrid) -> Self {
        let steps = if grid.steps.is_empty() { Buffer::none() } else { rec.upload("steps", grid.steps) };
        Self { scale: rec.upload("scale", grid.scale), zero: rec.upload("zero", grid.zero), steps }
    }

    /// Records the read-back of all of it.
    pub fn download(self, rec: &mut Recording<'_>) -> PendingGrid {
        let steps = (!self.steps.raw().is_none()).then(|| rec.download(self.steps));
        PendingGrid([Some(rec.download(self.scale)), Some(rec.download(self.zero)), steps])
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        rec.free(self.scale);
        rec.free(self.zero);
        if !self.steps.raw().is_none() {
            rec.free(self.steps);
        }
    }

    /// The nearest codes of `w` and the values they stand for, both [rows, cols].
    pub fn nearest(self, rec: &mut Recording<'_>, shape: &GridShape, w: Mat<f32>) -> (Mat<u32>, Mat<f32>) {
        let w_hat = Mat::alloc(rec, "quantized weight", shape.rows, shape.cols);
        (self.nearest_in(rec, shape, w, w_hat), w_hat)
    }

    /// The nearest codes of `w` [rows, cols]; the values they stand for go into `w_hat`, of the same shape.
    pub fn nearest_in(self, rec: &mut Recording<'_>, shape: &GridShape, w: Mat<f32>, w_hat: Mat<f32>) -> Mat<u32> {
        let codes = Mat::alloc(rec, "codes", shape.rows, shape.cols);
        let p = quantize::QuantizeParams {
            rows: shape.rows as u32,
            cols: shape.cols as u32,
            ld: w.ld as u32,
            group: shape.group() as u32,
            n_group: shape.n_group() as u32,
            max_code: shape.lattice.max_code(),
        };
        kernels::quantize(rec, p, w.buffer, self.scale, self.zero, codes.buffer, w_hat.buffer);
        codes
    }

    /// The values that `codes` stand for, [rows, cols].
    pub fn dequantize(self, rec: &mut Recording<'_>, shape: &GridShape, codes: Mat<u32>) -> Mat<f32> {
        let w_hat = Mat::alloc(rec, "quantized weight", shape.rows, shape.cols);
        let p = dequantize::DequantizeParams {
            rows: shape.rows as u32,
            cols: shape.cols as u32,
            ld: codes.ld as u32,
            group: shape.group() as u32,
            n_group: shape.n_group() as u32,
        };
        kernels::dequantize(rec, p, codes.buffer, self.scale, self.zero, w_hat.buffer);
        w_hat
    }
}

/// Turns `w_hat` into the error ŵ − w in place.
pub fn subtract(rec: &mut Recording<'_>, w_hat: Mat<f32>, w: Mat<f32>) -> Mat<f32> {
    kernels::axpy(rec, axpy::AxpyParams { n: w.buffer.len() as u32, alpha: -1.0 }, w.buffer, w_hat.buffer);
    w_hat
}
