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

use aespa_gpu::calib::{AttentionStats, DeviceBlock, Forward, Gram, HiddenStates, HostBlock, RopeAverage};
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::{Engine, Mat, Recording, submit};
use aespa_gpu::metric::{AttentionHalf, AttentionMetric, ColumnMetric, Heads, Objective, RowMetric};
use aespa_gpu::model::{Block, Checkpoint, Input, Linear, Role, Weights, unpack_demo};
use aespa_gpu::quant::{Grid, GridShape, Scheme, subtract};
use aespa_gpu::round::factor::{factor, factor_in};
use aespa_gpu::round::gptq::{DeviceFactor, RoundedGptq, RowFactor};
use aespa_gpu::round::{AdaRound, Descent, Problem, Rounded, adaround, descend, orders};
use aespa_gpu::scale::{self, ScaleRule};
use aespa_gpu::tensor::Dtype;
use aespa_gpu::text::{Corpus, Tokenizer};
use aespa_gpu::{Error, Result, interrupt};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// One way to round: a last step, and the chain whose result it works on.
struct Chain {
    name: &'static str,
    /// In the picture.
    label: &'static str,
    from: Option<usize>,
    step: Step,
}

#[derive(Clone, Copy)]
enum Step {
    Nearest,
    Gptq,
    /// The best rows of this many column orders.
    Orders(usize),
    AdaRound(AdaRound),
    Descent(Descent),
}

const NEAREST: usize = 0;
const GPTQ: usize = 1;
/// AdaRound as published, which the others are compared with.
const PUBLISHED: usize = 3;
const NORMALISED: usize = 4;
/// The default of this program.
const DESCENT: usize = 7;
const BEST_ORDERS: usize = 9;
const BLOCKS: usize = 11;
/// Column orders of those chains that try several.
const ORDERS: usize = 8;

const fn refined(name: &'static str, label: &'static str, step: Step) -> Chain {
    Chain { name, label, from: Some(GPTQ), step }
}

const CHAINS: &[Chain] = &[
    Chain { name: "nearest", label: "nearest", from: None, step: Step::Nearest },
    Chain { name: "gptq", label: "GPTQ", from: None, step: Step::Gptq },
    refined("gptq+adaround, published, 200", "A 200", Step::AdaRound(AdaRound { iterations: 200, ..AdaRound::PUBLISHED })),
    refined("gptq+adaround, published, 2000", "A 2000", Step::AdaRound(AdaRound::PUBLISHED)),
    refined("gptq+adaround, normalised, 200", "N 200", Step::AdaRound(AdaRound { iterations: 200, ..AdaRound::NORMALISED })),
    refined("gptq+descent, greedy", "greedy", Step::Descent(Descent { temperature: 0.0, ..Descent::DEFAULT })),
    refined("gptq+descent, scales fixed", "D fixed", Step::Descent(Descent { refit: false, ..Descent::DEFAULT })),
    refined("gptq+descent", "D", Step::Descent(Descent::DEFAULT)),
    Chain {
        name: "gptq+adaround, normalised, 200+descent",
        label: "N 200 + D",
        from: Some(NORMALISED),
        step: Step::Descent(Descent::DEFAULT),
    },
    Chain { name: "gptq, 8 orders", label: "GPTQ x 8", from: None, step: Step::Orders(ORDERS) },
    Chain { name: "gptq, 8 orders+descent", label: "x 8 + D", from: Some(BEST_ORDERS), step: Step::Descent(Descent::DEFAULT) },
    refined("gptq+adaround-blocks", "B", Step::AdaRound(AdaRound::BLOCKS)),
    Chain { name: "gptq+adaround-blocks+descent", label: "B + D", from: Some(BLOCKS), step: Step::Descent(Descent::DEFAULT) },
];

/// Of the unit diagonal, as `quantize` has it where nothing else is said.
const DAMPING: f64 = 0.01;
const ROLES: &[Role] = &[Role::Q, Role::K, Role::V, Role::O, Role::Gate, Role::Up, Role::Down];

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
    let json = serde_json::to_string_pretty(&report).map_err(|e| Error::internal("results", "cannot be JSON").caused_by(e))? + "\n";
    save(&results.join(format!("rounding-{name}.json")), &json)?;
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

/// Six digits: what a file is read for, and what f32 losses have.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

impl Step {
    fn settings(self) -> Value {
        match self {
            Step::Nearest => json!("nearest"),
            Step::Gptq => json!("gptq"),
            Step::Orders(orders) => json!({ "gptq": { "orders": orders } }),
            Step::AdaRound(options) => json!({ "adaround": options }),
            Step::Descent(options) => json!({ "descent": options }),
        }
    }
}

/// One linear at one width: what each chain left and took.
struct Measured {
    block: usize,
    role: Role,
    bits: u32,
    weights: usize,
    scale_seconds: f64,
    loss: Vec<f64>,
    seconds: Vec<f64>,
    /// Of these in matrix products.
    products: Vec<f64>,
}

impl Measured {
    fn new(block: usize, linear: &Linear, bits: u32) -> Self {
        let zeros = vec![0.0; CHAINS.len()];
        let weights = linear.d_out * linear.d_in;
        Self { block, role: linear.role, bits, weights, scale_seconds: 0.0, loss: zeros.clone(), seconds: zeros.clone(), products: zeros }
    }

    fn json(&self) -> Value {
        let all = |values: &[f64]| values.iter().copied().map(rounded).collect::<Vec<_>>();
        json!({
            "block": self.block, "role": self.role, "bits": self.bits, "weights": self.weights,
            "scale_seconds": rounded(self.scale_seconds), "loss": all(&self.loss), "seconds": all(&self.seconds),
            "product_seconds": all(&self.products),
        })
    }
}

/// The column metric of an input, or of one head's, on the device.
struct Columns {
    metric: ColumnMetric,
    /// One for each order; the first is by decreasing activations.
    factors: Vec<DeviceFactor>,
}

impl Columns {
    fn free(self, engine: &mut dyn Engine) -> Result<()> {
        submit(engine, |rec| {
            self.metric.free(rec);
            self.factors.into_iter().for_each(|factor| factor.free(rec));
        })
    }
}

/// Rows of a linear under one column metric, and the G of their heads.
struct Rows<'a> {
    w: &'a [f32],
    first: usize,
    cols: usize,
    columns: &'a Columns,
    heads: Option<(usize, &'a [f32])>,
}

struct Bench {
    engine: CpuEngine,
    bits: Vec<u32>,
    chosen: Vec<bool>,
    scale_dtype: Dtype,
    linears: Vec<Measured>,
    statistics_seconds: f64,
    factor_seconds: f64,
    /// Of the further column orders.
    order_seconds: f64,
}

impl Bench {
    fn new(bits: Vec<u32>, chosen: Vec<bool>, scale_dtype: Dtype) -> Self {
        let linears = Vec::new();
        let engine = CpuEngine::new();
        Self { engine, bits, chosen, scale_dtype, linears, statistics_seconds: 0.0, factor_seconds: 0.0, order_seconds: 0.0 }
    }

    /// Walks the float model up to the last of `blocks` and measures those.
    fn model(&mut self, checkpoint: &Checkpoint, windows: &[Vec<u32>], blocks: &[usize]) -> Result<()> {
        let (spec, limits) = (checkpoint.spec(), self.engine.limits());
        let last = blocks.iter().copied().max().unwrap_or(0);
        let mut hidden = HiddenStates::embed(&mut self.engine, checkpoint, windows)?;
        let forward = submit(&mut self.engine, |rec| Forward::<f32>::new(rec, spec, windows[0].len(), limits))?;
        for block in &spec.blocks[..=last] {
            interrupt::check()?;
            let host = HostBlock::read(checkpoint, block)?;
            let device = submit(&mut self.engine, |rec| host.upload(rec, limits))?;
            if blocks.contains(&block.index) {
                self.block(checkpoint, block, &hidden, &forward, &device)?;
            }
            if block.index < last {
                hidden.advance(&mut self.engine, &forward, &device)?;
            }
            submit(&mut self.engine, |rec| device.free(rec))?;
        }
        submit(&mut self.engine, |rec| forward.free(rec))
    }

    fn block(
        &mut self,
        checkpoint: &Checkpoint,
        block: &Block,
        hidden: &HiddenStates,
        forward: &Forward<'_, f32>,
        device: &DeviceBlock,
    ) -> Result<()> {
        let start = Instant::now();
        let grams = hidden.collect(&mut self.engine, forward, block, device, None)?;
        let input = grams.iter().find(|(input, _)| *input == Input::AttnNorm).map(|(_, gram)| gram.clone());
        let input = input.ok_or_else(|| Error::internal(format!("block {}", block.index), "has no statistic of its attention's input"))?;
        let attention = attention(&mut self.engine, hidden, forward, device, input)?;
        self.statistics_seconds += start.elapsed().as_secs_f64();
        for (input, gram) in &grams {
            let shared = self.columns(gram)?;
            for linear in block.readers(*input) {
                self.linear(checkpoint, block, linear, &shared, attention.heads(linear.role))?;
            }
            shared.free(&mut self.engine)?;
        }
        Ok(())
    }

    fn columns(&mut self, gram: &Gram) -> Result<Columns> {
        let start = Instant::now();
        let host = factor(&gram.h, gram.d, true, DAMPING)?;
        let limits = self.engine.limits();
        let mut columns = submit(&mut self.engine, |rec| Columns {
            metric: ColumnMetric::layer(rec, gram, DAMPING as f32, limits),
            factors: vec![DeviceFactor::upload(rec, &host)],
        })?;
        self.factor_seconds += start.elapsed().as_secs_f64();
        let start = Instant::now();
        let orders = if self.chosen[BEST_ORDERS] { ORDERS } else { 1 };
        for index in 1..orders {
            let host = factor_in(orders::drawn(&gram.h, gram.d, 0, index as u32), &gram.h, gram.d, DAMPING)?;
            columns.factors.push(submit(&mut self.engine, |rec| DeviceFactor::upload(rec, &host))?);
        }
        self.order_seconds += start.elapsed().as_secs_f64();
        Ok(columns)
    }

    fn linear(&mut self, checkpoint: &Checkpoint, block: &Block, linear: &Linear, shared: &Columns, heads: Heads<'_>) -> Result<()> {
        let mut measured: Vec<Measured> = self.bits.iter().map(|bits| Measured::new(block.index, linear, *bits)).collect();
        let w = checkpoint.linear(linear)?.to_f32();
        let cols = linear.d_in;
        match heads {
            Heads::None => self.rows(&Rows { w: &w, first: 0, cols, columns: shared, heads: None }, &mut measured)?,
            Heads::Rows { d_head, g } => {
                self.rows(&Rows { w: &w, first: 0, cols, columns: shared, heads: Some((d_head, g)) }, &mut measured)?;
            }
            Heads::Columns { d_head, h, g } => {
                for (head, (gram, w)) in h.iter().zip(w.chunks(d_head * cols)).enumerate() {
                    let columns = self.columns(gram)?;
                    let heads = g.map(|g| (d_head, &g[head * d_head * d_head..][..d_head * d_head]));
                    self.rows(&Rows { w, first: head * d_head, cols, columns: &columns, heads }, &mut measured)?;
                    columns.free(&mut self.engine)?;
                }
            }
        }
        for m in &measured {
            let [published, descent] = [PUBLISHED, DESCENT].map(|i| m.loss[i] / m.loss[GPTQ]);
            let seconds = m.seconds.iter().filter(|s| s.is_finite()).sum::<f64>();
            eprintln!(
                "block {} {:<4} {} bits: AdaRound 2000 {published:.4}, descent {descent:.4} ({seconds:.1} s)",
                m.block,
                m.role.to_string(),
                m.bits
            );
        }
        self.linears.extend(measured);
        Ok(())
    }

    /// Rounds some rows at every width by every chain; adds up in `measured`.
    fn rows(&mut self, rows: &Rows<'_>, measured: &mut [Measured]) -> Result<()> {
        let (n_rows, cols) = (rows.w.len() / rows.cols, rows.cols);
        let start = Instant::now();
        let v = rows.heads.map(|(d_head, g)| RowFactor::host(g, d_head, DAMPING).map(|v| (d_head, v))).transpose()?;
        self.factor_seconds += start.elapsed().as_secs_f64();
        let mut rec = Recording::new();
        let target = Mat::upload(&mut rec, "target", n_rows, cols, rows.w);
        let row_metric = rows.heads.map(|(d_head, g)| RowMetric::upload(&mut rec, d_head, g));
        let row_factor = v.as_ref().map(|(d_head, v)| RowFactor::upload(&mut rec, *d_head, v));
        self.engine.run(rec)?;
        for m in measured {
            let scheme = Scheme::new(m.bits, -1, false)?;
            let shape = GridShape { scheme, scale_dtype: self.scale_dtype, rows: n_rows, cols };
            let objective = Objective { columns: &rows.columns.metric, rows: row_metric.as_ref() };
            let problem = Problem { shape, target, objective };
            let start = Instant::now();
            let grid = scale::search(&mut self.engine, ScaleRule::Metric, &shape, target, objective.columns)?;
            m.scale_seconds += start.elapsed().as_secs_f64();
            let mut work = Work { engine: &mut self.engine, problem, grid, factors: &rows.columns.factors, row_factor, first: rows.first };
            work.chains(&self.chosen, m)?;
            submit(&mut self.engine, |rec| grid.free(rec))?;
        }
        submit(&mut self.engine, |rec| {
            target.free(rec);
            if let Some(metric) = row_metric {
                metric.free(rec);
            }
            if let Some(factor) = row_factor {
                factor.free(rec);
            }
        })
    }
}

/// The metrics of a float block's heads, as published: `--metric attention`.
fn attention(
    engine: &mut dyn Engine,
    hidden: &HiddenStates,
    forward: &Forward<'_, f32>,
    device: &DeviceBlock,
    input: Gram,
) -> Result<AttentionMetric> {
    let (spec, limits) = (forward.spec(), engine.limits());
    let mut stats = submit(engine, |rec| AttentionStats::new(rec, spec, 1, limits))?;
    hidden.observe(engine, forward, device, 0..hidden.batches(), &mut stats, Input::Context)?;
    let mut rec = Recording::new();
    let pending = stats.download(&mut rec);
    let moments = pending.take(&mut engine.run(rec)?)?;
    let rope = RopeAverage::new(&spec.rope, spec.d_head, hidden.batch(0).seq_len);
    Ok(AttentionMetric::published(&[AttentionHalf { rows: moments.row_metric(Some(&rope)), moments, input }]))
}

/// One rounding problem.
struct Work<'a> {
    engine: &'a mut CpuEngine,
    problem: Problem<'a>,
    grid: Grid,
    factors: &'a [DeviceFactor],
    row_factor: Option<RowFactor>,
    first: usize,
}

impl Work<'_> {
    /// Chains that are not chosen have no numbers (NaN); one that another starts from is chosen with it.
    fn chains(&mut self, chosen: &[bool], measured: &mut Measured) -> Result<()> {
        let mut states: Vec<Option<Rounded>> = Vec::new();
        // Of each chain: all seconds, those in products.
        let mut seconds: Vec<[f64; 2]> = Vec::new();
        // What GPTQ made of each weight at the moment of its rounding: AdaRound starts there.
        let mut compensated = None;
        for (chain, chosen) in CHAINS.iter().zip(chosen) {
            interrupt::check()?;
            if !chosen {
                states.push(None);
                seconds.push([f64::NAN; 2]);
                continue;
            }
            let given = match chain.from.map(|from| states[from]) {
                Some(Some(from)) => self.copied(from.grid, Some(from.codes))?,
                Some(None) => return Err(Error::internal(chain.name, "starts from a chain that was not run")),
                None => self.copied(self.grid, None)?,
            };
            let (start, products) = (Instant::now(), self.products());
            let state = self.step(chain.step, given, &mut compensated)?;
            let own = [start.elapsed().as_secs_f64(), self.products() - products];
            let before = chain.from.map_or([0.0; 2], |from| seconds[from]);
            seconds.push([own[0] + before[0], own[1] + before[1]]);
            states.push(Some(state));
        }
        for (i, state) in states.iter().enumerate() {
            measured.loss[i] += state.as_ref().map_or(Ok(f64::NAN), |state| self.loss(state))?;
            measured.seconds[i] += seconds[i][0];
            measured.products[i] += seconds[i][1];
        }
        submit(self.engine, |rec| {
            states.into_iter().flatten().for_each(|state| state.free(rec));
            if let Some(compensated) = compensated {
                compensated.free(rec);
            }
        })
    }

    /// Seconds in matrix products so far.
    fn products(&self) -> f64 {
        let kernels = &self.engine.profile().kernels;
        ["matmul_nn", "matmul_nt"].iter().filter_map(|name| kernels.get(name)).map(|k| k.seconds).sum()
    }

    fn step(&mut self, step: Step, (grid, codes): (Grid, Option<Mat<u32>>), compensated: &mut Option<Mat<f32>>) -> Result<Rounded> {
        let Problem { shape, target, objective } = self.problem;
        let given = || codes.map(|codes| Rounded { codes, grid }).ok_or_else(|| Error::internal("chain", "has nothing to start from"));
        match step {
            Step::Nearest => {
                let codes = submit(self.engine, |rec| {
                    let (codes, w_hat) = grid.nearest(rec, &shape, target);
                    w_hat.free(rec);
                    codes
                })?;
                Ok(Rounded { codes, grid })
            }
            Step::Gptq => {
                let rounded = self.orders(grid, 1)?;
                *compensated = Some(rounded.compensated);
                Ok(Rounded { codes: rounded.codes, grid })
            }
            Step::Orders(n) => {
                let rounded = self.orders(grid, n)?;
                Ok(Rounded { codes: submit(self.engine, |rec| rounded.into_codes(rec))?, grid })
            }
            Step::AdaRound(options) => {
                // The published objective has another factor 2 in its row metric.
                let coupled = if objective.rows.is_some() { 2.0 } else { 1.0 };
                let options = AdaRound { quadratic_weight: coupled * options.quadratic_weight, ..options };
                let mut state = given()?;
                adaround(self.engine, &self.problem, &mut state, *compensated, &options)?;
                Ok(state)
            }
            Step::Descent(options) => {
                let options = Descent { row0: self.first as u32, ..options };
                let mut state = given()?;
                descend(self.engine, &self.problem, &mut state, &options)?;
                Ok(state)
            }
        }
    }

    fn orders(&mut self, grid: Grid, n: usize) -> Result<RoundedGptq> {
        let best = orders::round(self.engine, &self.problem, grid, &self.factors[..n], self.row_factor.as_ref())?;
        Ok(best.rounded)
    }

    /// What a step may change.
    fn copied(&mut self, grid: Grid, codes: Option<Mat<u32>>) -> Result<(Grid, Option<Mat<u32>>)> {
        submit(self.engine, |rec| {
            let fresh = Grid { scale: rec.alloc("scale", grid.scale.len()), zero: rec.alloc("zero", grid.zero.len()) };
            rec.copy(grid.scale, fresh.scale);
            rec.copy(grid.zero, fresh.zero);
            let codes = codes.map(|from| {
                let to = Mat::alloc(rec, "codes", from.rows, from.cols);
                rec.copy(from.buffer, to.buffer);
                to
            });
            (fresh, codes)
        })
    }

    fn loss(&mut self, state: &Rounded) -> Result<f64> {
        let Problem { shape, target, objective } = self.problem;
        let mut rec = Recording::new();
        let w_hat = state.grid.dequantize(&mut rec, &shape, state.codes);
        let error = subtract(&mut rec, w_hat, target);
        let losses = objective.losses(&mut rec, error);
        error.free(&mut rec);
        let pending = rec.download(losses);
        rec.free(losses);
        let loss: f64 = self.engine.run(rec)?.take(pending)?.into_iter().map(f64::from).sum();
        if loss.is_finite() { Ok(loss) } else { Err(Error::numeric("loss", "is not finite")) }
    }
}

/// All linears at one width. Seconds are sums, those of products included in the others.
struct Summary {
    bits: u32,
    linears: usize,
    scale_seconds: f64,
    loss: Vec<f64>,
    seconds: Vec<f64>,
    products: Vec<f64>,
    /// Geometric mean of each linear's loss over GPTQ's.
    mean: Vec<f64>,
    /// Sums of losses by role.
    roles: BTreeMap<String, Vec<f64>>,
    /// Linears in which descent ends below AdaRound as published.
    lower: usize,
}

impl Summary {
    fn of(bits: u32, linears: &[Measured]) -> Self {
        let own: Vec<&Measured> = linears.iter().filter(|m| m.bits == bits).collect();
        let each = |value: &dyn Fn(usize) -> f64| (0..CHAINS.len()).map(value).collect::<Vec<f64>>();
        let loss = |of: &[&Measured]| each(&|i| of.iter().map(|m| m.loss[i]).sum());
        let mean = |i: usize| {
            let logs: Vec<f64> = own.iter().filter(|m| m.loss[GPTQ] > 0.0).map(|m| (m.loss[i] / m.loss[GPTQ]).ln()).collect();
            (logs.iter().sum::<f64>() / logs.len().max(1) as f64).exp()
        };
        let role = |role: &Role| (role.to_string(), loss(&own.iter().copied().filter(|m| m.role == *role).collect::<Vec<_>>()));
        Self {
            bits,
            linears: own.len(),
            scale_seconds: own.iter().map(|m| m.scale_seconds).sum(),
            loss: loss(&own),
            seconds: each(&|i| own.iter().map(|m| m.seconds[i]).sum()),
            products: each(&|i| own.iter().map(|m| m.products[i]).sum()),
            mean: each(&mean),
            roles: ROLES.iter().map(role).collect(),
            lower: own.iter().filter(|m| m.loss[DESCENT] < m.loss[PUBLISHED]).count(),
        }
    }

    fn relative(&self, chain: usize) -> f64 {
        self.loss[chain] / self.loss[GPTQ]
    }

    fn print(&self) {
        println!("\n{} bits, {} linears; scale search {:.2} s", self.bits, self.linears, self.scale_seconds);
        println!("{:<40} {:>9} {:>9} {:>9} {:>9} {:>10}", "rounding", "sum/GPTQ", "mean/GPTQ", "seconds", "products", "of A 2000");
        for (i, chain) in CHAINS.iter().enumerate().filter(|(i, _)| self.loss[*i].is_finite()) {
            let (seconds, products, part) = (self.seconds[i], self.products[i], self.seconds[i] / self.seconds[PUBLISHED]);
            println!("{:<40} {:>9.4} {:>9.4} {seconds:>9.3} {products:>9.3} {part:>10.5}", chain.name, self.relative(i), self.mean[i]);
        }
    }

    /// The default against AdaRound as published.
    fn compare(&self) {
        let [[l2, s2], [l1, s1]] = [PUBLISHED, DESCENT].map(|i| [self.loss[i], self.seconds[i]]);
        let refining = |i: usize| self.seconds[i] - self.seconds[GPTQ];
        let (percent, word) = (100.0 * (l1 / l2 - 1.0).abs(), if l1 < l2 { "lower" } else { "HIGHER" });
        println!(
            "  {} bits: AdaRound, published, 2000 iterations: {l2:.6e} in {s2:.2} s, {:.2} s of them in products",
            self.bits, self.products[PUBLISHED]
        );
        println!("          descent: {l1:.6e} in {s1:.2} s: {percent:.2} % {word} in 1/{:.1} of the time", s2 / s1);
        println!(
            "          (1/{:.1} without their common start; lower in {} of {} linears)",
            refining(PUBLISHED) / refining(DESCENT),
            self.lower,
            self.linears
        );
    }

    fn json(&self) -> Value {
        let chain = |(i, chain): (usize, &Chain)| {
            let roles: BTreeMap<&str, Value> = self
                .roles
                .iter()
                .map(|(role, loss)| (role.as_str(), json!({ "loss": rounded(loss[i]), "over_gptq": rounded(loss[i] / loss[GPTQ]) })))
                .collect();
            json!({
                "chain": chain.name,
                "loss": rounded(self.loss[i]),
                "loss_over_gptq": rounded(self.relative(i)),
                "mean_over_gptq": rounded(self.mean[i]),
                "seconds": rounded(self.seconds[i]),
                "product_seconds": rounded(self.products[i]),
                "seconds_over_adaround_2000": rounded(self.seconds[i] / self.seconds[PUBLISHED]),
                "roles": roles,
            })
        };
        json!({
            "bits": self.bits,
            "linears": self.linears,
            "descent_below_adaround_2000": self.lower,
            "scale_seconds": rounded(self.scale_seconds),
            "chains": CHAINS.iter().enumerate().map(chain).collect::<Vec<_>>(),
        })
    }
}

/// Loss over GPTQ's against seconds, a series per width; lines join what nothing faster beats. Nearest rounding is far above the rest
/// and left out.
fn picture(title: &str, summaries: &[Summary]) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, title, summaries).map_err(|e| Error::internal("picture", e))?;
    Ok(svg)
}

/// What the labels mean.
const KEY: &str = "A: AdaRound, published; N: normalised; with their iterations; B: in blocks. x 8: column orders. D: descent (greedy: no annealing; fixed: scales stay).";

fn draw(svg: &mut String, title: &str, summaries: &[Summary]) -> std::result::Result<(), String> {
    use plotters::prelude::*;
    const COLOURS: [RGBColor; 4] = [RGBColor(193, 39, 45), RGBColor(0, 99, 178), RGBColor(20, 130, 60), RGBColor(110, 60, 150)];
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let drawn: Vec<usize> = (GPTQ..CHAINS.len()).filter(|i| summaries.iter().all(|s| s.loss[*i].is_finite())).collect();
    let points: Vec<Vec<(f64, f64)>> =
        summaries.iter().map(|s| drawn.iter().map(|i| (s.seconds[*i].max(1e-6), s.relative(*i))).collect()).collect();
    let bounds = |of: fn(&(f64, f64)) -> f64| {
        let values = || points.iter().flatten().map(of);
        (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max))
    };
    let ((x0, x1), (y0, y1)) = (bounds(|p| p.0), bounds(|p| p.1));
    let root = SVGBackend::with_string(svg, (900, 600)).into_drawing_area();
    root.fill(&WHITE).map_err(|e| text(&e))?;
    root.draw(&Text::new(KEY, (76, 40), ("sans-serif", 12))).map_err(|e| text(&e))?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .margin_top(8)
        .x_label_area_size(42)
        .y_label_area_size(56)
        .build_cartesian_2d((x0 / 1.5..x1 * 2.5).log_scale(), y0 - 0.02..y1 + 0.05)
        .map_err(|e| text(&e))?;
    chart
        .configure_mesh()
        .x_desc("seconds of rounding, all linears")
        .y_desc("loss over GPTQ's")
        .x_label_formatter(&|x| format!("{x}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .draw()
        .map_err(|e| text(&e))?;
    for ((summary, points), colour) in summaries.iter().zip(&points).zip(COLOURS.iter().cycle()) {
        let mut front: Vec<(f64, f64)> = points.iter().copied().filter(|p| points.iter().all(|o| o.0 >= p.0 || o.1 > p.1)).collect();
        front.sort_by(|a, b| a.0.total_cmp(&b.0));
        chart.draw_series(LineSeries::new(front, colour.mix(0.5).stroke_width(2))).map_err(|e| text(&e))?;
        let marks = PointSeries::of_element(points.iter().copied(), 4, colour.filled(), &|at, size, style| Circle::new(at, size, style));
        let legend = move |(x, y)| Circle::new((x + 8, y), 4, colour.filled());
        chart.draw_series(marks).map_err(|e| text(&e))?.label(format!("{} bits", summary.bits)).legend(legend);
        // The default stands below its point: other descents are near.
        let label = |(i, at): (usize, &(f64, f64))| {
            let offset = if drawn[i] == DESCENT { (-3, 6) } else { (6, -12) };
            EmptyElement::at(*at) + Text::new(CHAINS[drawn[i]].label, offset, ("sans-serif", 12).into_font().color(colour))
        };
        // GPTQ's losses are all 1, and one label serves all.
        let skip = usize::from(summary.bits != summaries[0].bits);
        chart.draw_series(points.iter().enumerate().skip(skip).map(label)).map_err(|e| text(&e))?;
    }
    let mut legend = chart.configure_series_labels();
    legend.position(SeriesLabelPosition::UpperRight).border_style(BLACK.mix(0.3)).label_font(("sans-serif", 13));
    legend.draw().map_err(|e| text(&e))?;
    drop(chart);
    root.present().map_err(|e| text(&e))
}
