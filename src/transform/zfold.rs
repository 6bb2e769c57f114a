//! Z-Fold (Jeon et al., EMNLP 2023) as a rewrite of the float weights: factors per input channel that make weights fit integer grids
//! better and cost nothing, since they vanish in what comes before.
//!
//! Column i of the readers' W is divided by zeta_i, and channel i of its source multiplied: the gain (and bias) of a norm, or row i of
//! the W (and bias) of a linear between which and the readers nothing acts across channels. The block's function stays, the grid of a
//! reader becomes the rank-one s_r zeta_i. A source linear is quantized per row, which no factor on rows disturbs, so that folding
//! before quantization equals folding after it, and what is stored is exactly what was solved for.
//!
//! Everything downstream works on the rewritten block and needs to know nothing: weights and norms on the device are replaced, and the
//! statistics become those of the new inputs, H' = zeta H zeta.
//!
//! How factors are found: `transform::zeta`. Memory: the readers of one fold twice in f32 besides the block itself.

use super::zeta::{Found, Part, Readers, Search, Stored, rescale_gram, rescaled};
use super::{GridChoice, ZfoldOptions};
use crate::calib::{DeviceBlock, DeviceNorm, Gram};
use crate::engine::{Buffer, Engine, Recording, Weight, submit};
use crate::model::{Block, Fold, FoldSource, Input, Role, Tied, Weights};
use crate::quant::Lattice;
use crate::tensor::Tensor;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The statistics of a block, made to be those of the rewritten one.
#[derive(Debug)]
pub struct Statistics<'s> {
    /// H of every distinct input.
    pub inputs: &'s mut [(Input, Gram)],
    /// H of the values' linear for each key-value head, where a method weighs heads apart; else empty, and the input's H serves.
    pub values: &'s mut [Gram],
}

/// A norm's gain or bias, or a linear's bias, to be stored instead of the checkpoint's.
#[derive(Clone, Debug)]
pub struct FoldedTensor {
    pub name: String,
    /// Shape and type are those of the checkpoint's.
    pub tensor: Tensor<'static>,
}

/// What one fold did: for the report.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FoldRecord {
    /// A norm's output or a linear's role.
    pub source: String,
    pub readers: Vec<Role>,
    pub zeta_min: f32,
    pub zeta_max: f32,
    /// Factors that were tried after the first, which are 1.
    pub iterations: u32,
    /// Σ tr(E H Eᵀ) of the readers with nearest rounding on searched grids, without factors and with them.
    pub loss_before: f64,
    pub loss_after: f64,
}

/// What has to be stored besides linears, and what was done.
#[derive(Clone, Debug, Default)]
pub struct FoldedBlock {
    pub tensors: Vec<FoldedTensor>,
    pub folds: Vec<FoldRecord>,
}

/// Rewrites a block on the device and its statistics. `weights` tells shapes and types; values come from the device.
///
/// # Errors
/// Internal where statistics are missing or do not fit the block; numeric where a loss is not finite; whatever the engine says.
pub fn fold_block(
    engine: &mut dyn Engine,
    options: &ZfoldOptions,
    weights: &dyn Weights,
    block: &Block,
    device: &mut DeviceBlock,
    stats: &mut Statistics<'_>,
    grid: &GridChoice<'_>,
) -> Result<FoldedBlock> {
    let mut run = Run { engine, weights, block, device, stored: BTreeMap::new() };
    let mut folds = Vec::new();
    for (input, fold) in in_order(block)? {
        let named = |e: Error| Error { subject: format!("block {}, factors of {input}: {}", block.index, e.subject), ..e };
        let channel = run.channels(fold, input)?;
        let found = run.search(options, grid, fold, input, &channel, stats).map_err(named)?;
        if found.zeta.iter().any(|z| *z != 1.0) {
            let columns: Vec<f32> = channel.iter().map(|c| found.zeta[*c]).collect();
            run.rewrite_readers(fold, &columns)?;
            run.rewrite_source(fold.from, &found.zeta)?;
            stats.rescale(input, &columns);
        }
        folds.push(record(fold, &found));
    }
    let tensors = run.stored.into_iter().map(|(name, tensor)| FoldedTensor { name, tensor }).collect();
    Ok(FoldedBlock { tensors, folds })
}

/// Folds and the inputs that they act on, in the order of the forward pass.
fn in_order(block: &Block) -> Result<Vec<(Input, &Fold)>> {
    let mut folds = Vec::new();
    for fold in &block.folds {
        let reader = fold.into.first().ok_or_else(|| Error::internal("fold", "has no readers"))?;
        folds.push((block.linear(*reader)?.input, fold));
    }
    folds.sort_by_key(|(input, _)| *input);
    Ok(folds)
}

fn record(fold: &Fold, found: &Found) -> FoldRecord {
    let source = match fold.from {
        FoldSource::Norm(input) => input.to_string(),
        FoldSource::Linear(role) => role.to_string(),
    };
    FoldRecord {
        source,
        readers: fold.into.clone(),
        zeta_min: found.zeta.iter().copied().fold(f32::INFINITY, f32::min),
        zeta_max: found.zeta.iter().copied().fold(0.0, f32::max),
        iterations: found.iterations,
        loss_before: found.loss_before,
        loss_after: found.loss_after,
    }
}

impl Statistics<'_> {
    fn of(&self, input: Input) -> Result<&Gram> {
        let found = self.inputs.iter().find(|(i, _)| *i == input);
        found.map(|(_, gram)| gram).ok_or_else(|| Error::internal(input, "has no statistics"))
    }

    fn rescale(&mut self, input: Input, columns: &[f32]) {
        self.inputs.iter_mut().filter(|(i, _)| *i == input).for_each(|(_, gram)| rescale_gram(gram, columns));
        if input == Input::AttnNorm {
            self.values.iter_mut().for_each(|gram| rescale_gram(gram, columns));
        }
    }
}

struct Run<'a> {
    engine: &'a mut dyn Engine,
    weights: &'a dyn Weights,
    block: &'a Block,
    device: &'a mut DeviceBlock,
    /// By name: a bias can be folded twice.
    stored: BTreeMap<String, Tensor<'static>>,
}

impl Run<'_> {
    /// The source's channel that each column of the readers comes from.
    fn channels(&self, fold: &Fold, input: Input) -> Result<Vec<usize>> {
        let d = self.block.readers(input).next().map_or(0, |l| l.d_in);
        if self.block.readers(input).any(|l| !fold.into.contains(&l.role)) {
            return Err(Error::internal(input, "has a reader that its fold does not name"));
        }
        let channel: Vec<usize> = match fold.tied {
            Tied::None => (0..d).collect(),
            Tied::KvGroup => {
                let spec = self.weights.spec();
                let (d_head, group) = (spec.d_head, spec.n_head / spec.n_kv.max(1));
                (0..d).map(|c| c / d_head / group * d_head + c % d_head).collect()
            }
        };
        let n = self.source_channels(fold.from)?;
        // Every channel has a column, and every column a channel.
        if channel.iter().max().map_or(0, |c| c + 1) != n {
            return Err(Error::internal(input, format!("has {d} columns, which do not come from {n} channels")));
        }
        Ok(channel)
    }

    fn source_channels(&self, source: FoldSource) -> Result<usize> {
        Ok(match source {
            FoldSource::Norm(input) => self.device.norm(input)?.gain.len(),
            FoldSource::Linear(role) => self.block.linear(role)?.d_out,
        })
    }

    fn search(
        &mut self,
        options: &ZfoldOptions,
        grid: &GridChoice<'_>,
        fold: &Fold,
        input: Input,
        channel: &[usize],
        stats: &Statistics<'_>,
    ) -> Result<Found> {
        let gains = match fold.from {
            FoldSource::Norm(input) => Some((self.values(self.device.norm(input)?.gain)?, self.gain_tensor(input)?.dtype)),
            FoldSource::Linear(_) => None,
        };
        let mut shared = Readers { gram: stats.of(input)?, parts: Vec::new() };
        let mut apart: Vec<Readers<'_>> = Vec::new();
        let enter = |rec: &mut Recording<'_>| fold.into.iter().map(|role| self.device.enter(rec, *role)).collect::<Result<Vec<_>>>();
        let readers = submit(self.engine, enter)??;
        for linear in &readers {
            let (role, weight, lattice) = (&linear.role, &linear.weight, (grid.lattice)(self.block.linear(linear.role)?)?);
            if *role == Role::V && !stats.values.is_empty() {
                apart = heads(weight, lattice, stats.values)?;
            } else {
                shared.parts.extend(parts(weight, 0..weight.rows).into_iter().map(|part| (part, lattice)));
            }
        }
        let search = Search {
            rule: grid.rule,
            readers: std::iter::once(shared).chain(apart).filter(|r| !r.parts.is_empty()).collect(),
            channel: channel.to_vec(),
            n_channel: self.source_channels(fold.from)?,
            stored: gains.as_ref().map_or(Stored::Any, |(gains, dtype)| Stored::Gains { gains, dtype: *dtype }),
        };
        if let Some(wrong) = search.readers.iter().find(|r| r.gram.d != channel.len()) {
            return Err(Error::internal(input, format!("has statistics of {} columns instead of {}", wrong.gram.d, channel.len())));
        }
        let found = search.run(self.engine, options)?;
        submit(self.engine, |rec| readers.into_iter().for_each(|linear| self.device.leave(rec, linear)))?;
        Ok(found)
    }

    /// Divides the columns of all readers.
    fn rewrite_readers(&mut self, fold: &Fold, columns: &[f32]) -> Result<()> {
        let inverse: Vec<f32> = columns.iter().map(|z| z.recip()).collect();
        fold.into.iter().try_for_each(|role| self.rewrite(*role, None, &inverse))
    }

    /// Multiplies the source's channels.
    fn rewrite_source(&mut self, source: FoldSource, zeta: &[f32]) -> Result<()> {
        match source {
            FoldSource::Norm(input) => {
                let norm = self.device.norm(input)?;
                let block = self.block;
                let names = block.norm(input).ok_or_else(|| Error::internal(input, "is no norm's output"))?;
                let gain = self.multiply(&names.name, norm.gain, zeta)?;
                let bias = match &names.bias {
                    Some(name) => Some(self.multiply(name, norm.bias, zeta)?),
                    None => None,
                };
                submit(self.engine, |rec| {
                    let bias = bias.map_or(Buffer::none(), |bias| rec.upload("norm", bias));
                    let norm = DeviceNorm { gain: rec.upload("norm", gain), bias };
                    self.device.replace_norm(rec, input, norm)
                })?
            }
            FoldSource::Linear(role) => {
                let cols = self.block.linear(role)?.d_in;
                self.rewrite(role, Some(zeta), &vec![1.0; cols])?;
                let block = self.block;
                if let Some(name) = block.linear(role)?.bias_name() {
                    let bias = self.multiply(&name, self.device.bias(role)?, zeta)?;
                    submit(self.engine, |rec| {
                        let bias = rec.upload("bias", bias);
                        self.device.replace_bias(rec, role, bias)
                    })??;
                }
                Ok(())
            }
        }
    }

    /// Puts factors on rows and columns of a weight, which becomes f32.
    fn rewrite(&mut self, role: Role, rows: Option<&[f32]>, columns: &[f32]) -> Result<()> {
        let linear = submit(self.engine, |rec| self.device.enter(rec, role))??;
        let parts = parts(&linear.weight, 0..linear.weight.rows);
        let mats = submit(self.engine, |rec| {
            let columns_buffer = rec.upload("factors", columns.to_vec());
            let mats: Vec<_> = parts
                .iter()
                .map(|part| {
                    let rows = rows.map(|rows| rows[part.panel.start..][..part.rows].to_vec());
                    rescaled(rec, part, rows, columns_buffer, columns.len())
                })
                .collect();
            rec.free(columns_buffer);
            self.device.leave(rec, linear);
            mats
        })?;
        self.device.replace(self.engine, role, Weight::from_f32(&mats))
    }

    /// A vector times `zeta`, rounded to the type that the file stores it in, and kept for the file.
    fn multiply(&mut self, name: &str, buffer: Buffer<f32>, zeta: &[f32]) -> Result<Vec<f32>> {
        let old = self.values(buffer)?;
        let stored = self.weights.tensor(name)?;
        let values: Vec<f32> = old.iter().zip(zeta).map(|(v, z)| v * z).collect();
        let tensor = Tensor::from_f32(stored.dtype, stored.shape, &values)?;
        let values = tensor.to_f32();
        if values.iter().any(|v| !v.is_finite()) {
            return Err(Error::numeric(name, format!("overflows {} when factors are folded into it", stored.dtype)));
        }
        self.stored.insert(name.to_owned(), tensor);
        Ok(values)
    }

    fn gain_tensor(&self, input: Input) -> Result<Tensor<'_>> {
        let norm = self.block.norm(input).ok_or_else(|| Error::internal(input, "is no norm's output"))?;
        self.weights.tensor(&norm.name)
    }

    fn values(&mut self, buffer: Buffer<f32>) -> Result<Vec<f32>> {
        let mut rec = Recording::new();
        let pending = rec.download(buffer);
        self.engine.run(rec)?.take(pending)
    }
}

/// Rows `range` of a weight, panel by panel.
fn parts(weight: &Weight, range: std::ops::Range<usize>) -> Vec<Part> {
    let within = |start: usize, rows: usize| range.start.max(start)..range.end.min(start + rows);
    weight
        .panels
        .iter()
        .map(|panel| (panel, within(panel.start, panel.rows)))
        .filter(|(_, rows)| !rows.is_empty())
        .map(|(panel, rows)| Part { panel: *panel, ld: weight.ld, row0: rows.start - panel.start, rows: rows.len() })
        .collect()
}

/// The heads' rows of a weight, each under its own H.
fn heads<'a>(weight: &Weight, lattice: Lattice, grams: &'a [Gram]) -> Result<Vec<Readers<'a>>> {
    if !weight.rows.is_multiple_of(grams.len()) {
        return Err(Error::internal(Role::V, format!("has {} rows for {} heads", weight.rows, grams.len())));
    }
    let d_head = weight.rows / grams.len();
    let of_head = |h: usize| parts(weight, h * d_head..(h + 1) * d_head).into_iter().map(|part| (part, lattice)).collect();
    Ok(grams.iter().enumerate().map(|(h, gram)| Readers { gram, parts: of_head(h) }).collect())
}
