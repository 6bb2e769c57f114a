//! Where activations wait between two steps of the walk: on the device, in memory, or on disk.
//!
//! On the device they stay in the buffers that launches work on, so that nothing is moved. From memory, where they are as they were
//! computed, and from disk, where they are in bf16, each batch goes up before a step and comes down after it.

use super::spill::{Place, SPILLED, Spill};
use crate::engine::matrix::PendingMat;
use crate::engine::{Downloads, Elem, Engine, Mat, Recording, submit};
use crate::{Error, Result};
use serde::{Serialize, Serializer};
use std::borrow::Cow;

impl Serialize for Tier {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.serialize_str(self.name())
    }
}

/// What hidden states wait in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tier {
    Device,
    Memory,
    Disk(Place),
}

impl Tier {
    /// As people are told.
    pub fn told(&self) -> &'static str {
        match self {
            Self::Device => "on the device",
            Self::Memory => "in memory",
            Self::Disk(_) => "on disk, in bf16",
        }
    }

    /// In plans and journals.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Memory => "memory",
            Self::Disk(_) => "disk",
        }
    }

    /// The one called `name`; `place` is where files would be.
    pub fn find(name: &str, place: Option<Place>) -> Option<Self> {
        let all = [Some(Self::Device), Some(Self::Memory), place.map(Self::Disk)];
        all.into_iter().flatten().find(|tier| tier.name() == name)
    }

    pub fn is_disk(&self) -> bool {
        matches!(self, Self::Disk(_))
    }

    /// For the stream called `name`.
    pub(super) fn named(&self, name: &str) -> Self {
        match self {
            Self::Disk(place) => Self::Disk(Place { name: name.to_owned(), ..place.clone() }),
            tier => tier.clone(),
        }
    }

    /// For what belongs to the same stream.
    pub fn beside(&self, what: &str) -> Self {
        match self {
            Self::Disk(place) => Self::Disk(place.beside(what)),
            tier => tier.clone(),
        }
    }
}

/// One matrix per batch.
#[derive(Debug)]
pub(super) struct Waiting<E: Elem> {
    /// For error messages and buffers.
    label: &'static str,
    /// [rows, cols] of each.
    shapes: Vec<[usize; 2]>,
    at: At<E>,
}

#[derive(Debug)]
enum At<E: Elem> {
    Device(Vec<Option<Mat<E>>>),
    Memory(Vec<Vec<E>>),
    Disk(Spill),
    /// Nowhere, in an estimate of what waits on disk.
    Nowhere,
}

/// A batch that a recording has changed, on its way to where it waits.
pub(super) enum Leaving<E: Elem> {
    Stays(Mat<E>),
    Comes(PendingMat<E>),
}

fn values([rows, cols]: [usize; 2]) -> usize {
    rows * cols
}

impl<E: Elem> Waiting<E> {
    /// Nothing yet.
    ///
    /// # Errors
    /// Output, if that is on a disk that cannot be written.
    pub fn new(tier: &Tier, label: &'static str, shapes: Vec<[usize; 2]>) -> Result<Self> {
        let at = match tier {
            Tier::Device => At::Device(vec![None; shapes.len()]),
            Tier::Memory => At::Memory(vec![Vec::new(); shapes.len()]),
            Tier::Disk(place) => At::Disk(Spill::open(place, SPILLED, shapes.iter().copied().map(values), None)?),
        };
        Ok(Self { label, shapes, at })
    }

    /// Stands for values that are not known, in an estimate.
    pub fn blank(engine: &mut dyn Engine, tier: &Tier, label: &'static str, shapes: Vec<[usize; 2]>) -> Result<Self> {
        let at = match tier {
            Tier::Device => {
                let all = submit(engine, |rec| shapes.iter().map(|[rows, cols]| Some(Mat::alloc(rec, label, *rows, *cols))).collect())?;
                At::Device(all)
            }
            Tier::Memory => At::Memory(shapes.iter().map(|shape| bytemuck::zeroed_vec(values(*shape))).collect()),
            Tier::Disk(_) => At::Nowhere,
        };
        Ok(Self { label, shapes, at })
    }

    /// Those that a run has left on disk.
    pub fn on_disk(spill: Spill, label: &'static str, shapes: Vec<[usize; 2]>) -> Self {
        Self { label, shapes, at: At::Disk(spill) }
    }

    /// Empty, with other widths, where these are.
    pub fn beside<F: Elem>(&self, tier: &Tier, label: &'static str, cols: usize) -> Result<Waiting<F>> {
        let shapes = self.shapes.iter().map(|[rows, _]| [*rows, cols]).collect();
        match self.at {
            At::Nowhere => Ok(Waiting { label, shapes, at: At::Nowhere }),
            _ => Waiting::new(&tier.beside(label), label, shapes),
        }
    }

    /// The files, if they are on disk.
    pub fn spill(&self) -> Option<&Spill> {
        match &self.at {
            At::Disk(spill) => Some(spill),
            _ => None,
        }
    }

    fn resident(&self, index: usize, all: &[Option<Mat<E>>]) -> Result<Mat<E>> {
        all[index].ok_or_else(|| Error::internal(self.label, format!("of batch {index} are not on the device")))
    }

    /// A batch as it is now, without padding; from the device it is read back.
    pub fn read(&self, engine: &mut dyn Engine, index: usize) -> Result<Cow<'_, [E]>> {
        let At::Device(all) = &self.at else { return self.on_host(index) };
        let mat = self.resident(index, all)?;
        let mut rec = Recording::new();
        let pending = mat.download(&mut rec);
        Ok(Cow::Owned(pending.take(&mut engine.run(rec)?)?))
    }

    /// The same, where it waits in memory or on disk.
    pub fn on_host(&self, index: usize) -> Result<Cow<'_, [E]>> {
        Ok(match &self.at {
            At::Memory(all) => Cow::Borrowed(&all[index]),
            At::Disk(spill) => Cow::Owned(spill.read(index)?.into_iter().map(E::from_f32).collect()),
            At::Nowhere => Cow::Owned(bytemuck::zeroed_vec(values(self.shapes[index]))),
            At::Device(_) => return Err(Error::internal(self.label, "are on the device")),
        })
    }

    /// Puts `data` [rows, cols] in the place of a batch.
    pub fn put(&mut self, engine: &mut dyn Engine, index: usize, data: Vec<E>) -> Result<()> {
        let (label, [rows, cols]) = (self.label, self.shapes[index]);
        if let At::Device(all) = &mut self.at {
            let old = all[index].take();
            all[index] = Some(submit(engine, |rec| {
                old.into_iter().for_each(|old| old.free(rec));
                Mat::upload(rec, label, rows, cols, data)
            })?);
            return Ok(());
        }
        self.set(index, data)
    }

    fn set(&mut self, index: usize, data: Vec<E>) -> Result<()> {
        match &mut self.at {
            At::Memory(all) => all[index] = data,
            At::Disk(spill) => match E::as_f32(&data) {
                Some(values) => spill.write(index, values)?,
                None => spill.write(index, &data.into_iter().map(E::to_f32).collect::<Vec<_>>())?,
            },
            At::Nowhere => {}
            At::Device(_) => return Err(Error::internal(self.label, "are on the device")),
        }
        Ok(())
    }

    /// Records the way of a batch to the device. [`Self::leave`] ends the visit if it is changed there, [`Self::done`] if it is only read.
    pub fn enter<'a>(&'a self, rec: &mut Recording<'a>, index: usize) -> Result<Mat<E>> {
        let [rows, cols] = self.shapes[index];
        match &self.at {
            At::Device(all) => self.resident(index, all),
            _ => Ok(Mat::upload(rec, self.label, rows, cols, self.on_host(index)?)),
        }
    }

    /// Records the way back of a batch that has been changed, which [`Self::settle`] completes after the run.
    pub fn leave(&self, rec: &mut Recording<'_>, mat: Mat<E>) -> Leaving<E> {
        if let At::Device(_) = self.at {
            return Leaving::Stays(mat);
        }
        let pending = mat.download(rec);
        mat.free(rec);
        Leaving::Comes(pending)
    }

    pub fn settle(&mut self, index: usize, leaving: Leaving<E>, downloads: &mut Downloads) -> Result<()> {
        match (leaving, &mut self.at) {
            (Leaving::Stays(mat), At::Device(all)) => all[index] = Some(mat),
            (Leaving::Stays(_), _) => return Err(Error::internal(self.label, "do not wait on the device")),
            (Leaving::Comes(pending), _) => self.set(index, pending.take(downloads)?)?,
        }
        Ok(())
    }

    /// Records the end of a visit that has changed nothing.
    pub fn done(&self, rec: &mut Recording<'_>, mat: Mat<E>) {
        if !matches!(self.at, At::Device(_)) {
            mat.free(rec);
        }
    }

    /// Records a copy of a batch on the device, which is the caller's.
    pub fn copy<'a>(&'a self, rec: &mut Recording<'a>, index: usize) -> Result<Mat<E>> {
        let mat = self.enter(rec, index)?;
        if !matches!(self.at, At::Device(_)) {
            return Ok(mat);
        }
        let copy = Mat::alloc(rec, self.label, mat.rows, mat.cols);
        rec.copy(mat.buffer, copy.buffer);
        Ok(copy)
    }

    /// A batch is not needed any more; on the device the caller has given it back.
    pub fn forget(&mut self, index: usize) {
        match &mut self.at {
            At::Device(all) => all[index] = None,
            At::Memory(all) => all[index] = Vec::new(),
            At::Disk(_) | At::Nowhere => {}
        }
    }

    /// What is there now is what the next block starts from.
    pub fn turn(&mut self) {
        if let At::Disk(spill) = &mut self.at {
            spill.turn();
        }
    }

    /// Gives back what is on the device.
    pub fn free(self, rec: &mut Recording<'_>) {
        if let At::Device(all) = self.at {
            all.into_iter().flatten().for_each(|mat| mat.free(rec));
        }
    }
}
