//! Pieces of a linear: rows that are solved by themselves, from the weight they are copied from to the packed matrix they become part of.

use crate::Result;
use crate::engine::kernels::{self, gather_columns, pack_bits};
use crate::engine::matrix::{self, STRIDE_ALIGN};
use crate::engine::{Buffer, Engine, Limits, Mat, Pending, Recording, Weight, submit};
use crate::quant::{Grid, GridShape, HostGrid, Lattice, PackedLinear};
use std::ops::Range;

/// Some rows' final result.
pub(super) struct Piece {
    words: Vec<u32>,
    grid: HostGrid,
    w_hat: Mat<f32>,
}

impl Piece {
    /// Runs `rec`, packs the codes that it leaves, and makes the values that they stand for on a grid.
    pub fn pack(engine: &mut dyn Engine, mut rec: Recording<'_>, shape: &GridShape, codes: Mat<u32>, grid: HostGrid) -> Result<Self> {
        let on_device = Grid::upload(&mut rec, grid.clone());
        let w_hat = on_device.dequantize(&mut rec, shape, codes);
        on_device.free(&mut rec);
        let words = pack(&mut rec, shape, codes);
        codes.free(&mut rec);
        let mut back = engine.run(rec)?;
        Ok(Self { words: back.take(words)?, grid, w_hat })
    }
}

/// The pieces of a weight, in order, as one matrix, packed and on the device.
pub(super) fn join(engine: &mut dyn Engine, pieces: Vec<Piece>, lattice: Lattice, weight: &Weight) -> Result<(PackedLinear, Weight)> {
    let blank = engine.estimates();
    let words = concatenated(&pieces, |piece| &piece.words, blank);
    let scales = concatenated(&pieces, |piece| &piece.grid.scale, blank);
    let zeros = concatenated(&pieces, |piece| &piece.grid.zero, blank);
    let steps = concatenated(&pieces, |piece| piece.grid.steps.as_chunks().0, blank);
    let mats = pieces.into_iter().map(|piece| piece.w_hat).collect();
    let offsets = lattice.offsets(weight.cols, &scales, &zeros, &steps);
    let (d_out, d_in) = (weight.rows, weight.cols);
    let packed = match blank {
        // Nobody has chosen scales.
        true => PackedLinear { lattice, d_out, d_in, words, scales, offsets, steps },
        false => PackedLinear::new(lattice, d_out, d_in, words, scales, offsets, steps)?,
    };
    let limits = engine.limits();
    let w_hat = submit(engine, |rec| joined(rec, mats, limits))?;
    Ok((packed, w_hat))
}

/// A part of all pieces, one after the other; zeros that stand for it in an estimate are not touched.
fn concatenated<T: Copy + Default>(pieces: &[Piece], part: impl Fn(&Piece) -> &[T], blank: bool) -> Vec<T> {
    let len = pieces.iter().map(|piece| part(piece).len()).sum();
    if blank {
        return vec![T::default(); len];
    }
    let mut all = Vec::with_capacity(len);
    pieces.iter().for_each(|piece| all.extend_from_slice(part(piece)));
    all
}

/// Records a copy in f32 of rows of a weight, whichever panels they lie in.
pub(super) fn gather_rows(rec: &mut Recording<'_>, weight: &Weight, rows: Range<usize>, natural: Buffer<u32>) -> Mat<f32> {
    let out = Mat::alloc(rec, "working copy", rows.len(), weight.cols);
    for panel in &weight.panels {
        let (start, end) = (rows.start.max(panel.start), rows.end.min(panel.start + panel.rows));
        if start < end {
            let p = gather_columns::GatherColumnsParams {
                rows: (end - start) as u32,
                cols: weight.cols as u32,
                ld_source: weight.ld as u32,
                ld_to: out.ld as u32,
                row_source: (start - panel.start) as u32,
                row_to: (start - rows.start) as u32,
            };
            kernels::gather_columns(rec, p, natural, panel.buffer, out.buffer);
        }
    }
    out
}

/// Pieces one below the other as one weight, in as few panels as fit.
fn joined(rec: &mut Recording<'_>, mats: Vec<Mat<f32>>, limits: Limits) -> Weight {
    let pieces = Weight::from_f32(&mats);
    if mats.len() < 2 {
        return pieces;
    }
    let natural = rec.upload("order", (0..pieces.cols as u32).collect::<Vec<_>>());
    let panels: Vec<Mat<f32>> = matrix::row_panels(pieces.rows, pieces.ld * size_of::<f32>(), STRIDE_ALIGN, limits)
        .into_iter()
        .map(|range| gather_rows(rec, &pieces, range, natural))
        .collect();
    rec.free(natural);
    pieces.free(rec);
    Weight::from_f32(&panels)
}

/// Records the packing of codes into a dense bit stream per row, and its read-back.
fn pack(rec: &mut Recording<'_>, shape: &GridShape, codes: Mat<u32>) -> Pending<u32> {
    let words = pack_bits::words_per_row(shape.cols, shape.lattice.bits as usize);
    let packed = rec.alloc("packed codes", shape.rows * words);
    let p = pack_bits::PackBitsParams {
        rows: shape.rows as u32,
        cols: shape.cols as u32,
        ld: codes.ld as u32,
        bits: shape.lattice.bits,
        words: words as u32,
    };
    kernels::pack_bits(rec, p, codes.buffer, packed);
    let pending = rec.download(packed);
    rec.free(packed);
    pending
}
