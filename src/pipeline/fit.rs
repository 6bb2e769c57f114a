//! Keeps a run to its bounds: of the choices that a plan has, the first whose footprint they hold; and the refusal where none does.

use super::footprint::{self, Footprint, Needs};
use super::{choices, resume};
use crate::calib::{Place, Residency, Streaming, Tier};
use crate::engine::Rates;
use crate::plan::{Bounds, Plan};
use crate::{Error, Result};

/// Chooses how hidden states wait such that a run keeps to its bounds: as many at a time as keep a device busy, on it if they fit; and the
/// weights of a block, all at once if they fit.
///
/// # Errors
/// Usage, naming the bound and what it would have to be.
pub fn fit(plan: &mut Plan) -> Result<()> {
    let bounds = plan.request.bounds;
    if bounds == Bounds::default() {
        plan.streaming = choices::unbounded(plan);
        return Ok(());
    }
    if let Some(streaming) = begun(plan) {
        plan.streaming = streaming;
        return Ok(());
    }
    let choices = choices::bounded(plan, place(plan));
    let streaming = choices[choose(plan, &choices)?].clone();
    if let Tier::Disk(place) = &streaming.tier {
        std::fs::create_dir_all(&place.folder).map_err(|e| Error::output(place.folder.display(), "cannot be made").caused_by(e))?;
    }
    plan.streaming = streaming;
    Ok(())
}

/// Where hidden states wait on disk.
fn place(plan: &Plan) -> Option<Place> {
    plan.journal.as_ref().map(|journal| Place { folder: journal.folder().join(resume::STATES), name: String::new() })
}

/// How an unfinished run went on that this one takes up.
fn begun(plan: &Plan) -> Option<Streaming> {
    resume::streaming(plan.journal.as_ref()?, place(plan))
}

/// What `plan` will take as it is; how long, where the device's rates are known. Asked while the plan has its journal.
///
/// # Errors
/// Usage, if the bounds do not hold: reading the texts may have taken more than the work will. An unfinished run has kept to the same bounds and
/// is not refused for what differs from one reading to the next. Internal, if a recording is wrong, or the program's allocator does not count.
pub fn footprint(plan: &Plan, rates: Option<&Rates>) -> Result<Footprint> {
    let footprint = footprint::of(plan, rates)?;
    let bounds = plan.request.bounds;
    if bounds.hold(&footprint.needs) || begun(plan).is_some() { Ok(footprint) } else { Err(too_little(bounds.broken(&footprint.needs))) }
}

/// The first choice that keeps to the bounds. What no choice can keep is refused before any other is tried: the last one takes least of a
/// device, the last one with whole blocks least memory.
fn choose(plan: &Plan, choices: &[Streaming]) -> Result<usize> {
    let bounds = plan.request.bounds;
    let mut known: Vec<Option<Needs>> = vec![None; choices.len()];
    let mut needs = |index: usize| -> Result<Needs> {
        match known[index] {
            Some(needs) => Ok(needs),
            None => Ok(*known[index].insert(footprint::needs(plan, &choices[index])?)),
        }
    };
    let Some(last) = choices.len().checked_sub(1) else { return Err(Error::internal("plan", "has no choices")) };
    let of_memory = choices.iter().rposition(|choice| choice.weights == Residency::Block).unwrap_or(0);
    for (index, bound) in [
        (of_memory, Bounds { max_ram: bounds.max_ram, ..Bounds::default() }),
        (last, Bounds { max_vram: bounds.max_vram, ..Bounds::default() }),
    ] {
        if bound == Bounds::default() {
            continue;
        }
        let least = needs(index)?;
        if !bound.hold(&least) {
            return Err(too_little(bound.broken(&least)));
        }
    }
    for index in 0..choices.len() {
        if bounds.hold(&needs(index)?) {
            return Ok(index);
        }
    }
    // Each bound can be kept, but not together.
    Err(too_little(bounds.broken(&needs(last)?)))
}

/// The error about a bound: its option, what it is, and what it would have to be. Before texts are read nobody knows what that takes.
fn too_little((option, bound, need): (&str, u64, u64)) -> Error {
    let hundredths = |bytes: u64| bytes as f64 / f64::from(1u32 << 30) * 100.0;
    Error::usage(
        option,
        format!(
            "of {:.2} GiB is too little: this run needs at least {:.2} GiB; ask for that, for shorter or fewer windows, for less text, or for a \
             simpler method",
            hundredths(bound).floor() / 100.0,
            hundredths(need).ceil() / 100.0
        ),
    )
}

impl Bounds {
    fn hold(&self, needs: &Needs) -> bool {
        let within = |bound: Option<u64>, need: u64| bound.is_none_or(|bound| need <= bound);
        within(self.max_ram, needs.ram_bytes)
            && within(self.max_vram, needs.device_bytes)
            && within(self.max_disk, needs.spill_bytes + needs.output_bytes)
    }

    /// The first bound that does not hold, its option, and what is needed.
    fn broken(&self, needs: &Needs) -> (&'static str, u64, u64) {
        let all = [
            ("--max-ram", self.max_ram, needs.ram_bytes),
            ("--max-vram", self.max_vram, needs.device_bytes),
            ("--max-disk", self.max_disk, needs.spill_bytes + needs.output_bytes),
        ];
        all.into_iter().find_map(|(option, bound, need)| bound.filter(|b| need > *b).map(|bound| (option, bound, need))).unwrap_or((
            "--max-ram",
            0,
            0,
        ))
    }
}
