//! GPTQ (Frantar et al., ICLR 2023; act-order with static groups): columns are rounded one after the other, and each column's
//! error is spread over the columns that follow so that the layer's output changes least.
//!
//! With H⁻¹ = Uᵀ U and columns in quantization order: e_j = (w_j − ŵ_j) / U_jj, w_k −= e_j U_jk for k > j. Two levels of lazy
//! updates keep the work in products: a launch sweeps 32 columns, a product brings their errors to the rest of the 128 of a
//! panel of U, a second product brings the panel's errors to all later columns.
//!
//! Where a metric G couples the rows of a head (BoA, Kim et al., ICML 2025), errors are also spread over the rows that follow in their
//! head: with G⁻¹ = Vᵀ V rounding (r, j) is compensated at (r', k) by U_jk V_rr' / (U_jj V_rr). See `kernels::gptq_sweep_heads`.
//!
//! Shapes: W [rows, d] f32, U [d, d] f32 in panels of 128 rows, V [rows, d_head]. Cost: rows · d² multiply-adds, rows · d · d_head / 2 more
//! with V; three copies of W, its codes among them.

use super::factor::{Factor, factor};
use crate::engine::kernels::{self, gather_columns, gptq_sweep, gptq_sweep_heads, matmul_nn, matmul_nt};
use crate::engine::matrix::{StoredPanel, stride};
use crate::engine::{Buffer, Mat, Panels, Recording};
use crate::quant::{Grid, GridShape};
use crate::{Error, Result};

/// Columns per panel of U: the depth of the product that updates all later columns.
const PANEL: usize = 128;
const SWEEP: usize = gptq_sweep::MAX_WIDTH as usize;
const SWEEP_HEADS: usize = gptq_sweep_heads::MAX_WIDTH as usize;

/// U on the device.
#[derive(Debug)]
pub struct DeviceFactor {
    d: usize,
    order: Buffer<u32>,
    /// Position of each original column.
    position: Buffer<u32>,
    /// 128 rows each.
    panels: Vec<Mat<f32>>,
}

/// The factors V of a row metric on the device, [n_head · d_head, d_head]: G⁻¹ = Vᵀ V for each head.
#[derive(Clone, Copy, Debug)]
pub struct RowFactor {
    d_head: usize,
    v: Mat<f32>,
}

impl RowFactor {
    /// Factors G [n_head, d_head, d_head], damped as H is: `damping` is relative to the unit diagonal of the equilibrated matrix.
    ///
    /// # Errors
    /// `Kind::Numeric` when a G is no Gram matrix.
    pub fn host(g: &[f32], d_head: usize, damping: f64) -> Result<Vec<f32>> {
        let heads = g.chunks((d_head * d_head).max(1)).map(|g| factor(g, d_head, false, damping).map(|f| f.u));
        Ok(heads.collect::<Result<Vec<_>>>()?.concat())
    }

    /// `v` as [`RowFactor::host`] makes it.
    pub fn upload<'a>(rec: &mut Recording<'a>, d_head: usize, v: &'a [f32]) -> Self {
        Self { d_head, v: Mat::upload(rec, "row factor", v.len() / d_head.max(1), d_head, v) }
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        self.v.free(rec);
    }
}

/// What GPTQ leaves, in the original column order.
#[derive(Clone, Copy, Debug)]
pub struct RoundedGptq {
    pub codes: Mat<u32>,
    /// Each weight as it was when it was rounded, errors of earlier ones compensated: the codes are its nearest.
    pub compensated: Mat<f32>,
}

impl RoundedGptq {
    /// The codes alone.
    pub fn into_codes(self, rec: &mut Recording<'_>) -> Mat<u32> {
        self.compensated.free(rec);
        self.codes
    }
}

impl DeviceFactor {
    pub fn upload(rec: &mut Recording<'_>, factor: Factor) -> Self {
        let Factor { d, order, u, blank, .. } = factor;
        let ranges: Vec<_> = (0..d).step_by(PANEL).map(|start| start..(start + PANEL).min(d)).collect();
        let panels = Panels::upload(rec, "factor", d, u, blank, &ranges).iter().map(|panel| panel.mat).collect();
        let mut position = vec![0u32; d];
        for (at, column) in order.iter().enumerate() {
            position[*column as usize] = at as u32;
        }
        Self { d, order: rec.upload("order", order), position: rec.upload("order", position), panels }
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        rec.free(self.order);
        rec.free(self.position);
        self.panels.into_iter().for_each(|panel| panel.free(rec));
    }

    /// Records the rounding of `target` [rows, d] f32 in original column order on `grid`; with `rows` errors are spread over the rows of a
    /// head too, whose number of rows must divide the target's.
    pub fn round(&self, rec: &mut Recording<'_>, shape: &GridShape, target: Mat<f32>, grid: Grid, rows: Option<&RowFactor>) -> RoundedGptq {
        let w = gather(rec, self.order, &plain(target), self.d);
        let err = Mat::alloc(rec, "rounding error", shape.rows, PANEL);
        let width = if rows.is_some() { SWEEP_HEADS } else { SWEEP };
        for (i, u) in self.panels.iter().enumerate() {
            let (start, end) = (i * PANEL, i * PANEL + u.rows);
            for first in (start..end).step_by(width) {
                let last = (first + width).min(end);
                let at = [start, first, last];
                match rows {
                    Some(rows) => self.sweep_heads(rec, shape, u, rows, at, grid, w, err),
                    None => self.sweep(rec, shape, u, at, grid, w, err),
                }
                self.update(rec, u, err, [first - start, last - start], [last, end], w);
            }
            self.update(rec, u, err, [0, u.rows], [end, self.d], w);
        }
        err.free(rec);
        let compensated = gather(rec, self.position, &plain(w), self.d);
        // The working copy is done with: it takes the values.
        let codes = grid.nearest_in(rec, shape, compensated, w);
        w.free(rec);
        RoundedGptq { codes, compensated }
    }

    /// Records S H⁻¹ of rows S [rows, d] in natural column order, with the damped H of the factor: S Uᵀ U in quantization order.
    pub fn solve(&self, rec: &mut Recording<'_>, s: Mat<f32>) -> Mat<f32> {
        let ordered = gather(rec, self.order, &plain(s), self.d);
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
        let natural = gather(rec, self.position, &plain(solved), self.d);
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
            max_code: shape.lattice.max_code(),
        };
        kernels::gptq_sweep(rec, p, u.buffer, self.order, grid.scale, grid.zero, w.buffer, err.buffer);
    }

    /// The same with coupled rows.
    #[allow(clippy::too_many_arguments, reason = "the operands of one launch")]
    fn sweep_heads(
        &self,
        rec: &mut Recording<'_>,
        shape: &GridShape,
        u: &Mat<f32>,
        rows: &RowFactor,
        [start, first, last]: [usize; 3],
        grid: Grid,
        w: Mat<f32>,
        err: Mat<f32>,
    ) {
        let RowFactor { d_head, v } = *rows;
        if d_head == 0 || v.rows != shape.rows || !shape.rows.is_multiple_of(d_head) {
            return rec.fail(Error::internal("row factor", format!("{} rows of heads of {d_head} for {} rows", v.rows, shape.rows)));
        }
        let p = gptq_sweep_heads::GptqSweepHeadsParams {
            n_head: (shape.rows / d_head) as u32,
            d_head: d_head as u32,
            ld_v: v.ld as u32,
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
            max_code: shape.lattice.max_code(),
        };
        let Grid { scale, zero, .. } = grid;
        kernels::gptq_sweep_heads(rec, p, u.buffer, v.buffer, self.order, scale, zero, w.buffer, err.buffer);
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

/// A matrix on the device as a stored weight.
fn plain(mat: Mat<f32>) -> StoredPanel {
    StoredPanel { start: 0, rows: mat.rows, buffer: mat.buffer.as_stored() }
}

/// A row panel of a stored weight as f32, columns in `order`: the working copy that solvers change.
pub fn gather(rec: &mut Recording<'_>, order: Buffer<u32>, weight: &StoredPanel, cols: usize) -> Mat<f32> {
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
