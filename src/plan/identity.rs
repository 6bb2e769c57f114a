//! What makes two runs the same run: a journal goes on only where all of this is as it was.

use super::{Calibration, EvalText, Request};
use crate::engine::Engine;
use crate::method::Method;
use crate::model::Checkpoint;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::time::UNIX_EPOCH;

/// Everything that the bytes of the result depend on. Weight files are told by size and time, so that it takes no time; the report has their
/// hashes.
///
/// # Errors
/// Input, if a file of the model cannot be looked at.
pub(super) fn identity(
    request: &Request,
    method: &Method,
    checkpoint: &Checkpoint,
    engine: &dyn Engine,
    calibration: Option<&Calibration>,
    eval: Option<&EvalText>,
) -> Result<Value> {
    let mut files = serde_json::Map::new();
    let tokenizer = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"].map(|name| checkpoint.dir().join(name));
    for path in super::hashed_files(checkpoint).into_iter().chain(tokenizer.into_iter().filter(|path| path.exists())) {
        let cannot = |e| Error::input(path.display(), "cannot be read").caused_by(e);
        let meta = path.metadata().map_err(cannot)?;
        let time = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map_or(0, |time| time.as_millis() as u64);
        files.insert(path.file_name().unwrap_or_default().to_string_lossy().into_owned(), json!([meta.len(), time]));
    }
    let model = checkpoint.dir().canonicalize().map_err(|e| Error::input(checkpoint.dir().display(), "cannot be read").caused_by(e))?;
    let text = |name: &str, sha256: &str, windows: usize, length: usize| json!({"text": name, "sha256": sha256, "windows": windows, "length": length});
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": {"path": model.display().to_string(), "files": files},
        "method": method,
        "scheme": request.scheme,
        "format": request.formats.iter().map(|format| format.name).collect::<Vec<_>>(),
        "gguf-pre": request.gguf_pre,
        "act-order": request.act_order,
        "alpha": request.alpha,
        "seed": request.seed,
        "device": engine.describe(),
        "bounds": {"max-ram": request.bounds.max_ram, "max-vram": request.bounds.max_vram, "max-disk": request.bounds.max_disk},
        "operands": request.operands.to_string(),
        "calibration": calibration.map(|c| text(&c.name, &c.sha256, c.windows.len(), c.windows.first().map_or(0, Vec::len))),
        "eval": eval.map(|e| text(&e.name, &e.sha256, e.windows().len(), e.window)),
    }))
}
