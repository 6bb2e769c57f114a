//! `aespa-gpu quantize`.

use super::args::Quantize;
use super::progress::Bars;
use super::{demo, print, print_json};
use crate::cache::Cache;
use crate::calib::TOKENS;
use crate::export::Format;
use crate::method::{self, INPUTS, Method};
use crate::metric::METRICS;
use crate::pipeline::Footprint;
use crate::plan::{Bounds, EvalRequest, Plan, Request, TextSource};
use crate::quant::Scheme;
use crate::report::Report;
use crate::round::Rounding;
use crate::scale::SCALE_RULES;
use crate::transform::TRANSFORMS;
use crate::{Error, Result, export, measure, pipeline};
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};

pub fn run(args: Quantize) -> Result<()> {
    if args.dry_run {
        return plan(&args, false);
    }
    if args.demo {
        return demo::run(args);
    }
    let reports = quantize(request(&args)?)?;
    let out = args.output.unwrap_or_default();
    for report in &reports {
        print(&summary(report))?;
        let folder = if reports.len() == 1 { out.clone() } else { out.join(report.settings.format) };
        print(&format!("wrote {}", folder.display()))?;
    }
    Ok(())
}

/// Says what a run would take, and leaves everything as it is.
pub fn plan(args: &Quantize, json: bool) -> Result<()> {
    if args.restart {
        return Err(Error::usage("--restart", "throws unfinished work away, and a plan leaves everything as it is; leave it out"));
    }
    if args.demo {
        return Err(Error::usage("--demo", "runs a small model in a minute and has no plan; give a MODEL_DIR and -o OUT_DIR instead"));
    }
    let plan = Plan::fitted(request(args)?, pipeline::fit)?;
    let rates = measure::known(plan.engine.as_ref(), &Cache::user());
    let needs = pipeline::footprint(&plan, rates.as_ref())?;
    if json {
        return print_json(&needs);
    }
    print(&footprint(&needs))?;
    match rates {
        Some(_) => Ok(()),
        None => print(&format!("how long: not known before `aespa-gpu devices --bench --device {}`", plan.request.device)),
    }
}

/// Memory, disk and work of a run.
fn footprint(footprint: &Footprint) -> String {
    let size = |bytes: u64| format!("{:.3} GB", bytes as f64 / 1e9);
    let mut text = table(&["what", "at most"]);
    text.add_row(["memory", &size(footprint.needs.ram_bytes)]);
    text.add_row(["device memory", &if footprint.needs.device_bytes == 0 { "-".to_owned() } else { size(footprint.needs.device_bytes) }]);
    for output in &footprint.outputs {
        text.add_row([&format!("output, {}", output.format), &size(output.bytes)]);
    }
    text.add_row(["hidden states on disk", &size(footprint.needs.spill_bytes)]);
    let mut work = table(&["stage", "Tflop", "GB of kernels", "seconds"]);
    for stage in &footprint.stages {
        let seconds = stage.seconds.map_or("-".to_owned(), |s| format!("{s:.1}"));
        work.add_row([stage.name.to_owned(), format!("{:.4}", stage.flops / 1e12), format!("{:.2}", stage.bytes / 1e9), seconds]);
    }
    let time = footprint.seconds.map_or(String::new(), |seconds| format!(", about {seconds:.0} s"));
    format!("{text}\n{work}\n{} blocks, {:.3e} floating-point operations{time}\n{footprint}", footprint.blocks, footprint.work.flops())
}

/// Plans and runs one quantization with progress on the terminal.
pub fn quantize(request: Request) -> Result<Vec<Report>> {
    let plan = Plan::fitted(request, pipeline::fit)?;
    tracing::info!("quantizing {} on {}", plan.request.model.display(), plan.engine.describe());
    let mut bars = Bars::new();
    let result = pipeline::run(plan, &mut bars);
    bars.finish();
    result
}

fn scheme(args: &Quantize, formats: &[&Format]) -> Result<Scheme> {
    let given = [("--bits", args.bits.is_some()), ("--group-size", args.group_size.is_some()), ("--symmetric", args.symmetric)];
    if let Some((option, _)) = given.iter().find(|(_, given)| *given && formats.iter().all(|f| f.own_scheme)) {
        return Err(Error::usage(
            *option,
            format!("is fixed by --format {}; leave it out, or choose another format", args.format.join(",")),
        ));
    }
    let scheme = Scheme::new(args.bits.unwrap_or(4), args.group_size.unwrap_or(128), args.symmetric)?;
    Ok(Scheme { keep_embeddings: args.keep_embeddings, ..scheme })
}

/// Arguments to a request; usage errors name the option.
pub fn request(args: &Quantize) -> Result<Request> {
    let missing = |what: &str| Error::usage(what, "is missing");
    let formats = args.format.iter().map(|name| export::find(name)).collect::<Result<Vec<_>>>()?;
    Ok(Request {
        model: args.model.clone().ok_or_else(|| missing("MODEL_DIR"))?,
        out: args.output.clone().ok_or_else(|| missing("--output"))?,
        overwrite: args.overwrite,
        method: method(args)?,
        scheme: scheme(args, &formats)?,
        act_order: !args.no_act_order,
        alpha: args.alpha,
        gguf_pre: gguf_pre(args, &formats)?,
        formats,
        calibration: args.calibration.clone(),
        samples: args.samples,
        sequence_length: args.sequence_length,
        seed: args.seed,
        bounds: Bounds { max_ram: args.max_ram, max_vram: args.max_vram, max_disk: args.max_disk },
        restart: args.restart,
        fallback_cpu: args.fallback_cpu,
        journal_seconds: args.journal_seconds,
        device: args.device.device.clone(),
        operands: args.device.operands,
        eval: args.eval.clone().map(|path| EvalRequest {
            text: TextSource::File(path),
            window: args.eval_window,
            windows: args.eval_windows,
        }),
    })
}

/// The name of a pre-tokenizer, which only GGUF files have a place for.
fn gguf_pre(args: &Quantize, formats: &[&Format]) -> Result<Option<String>> {
    let refused = |message: &str| Err(Error::usage("--gguf-pre", message));
    match &args.gguf_pre {
        Some(name) if name.trim().is_empty() => refused("is empty; give a name such as llama-bpe, or leave it out"),
        Some(_) if !formats.iter().any(|f| f.name.starts_with("gguf-")) => {
            refused("is for GGUF files: add a --format gguf-..., or leave it out")
        }
        name => Ok(name.clone()),
    }
}

/// The preset with what was asked for instead of its own choices.
fn method(args: &Quantize) -> Result<Method> {
    let own = method::find(&args.method)?;
    Ok(Method {
        transform: chosen(TRANSFORMS, &args.transform, own.transform),
        metric: chosen(METRICS, &args.metric, own.metric),
        tokens: chosen(TOKENS, &args.tokens, own.tokens),
        scale: chosen(SCALE_RULES, &args.scale, own.scale),
        rounding: rounding(args, own.rounding)?,
        inputs: chosen(INPUTS, &args.inputs, own.inputs),
        damping: args.damping.unwrap_or(own.damping),
        ..own
    })
}

/// The option called `name`; the argument parser has checked that there is one.
fn chosen<T: Copy>(options: &[(&str, T, &str)], name: &Option<String>, own: T) -> T {
    options.iter().find(|(n, _, _)| name.as_deref() == Some(n)).map_or(own, |(_, option, _)| *option)
}

/// The rounding that was asked for, or the method's own.
fn rounding(args: &Quantize, own: Rounding) -> Result<Rounding> {
    let mut rounding = match &args.rounding {
        Some(chain) => Rounding::parse(chain)?,
        None => own,
    };
    rounding.orders = args.orders.unwrap_or(rounding.orders);
    let (sweeps, temperature) = (args.sweeps, args.temperature);
    match &mut rounding.descent {
        Some(descent) => {
            descent.sweeps = sweeps.unwrap_or(descent.sweeps);
            descent.temperature = temperature.unwrap_or(descent.temperature);
            descent.refit &= !args.no_refit;
            descent.refit_zero |= args.refit_zero;
        }
        None if sweeps.is_some() || temperature.is_some() || args.no_refit || args.refit_zero => {
            let options = "--sweeps, --temperature, --no-refit, --refit-zero";
            return Err(Error::usage(options, "belong to coordinate descent: add --rounding gptq+descent"));
        }
        None => {}
    }
    Ok(rounding)
}

/// The closing table: losses per role, then sizes, times and perplexities.
fn summary(report: &Report) -> String {
    let mut table = table(&["layers", "count", "loss of RTN", "loss", "ratio"]);
    let mut roles: Vec<&str> = Vec::new();
    for layer in &report.layers {
        if !roles.contains(&layer.role.as_str()) {
            roles.push(&layer.role);
        }
    }
    for role in roles {
        let of_role = || report.layers.iter().filter(|l| l.role == role);
        let (rtn, loss) = of_role().fold((0.0, 0.0), |(rtn, loss), l| (rtn + l.loss_rtn, loss + l.loss));
        let ratio = if rtn > 0.0 { format!("{:.3}", loss / rtn) } else { "-".to_owned() };
        table.add_row([role.to_owned(), of_role().count().to_string(), format!("{rtn:.4e}"), format!("{loss:.4e}"), ratio]);
    }
    let mut text = if report.layers.is_empty() { String::new() } else { format!("{table}\n") };
    let raised = report.layers.iter().filter(|l| l.damping_raised.is_some_and(|r| r > 0)).count();
    if raised > 0 {
        text += &format!("damping was raised for {raised} linears (see the report)\n");
    }
    let (ties, weights) = report.layers.iter().fold((0, 0), |(ties, weights), l| (ties + l.ties, weights + l.rows * l.columns));
    // One in a thousand: some five times what chance brings.
    if ties * 1000 > weights {
        let percent = 100.0 * ties as f64 / weights as f64;
        text += &format!("{ties} weights ({percent:.2} %) lie in the middle of two codes: other devices may choose the other\n");
    }
    let how = match report.settings.scheme {
        Some(scheme) => {
            let group = scheme.group.map_or("per channel".to_owned(), |g| format!("groups of {g}"));
            format!("{} bits, {group}, {}", scheme.bits, if scheme.symmetric { "symmetric" } else { "asymmetric" })
        }
        None => report.settings.format.to_owned(),
    };
    text += &match report.layers.is_empty() {
        true => format!("{how}: nothing was quantized\n"),
        false => format!("{}, {how}: {:.3} bits per weight\n", report.settings.method.name, report.bits_per_weight),
    };
    let memory = report.memory.peak_resident_bytes.map_or(String::new(), |b| format!(", peak memory {:.2} GB", b as f64 / 1e9));
    text += &format!("{:.1} s on {}{memory}", report.seconds, report.device);
    if let Some(p) = &report.perplexity {
        text += &format!(
            "\nperplexity on {} ({} windows of {}): {:.3} before, {:.3} after",
            p.text, p.after.windows, p.after.window, p.before.perplexity, p.after.perplexity
        );
    }
    text
}

/// A table with numbers to the right of the first column.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
