//! The column metric H of one input: uploaded once, shared by the linears that read the input.

use crate::calib::Gram;
use crate::engine::kernels::{self, axpy, matmul_nn, matmul_nt, row_dot};
use crate::engine::panels;
use crate::engine::{Buffer, Limits, Mat, Panels, Recording};

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
    /// `None` is the identity.
    h: Option<Panels>,
}

impl ColumnMetric {
    pub fn identity(rec: &mut Recording<'_>, d: usize) -> Self {
        let [diag, inverse] = [(); 2].map(|()| rec.upload("metric", vec![1.0; d]));
        Self { d, diag, inverse, natural: natural(rec, d), h: None }
    }

    /// H + damping · diag(H): what error feedback needs to be stable, and what keeps a metric from trusting the calibration text too
    /// much, since off-diagonal parts are what other texts share least.
    pub fn layer(rec: &mut Recording<'_>, gram: Gram, damping: f32, limits: Limits) -> Self {
        let Gram { d, mut h, n_tok } = gram;
        let mut diag = vec![0.0; d];
        // Zeros that stand for what is not known are better left untouched.
        let blank = n_tok == 0;
        if !blank {
            for (j, diag) in diag.iter_mut().enumerate() {
                h[j * d + j] *= 1.0 + damping;
                *diag = h[j * d + j];
            }
        }
        let panels = Panels::upload(rec, "metric", d, h, blank, &panels::ranges([d, d], PANEL_ALIGN, limits));
        let inverse = rec.upload("metric", diag.iter().map(|h| if *h > 0.0 { 1.0 / h } else { 0.0 }).collect::<Vec<_>>());
        Self { d, diag: rec.upload("metric", diag), inverse, natural: natural(rec, d), h: Some(panels) }
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
        let eh = if group == self.d { whole(rec, h, e) } else { by_group(rec, h, e, group) };
        kernels::row_dot(rec, p, eh.buffer, e.buffer, out);
        eh.free(rec);
        out
    }

    /// Records E H [rows, d]: half the gradient of the loss with respect to E.
    pub fn times(&self, rec: &mut Recording<'_>, e: Mat<f32>) -> Mat<f32> {
        match &self.h {
            Some(h) => whole(rec, h, e),
            None => {
                let copy = Mat { buffer: rec.alloc("error times metric", e.buffer.len()), ..e };
                rec.copy(e.buffer, copy.buffer);
                copy
            }
        }
    }

    /// Records to += E H, where most of E may be zeros.
    pub fn add_times(&self, rec: &mut Recording<'_>, e: Mat<f32>, to: Mat<f32>) {
        match &self.h {
            Some(h) => matmul_nn::by_panels(rec, e, h, [1.0, 1.0], to),
            None => kernels::axpy(rec, axpy::AxpyParams { n: to.buffer.len() as u32, alpha: 1.0 }, e.buffer, to.buffer),
        }
    }

    /// The panels of H, for kernels that walk over it; `None` is the identity.
    pub fn panels(&self) -> Option<&Panels> {
        self.h.as_ref()
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

/// Records E H [rows, d].
fn whole(rec: &mut Recording<'_>, panels: &Panels, e: Mat<f32>) -> Mat<f32> {
    let eh = Mat::alloc(rec, "error times metric", e.rows, e.cols);
    // E Hᵀ would be the same; as rows of H lie, this is the product that needs no transposed reads.
    matmul_nn::by_panels(rec, e, panels, [1.0, 0.0], eh);
    eh
}

/// Records E times the diagonal blocks of H of `group` columns [rows, d]. No group straddles two panels.
fn by_group(rec: &mut Recording<'_>, panels: &Panels, e: Mat<f32>, group: usize) -> Mat<f32> {
    let eh = Mat::alloc(rec, "error times metric", e.rows, e.cols);
    for panel in panels.iter() {
        let p = matmul_nt::MatmulNtParams {
            n: e.rows as u32,
            m: group as u32,
            k: group as u32,
            lda: e.ld as u32,
            ldw: panel.mat.ld as u32,
            ldc: eh.ld as u32,
            a_offset: panel.start as u32,
            w_offset: panel.start as u32,
            c_offset: panel.start as u32,
            a_batch: group as u32,
            w_batch: (group * panel.mat.ld + group) as u32,
            c_batch: group as u32,
            batches: (panel.mat.rows / group) as u32,
            alpha: 1.0,
            ..Default::default()
        };
        kernels::matmul_nt(rec, p, e.buffer, panel.mat.buffer.as_stored(), Buffer::none(), eh.buffer);
    }
    eh
}

fn natural(rec: &mut Recording<'_>, d: usize) -> Buffer<u32> {
    rec.upload("order", (0..d as u32).collect::<Vec<_>>())
}
