//! What a rounding costs and what it leaves: loss against seconds, on the real layers of a model.
//!
//! usage: cargo bench --bench rounding -- [MODEL_DIR TEXT_FILE [BLOCKS [SAMPLES [LENGTH [BITS [CHAINS]]]]]]
//!   MODEL_DIR  a model folder, or `demo` (default)          TEXT_FILE  a text, or `built-in` (default)
//!   BLOCKS     `all`, or numbers such as 0,7 (default: three spread over the model)
//!   SAMPLES, LENGTH  calibration windows and their tokens (default: 32 of 512)      BITS  such as 2,3 (default: 2,3,4)
//!   CHAINS     `all` (default), or `main`: nearest, GPTQ, AdaRound as published and the default descent, an hour less on all of SmolLM2
//!
//! Every linear of the blocks is rounded per channel, asymmetric, with scales in the model's own type, by all of [`CHAINS`], on the native
//! engine and in one run. They share the statistics (of the float model: H, H per head for v, G for q and k), the grid (searched under
//! the metric), the objective tr(G E H Eᵀ) with H damped, and where a chain starts from another one that one's result, which is computed
//! once and whose seconds count in both. What all need alike, statistics, factorisations and the scale search, is timed apart, and so are
//! the factorisations of GPTQ's further column orders.
//!
//! Losses are of codes and stored scales, computed anew. The sum over linears weighs them as the objective does; the mean is the geometric
//! one of each linear's ratio to GPTQ, in which all count alike. Seconds depend on the machine and on who else uses it: ratios count.
//! Those in matrix products are shown too: what a chain would take at least if its other kernels were free.
//!
//! Writes benches/results/rounding-MODEL.json and .svg; a run that is interrupted writes nothing.

mod chains;
mod measure;
mod picture;
mod report;
mod work;

use aespa_gpu::engine::Engine;
use aespa_gpu::model::{Checkpoint, unpack_demo};
use aespa_gpu::quant::Scheme;
use aespa_gpu::text::{Corpus, Tokenizer};
use aespa_gpu::{Error, Result, interrupt};
use chains::{CHAINS, DESCENT, GPTQ, NEAREST, PUBLISHED};
use measure::{Bench, DAMPING, Measured};
use picture::picture;
use report::{Summary, rounded};
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

struct Options {
    /// `None` is the demo model.
    model: Option<PathBuf>,
    /// `None` is the built-in text.
    text: Option<PathBuf>,
    /// `None` is all.
    blocks: Option<Vec<usize>>,
    spread: bool,
    samples: usize,
    length: usize,
    bits: Vec<u32>,
    /// Of the chains those that are run.
    chosen: Vec<bool>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self> {
        let path = |i: usize, built_in: &str| arguments.get(i).filter(|a| *a != built_in).map(PathBuf::from);
        let number = |i: usize, name: &str, default: usize| match arguments.get(i) {
            Some(a) => a.parse().map_err(|_| Error::usage(name, format!("'{a}' is not a number"))),
            None => Ok(default),
        };
        let blocks = arguments.get(2);
        let main = match arguments.get(6).map(String::as_str) {
            None | Some("all") => false,
            Some("main") => true,
            Some(other) => return Err(Error::usage("CHAINS", format!("'{other}' is neither all nor main"))),
        };
        Ok(Self {
            chosen: (0..CHAINS.len()).map(|i| !main || [NEAREST, GPTQ, PUBLISHED, DESCENT].contains(&i)).collect(),
            model: path(0, "demo"),
            text: path(1, "built-in"),
            blocks: blocks.filter(|a| *a != "all").map(|a| list("BLOCKS", a)).transpose()?,
            spread: blocks.is_none(),
            samples: number(3, "SAMPLES", 32)?,
            length: number(4, "LENGTH", 512)?,
            bits: arguments.get(5).map_or_else(|| Ok(vec![2, 3, 4]), |a| list("BITS", a))?,
        })
    }
}

fn list<T: std::str::FromStr>(name: &str, values: &str) -> Result<Vec<T>> {
    let parse = |v: &str| v.parse().map_err(|_| Error::usage(name, format!("'{v}' in '{values}' is not a number")));
    values.split(',').map(parse).collect()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    match interrupt::install().and_then(|()| run(&Options::parse(&arguments)?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let dir = tempfile::tempdir().map_err(|e| Error::output("temporary folder", "cannot be made").caused_by(e))?;
    let model = match &options.model {
        Some(path) => path.clone(),
        None => {
            unpack_demo(&dir.path().join("demo"))?;
            dir.path().join("demo")
        }
    };
    let name = model.canonicalize().ok().and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()));
    let name = name.unwrap_or_else(|| "model".to_owned());
    let checkpoint = Checkpoint::open(&model)?;
    let corpus = options.text.as_deref().map_or_else(|| Ok(Corpus::built_in()), Corpus::open)?;
    let n_vocab = checkpoint.spec().n_vocab;
    let windows = corpus.sample(&Tokenizer::open(&model)?, n_vocab, options.samples, options.length, 0)?;

    let n = checkpoint.spec().blocks.len();
    let blocks = match &options.blocks {
        Some(blocks) => blocks.clone(),
        None if options.spread => vec![n / 6, n / 2, 5 * n / 6],
        None => (0..n).collect(),
    };
    if let Some(block) = blocks.iter().find(|b| **b >= n) {
        return Err(Error::usage("BLOCKS", format!("{block} is not one of the {n} blocks of this model (0 to {})", n.saturating_sub(1))));
    }
    for bits in &options.bits {
        Scheme::new(*bits, -1, false)?;
    }

    let mut bench = Bench::new(options.bits.clone(), options.chosen.clone(), checkpoint.spec().dtype);
    bench.model(&checkpoint, &windows, &blocks)?;
    let live = bench.engine.profile().live_buffers();
    if live > 0 {
        return Err(Error::internal("buffers", format!("{live} were not given back")));
    }

    let all = (0..n).all(|b| blocks.contains(&b));
    let summaries: Vec<Summary> = options.bits.iter().map(|bits| Summary::of(*bits, &bench.linears)).collect();
    summaries.iter().for_each(Summary::print);
    let Bench { statistics_seconds, factor_seconds, order_seconds, .. } = &bench;
    println!("apart: statistics {statistics_seconds:.1} s, factorisations {factor_seconds:.1} s, of further orders {order_seconds:.1} s");
    println!("\nsum of tr(G E H Eᵀ) over {}:", if all { "all layers".to_owned() } else { format!("blocks {blocks:?}") });
    summaries.iter().for_each(Summary::compare);

    let text = options.text.as_deref().and_then(Path::file_name).map_or_else(|| corpus.name.clone(), |n| n.to_string_lossy().into_owned());
    let report = json!({
        "program": env!("CARGO_PKG_NAME"),
        "version": env!("CARGO_PKG_VERSION"),
        "engine": bench.engine.describe(),
        "model": name,
        "blocks": blocks,
        "all_blocks": all,
        "text": { "name": text, "sha256": corpus.sha256, "samples": options.samples, "length": options.length },
        "damping": DAMPING,
        "statistics_seconds": rounded(bench.statistics_seconds),
        "factor_seconds": rounded(bench.factor_seconds),
        "order_factor_seconds": rounded(bench.order_seconds),
        "chains": CHAINS.iter().map(|c| json!({ "name": c.name, "label": c.label, "last_step": c.step.settings() })).collect::<Vec<_>>(),
        "bits": summaries.iter().map(Summary::json).collect::<Vec<_>>(),
        "linears": bench.linears.iter().map(Measured::json).collect::<Vec<_>>(),
    });
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches").join("results");
    save(&results.join(format!("rounding-{name}.json")), &format!("{report}\n"))?;
    let scope = if all {
        "all blocks".to_owned()
    } else {
        format!("blocks {}", blocks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
    };
    save(&results.join(format!("rounding-{name}.svg")), &picture(&format!("{name}, {scope}, per channel"), &summaries)?)
}

/// Writes a file in one step.
fn save(path: &Path, content: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        #[cfg(unix)]
        file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        file.write_all(content.as_bytes())?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|e| Error::output(path.display(), "cannot be written").caused_by(e))?;
    println!("wrote {}", path.display());
    Ok(())
}
