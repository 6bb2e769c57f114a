//! `aespa-gpu quantize`.

use super::args::Quantize;
use super::progress::Bars;
use super::{demo, print};
use crate::method::{self, INPUTS};
use crate::metric::METRICS;
use crate::plan::{EvalRequest, Plan, Request, TextSource};
use crate::quant::Scheme;
use crate::report::Report;
use crate::round::Rounding;
use crate::scale::SCALE_RULES;
use crate::transform::TRANSFORMS;
use crate::{Error, Result, export, pipeline};
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};

pub fn run(args: Quantize) -> Result<()> {
    if args.demo {
        return demo::run(args);
    }
    let report = quantize(request(&args)?)?;
    print(&summary(&report))?;
    print(&format!("wrote {}", args.output.unwrap_or_default().display()))
}

/// Plans and runs one quantization with progress on the terminal.
pub fn quantize(request: Request) -> Result<Report> {
    let plan = Plan::new(request)?;
    tracing::info!("quantizing {} on {}", plan.request.model.display(), plan.engine.describe());
    let mut bars = Bars::new();
    let result = pipeline::run(plan, &mut bars);
    bars.finish();
    result
}

/// Arguments to a request; usage errors name the option.
pub fn request(args: &Quantize) -> Result<Request> {
    let missing = |what: &str| Error::usage(what, "is missing");
    let scale = args.scale.as_ref().and_then(|name| SCALE_RULES.iter().find(|(n, _, _)| n == name)).map(|(_, rule, _)| *rule);
    let inputs = args.inputs.as_ref().and_then(|name| INPUTS.iter().find(|(n, _, _)| n == name)).map(|(_, inputs, _)| *inputs);
    Ok(Request {
        model: args.model.clone().ok_or_else(|| missing("MODEL_DIR"))?,
        out: args.output.clone().ok_or_else(|| missing("--output"))?,
        overwrite: args.overwrite,
        method: method::find(&args.method)?,
        scale,
        transform: args.transform.as_ref().and_then(|name| TRANSFORMS.iter().find(|(n, _, _)| n == name)).map(|(_, t, _)| *t),
        metric: args.metric.as_ref().and_then(|name| METRICS.iter().find(|(n, _, _)| n == name)).map(|(_, metric, _)| *metric),
        rounding: rounding(args)?,
        inputs,
        scheme: Scheme::new(args.bits.unwrap_or(4), args.group_size, args.symmetric)?,
        act_order: !args.no_act_order,
        damping: args.damping,
        alpha: args.alpha,
        format: export::find(&args.format)?,
        calibration: args.calibration.clone(),
        samples: args.samples,
        sequence_length: args.sequence_length,
        seed: args.seed,
        device: args.device.device.clone(),
        operands: args.device.operands,
        eval: args.eval.clone().map(|path| EvalRequest {
            text: TextSource::File(path),
            window: args.eval_window,
            windows: args.eval_windows,
        }),
    })
}

/// The method's own rounding with what was asked for instead.
fn rounding(args: &Quantize) -> Result<Option<Rounding>> {
    let mut rounding = match &args.rounding {
        Some(chain) => Rounding::parse(chain)?,
        None => method::find(&args.method)?.rounding,
    };
    rounding.orders = args.orders.unwrap_or(rounding.orders);
    let (sweeps, temperature) = (args.sweeps, args.temperature);
    match &mut rounding.descent {
        Some(descent) => {
            descent.sweeps = sweeps.unwrap_or(descent.sweeps);
            descent.temperature = temperature.unwrap_or(descent.temperature);
            descent.refit &= !args.no_refit;
        }
        None if sweeps.is_some() || temperature.is_some() || args.no_refit => {
            return Err(Error::usage("--sweeps, --temperature, --no-refit", "belong to coordinate descent: add --rounding gptq+descent"));
        }
        None => {}
    }
    Ok(Some(rounding))
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
    let mut text = format!("{table}\n");
    let raised = report.layers.iter().filter(|l| l.damping_raised.is_some_and(|r| r > 0)).count();
    if raised > 0 {
        text += &format!("damping was raised for {raised} linears (see the report)\n");
    }
    let scheme = report.settings.scheme;
    let group = scheme.group.map_or("per channel".to_owned(), |g| format!("groups of {g}"));
    let symmetry = if scheme.symmetric { "symmetric" } else { "asymmetric" };
    let name = report.settings.method.name;
    text += &format!("{name}, {} bits, {group}, {symmetry}: {:.3} bits per weight\n", scheme.bits, report.bits_per_weight);
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
