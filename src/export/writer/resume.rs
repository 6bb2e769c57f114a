//! What a writer has been given since it was last asked: a run that goes on where another was tells it, and need not give it again.

use super::Writer;
use crate::export::disk::cannot_write;
use crate::model::{Linear, ModelSpec};
use crate::quant::Digest;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// What lies in the files, with what it must read back as.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Made {
    /// Quantized matrices, by module.
    linears: Vec<(String, Digest)>,
    /// Tensors that a transform changed, by name in the file.
    tensors: Vec<(String, Digest)>,
}

impl Writer {
    /// What was put since the last call, durable on disk now.
    ///
    /// # Errors
    /// Output, if it cannot be made so.
    pub fn made(&mut self) -> Result<Made> {
        for (path, file) in &self.files {
            file.sync_data().map_err(|e| cannot_write(path, e))?;
        }
        let (linears, tensors) = std::mem::take(&mut self.fresh);
        let linear = |module: String| self.written.linears.get(&module).map(|digest| (module.clone(), *digest));
        let tensor = |name: String| self.written.others.get(&name).map(|digest| (name.clone(), *digest));
        Ok(Made { linears: linears.into_iter().filter_map(linear).collect(), tensors: tensors.into_iter().filter_map(tensor).collect() })
    }

    /// Takes what an earlier run has put into the same files.
    ///
    /// # Errors
    /// Input, if this is none of what is to be written.
    pub fn restore(&mut self, spec: &ModelSpec, made: &Made) -> Result<()> {
        let unknown = |name: &String| Error::input(name, "is in the journal of an unfinished run and not in this model; use --restart");
        for (module, digest) in &made.linears {
            let linear = spec.matrices().find(|l| l.module == *module).filter(|_| self.missing.remove(module));
            self.mark(spec, linear.ok_or_else(|| unknown(module))?, true)?;
            self.written.linears.insert(module.clone(), *digest);
        }
        for (name, digest) in &made.tensors {
            self.places.get_mut(name).ok_or_else(|| unknown(name))?.written = true;
            self.written.others.insert(name.clone(), *digest);
        }
        Ok(())
    }

    /// Takes back what was put since [`Self::made`]: it comes again.
    ///
    /// # Errors
    /// Internal, if that is not in the model.
    pub fn forget(&mut self, spec: &ModelSpec) -> Result<()> {
        let (linears, tensors) = std::mem::take(&mut self.fresh);
        for module in linears {
            let linear = spec.matrices().find(|l| l.module == module);
            self.mark(spec, linear.ok_or_else(|| Error::internal(&module, "is not in the model"))?, false)?;
            self.written.linears.remove(&module);
            self.missing.insert(module);
        }
        for name in tensors {
            self.places.entry(name.clone()).and_modify(|place| place.written = false);
            self.written.others.remove(&name);
        }
        Ok(())
    }

    /// Marks the tensors of a quantized matrix as written or not.
    fn mark(&mut self, spec: &ModelSpec, linear: &Linear, written: bool) -> Result<()> {
        let lattice = self.lattice(linear)?;
        for tensor in self.names.rename((self.format.tensors)(spec, linear, lattice)) {
            self.places.entry(tensor.name).and_modify(|place| place.written = written);
        }
        Ok(())
    }
}
