//! What a run is asked for.

use crate::engine::DeviceChoice;
use crate::export::Format;
use crate::method::Method;
use crate::quant::Scheme;
use crate::text::Corpus;
use crate::{Error, Result};
use std::path::PathBuf;
use std::str::FromStr;

/// Type of the operands of matrix products (activations and what they are multiplied with); sums are f32 in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operands {
    F32,
    /// Half the traffic; values beyond 65504 overflow and small ones lose bits, so it is asked for, never chosen silently.
    F16,
}

impl FromStr for Operands {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            _ => Err(Error::usage("--operands", format!("'{s}' is not f32 or f16"))),
        }
    }
}

impl std::fmt::Display for Operands {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        })
    }
}

/// What a user asked `quantize` for.
#[derive(Clone, Debug)]
pub struct Request {
    pub model: PathBuf,
    pub out: PathBuf,
    pub overwrite: bool,
    pub method: Method,
    pub scheme: Scheme,
    pub act_order: bool,
    /// `None`: by a split-half test.
    pub alpha: Option<f32>,
    /// At least one; each has a folder of its own inside `out` where there are several.
    pub formats: Vec<&'static Format>,
    /// The name that llama.cpp has for the pre-tokenizer; `None`: it is found out.
    pub gguf_pre: Option<String>,
    /// `None` is the built-in text.
    pub calibration: Option<PathBuf>,
    /// `None`: 128, or all windows of a token file.
    pub samples: Option<usize>,
    /// `None`: 2048, or the model's longest sequence where that is shorter.
    pub sequence_length: Option<usize>,
    pub seed: u64,
    pub device: DeviceChoice,
    /// May the CPU go on where the device is lost and does not come back?
    pub fallback_cpu: bool,
    pub operands: Operands,
    pub eval: Option<EvalRequest>,
    pub bounds: Bounds,
    /// Throw away what an unfinished run has left for the same output.
    pub restart: bool,
    /// Seconds of work after which the journal gets a record at the end of a block.
    pub journal_seconds: f64,
}

impl Request {
    /// One with nothing but defaults in what is not given.
    pub fn new(model: PathBuf, out: PathBuf, method: Method, scheme: Scheme, formats: Vec<&'static Format>) -> Self {
        Self {
            model,
            out,
            overwrite: false,
            method,
            scheme,
            act_order: true,
            alpha: None,
            formats,
            gguf_pre: None,
            calibration: None,
            samples: None,
            sequence_length: None,
            seed: 0,
            device: DeviceChoice::Auto,
            fallback_cpu: false,
            operands: Operands::F32,
            eval: None,
            bounds: Bounds::default(),
            restart: false,
            journal_seconds: JOURNAL_SECONDS,
        }
    }
}

/// What a run may take at most, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Resident memory of the process.
    pub max_ram: Option<u64>,
    /// Buffers of a GPU.
    pub max_vram: Option<u64>,
    /// What is written, and hidden states on disk.
    pub max_disk: Option<u64>,
}

/// Seconds of work that are worth a record of the journal.
pub const JOURNAL_SECONDS: f64 = 5.0;

/// A text to judge a model on.
#[derive(Clone, Debug)]
pub struct EvalRequest {
    pub text: TextSource,
    /// As `sequence_length`.
    pub window: Option<usize>,
    pub windows: Option<usize>,
}

#[derive(Clone, Debug)]
pub enum TextSource {
    File(PathBuf),
    BuiltInHeldout,
}

impl TextSource {
    pub fn open(&self) -> Result<Corpus> {
        match self {
            Self::File(path) => Corpus::open(path),
            Self::BuiltInHeldout => Ok(Corpus::built_in_heldout()),
        }
    }
}
