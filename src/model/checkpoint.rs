//! A model folder: `config.json` and memory-mapped safetensors, checked on opening and read one tensor at a time.

use super::config::Config;
use super::family::spec_of;
use super::graph::{ModelSpec, TensorSpec};
use super::header::{self, Entry};
use super::map::Map;
use super::shards::{self, Shards};
use crate::tensor::{Dtype, Tensor};
use crate::{Error, Result};
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

/// A memory-mapped model folder whose headers, names and shapes have been checked.
pub struct Checkpoint {
    dir: PathBuf,
    config: Config,
    spec: ModelSpec,
    files: Vec<PathBuf>,
    maps: Vec<Map>,
    /// Tensor name to file number and entry.
    entries: BTreeMap<String, (usize, Entry)>,
    pre_tokenizer: Option<String>,
}

/// A tensor of any type, as it lies in the file; nothing but its length has been checked.
#[derive(Clone, Debug)]
pub struct RawTensor<'a> {
    /// The name in the safetensors header: "I32", "F16", "U8", ...
    pub dtype: String,
    pub shape: Vec<usize>,
    /// Row-major, little-endian.
    pub bytes: &'a [u8],
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("dir", &self.dir).field("tensors", &self.entries.len()).finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens and checks a folder; no weights are read yet.
    ///
    /// Errors name the file, and the tensor where it is about one: an unknown architecture, a config that makes no sense, weight
    /// files that are missing or damaged, a tensor that is missing or has another shape than the config says. In a folder with a
    /// `quantization_config` the weights of linears are left to the reader of that format.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::input(dir.display(), "is not a folder; a model is a folder with config.json and safetensors"));
        }
        let config = Config::open(dir)?;
        let spec = spec_of(&config)?;
        let Shards { files, index } = shards::find(dir)?;
        let maps = files.iter().map(|f| Map::open(f)).collect::<Result<Vec<_>>>()?;

        let mut entries: BTreeMap<String, (usize, Entry)> = BTreeMap::new();
        for (number, (path, map)) in files.iter().zip(&maps).enumerate() {
            for entry in header::parse(path, map)? {
                let subject = header::subject(path, &entry.name);
                if let Some((other, _)) = entries.insert(entry.name.clone(), (number, entry)) {
                    return Err(Error::input(subject, format!("is also in {}", files[other].display())));
                }
            }
        }
        for (tensor, file) in index.iter().flat_map(|index| &index.weight_map) {
            let found = entries.get(tensor).map(|(number, _)| &files[*number]);
            if found.and_then(|f| f.file_name()).is_none_or(|f| f != file.as_str()) {
                let promised = index.as_ref().map_or(dir, |i| &i.path).display();
                return Err(Error::input(header::subject(&dir.join(file), tensor), format!("is missing, though {promised} promises it")));
            }
        }

        let mut checkpoint = Self { dir: dir.to_owned(), config, spec, files, maps, entries, pre_tokenizer: None };
        checkpoint.check_tensors()?;
        checkpoint.spec.dtype = checkpoint.stored_dtype()?;
        Ok(checkpoint)
    }

    /// With what the user knows about the tokenizer and no file says: the name that llama.cpp has for its pre-tokenizer.
    pub fn with_pre_tokenizer(self, name: Option<String>) -> Self {
        Self { pre_tokenizer: name, ..self }
    }

    /// The name that llama.cpp has for the pre-tokenizer, if the user gives it.
    pub fn pre_tokenizer(&self) -> Option<&str> {
        self.pre_tokenizer.as_deref()
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The `quantization_config` of `config.json`, if the folder is quantized.
    pub fn quantization_config(&self) -> Option<&serde_json::Value> {
        self.config.quantization_config()
    }

    /// The weight files, sorted.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// All tensor names, sorted, those that the model does not use included.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// How errors should name a tensor: with its file, or with the folder where it is in none.
    pub fn subject(&self, name: &str) -> String {
        header::subject(self.entries.get(name).map_or(&self.dir, |(file, _)| &self.files[*file]), name)
    }

    /// A tensor of f32, f16 or bf16, borrowed from the file. Errors: it is missing, of another type, or holds NaN or infinity.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        /// Bytes that are looked at, and then let go of where there are more: an embedding is larger than a block.
        const PIECE: usize = 64 << 20;
        let (entry, bytes) = self.entry(name)?;
        let dtype = self.float(entry)?;
        for (piece, part) in bytes.chunks(PIECE).enumerate() {
            if let Some(position) = first_not_finite(dtype, part) {
                let mut value = [0.0];
                dtype.decode(&part[position * dtype.size()..(position + 1) * dtype.size()], &mut value);
                let position = piece * PIECE / dtype.size() + position;
                return Err(Error::input(self.subject(name), format!("holds {} at element {position} of {:?}", value[0], entry.shape)));
            }
            if bytes.len() > PIECE {
                let (file, _) = &self.entries[name];
                let start = entry.bytes.start + piece * PIECE;
                self.maps[*file].release(start..start + part.len());
            }
        }
        Tensor::new(dtype, entry.shape.clone(), Cow::Borrowed(bytes))
    }

    /// A tensor of any type, unchecked: for readers of quantized folders. Error: it is missing.
    pub fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let (entry, bytes) = self.entry(name)?;
        Ok(RawTensor { dtype: entry.dtype.to_string(), shape: entry.shape.clone(), bytes })
    }

    /// Lets go of the memory of everything that has been read so far; see [`Map::release`].
    pub fn release(&self) {
        self.maps.iter().for_each(|map| map.release(0..map.len()));
    }

    /// Has the system read a tensor in the background.
    pub fn read_ahead(&self, name: &str) {
        if let Some((file, entry)) = self.entries.get(name) {
            self.maps[*file].prefetch(entry.bytes.clone());
        }
    }

    fn entry(&self, name: &str) -> Result<(&Entry, &[u8])> {
        let (file, entry) = self.entries.get(name).ok_or_else(|| Error::input(self.subject(name), "is missing"))?;
        Ok((entry, &self.maps[*file][entry.bytes.clone()]))
    }

    fn float(&self, entry: &Entry) -> Result<Dtype> {
        match entry.dtype {
            safetensors::Dtype::F32 => Ok(Dtype::F32),
            safetensors::Dtype::F16 => Ok(Dtype::F16),
            safetensors::Dtype::BF16 => Ok(Dtype::Bf16),
            other => Err(Error::input(self.subject(&entry.name), format!("is of type {other}; F32, F16 or BF16 is needed"))),
        }
    }

    /// Everything the spec needs is there, in a type and shape that we can read.
    fn check_tensors(&self) -> Result<()> {
        let quantized = self.quantization_config().is_some();
        for TensorSpec { name, shape, quantizable } in self.spec.tensors() {
            if quantized && quantizable {
                continue;
            }
            let Some((_, entry)) = self.entries.get(&name) else {
                let hint = if name == self.spec.head.weight() { "; if the head is the embedding, config.json must tie them" } else { "" };
                return Err(Error::input(self.subject(&name), format!("is missing{hint}")));
            };
            self.float(entry)?;
            if entry.shape != shape {
                let message = format!("has shape {:?}, but config.json makes it {shape:?}", entry.shape);
                return Err(Error::input(self.subject(&name), message));
            }
        }
        if quantized { Ok(()) } else { self.check_nothing_is_left() }
    }

    /// A weight that the spec does not know (more layers than the config says, a norm on the queries, a bias, an adapter) would be
    /// dropped silently, and the result would be another model. Buffers such as `inv_freq` may stay.
    fn check_nothing_is_left(&self) -> Result<()> {
        let known: HashSet<String> = self.spec.tensors().into_iter().map(|t| t.name).collect();
        let spec = &self.spec;
        // Some writers store a tied head a second time; the config decides.
        let second_head = |entry: &Entry| spec.tied_head && entry.shape == [spec.n_vocab, spec.d_model];
        for (name, (_, entry)) in &self.entries {
            let is_weight = name.ends_with(".weight") || name.ends_with(".bias");
            if is_weight && !known.contains(name) && !second_head(entry) {
                let message = format!("has no place in the {} model that config.json describes", spec.family);
                return Err(Error::input(self.subject(name), message));
            }
        }
        Ok(())
    }

    fn stored_dtype(&self) -> Result<Dtype> {
        let linear = self.spec.blocks.first().and_then(|b| b.linears.first()).map(|l| l.weight());
        let plain = linear.filter(|_| self.quantization_config().is_none());
        let name = plain.unwrap_or_else(|| self.spec.embedding.weight());
        let is_float = |name: &str| self.entries.get(name).is_some_and(|(_, entry)| self.float(entry).is_ok());
        let name = if self.quantization_config().is_some() && !is_float(&name) { self.spec.final_norm.name.clone() } else { name };
        self.float(self.entry(&name)?.0)
    }
}

/// The position of the first NaN or infinity: those whose exponent bits are all ones.
fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    const CHUNK: usize = 1 << 18; // bytes; a multiple of every element size
    let not_finite: fn(&[u8]) -> bool = match dtype {
        Dtype::F32 => |b| b.as_chunks::<4>().0.iter().fold(false, |bad, v| bad | (u32::from_le_bytes(*v) & 0x7f80_0000 == 0x7f80_0000)),
        Dtype::F16 => |b| b.as_chunks::<2>().0.iter().fold(false, |bad, v| bad | (u16::from_le_bytes(*v) & 0x7c00 == 0x7c00)),
        Dtype::Bf16 => |b| b.as_chunks::<2>().0.iter().fold(false, |bad, v| bad | (u16::from_le_bytes(*v) & 0x7f80 == 0x7f80)),
    };
    let chunk = bytes.par_chunks(CHUNK).position_first(not_finite)?;
    let start = chunk * CHUNK;
    let within = bytes[start..].chunks(dtype.size()).position(not_finite)?;
    Some(start / dtype.size() + within)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_finite_check_agrees_with_f32_for_every_half_and_finds_the_first() {
        for dtype in [Dtype::F16, Dtype::Bf16] {
            for bits in 0..=u16::MAX {
                let mut value = [0.0];
                dtype.decode(&bits.to_le_bytes(), &mut value);
                assert_eq!(first_not_finite(dtype, &bits.to_le_bytes()).is_none(), value[0].is_finite(), "{dtype} {bits:#x}");
            }
        }
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![f32::MAX; 200_000];
            values[123_457] = value;
            values[199_999] = f32::NAN;
            let bytes: Vec<u8> = std::iter::once(0).chain(values.iter().flat_map(|v| v.to_le_bytes())).collect();
            assert_eq!(first_not_finite(Dtype::F32, &bytes[1..]), Some(123_457));
            assert_eq!(first_not_finite(Dtype::F32, &bytes[1..400_001]), None);
        }
        assert_eq!(first_not_finite(Dtype::F16, &[]), None);
    }
}
