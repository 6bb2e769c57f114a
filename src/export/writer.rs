//! Writes a folder in place while a run proceeds.

mod content;
mod resume;

pub use resume::Made;

use super::disk::{cannot_write, check_space, copy, reopen, reserve, seal, write_json};
use super::plan::{self, Shard, Stored};
use super::staged::{Staged, Written};
use super::target::Target;
use super::{Container, Format, Names, target};
use crate::model::{Checkpoint, Linear, ModelSpec, RawTensor};
use crate::quant::{Lattice, PackedLinear, Scheme};
use crate::tensor::Tensor;
use crate::{Error, Result};
use content::{all_tensors, files_to_copy};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The size that `transformers` splits at.
pub const MAX_SHARD: u64 = 5_000_000_000;

/// What is left of the disk for everything that is not a tensor and not copied: config, index, report.
const MARGIN: u64 = 1 << 20;

/// Where a run that can be gone on with writes a folder until it is published.
#[derive(Clone, Copy, Debug)]
pub struct Staging<'p> {
    pub folder: &'p Path,
    /// The folder is there already, with what an earlier run has written.
    pub resumed: bool,
}

/// A folder that is being written.
#[derive(Debug)]
pub struct Writer {
    target: Target,
    format: &'static Format,
    scheme: Scheme,
    /// Of the matrices that are quantized, by module.
    lattices: BTreeMap<String, Lattice>,
    shards: Vec<Shard>,
    files: Vec<(PathBuf, File)>,
    places: BTreeMap<String, Place>,
    bits_per_weight: f64,
    /// Files to copy, by name.
    copies: Vec<String>,
    /// Bytes of what comes last, the copies and small files, for which no space is reserved.
    unreserved: u64,
    /// Matrices that must still come, by module.
    missing: BTreeSet<String>,
    /// What must be read back.
    written: Written,
    /// What of that was not yet told as made: modules of matrices, and names of tensors in the file.
    fresh: (Vec<String>, Vec<String>),
    /// Of all tensors.
    names: Names,
    /// The names in the file of tensors that are not quantized, by those in the model.
    plain: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    offset: u64,
    stored: Stored,
    written: bool,
}

impl Writer {
    /// Plans all files and reserves the disk space for `checkpoint` quantized by `scheme`. What has been written goes when this is dropped.
    ///
    /// Errors: usage if `out` exists and is not to be overwritten, is no model folder, or overlaps the model's; if the format cannot
    /// hold the scheme or its groups do not divide a linear; output if the folder cannot be written or the disk has too little space;
    /// input if the model is quantized already.
    pub fn create(out: &Path, overwrite: bool, format: &'static Format, checkpoint: &Checkpoint, scheme: Scheme) -> Result<Self> {
        Self::with_shard_size(out, overwrite, format, checkpoint, scheme, MAX_SHARD)
    }

    /// As [`Self::create`], in a folder that stays.
    pub fn create_in(
        staging: Staging<'_>,
        out: &Path,
        overwrite: bool,
        format: &'static Format,
        checkpoint: &Checkpoint,
        scheme: Scheme,
    ) -> Result<Self> {
        Self::open(Some(staging), out, overwrite, format, checkpoint, scheme, MAX_SHARD)
    }

    /// As [`Self::create`], with weight files of at most `max_shard` bytes unless one tensor alone is larger.
    pub fn with_shard_size(
        out: &Path,
        overwrite: bool,
        format: &'static Format,
        checkpoint: &Checkpoint,
        scheme: Scheme,
        max_shard: u64,
    ) -> Result<Self> {
        Self::open(None, out, overwrite, format, checkpoint, scheme, max_shard)
    }

    #[allow(clippy::too_many_arguments, reason = "what is written where, and how")]
    fn open(
        staging: Option<Staging<'_>>,
        out: &Path,
        overwrite: bool,
        format: &'static Format,
        checkpoint: &Checkpoint,
        scheme: Scheme,
        max_shard: u64,
    ) -> Result<Self> {
        if checkpoint.quantization_config().is_some() {
            return Err(Error::input(checkpoint.dir().display(), "is quantized already; start from the original model"));
        }
        let spec = checkpoint.spec();
        (format.check)(scheme, spec)?;
        let on = |l: &Linear| (format.lattice)(scheme, spec, l).map(|lattice| (l.module.clone(), lattice));
        let lattices: BTreeMap<String, Lattice> = spec.matrices().filter_map(on).collect();
        let linears: Vec<&Linear> = spec.matrices().filter(|l| lattices.contains_key(&l.module)).collect();
        for linear in &linears {
            if !lattices[&linear.module].divides(linear.d_in) {
                let message = format!("groups do not divide the {} input columns of {}", linear.d_in, linear.module);
                return Err(Error::usage("--group-size", message));
            }
        }
        let target = Target::prepare(out, overwrite, checkpoint, staging.map(|s| s.folder))?;
        let names = format.container.names(spec);
        let (tensors, plain) = all_tensors(checkpoint, format, &names, &lattices)?;
        let shards = match format.container {
            Container::Safetensors(folder) => plan::shards(tensors, max_shard, folder.metadata)?,
            Container::Other(layout) => (layout.files)(checkpoint, format, tensors)?,
        };
        let (copies, copied_bytes) = files_to_copy(checkpoint.dir())?;
        let unreserved = copied_bytes + MARGIN;
        let folder = target.staging();
        let files = if staging.is_some_and(|s| s.resumed) {
            check_space(folder, unreserved)?;
            shards.iter().map(|shard| reopen(folder, shard)).collect::<Result<Vec<_>>>()?
        } else {
            check_space(folder, shards.iter().map(|s| s.len).sum::<u64>() + unreserved)?;
            shards.iter().map(|shard| reserve(folder, shard)).collect::<Result<Vec<_>>>()?
        };
        let mut places = BTreeMap::new();
        for (file, shard) in shards.iter().enumerate() {
            for (stored, offset) in &shard.tensors {
                places.insert(stored.name.clone(), Place { file, offset: *offset, stored: stored.clone(), written: false });
            }
        }
        let bytes = |l: &&Linear| (format.tensors)(spec, l, lattices[&l.module]).iter().map(|t| t.bytes).sum::<u64>();
        let weights: usize = linears.iter().map(|l| l.d_out * l.d_in).sum();
        let bits_per_weight = 8.0 * linears.iter().map(bytes).sum::<u64>() as f64 / weights.max(1) as f64;
        let missing = linears.iter().map(|l| l.module.clone()).collect();
        let mut writer = Self {
            target,
            format,
            scheme,
            lattices,
            shards,
            files,
            places,
            bits_per_weight,
            copies,
            unreserved,
            missing,
            written: Written::default(),
            fresh: Default::default(),
            names,
            plain,
        };
        for (stored, bytes) in format.container.added(spec) {
            writer.put_other(&stored.name, &bytes)?;
        }
        Ok(writer)
    }

    /// Checks that what writers to one disk have not reserved fits together: each has seen the space that the later ones will take as free.
    ///
    /// Errors: output if it does not.
    pub fn check_rest(writers: &[Self]) -> Result<()> {
        let needed = writers.iter().map(|w| w.unreserved).sum();
        writers.first().map_or(Ok(()), |first| check_space(first.target.staging(), needed))
    }

    /// Is any matrix quantized?
    pub fn quantizes(&self) -> bool {
        !self.lattices.is_empty()
    }

    /// What the groups of all matrices that are quantized can stand for, by module.
    pub fn lattices(&self) -> &BTreeMap<String, Lattice> {
        &self.lattices
    }

    /// What the groups of a matrix can stand for in this format; `None`: it stays as it is.
    pub fn quantized(&self, linear: &Linear) -> Option<Lattice> {
        self.lattices.get(&linear.module).copied()
    }

    /// The same of a matrix that is quantized.
    ///
    /// Errors: internal if it is none of those.
    pub fn lattice(&self, linear: &Linear) -> Result<Lattice> {
        self.quantized(linear).ok_or_else(|| Error::internal(&linear.module, "is not to be quantized"))
    }

    /// Writes one quantized matrix into its place; each must come exactly once, in any order.
    ///
    /// Errors: internal if it is none of the model's, comes twice, or is not as planned; output if writing fails.
    pub fn put_linear(&mut self, spec: &ModelSpec, linear: &Linear, packed: &PackedLinear) -> Result<()> {
        if !self.missing.remove(&linear.module) {
            return Err(Error::internal(&linear.module, "was not to be written, or has been written"));
        }
        let lattice = self.lattice(linear)?;
        if (lattice, linear.d_out, linear.d_in) != (packed.lattice, packed.d_out, packed.d_in) {
            return Err(Error::internal(&linear.module, format!("is not [{}, {}] on {lattice:?}", linear.d_out, linear.d_in)));
        }
        let tensors = self.names.rename((self.format.tensors)(spec, linear, lattice));
        let mut done = vec![0u64; tensors.len()];
        (self.format.encode)(spec, linear, packed, &mut |index, bytes| {
            let name = tensors.get(index).map_or("", |t| t.name.as_str());
            let before = done.get(index).copied().unwrap_or(0);
            self.write(name, before, bytes)?;
            done[index] += bytes.len() as u64;
            Ok(())
        })?;
        for (tensor, done) in tensors.iter().zip(done) {
            self.finish(&tensor.name, done)?;
        }
        self.written.linears.insert(linear.module.clone(), (self.format.fingerprint)(packed)?);
        self.fresh.0.push(linear.module.clone());
        Ok(())
    }

    /// Writes a tensor that would otherwise be taken from the model: a norm or bias that a transform changed.
    ///
    /// Errors: internal unless it has the type and shape that it has in the model and comes once; output if writing fails.
    pub fn put_tensor(&mut self, spec: &ModelSpec, name: &str, tensor: &Tensor<'_>) -> Result<()> {
        let raw = RawTensor { dtype: tensor.dtype.safetensors_name().to_owned(), shape: tensor.shape.clone(), bytes: &tensor.data };
        let stored = self.plain.get(name).and_then(|in_file| self.format.container.plain(in_file, &raw));
        match stored.as_ref().and_then(|stored| self.places.get(&stored.name).map(|place| (stored, place))) {
            Some((stored, place)) if place.stored == *stored && !place.written => {}
            _ => return Err(Error::internal(name, format!("cannot be replaced by {} {:?}", tensor.dtype, tensor.shape))),
        }
        let stored = stored.map(|stored| stored.name).unwrap_or_default();
        let bytes = self.format.container.convert(spec, name, raw)?;
        self.put_other(&stored, &bytes)?;
        self.fresh.1.push(stored);
        Ok(())
    }

    /// Writes all of a tensor that is not quantized, by its name in the file.
    fn put_other(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.write(name, 0, bytes)?;
        self.finish(name, bytes.len() as u64)?;
        self.written.others.insert(name.to_owned(), Sha256::digest(bytes).into());
        Ok(())
    }

    /// Of all files.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.len).sum::<u64>() + self.unreserved
    }

    pub fn format(&self) -> &'static Format {
        self.format
    }

    /// As asked for, with groups that fit the model.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Of the quantized matrices: everything that is stored for them, per weight.
    pub fn bits_per_weight(&self) -> f64 {
        self.bits_per_weight
    }

    /// Copies all other tensors and files, writes the config and flushes everything to disk; OUT is still as it was.
    ///
    /// Errors: internal if a linear has not been put; input if the model cannot be read; output if writing fails.
    pub fn complete(mut self, checkpoint: &Checkpoint) -> Result<Staged> {
        if let Some(module) = self.missing.first() {
            return Err(Error::internal(module, format!("and {} other linears have not been written", self.missing.len() - 1)));
        }
        let spec = checkpoint.spec();
        for (name, stored) in self.plain.clone() {
            if self.places.get(&stored).is_some_and(|place| !place.written) {
                let bytes = self.format.container.convert(spec, &name, checkpoint.raw(&name)?)?;
                self.put_other(&stored, &bytes)?;
                checkpoint.release();
            }
        }
        // A folder of safetensors is none until its config comes, after all this.
        let alone = !matches!(self.format.container, Container::Safetensors(_));
        for ((path, file), shard) in self.files.iter_mut().zip(&self.shards) {
            seal(file, &shard.header, alone).map_err(|e| cannot_write(path, e))?;
        }
        let folder = self.target.staging();
        for name in &self.copies {
            copy(&checkpoint.dir().join(name), &folder.join(name))?;
        }
        if let Container::Safetensors(format) = self.format.container {
            let mut config = checkpoint.config().json().clone();
            (format.config)(&mut config, spec, self.scheme);
            write_json(&folder.join("config.json"), &config)?;
            for (name, content) in (format.files)(self.scheme) {
                write_json(&folder.join(name), &content)?;
            }
            if self.shards.len() > 1 {
                write_json(&folder.join("model.safetensors.index.json"), &plan::index(&self.shards))?;
            }
        }
        target::sync_folder(folder)?;
        Ok(Staged::new(self.target, self.format, self.written))
    }

    fn write(&mut self, name: &str, position: u64, bytes: &[u8]) -> Result<()> {
        let place = self.places.get(name).ok_or_else(|| Error::internal(name, "has no place"))?;
        if position + bytes.len() as u64 > place.stored.bytes {
            return Err(Error::internal(name, format!("has more than the planned {} bytes", place.stored.bytes)));
        }
        let (path, file) = &mut self.files[place.file];
        file.seek(SeekFrom::Start(place.offset + position)).and_then(|_| file.write_all(bytes)).map_err(|e| cannot_write(path, e))
    }

    fn finish(&mut self, name: &str, bytes: u64) -> Result<()> {
        match self.places.get_mut(name) {
            Some(place) if place.stored.bytes == bytes => place.written = true,
            _ => return Err(Error::internal(name, format!("has {bytes} bytes, not the planned number"))),
        }
        Ok(())
    }
}
