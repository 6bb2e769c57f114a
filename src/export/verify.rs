//! Checks a folder or file against the rules of the runtimes that it is for: what reading it back does not show.
//!
//! Reading checks names, types, shapes, groups that divide, packing, zero points, stored scales and stray tensors (see `packed`, `gguf`). On top
//! of that come the rules of [`RULES`]. A new one is one line there and a test with a folder that breaks it.

use super::gguf::{self, Gguf};
use super::staged::Written;
use super::{Reader, gguf_file, open_packed, reading};
use crate::model::{Checkpoint, Config, Linear, Role};
use crate::quant::Digest;
use crate::text::Tokenizer;
use crate::{Error, Result, interrupt};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// What was found in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Of the format; `plain` for an ordinary model.
    pub format: &'static str,
    /// Quantized matrices, and matrices that are not.
    pub quantized: usize,
    pub plain: usize,
    /// Rules that were checked.
    pub rules: usize,
}

/// One thing that a runtime relies on.
struct Rule {
    /// The formats that it is for; empty: all.
    formats: &'static [&'static str],
    check: fn(&Opened<'_>) -> Result<()>,
}

const VLLM: &[&str] = &["compressed-tensors", "compressed-tensors-w8a8", "gptq", "gptq-v2", "awq"];

const RULES: &[Rule] = &[
    Rule { formats: &[], check: values_are_sound },
    Rule { formats: VLLM, check: fused_modules_are_alike },
    Rule { formats: VLLM, check: what_is_plain_is_named },
    Rule { formats: &["gptq", "gptq-v2"], check: both_configs_agree },
    Rule { formats: &["mlx"], check: both_keys_agree },
    Rule { formats: &["mlx"], check: tied_heads_are_not_stored },
    Rule { formats: &["gguf"], check: gguf_is_complete },
];

/// A folder or file that could be opened.
struct Opened<'w> {
    path: PathBuf,
    format: &'static str,
    source: Source,
    /// What it must hold, where it was just written.
    written: Option<&'w Written>,
}

enum Source {
    Folder { checkpoint: Checkpoint, reader: Box<dyn Reader> },
    Gguf(Gguf),
}

/// Opens `path` and checks every rule of its format.
///
/// # Errors
/// Those of reading it, and an input error for the first rule that is broken, naming the file and what in it.
pub fn verify(path: &Path) -> Result<Verdict> {
    check(&Opened::new(path, None)?)
}

/// As [`verify`], of what was just written: the pass over all values compares them too.
///
/// # Errors
/// Also an output error naming file and tensor for the first difference.
pub(super) fn verify_written(path: &Path, written: &Written) -> Result<Verdict> {
    check(&Opened::new(path, Some(written))?)
}

fn check(opened: &Opened<'_>) -> Result<Verdict> {
    let rules = RULES.iter().filter(|rule| rule.formats.is_empty() || rule.formats.contains(&opened.format));
    let mut checked = 0;
    for rule in rules {
        interrupt::check()?;
        (rule.check)(opened)?;
        checked += 1;
    }
    let (mut quantized, mut plain) = (0, 0);
    for linear in opened.reader().spec().matrices() {
        match opened.is_quantized(linear)? {
            true => quantized += 1,
            false => plain += 1,
        }
    }
    warn_of_tokens(opened)?;
    Ok(Verdict { format: opened.format, quantized, plain, rules: checked })
}

impl<'w> Opened<'w> {
    fn new(path: &Path, written: Option<&'w Written>) -> Result<Self> {
        if let Some(path) = gguf_file(path) {
            let source = Source::Gguf(Gguf::open(&path)?);
            return Ok(Self { path, format: "gguf", source, written });
        }
        let reader = open_packed(path)?;
        let checkpoint = Checkpoint::open(path)?;
        let config = checkpoint.quantization_config();
        let format = config.and_then(reading).map_or("plain", |(format, _)| format.name);
        Ok(Self { path: path.to_owned(), format, source: Source::Folder { checkpoint, reader }, written })
    }

    fn reader(&self) -> &dyn Reader {
        match &self.source {
            Source::Folder { reader, .. } => reader.as_ref(),
            Source::Gguf(gguf) => gguf,
        }
    }

    /// Of a folder of safetensors.
    fn checkpoint(&self) -> Result<&Checkpoint> {
        match &self.source {
            Source::Folder { checkpoint, .. } => Ok(checkpoint),
            Source::Gguf(_) => Err(Error::internal("verify", "a rule of folders was asked of a GGUF file")),
        }
    }

    /// Where its tokenizer and its other files are.
    fn folder(&self) -> &Path {
        match &self.source {
            Source::Folder { .. } => &self.path,
            Source::Gguf(_) => self.path.parent().unwrap_or(Path::new(".")),
        }
    }

    fn config(&self) -> Result<&Value> {
        Ok(self.checkpoint()?.quantization_config().unwrap_or(&Value::Null))
    }

    fn broken(&self, file: &str, message: impl std::fmt::Display) -> Error {
        Error::input(self.folder().join(file).display(), message)
    }

    fn is_quantized(&self, linear: &Linear) -> Result<bool> {
        // Whether it is, without decoding it: the lattice is known from what is stored.
        self.reader().lattice(linear).map(|lattice| lattice.is_some())
    }
}

/// Every matrix decodes, and every value is finite; what was just written reads back as such.
fn values_are_sound(opened: &Opened<'_>) -> Result<()> {
    let reader = opened.reader();
    let differs = |name: &str, than: &str| {
        Error::output(format!("{}: tensor {name}", opened.path.display()), format!("reads back different from {than}"))
    };
    let mut compared = 0;
    for linear in reader.spec().matrices() {
        interrupt::check()?;
        match opened.written.and_then(|written| written.linears.get(&linear.module)) {
            Some(put) if *put != reader.fingerprint(linear)? => return Err(differs(&linear.weight(), "what was decided")),
            Some(_) => compared += 1,
            // Codes that decode are finite values.
            None if reader.packed(linear)?.is_some() => {}
            None => drop(reader.linear(linear)?),
        }
        reader.release();
    }
    for tensor in reader.spec().tensors().iter().filter(|t| !t.quantizable) {
        reader.tensor(&tensor.name)?;
    }
    let Some(written) = opened.written else { return Ok(()) };
    if compared != written.linears.len() {
        return Err(Error::output(opened.path.display(), format!("holds {compared} of {} matrices", written.linears.len())));
    }
    for (name, put) in &written.others {
        if <Digest>::from(Sha256::digest(reader.stored(name)?)) != *put {
            return Err(differs(name, "what was to be written"));
        }
        reader.release();
    }
    Ok(())
}

/// A tokenizer may have ids that the model has no rows for, of padding mostly: runtimes load it, and so they did with the model.
fn warn_of_tokens(opened: &Opened<'_>) -> Result<()> {
    let folder = opened.folder();
    if !folder.join("tokenizer.json").exists() {
        return Ok(());
    }
    let (tokens, rows) = (Tokenizer::open(folder)?.n_vocab(), opened.reader().spec().n_vocab);
    if tokens > rows {
        tracing::warn!(
            "{}: has {tokens} tokens, and the model has rows for {rows}: it cannot read the last ones",
            folder.join("tokenizer.json").display()
        );
    }
    Ok(())
}

/// Runtimes fuse q, k and v into one matrix, and gate and up: all of one kind.
fn fused_modules_are_alike(opened: &Opened<'_>) -> Result<()> {
    for block in &opened.reader().spec().blocks {
        for roles in [&[Role::Q, Role::K, Role::V][..], &[Role::Gate, Role::Up]] {
            let first = block.linear(roles[0])?;
            let lattice = opened.reader().lattice(first)?;
            for role in &roles[1..] {
                let other = block.linear(*role)?;
                if opened.reader().lattice(other)? != lattice {
                    let message = format!(
                        "{} and {} are quantized in different ways, which runtimes that fuse them cannot load",
                        first.module, other.module
                    );
                    return Err(opened.broken("config.json", message));
                }
            }
        }
    }
    Ok(())
}

/// Runtimes look for codes of every module that is not on the list of those left out.
fn what_is_plain_is_named(opened: &Opened<'_>) -> Result<()> {
    let config = opened.config()?;
    let listed: HashSet<&str> =
        ["ignore", "modules_to_not_convert"].iter().filter_map(|key| config[*key].as_array()).flatten().filter_map(Value::as_str).collect();
    for linear in opened.reader().spec().matrices().filter(|l| l.role != Role::Embedding) {
        // GPTQ has a key for the head, and a tied head is the embedding.
        let head = linear.role == Role::Head;
        let left_out = listed.contains(linear.module.as_str())
            || (head && (opened.reader().spec().tied_head || opened.format.starts_with("gptq") && config["lm_head"] != true));
        if !left_out && !opened.is_quantized(linear)? {
            let message = format!("does not name {} among the modules that are not quantized", linear.module);
            return Err(opened.broken("config.json", message));
        }
    }
    Ok(())
}

/// `quantize_config.json` says the same as `config.json`.
fn both_configs_agree(opened: &Opened<'_>) -> Result<()> {
    let file = "quantize_config.json";
    let config = Config::read(opened.folder().join(file), "cannot be read; GPTQ loaders look for it")?;
    if Some(config.json()) != opened.config()?.as_object() {
        return Err(opened.broken(file, "differs from `quantization_config` in config.json"));
    }
    Ok(())
}

/// mlx-lm reads `quantization`, the Hub `quantization_config`.
fn both_keys_agree(opened: &Opened<'_>) -> Result<()> {
    if opened.checkpoint()?.config().json().get("quantization") != Some(opened.config()?) {
        return Err(opened.broken("config.json", "has no `quantization` like its `quantization_config`; mlx-lm reads that one"));
    }
    Ok(())
}

/// mlx-lm drops the weight of a tied head and nothing else of it: a stray tensor breaks the load.
fn tied_heads_are_not_stored(opened: &Opened<'_>) -> Result<()> {
    let checkpoint = opened.checkpoint()?;
    match checkpoint.names().find(|n| checkpoint.spec().tied_head && n.starts_with("lm_head.") && *n != "lm_head.weight") {
        Some(name) => Err(Error::input(checkpoint.subject(name), "belongs to a head that is tied: mlx-lm cannot load it")),
        None => Ok(()),
    }
}

fn gguf_is_complete(opened: &Opened<'_>) -> Result<()> {
    match &opened.source {
        Source::Gguf(file) => gguf::check(file),
        Source::Folder { .. } => Err(Error::internal("verify", "a rule of GGUF files was asked of a folder")),
    }
}
