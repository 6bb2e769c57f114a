//! `aespa-gpu quantize --demo`: the built-in model through a few methods, with perplexities before and after.

use super::args::Quantize;
use super::print;
use super::quantize::{quantize, request, table};
use crate::method;
use crate::model::unpack_demo;
use crate::plan::{EvalRequest, TextSource};
use crate::{Error, Result, interrupt};
use std::path::{Path, PathBuf};

/// Where the demo writes when nothing is said.
const OUT: &str = "demo-out";
/// From the plainest to the best; `aespa-2024` would take minutes.
const METHODS: [&str; 3] = ["rtn", "gptq", "aespa"];
/// Windows and their length, for calibration and for evaluation: a few seconds of work each on two cores.
const WINDOW: usize = 256;
const WINDOWS: usize = 100;

pub fn run(mut args: Quantize) -> Result<()> {
    let out = args.output.clone().unwrap_or_else(|| PathBuf::from(OUT));
    let existed = out.exists();
    if existed && !args.overwrite && !is_empty(&out) {
        return Err(Error::usage(out.display(), "exists already; give --overwrite to replace it, or another folder with -o"));
    }
    if existed {
        return compare(&mut args, &out);
    }
    // What is complete before the end would look like a finished demo.
    interrupt::remove_if_ended(Some(out.clone()));
    let result = compare(&mut args, &out);
    if result.is_err() {
        let _ = std::fs::remove_dir_all(&out);
    }
    interrupt::remove_if_ended(None);
    // The runs' own error would tell what is kept.
    result.map_err(|error| interrupt::check().err().map_or(error, |stopped| stopped.with_end(interrupt::NOTHING_WRITTEN)))
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

fn compare(args: &mut Quantize, out: &Path) -> Result<()> {
    let model = out.join("model");
    unpack_demo(&model)?;
    args.model = Some(model);
    let bits = *args.bits.get_or_insert(3);
    args.sequence_length = args.sequence_length.or(Some(WINDOW));
    let mut rows = table(&["method", "bits per weight", "perplexity before", "after", "seconds", "folder"]);
    for name in METHODS {
        let method = method::find(name)?;
        let folder = out.join(format!("{}-w{bits}", method.name));
        args.method = method.name.to_owned();
        args.output = Some(folder.clone());
        let mut request = request(args)?;
        request.eval = Some(EvalRequest { text: TextSource::BuiltInHeldout, window: Some(WINDOW), windows: Some(WINDOWS) });
        let report = quantize(request)?.into_iter().next().ok_or_else(|| Error::internal(name, "wrote nothing"))?;
        let (before, after) = report.perplexity.as_ref().map_or((0.0, 0.0), |p| (p.before.perplexity, p.after.perplexity));
        rows.add_row([
            method.name.to_owned(),
            format!("{:.3}", report.bits_per_weight),
            format!("{before:.3}"),
            format!("{after:.3}"),
            format!("{:.1}", report.seconds),
            folder.display().to_string(),
        ]);
    }
    print(&format!("{rows}\nperplexity on held-out novels, {WINDOWS} windows of {WINDOW} tokens, of the written folders read anew"))
}
