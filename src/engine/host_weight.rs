//! Weights that are kept on the host and come to the device for a use.

use super::matrix::{STRIDE_ALIGN, StoredPanel, Weight, pad, row_panels, stride};
use super::recording::{AsBytes, Pending, Recording};
use super::{Downloads, Limits};
use crate::Result;
use crate::tensor::{Dtype, Tensor};
use std::borrow::Cow;
use std::sync::Arc;

/// A weight [rows, cols] as it lies on the device, panel by panel. Clones share the bytes.
#[derive(Clone)]
pub struct HostWeight {
    rows: usize,
    cols: usize,
    ld: usize,
    dtype: Dtype,
    panels: Vec<HostPanel>,
}

#[derive(Clone)]
struct HostPanel {
    start: usize,
    rows: usize,
    data: Arc<dyn AsBytes>,
}

impl std::fmt::Debug for HostWeight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}] {} on the host", self.rows, self.cols, self.dtype)
    }
}

impl HostWeight {
    /// A copy of a matrix as it is stored, in the panels that [`Weight::upload`] would make of it.
    pub fn new(tensor: Tensor<'_>, limits: Limits) -> Self {
        let ((rows, cols), dtype) = (tensor.rows_cols(), tensor.dtype);
        let (ld, size) = (stride(cols), dtype.size());
        let ranges = row_panels(rows, ld * size_of::<f32>(), STRIDE_ALIGN, limits);
        let whole = ranges.len() == 1;
        let mut data = tensor.data;
        let panel = |range: std::ops::Range<usize>| {
            // What is one panel and the caller's own is not copied.
            let bytes = match whole {
                true => std::mem::take(&mut data),
                false => Cow::Borrowed(&data[range.start * cols * size..range.end * cols * size]),
            };
            HostPanel { start: range.start, rows: range.len(), data: Arc::new(pad(bytes, cols * size, ld * size).into_owned()) }
        };
        let panels = ranges.into_iter().map(panel).collect();
        Self { rows, cols, ld, dtype, panels }
    }

    /// Records the read-back of a weight.
    pub fn download(rec: &mut Recording<'_>, weight: &Weight) -> PendingWeight {
        let panels = weight.panels.iter().map(|panel| (panel.start, panel.rows, rec.download(panel.buffer.as_words()))).collect();
        PendingWeight { rows: weight.rows, cols: weight.cols, ld: weight.ld, dtype: weight.dtype, panels }
    }

    /// Records its way to the device, without a copy on the host.
    pub fn upload(&self, rec: &mut Recording<'_>) -> Weight {
        let panel = |panel: &HostPanel| StoredPanel {
            start: panel.start,
            rows: panel.rows,
            buffer: rec.upload_shared("weight", self.dtype, panel.data.clone()),
        };
        Weight { rows: self.rows, cols: self.cols, ld: self.ld, dtype: self.dtype, panels: self.panels.iter().map(panel).collect() }
    }
}

/// A weight on its way back.
#[derive(Debug)]
pub struct PendingWeight {
    rows: usize,
    cols: usize,
    ld: usize,
    dtype: Dtype,
    panels: Vec<(usize, usize, Pending<u32>)>,
}

impl PendingWeight {
    pub fn take(self, downloads: &mut Downloads) -> Result<HostWeight> {
        let mut panels = Vec::new();
        for (start, rows, pending) in self.panels {
            panels.push(HostPanel { start, rows, data: Arc::new(downloads.take(pending)?) });
        }
        Ok(HostWeight { rows: self.rows, cols: self.cols, ld: self.ld, dtype: self.dtype, panels })
    }
}
