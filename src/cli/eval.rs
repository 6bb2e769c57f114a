//! `aespa-gpu eval`.

use super::args::Eval;
use super::progress::Bars;
use super::{print, print_json};
use crate::calib::Streaming;
use crate::engine::{self, Elem};
use crate::eval::{Evaluation, evaluate};
use crate::export;
use crate::model::Weights;
use crate::pipeline::Progress;
use crate::plan::{EvalRequest, EvalText, Operands, TextSource, check_shapes};
use crate::text::Tokenizer;
use crate::{Result, interrupt};
use half::f16;
use std::path::{Path, PathBuf};

pub fn run(args: &Eval) -> Result<()> {
    let result = match args.device.operands {
        Operands::F32 => judge::<f32>(args)?,
        Operands::F16 => judge::<f16>(args)?,
    };
    if args.json {
        return print_json(&result);
    }
    let mut text = format!("perplexity {:.4} ({} windows of {} tokens)", result.perplexity, result.windows, result.window);
    if let (Some(kl), Some(top1), Some(reference)) = (result.kl_divergence, result.top1_agreement, result.reference_perplexity) {
        text += &format!("\nreference perplexity {reference:.4}, KL divergence {kl:.5} nats, top-1 agreement {:.2} %", 100.0 * top1);
    }
    print(&text)
}

/// Where the tokenizer is: beside a file, or in a folder.
fn folder(model: &Path) -> PathBuf {
    match model.parent().filter(|_| model.is_file()) {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        Some(_) => PathBuf::from("."),
        None => model.to_owned(),
    }
}

fn judge<E: Elem>(args: &Eval) -> Result<Evaluation> {
    let open = |path: &Path| {
        let weights = export::open(path)?;
        check_shapes(weights.spec(), path).map(|()| weights)
    };
    let weights = open(&args.model)?;
    let request = EvalRequest { text: TextSource::File(args.text.clone()), window: args.window, windows: args.windows };
    let text = EvalText::new(&request, &Tokenizer::open(&folder(&args.model))?, weights.spec())?;
    let reference = args.reference.as_deref().map(open).transpose()?;
    let mut engine = engine::open(&args.device.device)?;
    let mut bars = Bars::new();
    let blocks = |w: &dyn Weights| w.spec().blocks.len() + 1;
    bars.stage("evaluate", blocks(weights.as_ref()) + reference.as_deref().map_or(0, blocks));
    let result =
        evaluate::<E>(engine.as_mut(), weights.as_ref(), reference.as_deref(), &text.windows(), &Streaming::default(), &mut |done, _| {
            bars.step(done, "");
            interrupt::check()
        });
    bars.finish();
    result
}
