//! Writing quantized models, and reading them back.
//!
//! A run calls [`Writer::create`] before its first second of work, [`Writer::put_linear`] for every linear of every block in any
//! order (and [`Writer::put_tensor`] for norms and biases that a transform changed), [`Writer::complete`], [`Staged::verify`], which
//! opens the folder anew, compares all of it with what was put and checks it as [`verify()`] does, and [`Staged::publish`], which renames
//! it to OUT. Dropping either of the two before that leaves nothing behind.
//!
//! Most formats are folders of safetensors: one [`Format`] says which tensors stand for a linear and what `config.json` says
//! about them. A new one is one file with a `pub const FORMAT` and one line in [`FORMATS`]. Exporters see packed matrices and the
//! block graph, never the engine or the algorithms.

mod awq;
mod compressed_tensors;
mod dense;
mod disk;
mod gguf;
#[cfg(test)]
mod golden;
mod gptq;
mod mlx;
mod packed;
mod plan;
mod staged;
mod target;
mod verify;
mod words;
mod writer;

pub use plan::{Shard, Stored};
pub use staged::{Staged, Verified};
pub use target::check_target;
pub use verify::{Verdict, verify};
pub use writer::{MAX_SHARD, Made, Staging, Writer};

use crate::model::{Checkpoint, Linear, ModelSpec, RawTensor, Weights};
use crate::quant::{Digest, Lattice, PackedLinear, Scheme};
use crate::tensor::Dtype;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// All formats, in the order in which help shows them.
pub static FORMATS: LazyLock<Vec<&Format>> = LazyLock::new(|| {
    let folders = [&compressed_tensors::FORMAT, &compressed_tensors::W8A8, &gptq::V1, &gptq::V2, &awq::FORMAT, &mlx::FORMAT];
    folders.into_iter().chain(&gguf::FORMATS).chain([&dense::FORMAT]).collect()
});

/// A way to store a quantized model.
pub struct Format {
    /// As the command line spells it.
    pub name: &'static str,
    /// One line for help.
    pub about: &'static str,
    /// How tensors lie in files.
    pub container: Container,
    /// Has it bits, groups and symmetry of its own, whatever the scheme?
    pub own_scheme: bool,
    /// What to be warned of: readers that cannot read it, matrices that are stored otherwise. A usage error if the format cannot hold the
    /// model by the scheme.
    pub check: fn(Scheme, &ModelSpec) -> Result<Vec<String>>,
    /// What the groups of a matrix can stand for; `None`: it stays as it is.
    pub lattice: fn(Scheme, &ModelSpec, &Linear) -> Option<Lattice>,
    /// The tensors that replace the weight of a linear, under the model's name for it where the container has names of its own.
    pub tensors: fn(&ModelSpec, &Linear, Lattice) -> Vec<Stored>,
    /// The bytes of those tensors, in pieces.
    pub encode: fn(&ModelSpec, &Linear, &PackedLinear, &mut Sink<'_>) -> Result<()>,
    /// What `encode` holds in memory besides the matrix, at most, in bytes for every weight.
    pub scratch: usize,
    /// What the reader's `fingerprint` must be for a matrix that was written and read back.
    pub fingerprint: fn(&PackedLinear) -> Result<Digest>,
}

/// Receives the number of a tensor in the order of [`Format::tensors`], and the bytes that follow those it has received so far.
pub type Sink<'a> = dyn FnMut(usize, &[u8]) -> Result<()> + 'a;

/// How tensors lie in files.
#[derive(Clone, Copy)]
pub enum Container {
    /// A folder of one or more safetensors files and a `config.json`; tensors that are not quantized are copied as they are.
    Safetensors(Folder),
    /// Another one.
    Other(&'static Layout),
}

/// What a folder of safetensors says about itself.
#[derive(Clone, Copy)]
pub struct Folder {
    /// Under `format` in the headers of the weight files.
    pub metadata: &'static str,
    /// Is a `quantization_config` one of this format?
    pub reads: fn(&Value) -> bool,
    /// Changes what `config.json` says about weights.
    pub config: fn(&mut Map<String, Value>, &ModelSpec, Scheme),
    /// Further JSON files that the folder gets, by name.
    pub files: fn(Scheme) -> Vec<(&'static str, Value)>,
    /// Opens a folder whose config says that it is of this format.
    pub open: fn(Checkpoint) -> Result<Box<dyn Reader>>,
}

/// Makes the bytes of a tensor, by its name in the model.
pub type Convert = for<'a> fn(&ModelSpec, &str, RawTensor<'a>) -> Result<Cow<'a, [u8]>>;
/// A tensor and its bytes.
pub type Added = (Stored, Vec<u8>);

/// A container of its own.
pub struct Layout {
    /// Names in the file by names in the model. Buffers that the model does not need have none and are left out.
    pub names: fn(&ModelSpec) -> BTreeMap<String, String>,
    /// How a tensor that is not quantized is stored, by its name in the file; `None`: it is left out.
    pub plain: fn(&str, &RawTensor<'_>) -> Option<Stored>,
    /// Its bytes, by its name in the model.
    pub convert: Convert,
    /// Tensors that the model does not store, with their bytes.
    pub added: fn(&ModelSpec) -> Vec<Added>,
    /// Where all of them will lie.
    pub files: fn(&Checkpoint, &Format, Vec<Stored>) -> Result<Vec<Shard>>,
}

impl Container {
    fn names(self, spec: &ModelSpec) -> Names {
        match self {
            Self::Safetensors(_) => Names(None),
            Self::Other(layout) => Names(Some((layout.names)(spec))),
        }
    }

    fn plain(self, name: &str, raw: &RawTensor<'_>) -> Option<Stored> {
        match self {
            Self::Safetensors(_) => {
                Some(Stored { name: name.into(), dtype: raw.dtype.clone().into(), shape: raw.shape.clone(), bytes: raw.bytes.len() as u64 })
            }
            Self::Other(layout) => (layout.plain)(name, raw),
        }
    }

    fn convert<'a>(self, spec: &ModelSpec, name: &str, raw: RawTensor<'a>) -> Result<Cow<'a, [u8]>> {
        match self {
            Self::Safetensors(_) => Ok(Cow::Borrowed(raw.bytes)),
            Self::Other(layout) => (layout.convert)(spec, name, raw),
        }
    }

    fn added(self, spec: &ModelSpec) -> Vec<Added> {
        match self {
            Self::Safetensors(_) => Vec::new(),
            Self::Other(layout) => (layout.added)(spec),
        }
    }
}

/// Names in the file by names in the model; `None`: they are the same.
#[derive(Debug)]
struct Names(Option<BTreeMap<String, String>>);

impl Names {
    /// `None`: the tensor has no place in the file.
    fn in_file<'n>(&'n self, name: &'n str) -> Option<&'n str> {
        match &self.0 {
            Some(names) => names.get(name).map(String::as_str),
            None => Some(name),
        }
    }

    fn rename(&self, stored: Vec<Stored>) -> Vec<Stored> {
        let own = |t: &Stored| self.in_file(&t.name).unwrap_or(&t.name).to_owned();
        stored.into_iter().map(|t| Stored { name: own(&t), ..t }).collect()
    }
}

impl std::fmt::Debug for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Format").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Weights of a folder that this module may have written.
pub trait Reader: Weights {
    /// The codes of a linear; `None` where it is stored as plain floats.
    fn packed(&self, linear: &Linear) -> Result<Option<PackedLinear>>;

    /// On which lattice the codes of a linear lie; `None` where it is stored as plain floats.
    fn lattice(&self, linear: &Linear) -> Result<Option<Lattice>>;

    /// The bytes of a tensor by the name that it has in the file.
    fn stored(&self, name: &str) -> Result<&[u8]>;
}

impl dyn Reader + '_ {
    /// Identifies what is stored for a linear: its codes, scales and zero points, or its floats.
    pub fn fingerprint(&self, linear: &Linear) -> Result<Digest> {
        match self.packed(linear)? {
            Some(packed) => Ok(packed.digest()),
            None => dense::stored_fingerprint(self, linear),
        }
    }
}

/// The format of that name, or a usage error that lists them.
pub fn find(name: &str) -> Result<&'static Format> {
    let known = || FORMATS.iter().map(|f| f.name).collect::<Vec<_>>().join(", ");
    FORMATS
        .iter()
        .copied()
        .find(|f| f.name == name)
        .ok_or_else(|| Error::usage("--format", format!("{name} is not known; choose one of {}", known())))
}

/// Opens a plain or quantized folder, or a GGUF file or a folder with one, as weights, dequantized on reading.
///
/// Errors name the file and the tensor or key: besides those of [`Checkpoint::open`], a quantization that we cannot read.
pub fn open(dir: &Path) -> Result<Box<dyn Weights>> {
    Ok(open_packed(dir)?)
}

/// As [`open`], with access to the codes.
pub fn open_packed(dir: &Path) -> Result<Box<dyn Reader>> {
    if let Some(file) = gguf_file(dir) {
        return Ok(Box::new(gguf::Gguf::open(&file)?));
    }
    let checkpoint = Checkpoint::open(dir)?;
    let Some(config) = checkpoint.quantization_config() else {
        return Ok(Box::new(checkpoint));
    };
    match reading(config) {
        Some((_, folder)) => (folder.open)(checkpoint),
        None => {
            let readable = FORMATS.iter().map(|f| f.name).collect::<Vec<_>>().join(", ");
            let method = config.get("quant_method").and_then(Value::as_str).unwrap_or("an unnamed method");
            let message = format!("`quantization_config`: the model is quantized with {method}; we read {readable}");
            Err(Error::input(checkpoint.config().path().display(), message))
        }
    }
}

/// The format that a `quantization_config` is of.
fn reading(config: &Value) -> Option<(&'static Format, Folder)> {
    FORMATS.iter().find_map(|format| match format.container {
        Container::Safetensors(folder) if (folder.reads)(config) => Some((*format, folder)),
        _ => None,
    })
}

/// The GGUF file that a path means: itself, or the only one in a folder that is no model folder.
pub fn gguf_file(path: &Path) -> Option<PathBuf> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if path.is_file() {
        return is_gguf(path).then(|| path.to_owned());
    }
    if path.join("config.json").exists() {
        return None;
    }
    let mut files = std::fs::read_dir(path).ok()?.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| is_gguf(p));
    files.next().filter(|_| files.next().is_none())
}

/// The scheme's integer lattice with scales of a type for the linears of blocks, as most formats have it.
fn in_blocks(scheme: Scheme, linear: &Linear, dtype: Dtype) -> Option<Lattice> {
    (!linear.is_outer()).then(|| scheme.lattice(dtype))
}

/// A usage error naming the linear whose d_out and d_in are no multiples of what a format needs.
fn check_divisible(spec: &ModelSpec, format: &str, [out, input]: [usize; 2]) -> Result<()> {
    let fits = |l: &&Linear| l.d_out.is_multiple_of(out) && l.d_in.is_multiple_of(input);
    match spec.blocks.iter().flat_map(|b| &b.linears).find(|l| !fits(l)) {
        Some(l) => {
            let message = format!("{format} cannot hold {}, [{}, {}]: it needs multiples of [{out}, {input}]", l.module, l.d_out, l.d_in);
            Err(Error::usage("--format", format!("{message}; compressed-tensors takes any shape")))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_have_unique_names_and_descriptions() {
        for (i, format) in FORMATS.iter().enumerate() {
            assert!(std::ptr::eq(find(format.name).unwrap(), *format) || find(format.name).unwrap().name == format.name);
            assert!(!format.about.is_empty());
            assert!(FORMATS[..i].iter().all(|f| f.name != format.name));
        }
        assert!(find("gguf2").unwrap_err().message.contains("gptq, gptq-v2"));
    }
}
