//! Activations on disk, batch by batch: in bf16 while they wait there for want of memory, as they are where they are saved.
//!
//! They lie in two files, one that a block's inputs are read from and one that its outputs go to, so that the inputs are whole until
//! the block is done. Files are read and written batch by batch and not mapped: a mapped file counts as memory, and a disk that is full ends
//! a process that writes to one.

use crate::tensor::Dtype;
use crate::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Mutex;

/// Of what is too large for the memory.
pub(super) const SPILLED: Dtype = Dtype::Bf16;

/// A folder for what does not fit the memory, and how the files of one stream are called there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub folder: PathBuf,
    pub name: String,
}

impl Place {
    /// For what belongs to the same stream.
    pub(super) fn beside(&self, what: &str) -> Self {
        Self { folder: self.folder.clone(), name: format!("{}-{what}", self.name) }
    }
}

/// The batches of one stream on disk.
#[derive(Debug)]
pub(super) struct Spill {
    dtype: Dtype,
    files: [Part; 2],
    /// Which of the files holds the inputs of the block.
    front: usize,
    /// The first value of each batch, and the end.
    starts: Vec<usize>,
    /// Batches whose states of this block are in the other file.
    moved: Vec<bool>,
}

#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: Mutex<File>,
}

impl Part {
    fn open(path: PathBuf, fresh: bool) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(fresh).truncate(fresh);
        let file = options.open(&path).map_err(|e| Error::output(path.display(), "cannot be opened").caused_by(e))?;
        Ok(Self { path, file: Mutex::new(file) })
    }

    /// Does something at a position of the file.
    fn at<T>(&self, byte: usize, action: impl FnOnce(&mut File) -> std::io::Result<T>) -> Result<T> {
        let failed = |e: std::io::Error| {
            let full = if e.kind() == std::io::ErrorKind::StorageFull { ": the disk is full" } else { "" };
            Error::output(self.path.display(), format!("cannot be read or written, and activations wait there{full}")).caused_by(e)
        };
        let mut file = self.file.lock().map_err(|e| Error::internal(self.path.display(), e))?;
        file.seek(SeekFrom::Start(byte as u64)).and_then(|_| action(&mut file)).map_err(failed)
    }
}

impl Spill {
    /// Two files for batches of the given numbers of values: new ones, or those that a run has left, of which the one called `front` is whole.
    pub fn open(place: &Place, dtype: Dtype, batches: impl IntoIterator<Item = usize>, front: Option<usize>) -> Result<Self> {
        let Place { folder, name } = place;
        let part = |i: usize| Part::open(folder.join(format!("{name}.{i}.{dtype}")), front.is_none());
        let mut starts = vec![0];
        for len in batches {
            starts.push(starts[starts.len() - 1] + len);
        }
        let moved = vec![false; starts.len() - 1];
        Ok(Self { dtype, files: [part(0)?, part(1)?], front: front.unwrap_or(0), starts, moved })
    }

    fn holding(&self, index: usize) -> &Part {
        &self.files[if self.moved[index] { 1 - self.front } else { self.front }]
    }

    pub fn read(&self, index: usize) -> Result<Vec<f32>> {
        let (start, end) = (self.starts[index], self.starts[index + 1]);
        let mut bytes = vec![0; (end - start) * self.dtype.size()];
        self.holding(index).at(start * self.dtype.size(), |file| file.read_exact(&mut bytes))?;
        let mut values = vec![0.0; end - start];
        self.dtype.decode(&bytes, &mut values);
        Ok(values)
    }

    pub fn write(&mut self, index: usize, values: &[f32]) -> Result<()> {
        let start = self.starts[index];
        if values.len() != self.starts[index + 1] - start {
            return Err(Error::internal("activations", format!("{} values for batch {index}", values.len())));
        }
        self.moved[index] = true;
        self.holding(index).at(start * self.dtype.size(), |file| file.write_all(&self.dtype.to_bytes(values)))
    }

    /// What all batches are now is what the next block starts from.
    pub fn turn(&mut self) {
        if self.moved.iter().all(|moved| *moved) {
            self.front = 1 - self.front;
            self.moved.fill(false);
        }
    }

    /// Makes the states of all batches durable; which file holds them.
    pub fn sync(&self) -> Result<usize> {
        if self.moved.iter().any(|moved| *moved) {
            return Err(Error::internal("activations", "are in the middle of a block"));
        }
        self.files[self.front].at(0, |file| file.sync_data())?;
        Ok(self.front)
    }
}
