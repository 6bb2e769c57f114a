//! A complete folder that is not yet at its place: it is judged there, gets the report, and is moved.

use super::target::{self, Target};
use super::{Format, disk, open_packed};
use crate::quant::Digest;
use crate::{Error, Result};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::path::{Component, Path};

/// A complete folder beside OUT. Dropping it removes it.
#[derive(Debug)]
pub struct Staged {
    target: Target,
    format: &'static Format,
    linears: BTreeMap<String, Digest>,
    others: BTreeMap<String, Digest>,
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
    pub(super) fn new(
        target: Target,
        format: &'static Format,
        linears: BTreeMap<String, Digest>,
        others: BTreeMap<String, Digest>,
    ) -> Self {
        Self { target, format, linears, others }
    }

    /// The folder's present place.
    pub fn path(&self) -> &Path {
        self.target.staging()
    }

    /// Opens the folder anew and compares every matrix with what was put, and every other tensor with the bytes that were written. One matrix
    /// is in memory at a time.
    ///
    /// Errors: an output error naming file and tensor for the first difference; those of reading the folder.
    pub fn verify(&self) -> Result<Verified> {
        let reader = open_packed(self.path())?;
        let subject = |name: &str| format!("{}: tensor {name}", self.path().display());
        let differs = |name: &str, than: &str| Error::output(subject(name), format!("reads back different from {than}"));
        let mut linears = 0;
        for linear in reader.spec().matrices() {
            let Some(put) = self.linears.get(&linear.module) else { continue };
            if *put != reader.fingerprint(linear)? {
                return Err(differs(&linear.weight(), "what was decided"));
            }
            linears += 1;
        }
        if linears != self.linears.len() {
            return Err(Error::output(self.path().display(), format!("holds {linears} of {} matrices", self.linears.len())));
        }
        for (name, put) in &self.others {
            if <Digest>::from(Sha256::digest(reader.stored(name)?)) != *put {
                return Err(differs(name, "what was to be written"));
            }
        }
        tracing::debug!("{}: {linears} matrices and {} other tensors read back as written", self.format.name, self.others.len());
        Ok(Verified { linears, tensors: self.others.len() })
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
