//! `quantization_report.json`: what was done, with what, how well, how long, and in how much memory.

use crate::calib::Streaming;
use crate::engine::Profile;
use crate::eval::Evaluation;
use crate::export::Format;
use crate::method::{self, Method, Solved};
use crate::metric::Metric;
use crate::model::{Checkpoint, Linear, ModelSpec};
use crate::plan::{Calibration, Request};
use crate::quant::{Lattice, Scheme};
use crate::round::DescentReport;
use crate::transform::FoldRecord;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The file's name inside the written folder.
pub const FILE_NAME: &str = "quantization_report.json";

#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub program: &'static str,
    pub version: &'static str,
    pub settings: Settings,
    pub model: ModelReport,
    pub device: String,
    /// Over the quantized linears, scales and zero points included.
    pub bits_per_weight: f64,
    pub perplexity: Option<PerplexityReport>,
    pub layers: Vec<LayerReport>,
    /// What the transform moved, block by block.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub folds: Vec<FoldReport>,
    pub stages: Vec<Stage>,
    /// Since the run was last taken up; stages have the time before as well.
    pub seconds: f64,
    pub memory: MemoryReport,
    pub streaming: Streaming,
    /// Per kernel: launches, flops, bytes, seconds.
    pub kernels: Profile,
}

#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    pub method: Method,
    /// None where the format has bits and groups of its own.
    pub scheme: Option<Scheme>,
    /// What was asked for; the scheme's group is smaller where this does not divide every width.
    pub asked_group_size: i64,
    pub format: &'static str,
    /// What the user calls the pre-tokenizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gguf_pre: Option<String>,
    pub act_order: bool,
    pub operands: String,
    pub calibration: Option<CalibrationReport>,
    pub seed: u64,
}

impl Settings {
    pub fn new(request: &Request, settings: &method::Settings, format: &Format, scheme: Scheme, calibration: Option<&Calibration>) -> Self {
        Self {
            method: settings.method,
            scheme: (!format.own_scheme).then_some(scheme),
            asked_group_size: request.scheme.group_size(),
            format: format.name,
            gguf_pre: request.gguf_pre.clone(),
            act_order: settings.act_order,
            operands: request.operands.to_string(),
            calibration: calibration.map(|c| CalibrationReport {
                text: c.name.clone(),
                sha256: c.sha256.clone(),
                samples: c.windows.len(),
                sequence_length: c.windows.first().map_or(0, Vec::len),
            }),
            seed: request.seed,
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct CalibrationReport {
    pub text: String,
    pub sha256: String,
    pub samples: usize,
    pub sequence_length: usize,
}

#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    pub path: String,
    pub family: &'static str,
    pub dtype: String,
    pub parameters: usize,
    /// SHA-256 of config.json and every weight file.
    pub files: Vec<FileHash>,
}

impl ModelReport {
    pub fn new(checkpoint: &Checkpoint, files: Vec<FileHash>) -> Self {
        let spec = checkpoint.spec();
        Self {
            path: checkpoint.dir().display().to_string(),
            family: spec.family,
            dtype: spec.dtype.to_string(),
            parameters: parameters(spec),
            files,
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct FileHash {
    pub file: String,
    pub sha256: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct PerplexityReport {
    pub text: String,
    pub sha256: String,
    pub before: Evaluation,
    /// Of the written folder, read anew.
    pub after: Evaluation,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerReport {
    pub module: String,
    pub role: String,
    /// None for the embedding and the head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block: Option<usize>,
    pub bits: u32,
    /// Columns per scale, −1 for one per output channel.
    pub group_size: i64,
    /// Whole zero points, minima or none, and how scales are stored.
    pub lattice: Lattice,
    /// What the error was weighed by.
    pub metric: Metric,
    /// Losses under the method's objective, summed over rows: of round-to-nearest, of the rounding's start, of the result.
    pub loss_rtn: f64,
    pub loss_start: f64,
    pub loss: f64,
    /// Rows where round-to-nearest was better and was kept.
    pub rows_from_rtn: usize,
    /// Rows that start from another column order than that of decreasing activations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows_from_orders: Option<usize>,
    pub rows: usize,
    pub columns: usize,
    /// Weights whose two nearest codes were equally good to within the accuracy of f32: engines may choose differently there.
    pub ties: usize,
    /// Of the metric's factorisation, shared by the linears that read one input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damping: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damping_raised: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_inputs: Option<usize>,
    /// Sweeps of coordinate descent, and the part of the visits that moved a code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sweeps: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acceptance: Option<f64>,
    /// Part of the codes that AdaRound changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adaround_flipped: Option<f64>,
    /// Share of the simpler estimate in the linear's head metrics (for v: in its column metrics).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shrinkage: Option<f32>,
    /// How far an asymmetric target was moved for what the inputs lack.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f32>,
    /// The same for what the residual stream lacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta: Option<f32>,
    /// For the whole linear, for its scale search, and for its rounding with all refinements.
    pub seconds: f64,
    pub scale_seconds: f64,
    pub round_seconds: f64,
}

/// What a linear was solved for.
#[derive(Clone, Copy, Debug)]
pub struct Weighing {
    pub metric: Metric,
    pub shrinkage: Option<f32>,
    pub alpha: Option<f32>,
    pub beta: Option<f32>,
}

/// One fold: factors moved from the readers of an input into what the input comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FoldReport {
    pub block: usize,
    #[serde(flatten)]
    pub fold: FoldRecord,
}

impl LayerReport {
    pub fn new(block: Option<usize>, linear: &Linear, solved: &Solved, how: &Weighing, seconds: f64) -> Self {
        let record = &solved.record;
        let factor = record.factor;
        let weights = (linear.d_out * linear.d_in) as f64;
        Self {
            module: linear.module.clone(),
            role: linear.role.to_string(),
            block,
            bits: solved.packed.lattice.bits,
            group_size: solved.packed.lattice.group.map_or(-1, |g| g as i64),
            lattice: solved.packed.lattice,
            loss_rtn: record.loss_rtn,
            loss_start: record.loss_start,
            loss: record.loss,
            rows_from_rtn: record.rows_from_rtn,
            rows_from_orders: record.rows_from_orders,
            rows: linear.d_out,
            columns: linear.d_in,
            ties: record.ties,
            damping: factor.map(|f| f.damping),
            damping_raised: factor.map(|f| f.raised),
            dead_inputs: factor.map(|f| f.dead),
            metric: how.metric,
            sweeps: record.descent.as_ref().map(DescentReport::sweeps),
            acceptance: record.descent.as_ref().map(|d| d.acceptance(weights)),
            adaround_flipped: record.adaround.as_ref().map(|a| a.flipped as f64 / weights),
            shrinkage: how.shrinkage,
            alpha: how.alpha,
            beta: how.beta,
            seconds,
            scale_seconds: record.scale_seconds,
            round_seconds: record.round_seconds,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stage {
    pub name: Cow<'static, str>,
    pub seconds: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct MemoryReport {
    /// Peak resident memory of the process; absent where the system does not tell.
    pub peak_resident_bytes: Option<u64>,
    /// Peak of the engine's buffers.
    pub peak_device_bytes: u64,
    /// What the plan promised: at most that much of the process, and of a GPU's buffers; absent where the program's allocator does not count.
    pub planned_resident_bytes: Option<u64>,
    pub planned_device_bytes: Option<u64>,
}

/// Adds up seconds per stage, in the order in which stages first came.
#[derive(Debug)]
pub struct Stopwatch {
    last: Instant,
    stages: Vec<Stage>,
}

impl Stopwatch {
    pub fn start() -> Self {
        Self { last: Instant::now(), stages: Vec::new() }
    }

    /// Books the time since the last call on `name` and returns it.
    pub fn lap(&mut self, name: &'static str) -> f64 {
        let seconds = self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
        match self.stages.iter_mut().find(|s| s.name == name) {
            Some(stage) => stage.seconds += seconds,
            None => self.stages.push(Stage { name: name.into(), seconds }),
        }
        seconds
    }

    /// Takes over what an earlier run has booked.
    pub fn add(&mut self, stages: &[Stage]) {
        for stage in stages {
            match self.stages.iter_mut().find(|s| s.name == stage.name) {
                Some(own) => own.seconds += stage.seconds,
                None => self.stages.push(stage.clone()),
            }
        }
    }

    pub fn stages(&self) -> Vec<Stage> {
        self.stages.clone()
    }
}

/// Parameters of all tensors of a model.
pub fn parameters(spec: &ModelSpec) -> usize {
    spec.tensors().iter().map(|t| t.shape.iter().product::<usize>()).sum()
}

/// SHA-256 of files, read in pieces.
pub fn hash_files(paths: &[PathBuf]) -> Result<Vec<FileHash>> {
    paths.iter().map(|p| hash_file(p)).collect()
}

fn hash_file(path: &Path) -> Result<FileHash> {
    let failed = |e| Error::input(path.display(), "cannot be read").caused_by(e);
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(failed)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(FileHash { file: name, sha256: hasher.finalize().iter().map(|b| format!("{b:02x}")).collect() })
}

/// Peak resident memory of this process in bytes.
pub fn peak_resident() -> Option<u64> {
    #[cfg(unix)]
    {
        use nix::sys::resource::{UsageWho, getrusage};
        let max = getrusage(UsageWho::RUSAGE_SELF).ok()?.max_rss();
        // Kilobytes on Linux, bytes on macOS.
        let unit = if cfg!(target_vendor = "apple") { 1 } else { 1024 };
        u64::try_from(max).ok().map(|m| m * unit)
    }
    #[cfg(not(unix))]
    None
}
