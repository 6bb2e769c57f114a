//! What can be said on the command line.

use crate::calib::TOKENS;
use crate::engine::DeviceChoice;
use crate::export::FORMATS;
use crate::method::{Damping, INPUTS, METHODS};
use crate::metric::METRICS;
use crate::plan::{JOURNAL_SECONDS, Operands};
use crate::scale::SCALE_RULES;
use crate::transform::TRANSFORMS;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Post-training quantization of large language models on any GPU (Vulkan, Metal, DX12) or on the CPU.
#[derive(Parser)]
#[command(version, propagate_version = true, after_help = "Exit codes: 0 all done; 1 failed; 2 wrong use or bad input; 130 interrupted.")]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
    /// Say more (-vv: everything); RUST_LOG overrides it
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Subcommand)]
pub enum Command {
    /// Quantize a Hugging Face model folder
    Quantize(Box<Quantize>),
    /// What `quantize` with the same arguments would take: memory, disk and work
    Plan {
        #[command(flatten)]
        quantize: Box<Quantize>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Perplexity of a plain or quantized folder
    Eval(Eval),
    /// List the adapters and what --device auto would take
    Devices {
        /// Measure the device that --device takes: check every kernel's results, then its speed; plans estimate time by what is found
        #[arg(long)]
        bench: bool,
        /// With --bench: auto, cpu, gpu, gpu:INDEX or gpu:NAME
        #[arg(long, default_value = "auto", requires = "bench")]
        device: DeviceChoice,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// What a model folder holds
    Inspect {
        model: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Check a folder or GGUF file against the rules of the runtimes that it is for
    Verify {
        /// A model folder of any format that this program writes, or a GGUF file
        path: PathBuf,
    },
}

#[derive(Args)]
pub struct Quantize {
    /// Folder with config.json, safetensors and tokenizer.json
    #[arg(value_name = "MODEL_DIR", required_unless_present = "demo", conflicts_with = "demo")]
    pub model: Option<PathBuf>,
    /// Quantize the built-in demo model with RTN, GPTQ and aespa at 3 bits and compare perplexities
    #[arg(long)]
    pub demo: bool,
    /// Folder to write; --demo: demo-out by default
    #[arg(short, long, value_name = "OUT_DIR", required_unless_present = "demo")]
    pub output: Option<PathBuf>,
    /// How to quantize
    #[arg(long, default_value = "aespa", value_parser = methods(), conflicts_with = "demo")]
    pub method: String,
    /// Bits per code, 2 to 8 [default: 4; --demo: 3]
    #[arg(long)]
    pub bits: Option<u32>,
    /// Columns per scale: 32, 64 or 128; -1 for one scale per output channel [default: 128]
    #[arg(long, allow_negative_numbers = true)]
    pub group_size: Option<i64>,
    /// Fix the zero point in the middle of the codes
    #[arg(long)]
    pub symmetric: bool,
    /// Leave the embedding and the head as they are, where the format quantizes them too (mlx)
    #[arg(long)]
    pub keep_embeddings: bool,
    /// How weights are rewritten before they are quantized, instead of the method's own way
    #[arg(long, value_parser = transforms())]
    pub transform: Option<String>,
    /// What errors are weighed by, instead of the method's own metric
    #[arg(long, value_parser = metrics())]
    pub metric: Option<String>,
    /// How much tokens count in the metric, instead of the method's own way
    #[arg(long, value_parser = tokens())]
    pub tokens: Option<String>,
    /// How scales are chosen instead of the method's own way
    #[arg(long, value_parser = scale_rules())]
    pub scale: Option<String>,
    /// How weights become codes instead of the method's own way: nearest or gptq, then any of +adaround or
    /// +adaround-blocks, and +descent
    #[arg(long, value_name = "CHAIN")]
    pub rounding: Option<String>,
    /// Column orders that error feedback tries, the best row kept; the first is by decreasing activation, the others are drawn near it
    #[arg(long, value_name = "N")]
    pub orders: Option<u32>,
    /// Sweeps of coordinate descent at most
    #[arg(long)]
    pub sweeps: Option<u32>,
    /// Temperature at which coordinate descent starts; 0 is greedy
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Keep scales fixed during coordinate descent
    #[arg(long)]
    pub no_refit: bool,
    /// Also move zero points during coordinate descent, where grids are asymmetric and rows independent
    #[arg(long, conflicts_with = "no_refit")]
    pub refit_zero: bool,
    /// Which inputs the linears are calibrated on, instead of the method's own
    #[arg(long, value_parser = inputs())]
    pub inputs: Option<String>,
    /// Strength of asymmetric targets, 0 to 1 [default: by a split-half test per input]
    #[arg(long)]
    pub alpha: Option<f32>,
    /// Keep the columns' order instead of taking those with the largest activations first
    #[arg(long)]
    pub no_act_order: bool,
    /// Added to the metric's diagonal, relative to it: a number, or auto for a split-half test [default: the method's own]
    #[arg(long)]
    pub damping: Option<Damping>,
    /// What to write: one format, or several from one calibration, each in a folder of its own inside OUT_DIR
    #[arg(long, default_value = FORMATS[0].name, value_parser = formats(), value_delimiter = ',')]
    pub format: Vec<String>,
    /// What llama.cpp calls the pre-tokenizer of the model (llama-bpe, qwen2, ...), for GGUF files of fine-tunes that are not recognised
    #[arg(long, value_name = "NAME", conflicts_with = "demo")]
    pub gguf_pre: Option<String>,
    /// Calibration text: plain UTF-8, .jsonl with a field `text`, or .safetensors with token ids `input_ids` [samples, length]
    /// [default: built-in novels]
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Calibration windows [default: 128; all of a token file]
    #[arg(long)]
    pub samples: Option<usize>,
    /// Tokens per calibration window [default: 2048, or the model's longest; a token file's own]
    #[arg(long)]
    pub sequence_length: Option<usize>,
    /// Seed of the choice of windows
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub device: Device,
    /// Perplexity on this text before and after
    #[arg(long, value_name = "FILE", conflicts_with = "demo")]
    pub eval: Option<PathBuf>,
    /// Tokens per evaluation window [default: 2048, or the model's longest]
    #[arg(long, requires = "eval", value_name = "N")]
    pub eval_window: Option<usize>,
    /// Evaluation windows [default: all whole ones]
    #[arg(long, requires = "eval", value_name = "N")]
    pub eval_windows: Option<usize>,
    /// Replace OUT_DIR if it exists
    #[arg(long)]
    pub overwrite: bool,
    /// Memory that the process may take, such as 6GiB: activations are made smaller or wait on disk to keep to it
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_ram: Option<u64>,
    /// Memory of the GPU that the run may take: hidden states stay there if it is enough (without a bound, if they are 1 GiB at most), and weights
    /// of a block that does not fit come linear by linear
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_vram: Option<u64>,
    /// Disk that the run may take, its output and hidden states
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_disk: Option<u64>,
    /// Say what the run would take and do nothing, as `aespa-gpu plan`
    #[arg(long, conflicts_with = "demo")]
    pub dry_run: bool,
    /// Let the CPU go on where the device is lost and does not come back
    #[arg(long)]
    pub fallback_cpu: bool,
    /// Throw away what an unfinished run has left for OUT_DIR; without this the same command goes on with it
    #[arg(long)]
    pub restart: bool,
    /// Seconds of work after which the end of a block is recorded, so that a killed run loses no more
    #[arg(long, value_name = "SECONDS", default_value_t = JOURNAL_SECONDS)]
    pub journal_seconds: f64,
}

/// Bytes: a number with a unit of powers of 1000 (kB, MB, GB) or 1024 (KiB, MiB, GiB), or with none.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let units = [("", 1.0), ("b", 1.0), ("kb", 1e3), ("mb", 1e6), ("gb", 1e9), ("tb", 1e12)];
    let binary = [("kib", 1024f64), ("mib", 1024f64.powi(2)), ("gib", 1024f64.powi(3)), ("tib", 1024f64.powi(4))];
    let unit = unit.trim().to_lowercase();
    let factor = units.into_iter().chain(binary).find(|(name, _)| *name == unit).map(|(_, factor)| factor);
    match (number.parse::<f64>(), factor) {
        (Ok(number), Some(factor)) if number > 0.0 => Ok((number * factor) as u64),
        _ => Err("is no size such as 500MB or 6GiB".to_owned()),
    }
}

#[derive(Args)]
pub struct Eval {
    /// Plain or quantized model folder
    pub model: PathBuf,
    /// Plain UTF-8 text, or .jsonl with a field `text`
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Tokens per window [default: 2048, or the model's longest]
    #[arg(long)]
    pub window: Option<usize>,
    /// Windows [default: all whole ones]
    #[arg(long)]
    pub windows: Option<usize>,
    /// Also report KL divergence and top-1 agreement with this model
    #[arg(long, value_name = "MODEL_DIR")]
    pub reference: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: Device,
}

#[derive(Args)]
pub struct Device {
    /// auto (a hardware GPU, else the CPU), cpu, gpu, gpu:INDEX or gpu:NAME
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Operands of matrix products: f32, or f16 where the device has it
    #[arg(long, default_value = "f32")]
    pub operands: Operands,
}

fn methods() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(METHODS.iter().map(|m| PossibleValue::new(m.name).help(m.about)))
}

fn formats() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(FORMATS.iter().map(|f| PossibleValue::new(f.name).help(f.about)))
}

fn transforms() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(TRANSFORMS.iter().map(|(name, _, about)| PossibleValue::new(*name).help(*about)))
}

fn metrics() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(METRICS.iter().map(|(name, _, about)| PossibleValue::new(*name).help(*about)))
}

fn tokens() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(TOKENS.iter().map(|(name, _, about)| PossibleValue::new(*name).help(*about)))
}

fn inputs() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(INPUTS.iter().map(|(name, _, about)| PossibleValue::new(*name).help(*about)))
}

fn scale_rules() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(SCALE_RULES.iter().map(|(name, _, about)| PossibleValue::new(*name).help(*about)))
}
