//! The column metric H of one input: uploaded once, shared by the linears that read the input.

use crate::calib::Gram;
use crate::engine::kernels::{self, matmul_nt, row_dot};
use crate::engine::matrix::{self, Panel};
use crate::engine::{Buffer, Limits, Mat, Recording, Weight};
use crate::tensor::Dtype;

/// H is uploaded in panels that start at multiples of the widest group, so that no group straddles two.
const PANEL_ALIGN: usize = 128;

/// H [d, d] of one input on the device.
#[derive(Clone, Debug)]
pub struct ColumnMetric {
    pub d: usize,
    /// diag(H), or ones.
    pub diag: Buffer<f32>,
    /// 1 / diag(H), 0 where that is 0.
    pub inverse: Buffer<f32>,
    /// 0, 1, ..., d − 1.
    pub natural: Buffer<u32>,
    /// H as row panels; `None` is the identity.
    h: Option<Weight>,
}

impl ColumnMetric {
    pub fn identity(rec: &mut Recording<'_>, d: usize) -> Self {
        let [diag, inverse] = [(); 2].map(|()| rec.upload("metric", vec![1.0; d]));
        Self { d, diag, inverse, natural: natural(rec, d), h: None }
    }

    /// H + damping · diag(H): what error feedback needs to be stable, and what keeps a metric from trusting the calibration text too
    /// much, since off-diagonal parts are what other texts share least.
    pub fn layer(rec: &mut Recording<'_>, gram: &Gram, damping: f32, limits: Limits) -> Self {
        let d = gram.d;
        let diag: Vec<f32> = (0..d).map(|j| gram.h[j * d + j] * (1.0 + damping)).collect();
        let ranges = matrix::row_panels(d, matrix::stride(d) * size_of::<f32>(), PANEL_ALIGN, limits);
        let panels = ranges
            .into_iter()
            .map(|r| {
                let mut rows = gram.h[r.start * d..r.end * d].to_vec();
                r.clone().for_each(|j| rows[(j - r.start) * d + j] = diag[j]);
                let mat = Mat::upload(rec, "metric", r.len(), d, rows);
                Panel { start: r.start, rows: r.len(), buffer: mat.buffer.as_stored() }
            })
            .collect();
        let h = Weight { rows: d, cols: d, ld: matrix::stride(d), dtype: Dtype::F32, panels };
        let inverse = rec.upload("metric", diag.iter().map(|h| if *h > 0.0 { 1.0 / h } else { 0.0 }).collect::<Vec<_>>());
        Self { d, diag: rec.upload("metric", diag), inverse, natural: natural(rec, d), h: Some(h) }
    }

    /// Records e H eᵀ of every row, restricted to the groups' own columns where `group` is less than d: [rows, n_group].
    pub fn losses(&self, rec: &mut Recording<'_>, e: Mat<f32>, group: usize) -> Buffer<f32> {
        let group = group.min(self.d).max(1);
        let n_group = self.d.div_ceil(group);
        let out = rec.alloc("loss", e.rows * n_group);
        let p = row_dot::RowDotParams {
            rows: e.rows as u32,
            cols: e.cols as u32,
            ld: e.ld as u32,
            group: group as u32,
            n_group: n_group as u32,
        };
        let Some(h) = &self.h else {
            kernels::row_dot(rec, p, e.buffer, e.buffer, out);
            return out;
        };
        let eh = self.products(rec, h, e, group);
        kernels::row_dot(rec, p, eh.buffer, e.buffer, out);
        eh.free(rec);
        out
    }

    /// Records E H [rows, d]: half the gradient of the loss with respect to E.
    pub fn times(&self, rec: &mut Recording<'_>, e: Mat<f32>) -> Mat<f32> {
        match &self.h {
            Some(h) => self.products(rec, h, e, self.d),
            None => {
                let copy = Mat { buffer: rec.alloc("error times metric", e.buffer.len()), ..e };
                rec.copy(e.buffer, copy.buffer);
                copy
            }
        }
    }

    fn products(&self, rec: &mut Recording<'_>, h: &Weight, e: Mat<f32>, group: usize) -> Mat<f32> {
        let eh = Mat::alloc(rec, "error times metric", e.rows, e.cols);
        for panel in &h.panels {
            self.product(rec, e, h.ld, panel, group, eh);
        }
        eh
    }

    /// The panels of H, for kernels that walk over it; `None` is the identity.
    pub fn matrix(&self) -> Option<&Weight> {
        self.h.as_ref()
    }

    /// eh[:, panel] = e Hᵀ over all columns, or group by group over the groups that lie in the panel.
    fn product(&self, rec: &mut Recording<'_>, e: Mat<f32>, ldh: usize, panel: &Panel, group: usize, eh: Mat<f32>) {
        let common = matmul_nt::MatmulNtParams {
            n: e.rows as u32,
            lda: e.ld as u32,
            ldw: ldh as u32,
            ldc: eh.ld as u32,
            c_offset: panel.start as u32,
            alpha: 1.0,
            ..Default::default()
        };
        let none = Buffer::none();
        if group == self.d {
            let p = matmul_nt::MatmulNtParams { m: panel.rows as u32, k: e.cols as u32, batches: 1, ..common };
            return kernels::matmul_nt(rec, p, e.buffer, panel.buffer, none, eh.buffer);
        }
        // H is symmetric: columns panel.start.. of its diagonal blocks are rows of the panel.
        let p = matmul_nt::MatmulNtParams {
            m: group as u32,
            k: group as u32,
            a_offset: panel.start as u32,
            w_offset: panel.start as u32,
            a_batch: group as u32,
            w_batch: (group * ldh + group) as u32,
            c_batch: group as u32,
            batches: (panel.rows / group) as u32,
            ..common
        };
        kernels::matmul_nt(rec, p, e.buffer, panel.buffer, none, eh.buffer);
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        rec.free(self.diag);
        rec.free(self.inverse);
        rec.free(self.natural);
        if let Some(h) = self.h {
            h.free(rec);
        }
    }
}

fn natural(rec: &mut Recording<'_>, d: usize) -> Buffer<u32> {
    rec.upload("order", (0..d as u32).collect::<Vec<_>>())
}
