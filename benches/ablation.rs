//! Perplexities of methods and of their parts on two texts, over bits, groups and seeds: what the defaults are chosen by.
//!
//! usage: cargo bench --bench ablation -- MODEL_DIR CALIBRATION SAMPLES HOME ABROAD WINDOWS RESULTS.jsonl [ROWS [BITS [GROUPS [SEEDS]]]]
//!   CALIBRATION  text, and SAMPLES how many windows of it have how many tokens, such as 128x512
//!   HOME, ABROAD texts to judge on: one like the calibration text, one unlike it; WINDOWS such as 40x512
//!   RESULTS      one JSON object per run is appended; runs that it holds already are not repeated, and one that was stopped goes on from
//!                what lies beside RESULTS, so that a sweep can be stopped
//!   ROWS         comma list of the names in `ROWS`, `presets` (the four methods) or `all`; BITS, GROUPS, SEEDS comma lists
//!                (default presets, 2,3,4, -1,128 and 0,1,2)
//!
//! Every result is that of the written compressed-tensors folder, read anew. At the end: mean and half the range over seeds.

use aespa_gpu::calib::{Streaming, Tokens};
use aespa_gpu::engine::DeviceChoice;
use aespa_gpu::eval::evaluate;
use aespa_gpu::method::{Damping, Inputs, Method};
use aespa_gpu::metric::Metric;
use aespa_gpu::model::{Checkpoint, Weights};
use aespa_gpu::pipeline::{self, Quiet};
use aespa_gpu::plan::{EvalRequest, EvalText, Plan, Request, TextSource};
use aespa_gpu::quant::Scheme;
use aespa_gpu::round::{AdaRound, Descent, Rounding};
use aespa_gpu::scale::ScaleRule;
use aespa_gpu::text::Tokenizer;
use aespa_gpu::transform::{Transform, ZfoldOptions};
use aespa_gpu::{Error, Result, engine, export, method};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

const PRESETS: [&str; 4] = ["rtn", "gptq", "aespa-2024", "aespa"];

/// One change of the preset `aespa` (or of another) per row.
fn rows() -> Result<Vec<(&'static str, Method)>> {
    let aespa = method::find("aespa")?;
    let gptq = method::find("gptq")?;
    let descent = Descent::DEFAULT;
    let with = |descent| Rounding { descent: Some(descent), ..Rounding::GPTQ };
    let mut all = PRESETS.map(|name| method::find(name).map(|m| (name, m))).into_iter().collect::<Result<Vec<_>>>()?;
    all.extend([
        ("zfold", method::find("zfold")?),
        ("gptq: sequential", Method { inputs: Inputs::Sequential, ..gptq }),
        ("gptq: asymmetric", Method { inputs: Inputs::Asymmetric, ..gptq }),
        ("gptq: residual", Method { inputs: Inputs::Residual, ..gptq }),
        ("gptq: descent", Method { rounding: Rounding::GPTQ_DESCENT, ..gptq }),
        ("aespa: inputs of the float block", Method { inputs: Inputs::Block, damping: Damping::Fixed(0.1), ..aespa }),
        ("aespa: sequential inputs", Method { inputs: Inputs::Sequential, ..aespa }),
        ("aespa: asymmetric inputs", Method { inputs: Inputs::Asymmetric, ..aespa }),
        ("aespa: no descent", Method { rounding: Rounding::GPTQ, ..aespa }),
        ("aespa: greedy descent", Method { rounding: with(Descent { temperature: 0.0, ..descent }), ..aespa }),
        ("aespa: no refit", Method { rounding: with(Descent { refit: false, ..descent }), ..aespa }),
        ("aespa: 10 sweeps", Method { rounding: with(Descent { sweeps: 10, ..descent }), ..aespa }),
        ("aespa: two-sided search", Method { scale: ScaleRule::MetricTwoSided, ..aespa }),
        ("aespa: zero refit", Method { rounding: with(Descent { refit_zero: true, ..descent }), ..aespa }),
        (
            "aespa: AdaRound before descent",
            Method {
                rounding: Rounding { adaround: Some(AdaRound { iterations: 200, ..AdaRound::NORMALISED }), ..aespa.rounding },
                ..aespa
            },
        ),
        ("aespa: 8 orders", Method { rounding: Rounding { orders: 8, ..aespa.rounding }, ..aespa }),
        (
            "aespa: block AdaRound before descent",
            Method { rounding: Rounding { adaround: Some(AdaRound::BLOCKS), ..aespa.rounding }, ..aespa },
        ),
        ("aespa: block AdaRound", Method { rounding: Rounding { adaround: Some(AdaRound::BLOCKS), ..Rounding::GPTQ }, ..aespa }),
        ("aespa: 8 orders and no descent", Method { rounding: Rounding { orders: 8, ..Rounding::GPTQ }, ..aespa }),
        ("aespa: all tokens alike", Method { tokens: Tokens::Uniform, ..aespa }),
        ("gptq: tokens by the residual", Method { tokens: Tokens::Residual, ..gptq }),
        ("aespa: layer metric", Method { metric: Metric::Layer, ..aespa }),
        ("aespa: published metric", Method { metric: Metric::Attention, ..aespa }),
        ("aespa: probe metric", Method { metric: Metric::Probe, ..aespa }),
        ("aespa: no folds", Method { transform: Transform::None, ..aespa }),
        ("aespa: folds", Method { transform: Transform::Zfold(ZfoldOptions::PUBLISHED), ..aespa }),
        ("aespa: weighted folds", Method { transform: Transform::Zfold(ZfoldOptions::WEIGHTED), ..aespa }),
        ("aespa: damping 0.01", Method { damping: Damping::Fixed(0.01), ..aespa }),
        ("aespa: damping 0.03", Method { damping: Damping::Fixed(0.03), ..aespa }),
        ("aespa: damping 0.1", Method { damping: Damping::Fixed(0.1), ..aespa }),
        ("aespa: damping 0.3", Method { damping: Damping::Fixed(0.3), ..aespa }),
        ("aespa: damping 0.5", Method { damping: Damping::Fixed(0.5), ..aespa }),
        ("aespa: damping 1", Method { damping: Damping::Fixed(1.0), ..aespa }),
    ]);
    Ok(all)
}

struct Setup {
    model: PathBuf,
    calibration: PathBuf,
    /// Windows and their tokens.
    samples: [usize; 2],
    texts: [PathBuf; 2],
    windows: [usize; 2],
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [model, calibration, samples, home, abroad, windows, results] = arguments.get(..7).unwrap_or_default() else {
        // `cargo bench` without arguments runs every bench.
        println!("ablation: needs MODEL_DIR CALIBRATION SAMPLES HOME ABROAD WINDOWS RESULTS.jsonl; see the top of benches/ablation.rs");
        return Ok(());
    };
    let number = |text: &str| text.parse::<i64>().map_err(|e| Error::usage(text, "is not a number").caused_by(e));
    let product = |text: &str| match text.split_once('x').map(|(a, b)| [a, b].map(str::parse::<usize>)) {
        Some([Ok(count), Ok(length)]) => Ok([count, length]),
        _ => Err(Error::usage(text, "is not a number of windows and their tokens, such as 128x512")),
    };
    let list = |i: usize, default: &str| -> Vec<String> {
        arguments.get(i).map_or(default, String::as_str).split(',').map(|s| s.trim().to_owned()).collect()
    };
    let setup = Setup {
        model: model.into(),
        calibration: calibration.into(),
        samples: product(samples)?,
        texts: [home.into(), abroad.into()],
        windows: product(windows)?,
    };
    let asked = list(7, "presets");
    let chosen: Vec<(&str, Method)> = rows()?
        .into_iter()
        .filter(|(name, _)| asked[0] == "all" || asked.iter().any(|a| a == name) || (asked[0] == "presets" && PRESETS.contains(name)))
        .collect();
    let results = Path::new(results);
    for seed in list(10, "0,1,2") {
        for bits in list(8, "2,3,4") {
            for group in list(9, "-1,128") {
                for (name, method) in &chosen {
                    let (bits, group, seed) = (number(&bits)? as u32, number(&group)?, number(&seed)? as u64);
                    // Nothing is random in RTN.
                    if method.calibrates() || seed == 0 {
                        run(&setup, results, name, *method, bits, group, seed)?;
                    }
                }
            }
        }
    }
    summary(results)
}

fn read(results: &Path) -> Result<Vec<Value>> {
    let text = match std::fs::read_to_string(results) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(Error::input(results.display(), "cannot be read").caused_by(e)),
    };
    text.lines().map(|line| serde_json::from_str(line).map_err(|e| Error::input(results.display(), "is damaged").caused_by(e))).collect()
}

fn run(setup: &Setup, results: &Path, name: &str, method: Method, bits: u32, group: i64, seed: u64) -> Result<()> {
    let model = setup.model.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let [samples, length] = setup.samples;
    let key = json!({"model": model, "row": name, "bits": bits, "group": group, "seed": seed, "samples": samples, "length": length});
    let has = |line: &Value| key.as_object().is_some_and(|key| key.iter().all(|(k, v)| &line[k] == v));
    if read(results)?.iter().any(has) {
        return Ok(());
    }
    // Of the run's own name, so that a run that was stopped finds its journal.
    let run = format!("{model}-{name}-{bits}-{group}-{seed}-{samples}x{length}").replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    let out = results.with_extension(run);
    let request = Request {
        calibration: Some(setup.calibration.clone()),
        samples: Some(samples),
        sequence_length: Some(length),
        seed,
        device: DeviceChoice::Cpu,
        overwrite: true,
        ..Request::new(
            setup.model.clone(),
            out.clone(),
            method,
            Scheme::new(bits, group, false)?,
            vec![export::find("compressed-tensors")?],
        )
    };
    let reports = pipeline::run(Plan::new(request)?, &mut Quiet)?;
    let report = reports.first().ok_or_else(|| Error::internal("run", "has no report"))?;
    let mut perplexity = [0.0; 2];
    let original = Checkpoint::open(&setup.model)?;
    let tokenizer = Tokenizer::open(&setup.model)?;
    for (value, text) in perplexity.iter_mut().zip(&setup.texts) {
        let request = EvalRequest { text: TextSource::File(text.clone()), window: Some(setup.windows[1]), windows: Some(setup.windows[0]) };
        let text = EvalText::new(&request, &tokenizer, original.spec())?;
        let mut engine = engine::open(&DeviceChoice::Cpu)?;
        let weights: Box<dyn Weights> = export::open(&out)?;
        *value = evaluate::<f32>(engine.as_mut(), weights.as_ref(), None, &text.windows(), &Streaming::default(), &mut |_, _| Ok(()))?
            .perplexity;
    }
    let round: f64 = report.layers.iter().map(|l| l.round_seconds).sum();
    let loss: f64 = report.layers.iter().map(|l| l.loss).sum();
    let mut line = key;
    line["home"] = json!(perplexity[0]);
    line["abroad"] = json!(perplexity[1]);
    line["bits_per_weight"] = json!(report.bits_per_weight);
    line["seconds"] = json!(report.stages.iter().map(|stage| stage.seconds).sum::<f64>());
    line["rounding_seconds"] = json!(round);
    line["loss"] = json!(loss);
    println!("{line}");
    let failed = |e| Error::output(results.display(), "cannot be written").caused_by(e);
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(results).map_err(failed)?;
    writeln!(file, "{line}").map_err(failed)?;
    std::fs::remove_dir_all(&out).map_err(|e| Error::output(out.display(), "cannot be removed").caused_by(e))
}

/// Mean and half the range over seeds of everything that the file holds.
fn summary(results: &Path) -> Result<()> {
    let mut cells: BTreeMap<(String, u64, i64, String), Vec<[f64; 3]>> = BTreeMap::new();
    for line in read(results)? {
        let text = |k: &str| line[k].as_str().unwrap_or_default().to_owned();
        let key = (text("model"), line["bits"].as_u64().unwrap_or(0), line["group"].as_i64().unwrap_or(0), text("row"));
        cells.entry(key).or_default().push(["home", "abroad", "seconds"].map(|k| line[k].as_f64().unwrap_or(f64::NAN)));
    }
    println!("| model | bits | group | row | home | abroad | seconds | seeds |\n|---|---|---|---|---|---|---|---|");
    for ((model, bits, group, row), runs) in cells {
        let cell = |i: usize| {
            let values: Vec<f64> = runs.iter().map(|r| r[i]).collect();
            let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
            (values.iter().sum::<f64>() / values.len() as f64, (high - low) / 2.0)
        };
        let show = |(mean, spread): (f64, f64)| if runs.len() > 1 { format!("{mean:.3} ± {spread:.3}") } else { format!("{mean:.3}") };
        println!("| {model} | {bits} | {group} | {row} | {} | {} | {:.0} | {} |", show(cell(0)), show(cell(1)), cell(2).0, runs.len());
    }
    Ok(())
}
