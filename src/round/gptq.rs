//! GPTQ (Frantar et al., ICLR 2023; act-order with static groups): columns are rounded one after the other, and each column's
//! error is spread over the columns that follow so that the layer's output changes least.
//!
//! With H⁻¹ = Uᵀ U and columns in quantization order: e_j = (w_j − ŵ_j) / U_jj, w_k −= e_j U_jk for k > j. Two levels of lazy
//! updates keep the work in products: a launch sweeps 32 columns, a product brings their errors to the rest of the 128 of a
//! panel of U, a second product brings the panel's errors to all later columns.
//!
//! Shapes: W [rows, d] f32, U [d, d] f32 in panels of 128 rows. Cost: rows · d² multiply-adds; two copies of W and its codes.

use super::factor::Factor;
use crate::engine::kernels::{self, gather_columns, gptq_sweep, matmul_nn, matmul_nt};
use crate::engine::matrix::{Panel, stride};
use crate::engine::{Buffer, Mat, Recording};
use crate::quant::{Grid, GridShape};

/// Columns per panel of U: the depth of the product that updates all later columns.
const PANEL: usize = 128;
const SWEEP: usize = gptq_sweep::MAX_WIDTH as usize;

/// U on the device.
#[derive(Debug)]
pub struct DeviceFactor {
    d: usize,
    /// Original column of each position, and the reverse.
    order: Buffer<u32>,
    position: Buffer<u32>,
    /// 128 rows each.
    panels: Vec<Mat<f32>>,
}

impl DeviceFactor {
    pub fn upload<'a>(rec: &mut Recording<'a>, factor: &'a Factor) -> Self {
        let d = factor.d;
        let panels = factor.u.chunks((PANEL * d).max(1)).map(|rows| Mat::upload(rec, "factor", rows.len() / d, d, rows)).collect();
        let mut position = vec![0u32; d];
        for (i, column) in factor.order.iter().enumerate() {
            position[*column as usize] = i as u32;
        }
        Self { d, order: rec.upload("order", factor.order.as_slice()), position: rec.upload("order", position), panels }
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        rec.free(self.order);
        rec.free(self.position);
        self.panels.into_iter().for_each(|panel| panel.free(rec));
    }

    /// Records the rounding of `target` [rows, d]; returns the codes [rows, d]. Columns of both are in their original order.
    pub fn round(&self, rec: &mut Recording<'_>, shape: &GridShape, target: Mat<f32>, grid: Grid) -> Mat<u32> {
        let w = gather_mat(rec, self.order, target);
        let codes = Mat::alloc(rec, "codes", shape.rows, self.d);
        let err = Mat::alloc(rec, "rounding error", shape.rows, PANEL);
        for (i, u) in self.panels.iter().enumerate() {
            let (start, end) = (i * PANEL, i * PANEL + u.rows);
            for first in (start..end).step_by(SWEEP) {
                let last = (first + SWEEP).min(end);
                self.sweep(rec, shape, u, [start, first, last], grid, w, codes, err);
                self.update(rec, u, err, [first - start, last - start], [last, end], w);
            }
            self.update(rec, u, err, [0, u.rows], [end, self.d], w);
        }
        err.free(rec);
        w.free(rec);
        codes
    }

    /// Records S H⁻¹ of rows S [rows, d] in natural column order, with the damped H of the factor: S Uᵀ U in quantization order.
    pub fn solve(&self, rec: &mut Recording<'_>, s: Mat<f32>) -> Mat<f32> {
        let ordered = gather_mat(rec, self.order, s);
        let half = Mat::alloc(rec, "half solved", s.rows, self.d);
        for (i, u) in self.panels.iter().enumerate() {
            let start = i * PANEL;
            // U is upper triangular: its rows start at the diagonal.
            let p = matmul_nt::MatmulNtParams {
                n: s.rows as u32,
                m: u.rows as u32,
                k: (self.d - start) as u32,
                lda: ordered.ld as u32,
                ldw: u.ld as u32,
                ldc: half.ld as u32,
                a_offset: start as u32,
                w_offset: start as u32,
                c_offset: start as u32,
                alpha: 1.0,
                batches: 1,
                ..Default::default()
            };
            kernels::matmul_nt(rec, p, ordered.buffer, u.buffer.as_stored(), Buffer::none(), half.buffer);
        }
        ordered.free(rec);
        let solved = Mat::zeros(rec, "solved", s.rows, self.d);
        for (i, u) in self.panels.iter().enumerate() {
            let start = i * PANEL;
            let p = matmul_nn::MatmulNnParams {
                n: s.rows as u32,
                m: (self.d - start) as u32,
                k: u.rows as u32,
                lda: half.ld as u32,
                ldb: u.ld as u32,
                ldc: solved.ld as u32,
                a_offset: start as u32,
                b_offset: start as u32,
                c_offset: start as u32,
                alpha: 1.0,
                beta: 1.0,
            };
            kernels::matmul_nn(rec, p, half.buffer, u.buffer, solved.buffer);
        }
        half.free(rec);
        let natural = gather_mat(rec, self.position, solved);
        solved.free(rec);
        natural
    }

    /// Columns first..last of the panel that starts at column `start`.
    #[allow(clippy::too_many_arguments, reason = "the operands of one launch")]
    fn sweep(
        &self,
        rec: &mut Recording<'_>,
        shape: &GridShape,
        u: &Mat<f32>,
        [start, first, last]: [usize; 3],
        grid: Grid,
        w: Mat<f32>,
        codes: Mat<u32>,
        err: Mat<f32>,
    ) {
        let p = gptq_sweep::GptqSweepParams {
            rows: shape.rows as u32,
            cols: self.d as u32,
            ld: w.ld as u32,
            col0: first as u32,
            width: (last - first) as u32,
            u_row: (first - start) as u32,
            ld_u: u.ld as u32,
            ld_err: err.ld as u32,
            err_col: (first - start) as u32,
            group: shape.group() as u32,
            n_group: shape.n_group() as u32,
            max_code: shape.scheme.max_code(),
        };
        kernels::gptq_sweep(rec, p, u.buffer, self.order, grid.scale, grid.zero, w.buffer, codes.buffer, err.buffer);
    }

    /// W[:, to] −= err[:, from] · U[from, to], `from` counted inside the panel.
    fn update(&self, rec: &mut Recording<'_>, u: &Mat<f32>, err: Mat<f32>, from: [usize; 2], to: [usize; 2], w: Mat<f32>) {
        if to[0] >= to[1] {
            return;
        }
        let p = matmul_nn::MatmulNnParams {
            n: w.rows as u32,
            m: (to[1] - to[0]) as u32,
            k: (from[1] - from[0]) as u32,
            lda: err.ld as u32,
            ldb: u.ld as u32,
            ldc: w.ld as u32,
            a_offset: from[0] as u32,
            b_offset: (from[0] * u.ld + to[0]) as u32,
            c_offset: to[0] as u32,
            alpha: -1.0,
            beta: 1.0,
        };
        kernels::matmul_nn(rec, p, err.buffer, u.buffer, w.buffer);
    }
}

/// A row panel of a stored weight as f32, columns in `order`: the working copy that solvers change.
pub fn gather(rec: &mut Recording<'_>, order: Buffer<u32>, weight: &Panel, cols: usize) -> Mat<f32> {
    let w = Mat::alloc(rec, "working copy", weight.rows, cols);
    let p = gather_columns::GatherColumnsParams {
        rows: weight.rows as u32,
        cols: cols as u32,
        ld_source: stride(cols) as u32,
        ld_to: w.ld as u32,
        row_source: 0,
        row_to: 0,
    };
    kernels::gather_columns(rec, p, order, weight.buffer, w.buffer);
    w
}

/// A matrix with its columns in `order`.
fn gather_mat(rec: &mut Recording<'_>, order: Buffer<u32>, m: Mat<f32>) -> Mat<f32> {
    gather(rec, order, &Panel { start: 0, rows: m.rows, buffer: m.buffer.as_stored() }, m.cols)
}
