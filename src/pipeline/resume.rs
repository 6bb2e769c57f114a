//! What the journal says of a run: a record for the evaluation before it, and one for each stretch of the walk over the blocks.

use super::block::Streams;
use super::outputs::Outputs;
use super::{Progress, Run};
use crate::calib::{HiddenStates, Place, Residency, Streaming, Tier};
use crate::engine::Engine;
use crate::eval::Evaluation;
use crate::export::Made;
use crate::interrupt::{self, Leaving};
use crate::journal::Journal;
use crate::model::{Checkpoint, ModelSpec};
use crate::plan::Calibration;
use crate::report::{FoldReport, LayerReport, Stage};
use crate::{Error, Result};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Hidden states of unfinished runs, beside what they write.
pub(super) const STATES: &str = "states";
/// Holds the number of the last save of hidden states, which a journal that lost its end does not know.
const NEWEST: &str = "newest";

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
enum Step {
    /// The perplexity before.
    Before { evaluation: Evaluation },
    /// What was made since the last record.
    Stretch(Box<Stretch>),
}

#[derive(Debug, Serialize, Deserialize)]
struct Stretch {
    /// How far the run is now.
    reached: Reached,
    /// For each format.
    outputs: Vec<(Made, Vec<LayerReport>)>,
    folds: Vec<FoldReport>,
    /// Seconds of all stages so far.
    stages: Vec<Stage>,
    /// How hidden states go through the device and wait: results depend on it.
    batch_tokens: usize,
    tier: String,
    weights: Residency,
    states: Option<Saved>,
}

/// What is done of the walk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reached {
    /// The embedding is rounded, if it is to be.
    pub embedding: bool,
    pub blocks: usize,
    /// The head is rounded, if it is to be.
    pub head: bool,
}

/// The files that hidden states are in, as `HiddenStates::save` tells.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Saved {
    /// How many saves the run has made.
    number: usize,
    quantized: usize,
    float: Option<usize>,
}

/// Which files are for which stream.
fn place(folder: &Path, stream: &str) -> Place {
    Place { folder: folder.to_owned(), name: stream.to_owned() }
}

/// The perplexity before, if an earlier run has measured it.
pub(super) fn evaluated(journal: &Journal) -> Option<Evaluation> {
    journal.steps().find_map(|step| match parsed(step) {
        Ok(Step::Before { evaluation }) => Some(evaluation),
        _ => None,
    })
}

/// Keeps the perplexity before.
pub(super) fn record_evaluation(journal: &mut Journal, evaluation: &Evaluation) -> Result<()> {
    journal.append(json(&Step::Before { evaluation: evaluation.clone() })?)
}

/// How an earlier run let hidden states wait; `place` is for what waits on disk.
pub(super) fn streaming(journal: &Journal, place: Option<Place>) -> Option<Streaming> {
    let last = stretches(journal).last()?;
    Some(Streaming { batch_tokens: last.batch_tokens, tier: Tier::find(&last.tier, place)?, weights: last.weights })
}

fn stretches(journal: &Journal) -> impl Iterator<Item = Stretch> {
    journal.steps().filter_map(|step| match parsed(step) {
        Ok(Step::Stretch(stretch)) => Some(*stretch),
        _ => None,
    })
}

/// The journal of a run at work.
pub(super) struct Record<'e> {
    journal: &'e mut Journal,
    /// Seconds of work that are worth a record, and when the last one was made.
    seconds: f64,
    made: Instant,
    /// Folds that it tells of.
    folds: usize,
    /// Saves of hidden states so far.
    saves: usize,
}

impl<'e> Record<'e> {
    pub fn new(journal: &'e mut Journal, seconds: f64) -> Self {
        Self { journal, seconds, made: Instant::now(), folds: 0, saves: 0 }
    }

    /// Records so far.
    pub fn steps(&self) -> usize {
        self.journal.steps().len()
    }

    fn states_folder(&self) -> PathBuf {
        self.journal.folder().join(STATES)
    }

    /// Makes the states between two blocks durable.
    fn save(&mut self, engine: &mut dyn Engine, streams: &mut Streams) -> Result<Saved> {
        let folder = self.states_folder();
        let cannot = |path: &Path, e| Error::output(path.display(), "cannot be written").caused_by(e);
        std::fs::create_dir_all(&folder).map_err(|e| cannot(&folder, e))?;
        let quantized = streams.quantized.save(engine, &place(&folder, "quantized"))?;
        let float = streams.float.as_mut().map(|float| float.save(engine, &place(&folder, "float"))).transpose()?;
        self.saves += 1;
        // By a rename: an empty file after a crash would disown all states.
        let (newest, coming) = (folder.join(NEWEST), folder.join("coming"));
        let write = || {
            let mut file = File::create(&coming)?;
            file.write_all(self.saves.to_string().as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&coming, &newest)
        };
        write().map_err(|e| cannot(&newest, e))?;
        Ok(Saved { number: self.saves, quantized, float })
    }
}

impl Run<'_> {
    /// Makes what has been done so far durable, if enough work lies behind it.
    pub(super) fn record(
        &mut self,
        record: &mut Record<'_>,
        checkpoint: &Checkpoint,
        reached: Reached,
        outputs: &mut Outputs,
        streams: Option<&mut Streams>,
    ) -> Result<()> {
        // States that wait on disk: the next block but one overwrites those of the last record.
        if !self.streaming.tier.is_disk() && record.made.elapsed().as_secs_f64() < record.seconds {
            return Ok(());
        }
        let states = streams.map(|streams| record.save(self.engine, streams)).transpose()?;
        let outputs = outputs.made()?;
        let folds = self.folds[record.folds..].to_vec();
        self.lap("journal");
        let (batch_tokens, tier) = (self.streaming.batch_tokens, self.streaming.tier.name().to_owned());
        let stretch =
            Stretch { reached, outputs, folds, stages: self.watch.stages(), batch_tokens, tier, weights: self.streaming.weights, states };
        record.journal.append(json(&Step::Stretch(Box::new(stretch)))?)?;
        prepare_to_leave(record.journal, checkpoint.spec().blocks.len());
        record.folds = self.folds.len();
        record.made = Instant::now();
        Ok(())
    }

    /// Takes over what an earlier run has done, as far as its hidden states are still there.
    pub(super) fn resume(
        &mut self,
        record: &mut Record<'_>,
        checkpoint: &Checkpoint,
        calibration: Option<&Calibration>,
        outputs: &mut Outputs,
        progress: &mut dyn Progress,
    ) -> Result<(Reached, Option<Streams>)> {
        let spec = checkpoint.spec();
        let done: Vec<Stretch> = stretches(record.journal).collect();
        let Some(last) = done.last() else { return Ok((Reached::default(), None)) };
        let Some(next) = self.from(record, spec, calibration, last)? else {
            tracing::warn!("the hidden states of the unfinished run are not those of its journal's end: the run begins anew");
            let before = evaluated(record.journal);
            record.journal.cut(0)?;
            before.iter().try_for_each(|before| record_evaluation(record.journal, before))?;
            return Ok((Reached::default(), None));
        };
        self.watch.add(&last.stages);
        record.saves = last.states.map_or(0, |saved| saved.number);
        for stretch in done {
            outputs.restore(spec, stretch.outputs)?;
            self.folds.extend(stretch.folds);
        }
        record.folds = self.folds.len();
        tracing::info!("going on with an unfinished run: {} of {} blocks are done", next.0.blocks, spec.blocks.len());
        progress.step(next.0.blocks, "");
        Ok(next)
    }

    /// Takes back what was done since the last record: it is done again.
    pub(super) fn go_back(
        &mut self,
        record: &Record<'_>,
        checkpoint: &Checkpoint,
        calibration: Option<&Calibration>,
        outputs: &mut Outputs,
    ) -> Result<(Reached, Option<Streams>)> {
        outputs.forget(checkpoint.spec())?;
        self.folds.truncate(record.folds);
        let Some(last) = stretches(record.journal).last() else { return Ok((Reached::default(), None)) };
        let next = self.from(record, checkpoint.spec(), calibration, &last)?;
        next.ok_or_else(|| Error::internal("journal", "hidden states are not those of the last record"))
    }

    /// What is done at the end of a stretch; none where the hidden states there are not to be had any more.
    fn from(
        &mut self,
        record: &Record<'_>,
        spec: &ModelSpec,
        calibration: Option<&Calibration>,
        last: &Stretch,
    ) -> Result<Option<(Reached, Option<Streams>)>> {
        let reached = last.reached;
        let over = reached.blocks == spec.blocks.len() && reached.head;
        match calibration.filter(|_| !over) {
            Some(calibration) => Ok(self.streams_saved(record, spec, calibration, last)?.map(|streams| (reached, Some(streams)))),
            None => Ok(Some((reached, None))),
        }
    }

    /// The streams at the end of a stretch; none where the files have gone on or are gone.
    fn streams_saved(
        &mut self,
        record: &Record<'_>,
        spec: &ModelSpec,
        calibration: &Calibration,
        stretch: &Stretch,
    ) -> Result<Option<Streams>> {
        let folder = record.states_folder();
        let newest = std::fs::read_to_string(folder.join(NEWEST)).ok().and_then(|text| text.parse::<usize>().ok());
        // A save that was not recorded leaves the files of the one before it as they are.
        let whole = |saved: &Saved| newest == Some(saved.number) || newest == Some(saved.number + 1);
        let Some(saved) = stretch.states.filter(whole) else { return Ok(None) };
        let windows = [calibration.windows.len(), calibration.windows.first().map_or(0, Vec::len)];
        let mut restored = |stream: &str, front: usize| {
            HiddenStates::restore(self.engine, spec, windows, &self.streaming.named(stream), &place(&folder, stream), front)
        };
        Ok(Some(Streams {
            quantized: restored("quantized", saved.quantized)?,
            float: saved.float.map(|front| restored("float", front)).transpose()?,
        }))
    }
}

fn json(step: &Step) -> Result<Value> {
    serde_json::to_value(step).map_err(|e| Error::internal("journal", "a record cannot be written as JSON").caused_by(e))
}

fn parsed<T: DeserializeOwned>(value: &Value) -> Result<T> {
    T::deserialize(value).map_err(|e| Error::input("journal", "a record cannot be read; use --restart").caused_by(e))
}

/// What becomes of a run's work that does not come to its end.
pub(super) fn prospect(journal: &Journal, blocks: usize) -> String {
    let done = stretches(journal).last().map_or(0, |stretch| stretch.reached.blocks);
    match journal.steps().len() {
        0 => interrupt::NOTHING_WRITTEN.to_owned(),
        _ => format!("; {done} of {blocks} blocks are kept: repeat the command to go on with them, or add --restart to begin anew"),
    }
}

/// Tells the same to who ends the process by force.
pub(super) fn prepare_to_leave(journal: &Journal, blocks: usize) {
    let remove = (journal.steps().len() == 0).then(|| journal.folder().to_owned());
    interrupt::leave(Leaving { remove, message: prospect(journal, blocks) });
}
