//! A complete folder that is not yet at its place: it is judged there, gets the report, and is moved.

use super::target::{self, Target};
use super::verify::verify_written;
use super::{Format, disk};
use crate::quant::Digest;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Component, Path};

/// A complete folder beside OUT. Dropping it removes it.
#[derive(Debug)]
pub struct Staged {
    target: Target,
    format: &'static Format,
    written: Written,
}

/// What a folder must read back as.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Quantized matrices, by module.
    pub linears: BTreeMap<String, Digest>,
    /// All other tensors, by name in the file.
    pub others: BTreeMap<String, Digest>,
}

/// What [`Staged::verify`] has compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Matrices whose codes, scales and offsets (or floats) are the solver's.
    pub linears: usize,
    /// Other tensors, byte for byte as written.
    pub tensors: usize,
}

impl Staged {
    pub(super) fn new(target: Target, format: &'static Format, written: Written) -> Self {
        Self { target, format, written }
    }

    /// The folder's present place.
    pub fn path(&self) -> &Path {
        self.target.staging()
    }

    /// Opens the folder anew, compares every matrix with what was put and every other tensor with the bytes that were written, and checks
    /// the rules of its runtimes, as [`super::verify()`] does. Every matrix is decoded once; one is in memory at a time.
    ///
    /// Errors: an output error naming file and tensor for the first difference; those of [`super::verify()`].
    pub fn verify(&self) -> Result<Verified> {
        verify_written(self.path(), &self.written)?;
        let verified = Verified { linears: self.written.linears.len(), tensors: self.written.others.len() };
        tracing::debug!("{}: {} matrices and {} other tensors read back as written", self.format.name, verified.linears, verified.tensors);
        Ok(verified)
    }

    /// Adds a file, such as the report.
    pub fn add(&self, name: &str, content: &[u8]) -> Result<()> {
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(Error::internal(name, "is no file name"));
        }
        disk::write_file(&self.path().join(name), content)
    }

    /// Adds `extra` files, such as the report, by name and content, and moves the folder to OUT in one step. An OUT that is to be
    /// overwritten is moved aside before and removed after.
    pub fn publish(self, extra: &[(&str, &[u8])]) -> Result<()> {
        extra.iter().try_for_each(|(name, content)| self.add(name, content))?;
        target::sync_folder(self.path())?;
        self.target.publish()
    }
}
