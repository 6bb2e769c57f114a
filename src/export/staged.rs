//! A complete folder that is not yet at its place: it is judged there, gets the report, and is moved.

use super::target::{self, Target};
use super::{Format, open_packed, writer};
use crate::model::Checkpoint;
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
    replaced: BTreeMap<String, Digest>,
}

/// What [`Staged::verify`] has compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Linears whose codes, scales and zero points (or floats) are the solver's.
    pub linears: usize,
    /// Other tensors, byte for byte as in the model or as put.
    pub tensors: usize,
}

impl Staged {
    pub(super) fn new(
        target: Target,
        format: &'static Format,
        linears: BTreeMap<String, Digest>,
        replaced: BTreeMap<String, Digest>,
    ) -> Self {
        Self { target, format, linears, replaced }
    }

    /// The folder's present place.
    pub fn path(&self) -> &Path {
        self.target.staging()
    }

    /// Opens the folder anew and compares every linear with what was put, and every other tensor with the model's bytes. One linear is
    /// in memory at a time.
    ///
    /// Errors: an output error naming file and tensor for the first difference; those of reading the folder.
    pub fn verify(&self, source: &Checkpoint) -> Result<Verified> {
        let reader = open_packed(self.path())?;
        let written = Checkpoint::open(self.path())?;
        let spec = written.spec();
        let differs = |name: &str, than: &str| Error::output(written.subject(name), format!("reads back different from {than}"));
        let mut own = BTreeMap::new();
        for linear in spec.matrices() {
            let Some(put) = self.linears.get(&linear.module) else { continue };
            if *put != reader.fingerprint(linear)? {
                return Err(differs(&format!("{}.weight", linear.module), "what was decided"));
            }
            own.insert(linear.weight(), linear);
        }
        let mut tensors = 0;
        for name in source.names().filter(|n| !own.contains_key(*n)) {
            let (raw, original) = (written.raw(name)?, source.raw(name)?);
            let same = match self.replaced.get(name) {
                Some(digest) => <Digest>::from(Sha256::digest(raw.bytes)) == *digest,
                None => raw.bytes == original.bytes,
            };
            if !same || raw.shape != original.shape || raw.dtype != original.dtype {
                return Err(differs(name, "what was to be written"));
            }
            tensors += 1;
        }
        if own.len() != self.linears.len() {
            return Err(Error::output(self.path().display(), format!("holds {} of {} linears", own.len(), self.linears.len())));
        }
        tracing::debug!("{}: {} linears and {tensors} other tensors read back as written", self.format.name, own.len());
        Ok(Verified { linears: own.len(), tensors })
    }

    /// Adds `extra` files, such as the report, by name and content, and moves the folder to OUT in one step. An OUT that is to be
    /// overwritten is moved aside before and removed after.
    pub fn publish(self, extra: &[(&str, &[u8])]) -> Result<()> {
        for (name, content) in extra {
            let mut parts = Path::new(name).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(Error::internal(name, "is no file name"));
            }
            writer::write_file(&self.path().join(name), content)?;
        }
        target::sync_folder(self.path())?;
        self.target.publish()
    }
}
