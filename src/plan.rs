//! Everything resolved and checked before the first second of work: what cannot work is refused here.

mod identity;
mod request;
mod texts;

use crate::calib::Streaming;
use crate::engine::kernels::attention::MAX_D_HEAD;
use crate::engine::{self, DeviceChoice, Engine};
use crate::export::{Format, Staging, Writer, check_target};
use crate::interrupt::{self, Leaving};
use crate::journal::Journal;
use crate::method::{self, Settings};
use crate::model::{Checkpoint, ModelSpec};
use crate::quant::Scheme;
use crate::{Error, Result};
pub use request::{Bounds, EvalRequest, JOURNAL_SECONDS, Operands, Request, TextSource};
use serde_json::Value;
use std::path::{Path, PathBuf};
use texts::Texts;
pub use texts::{Calibration, EvalText, sequence_length};

/// What opens an engine.
pub type Open = fn(&DeviceChoice) -> Result<Box<dyn Engine>>;

/// A run that can start: files read and checked, texts tokenized, the output folder staged, the device open.
pub struct Plan {
    pub request: Request,
    pub settings: Settings,
    pub streaming: Streaming,
    pub checkpoint: Checkpoint,
    pub calibration: Option<Calibration>,
    pub eval: Option<EvalText>,
    pub engine: Box<dyn Engine>,
    /// How to get another one, should the device be lost.
    pub open: Open,
    /// One for each format.
    pub writers: Vec<Writer>,
    /// What an unfinished run of the same request has done, and what this one will have.
    pub journal: Option<Journal>,
    /// The folder of several formats' folders, if it was made for them.
    pub parent: Option<MadeFolder>,
}

impl Plan {
    /// One without bounds.
    ///
    /// # Errors
    /// Everything that can be known before the work: see the options' own messages.
    pub fn new(request: Request) -> Result<Self> {
        Self::fitted(request, |_| Ok(()))
    }

    /// One that `fit` makes keep to its bounds. Windows have their sizes by then but no ids, so that what cannot fit is refused before
    /// anything is tokenized.
    ///
    /// # Errors
    /// As [`Self::new`], and those of `fit`.
    pub fn fitted(request: Request, fit: fn(&mut Self) -> Result<()>) -> Result<Self> {
        let plan = Self::checked(request, fit);
        if plan.is_err() {
            // What there was to leave has gone with the journal.
            interrupt::leave(Leaving::default());
        }
        plan
    }

    fn checked(request: Request, fit: fn(&mut Self) -> Result<()>) -> Result<Self> {
        let checkpoint = Checkpoint::open(&request.model)?.with_pre_tokenizer(request.gguf_pre.clone());
        if checkpoint.quantization_config().is_some() {
            let message = "is quantized already; give the original model (or `--format dense` output)";
            return Err(Error::input(request.model.display(), message));
        }
        check_shapes(checkpoint.spec(), checkpoint.config().path())?;
        if request.alpha.is_some_and(|a| !(0.0..=1.0).contains(&a)) {
            return Err(Error::usage("--alpha", "must be between 0 and 1"));
        }
        let method = request.method;
        method.check()?;
        if request.alpha.is_some() && !method.inputs.two_streams() {
            return Err(Error::usage("--alpha", "is the strength of asymmetric targets: add --inputs asymmetric or residual"));
        }
        let scheme = fitted(&request, checkpoint.spec())?;
        let quantizes = |format: &Format| checkpoint.spec().matrices().any(|l| (format.lattice)(scheme, checkpoint.spec(), l).is_some());
        // Formats of floats alone leave nothing to calibrate, transform or solve.
        let method = if request.formats.iter().any(|format| quantizes(format)) { method } else { method::find("rtn")? };
        // Output first: where nothing can be written shows before weights are read and texts tokenized. The folder is the first to come and
        // the last to go.
        let (parent, mut journal) = open_output(&request, &checkpoint, scheme)?;
        interrupt::leave(leaving(&journal));
        let engine = engine::open(&request.device)?;
        if request.operands == Operands::F16 && !engine.limits().f16_operands {
            let message = format!("f16 needs the feature SHADER_F16, which {} does not have; leave it at f32", engine.describe());
            return Err(Error::usage("--operands", message));
        }
        let texts = Texts::open(&request, &method, checkpoint.spec())?;
        let (calibration, eval) = texts.blank();
        let identity = identity::identity(&request, &method, &checkpoint, engine.as_ref(), calibration.as_ref(), eval.as_ref())?;
        journal.begin(&identity)?;
        let writers = writers(&request, &checkpoint, scheme, &mut journal, &identity)?;
        let settings = Settings { method, act_order: request.act_order, alpha: request.alpha, seed: request.seed };
        let mut plan = Self {
            request,
            settings,
            streaming: Streaming::default(),
            checkpoint,
            calibration,
            eval,
            engine,
            open: engine::open,
            writers,
            journal: Some(journal),
            parent,
        };
        interrupt::check()?;
        fit(&mut plan)?;
        interrupt::check()?;
        (plan.calibration, plan.eval) = texts.tokenize(&plan.request.model, plan.checkpoint.spec())?;
        Ok(plan)
    }
}

/// What is left where planning must be ended: all the space that will be written to is reserved by then.
fn leaving(journal: &Journal) -> Leaving {
    match journal.steps().len() {
        0 => Leaving { remove: Some(journal.folder().to_owned()), message: interrupt::NOTHING_WRITTEN.to_owned() },
        _ => Leaving { remove: None, message: "; the unfinished run is as it was".to_owned() },
    }
}

/// The scheme with groups that fit the model, unless all formats have schemes of their own.
fn fitted(request: &Request, spec: &ModelSpec) -> Result<Scheme> {
    if request.formats.iter().all(|f| f.own_scheme) { Ok(request.scheme) } else { fit_groups(request.scheme, spec) }
}

/// Where each format goes.
fn targets(request: &Request) -> Vec<(PathBuf, &'static Format)> {
    match request.formats.as_slice() {
        [only] => vec![(request.out.clone(), *only)],
        several => several.iter().map(|format| (request.out.join(format.name), *format)).collect(),
    }
}

/// Checks that all formats can be written, and opens the journal beside them.
fn open_output(request: &Request, checkpoint: &Checkpoint, scheme: Scheme) -> Result<(Option<MadeFolder>, Journal)> {
    for format in &request.formats {
        for warning in (format.check)(scheme, checkpoint.spec())? {
            tracing::warn!("{warning}");
        }
    }
    if let Some(twice) = request.formats.iter().enumerate().find(|(i, f)| request.formats[..*i].iter().any(|other| other.name == f.name)) {
        return Err(Error::usage("--format", format!("names {} twice", twice.1.name)));
    }
    let several = request.formats.len() > 1;
    let parent = if several && !request.out.exists() { Some(MadeFolder::new(&request.out)?) } else { None };
    let mut outs =
        targets(request).into_iter().map(|(out, _)| check_target(&out, request.overwrite, checkpoint)).collect::<Result<Vec<_>>>()?;
    let first = outs.swap_remove(0);
    let beside = if several { first.with_file_name("formats") } else { first };
    Ok((parent, Journal::open(&beside, request.restart)?))
}

/// The writers of all formats, which go on with what the journal tells of.
fn writers(request: &Request, checkpoint: &Checkpoint, scheme: Scheme, journal: &mut Journal, identity: &Value) -> Result<Vec<Writer>> {
    let targets = targets(request);
    let folder = |journal: &Journal, format: &Format| journal.folder().join(format.name);
    // A run that ended between its publication and the end of its journal has left nothing to go on with.
    if journal.steps().len() > 0 && targets.iter().any(|(_, format)| !folder(journal, format).is_dir()) {
        journal.clear()?;
        journal.begin(identity)?;
    }
    let resumed = journal.steps().len() > 0;
    let writer = |(out, format): (PathBuf, &'static Format)| {
        let folder = folder(journal, format);
        Writer::create_in(Staging { folder: &folder, resumed }, &out, request.overwrite, format, checkpoint, scheme)
    };
    let all = targets.into_iter().map(writer).collect::<Result<Vec<_>>>()?;
    Writer::check_rest(&all)?;
    Ok(all)
}

/// A folder that goes again if nothing has come into it.
#[derive(Debug)]
pub struct MadeFolder(PathBuf);

impl MadeFolder {
    fn new(path: &Path) -> Result<Self> {
        std::fs::create_dir(path).map_err(|e| Error::output(path.display(), "cannot be made").caused_by(e))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for MadeFolder {
    fn drop(&mut self) {
        // What is in it is somebody's.
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Refuses shapes that the kernels cannot take; `path` is that of the model.
pub fn check_shapes(spec: &ModelSpec, path: &Path) -> Result<()> {
    let d_head = spec.d_head;
    if d_head > MAX_D_HEAD as usize || !d_head.is_multiple_of(2) {
        let message = format!("heads of {d_head} channels are not supported: only even sizes up to {MAX_D_HEAD}");
        return Err(Error::input(path.display(), message));
    }
    Ok(())
}

/// The scheme with groups that divide every linear; says so where they are smaller than what was asked for.
fn fit_groups(scheme: Scheme, spec: &ModelSpec) -> Result<Scheme> {
    let fitted = scheme.fitted(spec.blocks.iter().flat_map(|b| &b.linears).map(|l| (l.module.as_str(), l.d_in)))?;
    if fitted != scheme {
        let (asked, used) = (scheme.group_size(), fitted.group_size());
        tracing::warn!("groups of {asked} do not divide the input columns of every linear: groups of {used} are used");
    }
    Ok(fitted)
}

/// Files whose hashes a report cites: config.json and the weights.
pub fn hashed_files(checkpoint: &Checkpoint) -> Vec<PathBuf> {
    let config: &Path = checkpoint.config().path();
    std::iter::once(config.to_owned()).chain(checkpoint.files().iter().cloned()).collect()
}
