//! Matrices over device buffers: how rows are laid out, and how a matrix that is too large for one buffer is split.

use super::buffer::{Buffer, BufferType, Element, Stored};
use super::recording::{Pending, Recording};
use super::{Downloads, Limits};
use crate::tensor::{Dtype, Tensor};
use crate::{Error, Result};
use std::borrow::Cow;

/// Row strides are multiples of this many elements, so that every row starts on 16 bytes whatever the element type, and kernels
/// may load four or eight elements at once. Real models have such widths anyway; odd ones are padded. Padding holds anything.
pub const STRIDE_ALIGN: usize = 8;

/// The row stride of a matrix with `cols` columns.
pub const fn stride(cols: usize) -> usize {
    cols.next_multiple_of(STRIDE_ALIGN)
}

/// A row-major matrix [rows, cols] in one buffer; element (i, j) lies at `i * ld + j`.
#[derive(Debug)]
pub struct Mat<T: BufferType> {
    pub buffer: Buffer<T>,
    pub rows: usize,
    pub cols: usize,
    pub ld: usize,
}

impl<T: BufferType> Clone for Mat<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T: BufferType> Copy for Mat<T> {}

impl<T: Element> Mat<T> {
    pub fn alloc(rec: &mut Recording<'_>, label: &'static str, rows: usize, cols: usize) -> Self {
        let ld = stride(cols);
        Self { buffer: rec.alloc(label, rows * ld), rows, cols, ld }
    }

    pub fn zeros(rec: &mut Recording<'_>, label: &'static str, rows: usize, cols: usize) -> Self {
        let ld = stride(cols);
        Self { buffer: rec.zeros(label, rows * ld), rows, cols, ld }
    }

    /// `data` is [rows, cols] without padding.
    pub fn upload<'a>(rec: &mut Recording<'a>, label: &'static str, rows: usize, cols: usize, data: impl Into<Cow<'a, [T]>>) -> Self {
        let ld = stride(cols);
        let data = data.into();
        if data.len() != rows * cols {
            rec.fail(Error::internal(label, format!("{} elements for a [{rows}, {cols}] matrix", data.len())));
        }
        Self { buffer: rec.upload(label, pad(data, cols, ld)), rows, cols, ld }
    }

    pub fn download(&self, rec: &mut Recording<'_>) -> PendingMat<T> {
        PendingMat { pending: rec.download(self.buffer), cols: self.cols, ld: self.ld }
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        rec.free(self.buffer);
    }
}

/// A download of a matrix; `take` removes the padding.
#[derive(Debug)]
pub struct PendingMat<T> {
    pending: Pending<T>,
    cols: usize,
    ld: usize,
}

impl<T: Element> PendingMat<T> {
    /// [rows, cols] without padding.
    pub fn take(self, downloads: &mut Downloads) -> Result<Vec<T>> {
        let padded = downloads.take(self.pending)?;
        if self.cols == self.ld {
            return Ok(padded);
        }
        Ok(padded.chunks(self.ld).flat_map(|row| row[..self.cols].iter().copied()).collect())
    }
}

pub(super) fn pad<T: bytemuck::Pod>(data: Cow<'_, [T]>, cols: usize, ld: usize) -> Cow<'_, [T]> {
    if cols == ld || cols == 0 {
        return data;
    }
    let mut out = vec![T::zeroed(); data.len() / cols * ld];
    for (to, from) in out.chunks_mut(ld).zip(data.chunks(cols)) {
        to[..cols].copy_from_slice(from);
    }
    Cow::Owned(out)
}

/// A weight [rows, cols] as a checkpoint stores it, split into panels of whole rows that each fit a binding of the device.
#[derive(Clone, Debug)]
pub struct Weight {
    pub rows: usize,
    pub cols: usize,
    pub ld: usize,
    pub dtype: Dtype,
    pub panels: Vec<StoredPanel>,
}

/// Rows `start..start + rows` of a `Weight`.
#[derive(Clone, Copy, Debug)]
pub struct StoredPanel {
    pub start: usize,
    pub rows: usize,
    pub buffer: Buffer<Stored>,
}

/// Row ranges of a matrix with `rows` rows of `row_bytes` that fit `limits`, as even as possible, starting at multiples of `align`.
///
/// Eight rows at least start on 16 bytes when results are written side by side; callers that work in blocks ask for more.
pub fn row_panels(rows: usize, row_bytes: usize, align: usize, limits: Limits) -> Vec<std::ops::Range<usize>> {
    let fit = usize::try_from(limits.max_buffer).unwrap_or(usize::MAX) / row_bytes.max(1);
    if rows <= fit {
        return std::iter::once(0..rows).collect();
    }
    let fit = (fit / align * align).max(align);
    let each = rows.div_ceil(rows.div_ceil(fit)).next_multiple_of(align);
    (0..rows).step_by(each).map(|start| start..(start + each).min(rows)).collect()
}

impl Weight {
    /// Uploads a matrix as it is stored; rows are padded only where the width is odd. A panel also fits when it is widened to f32,
    /// which is what solvers work on.
    pub fn upload<'a>(rec: &mut Recording<'a>, label: &'static str, tensor: &'a Tensor<'a>, limits: Limits) -> Self {
        let (rows, cols) = tensor.rows_cols();
        let (ld, size) = (stride(cols), tensor.dtype.size());
        let panels = row_panels(rows, ld * size_of::<f32>(), STRIDE_ALIGN, limits)
            .into_iter()
            .map(|range| {
                let bytes = &tensor.data[range.start * cols * size..range.end * cols * size];
                let data = pad(Cow::Borrowed(bytes), cols * size, ld * size);
                StoredPanel { start: range.start, rows: range.len(), buffer: rec.upload_stored(label, tensor.dtype, data) }
            })
            .collect();
        Self { rows, cols, ld, dtype: tensor.dtype, panels }
    }

    /// f32 row panels that are on the device already, all with row stride `stride(cols)`.
    pub fn from_f32(mats: &[Mat<f32>]) -> Self {
        let mut start = 0;
        let mut panels = Vec::new();
        for mat in mats {
            panels.push(StoredPanel { start, rows: mat.rows, buffer: mat.buffer.as_stored() });
            start += mat.rows;
        }
        let (cols, ld) = mats.first().map_or((0, 0), |m| (m.cols, m.ld));
        Self { rows: start, cols, ld, dtype: Dtype::F32, panels }
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        for panel in self.panels {
            rec.free(panel.buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_cover_all_rows_once_and_fit() {
        for (rows, row_bytes, max) in [(0, 64, 1024), (1, 64, 1024), (100, 64, 1024), (49152, 1152, 1 << 20), (17, 64, 64)] {
            let limits = Limits { max_buffer: max, f16_operands: false };
            let panels = row_panels(rows, row_bytes, STRIDE_ALIGN, limits);
            let mut next = 0;
            for p in &panels {
                assert_eq!(p.start, next);
                assert_eq!(p.start % STRIDE_ALIGN, 0);
                assert!(p.len() * row_bytes <= max as usize || p.len() <= STRIDE_ALIGN);
                next = p.end;
            }
            assert_eq!(next, rows);
        }
    }
}
