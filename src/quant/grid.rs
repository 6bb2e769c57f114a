//! Grids on the device, and what is done with any of them: nearest codes, the values of codes, errors.

use super::Lattice;
use crate::engine::kernels::{self, axpy, dequantize, quantize};
use crate::engine::{Buffer, Mat, Recording};

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
}

/// Scales s and zero points z on the device, [rows, n_group] each; dequantized s (q − z). z is whole on integer lattices; on those with a
/// minimum m it is −m / s.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    pub scale: Buffer<f32>,
    pub zero: Buffer<f32>,
}

impl Grid {
    pub fn upload(rec: &mut Recording<'_>, scale: Vec<f32>, zero: Vec<f32>) -> Self {
        Self { scale: rec.upload("scale", scale), zero: rec.upload("zero", zero) }
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        rec.free(self.scale);
        rec.free(self.zero);
    }

    /// The nearest codes of `w` and the values they stand for, both [rows, cols].
    pub fn nearest(self, rec: &mut Recording<'_>, shape: &GridShape, w: Mat<f32>) -> (Mat<u32>, Mat<f32>) {
        let codes = Mat::alloc(rec, "codes", shape.rows, shape.cols);
        let w_hat = Mat::alloc(rec, "quantized weight", shape.rows, shape.cols);
        let p = quantize::QuantizeParams {
            rows: shape.rows as u32,
            cols: shape.cols as u32,
            ld: w.ld as u32,
            group: shape.group() as u32,
            n_group: shape.n_group() as u32,
            max_code: shape.lattice.max_code(),
        };
        kernels::quantize(rec, p, w.buffer, self.scale, self.zero, codes.buffer, w_hat.buffer);
        (codes, w_hat)
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
