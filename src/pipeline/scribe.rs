//! A writer that works beside the computation: one matrix is encoded and written while the next one is solved.

use crate::export::{Format, Writer};
use crate::model::{Linear, ModelSpec};
use crate::quant::PackedLinear;
use crate::{Error, Result};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

pub(super) struct Scribe {
    spec: Arc<ModelSpec>,
    /// Gone while it is at work. An estimate has none.
    writer: Option<Writer>,
    at_work: Option<JoinHandle<(Writer, Result<()>)>>,
    /// What encoding holds besides, in bytes for every weight.
    scratch: usize,
    /// In an estimate, what the work would hold in memory.
    estimated: Option<(Arc<PackedLinear>, Vec<u8>)>,
}

impl Scribe {
    pub fn new(spec: &Arc<ModelSpec>, format: &Format, writer: Option<Writer>) -> Self {
        Self { spec: spec.clone(), writer, at_work: None, scratch: format.scratch, estimated: None }
    }

    /// The writer, once it is done with what it was given; `None` in an estimate.
    ///
    /// # Errors
    /// That of the last write.
    pub fn writer(&mut self) -> Result<Option<&mut Writer>> {
        self.estimated = None;
        if let Some(work) = self.at_work.take() {
            let (writer, result) = work.join().map_err(|_| Error::internal("writer", "its thread broke down"))?;
            self.writer = Some(writer);
            result?;
        }
        Ok(self.writer.as_mut())
    }

    /// Begins to write a matrix, once the last one is written.
    ///
    /// # Errors
    /// That of the last write; output if no thread can be started.
    pub fn put_linear(&mut self, linear: &Linear, packed: &Arc<PackedLinear>) -> Result<()> {
        self.writer()?;
        let packed = packed.clone();
        let Some(mut writer) = self.writer.take() else {
            let scratch = Vec::with_capacity(self.scratch * packed.d_out * packed.d_in);
            self.estimated = Some((packed, scratch));
            return Ok(());
        };
        let (spec, linear) = (self.spec.clone(), linear.clone());
        let work = move || {
            let result = writer.put_linear(&spec, &linear, &packed);
            (writer, result)
        };
        let thread = thread::Builder::new().name("writer".into()).spawn(work);
        self.at_work = Some(thread.map_err(|e| Error::output("writer", "no thread can be started").caused_by(e))?);
        Ok(())
    }

    /// The writer at the end of the run.
    ///
    /// # Errors
    /// That of the last write.
    pub fn into_writer(mut self) -> Result<Option<Writer>> {
        self.writer()?;
        Ok(self.writer.take())
    }
}

impl Drop for Scribe {
    /// What is written to may go away after this.
    fn drop(&mut self) {
        if let Some(work) = self.at_work.take() {
            // A run that fails tells of its own error.
            drop(work.join());
        }
    }
}
