//! f32 matrices that may be larger than a buffer, split by rows into parts that are not.

use super::kernels::{self, gather_columns::GatherColumnsParams};
use super::matrix::{self, Mat, PendingMat, StoredPanel, Weight};
use super::recording::Recording;
use super::{Downloads, Limits};
use crate::Result;
use std::ops::Range;

/// A matrix [rows, cols] in panels of whole rows.
#[derive(Clone, Debug, Default)]
pub struct Panels(Vec<Panel>);

/// All columns of the rows `start..start + mat.rows`.
#[derive(Clone, Copy, Debug)]
pub struct Panel {
    pub start: usize,
    pub mat: Mat<f32>,
}

impl Panel {
    /// The rows, and in a symmetric matrix the columns, that the panel holds.
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.mat.rows
    }
}

impl Panels {
    /// All zero.
    pub fn zeros(rec: &mut Recording<'_>, label: &'static str, [rows, cols]: [usize; 2], limits: Limits) -> Self {
        let ranges = ranges([rows, cols], matrix::STRIDE_ALIGN, limits).into_iter();
        ranges.map(|r| (r.start, Mat::zeros(rec, label, r.len(), cols))).collect()
    }

    /// `data` is [rows, cols] without padding; `ranges` are the rows of the panels, all of them in order. No more than a panel is on the host
    /// twice at a time. Zeros that stand for what is not known, `blank`, are not touched.
    pub fn upload(
        rec: &mut Recording<'_>,
        label: &'static str,
        cols: usize,
        mut data: Vec<f32>,
        blank: bool,
        ranges: &[Range<usize>],
    ) -> Self {
        if blank {
            data = Vec::new();
        }
        let mut upload = |range: &Range<usize>| {
            let rows = match range.start {
                _ if blank => vec![0.0; range.len() * cols],
                0 => std::mem::take(&mut data),
                start => {
                    let rows = data.split_off(start * cols);
                    data.shrink_to_fit();
                    rows
                }
            };
            (range.start, Mat::upload(rec, label, range.len(), cols, rows))
        };
        let mut panels: Vec<_> = ranges.iter().rev().map(&mut upload).collect();
        panels.reverse();
        panels.into_iter().collect()
    }

    /// Records a copy in f32 of a weight, in the weight's own panels.
    pub fn widened(rec: &mut Recording<'_>, weight: &Weight) -> Self {
        let natural = rec.upload("order", (0..weight.cols as u32).collect::<Vec<_>>());
        let widen = |panel: &StoredPanel| {
            let wide = Mat::alloc(rec, "weight in f32", panel.rows, weight.cols);
            let p = GatherColumnsParams {
                rows: panel.rows as u32,
                cols: weight.cols as u32,
                ld_source: weight.ld as u32,
                ld_to: wide.ld as u32,
                row_source: 0,
                row_to: 0,
            };
            kernels::gather_columns(rec, p, natural, panel.buffer, wide.buffer);
            (panel.start, wide)
        };
        let panels = weight.panels.iter().map(widen).collect();
        rec.free(natural);
        panels
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Panel> {
        self.0.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn rows(&self) -> usize {
        self.0.last().map_or(0, |last| last.range().end)
    }

    /// The panel that holds `row`.
    pub fn holding(&self, row: usize) -> Option<&Panel> {
        self.0.iter().find(|panel| panel.range().contains(&row))
    }

    /// Records the read-back.
    pub fn download(&self, rec: &mut Recording<'_>) -> PendingPanels {
        PendingPanels(self.0.iter().map(|panel| panel.mat.download(rec)).collect())
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        self.0.into_iter().for_each(|panel| panel.mat.free(rec));
    }
}

/// From first rows and panels, in order.
impl FromIterator<(usize, Mat<f32>)> for Panels {
    fn from_iter<I: IntoIterator<Item = (usize, Mat<f32>)>>(panels: I) -> Self {
        Self(panels.into_iter().map(|(start, mat)| Panel { start, mat }).collect())
    }
}

/// The rows of each panel of a matrix [rows, cols]; they start at multiples of `align`.
pub fn ranges([rows, cols]: [usize; 2], align: usize, limits: Limits) -> Vec<Range<usize>> {
    matrix::row_panels(rows, matrix::stride(cols) * size_of::<f32>(), align, limits)
}

/// Downloads under way.
#[derive(Debug)]
pub struct PendingPanels(Vec<PendingMat<f32>>);

impl PendingPanels {
    /// [rows, cols] without padding.
    pub fn take(self, downloads: &mut Downloads) -> Result<Vec<f32>> {
        let mut panels = self.0.into_iter().map(|panel| panel.take(downloads)).collect::<Result<Vec<_>>>()?;
        Ok(match panels.len() {
            1 => panels.remove(0),
            // As large, and not touched.
            _ if downloads.is_blank() => vec![0.0; panels.iter().map(Vec::len).sum()],
            _ => panels.concat(),
        })
    }
}
