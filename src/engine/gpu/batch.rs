//! The submission under construction: encoded commands, the parameters of their launches, and what to read back after it.

use super::context::Context;
use crate::{Error, Result};
use std::collections::HashSet;

/// Launches per submission: the number of slots in the uniform buffer.
const SLOTS: usize = 1024;

/// Arithmetic per submission. Drivers reset a GPU that works on one submission for seconds; this much takes a slow one a tenth of
/// a second, and a fast one long enough to hide the cost of submitting.
const MAX_FLOPS: f64 = 5e10;

/// Arithmetic per launch, where it can be parted: a product of a large model's widths alone would be seconds of work for an integrated GPU, and this
/// much takes one of 1 TFLOP/s a second. Half of it, the least that a part has, still is over four hundred tiles for those that are fast.
pub(super) const MAX_LAUNCH: f64 = 4e11;

/// Bytes of staging memory, or of buffers that are freed but still in use, before the engine waits for the device.
const MAX_WAITING: u64 = 256 << 20;

#[derive(Debug)]
pub(super) struct Batch {
    encoder: Option<wgpu::CommandEncoder>,
    uniforms: wgpu::Buffer,
    slot_bytes: usize,
    params: Vec<u8>,
    /// Buffers that the encoder touches.
    used: HashSet<u64>,
    flops: f64,
    waiting: u64,
    /// Submissions so far.
    pub submissions: u64,
    /// What the last `SLOTS` submissions left when they ran, each its number. Drivers are to say when they fail, and the one for Metal does not
    /// pass on what its command buffers say: without this, buffers that were never written would count as results.
    ran: wgpu::Buffer,
    /// Submissions that have been seen to have run.
    checked: u64,
    first: Option<&'static str>,
    last: Option<&'static str>,
}

impl Batch {
    pub fn new(context: &Context) -> Result<Self> {
        // A slot holds any parameter struct (at most 128 bytes, see `slot`) and starts where the device wants it.
        let slot_bytes = (context.device.limits().min_uniform_buffer_offset_alignment as usize).max(256);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        // One more place, for the submission's number behind the parameters.
        let uniforms = context.buffer("kernel parameters", ((SLOTS + 1) * slot_bytes) as u64, usage)?;
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let ran = context.buffer("submissions that ran", 4 * SLOTS as u64, usage)?;
        Ok(Self {
            encoder: None,
            uniforms,
            slot_bytes,
            params: Vec::new(),
            used: HashSet::new(),
            flops: 0.0,
            waiting: 0,
            submissions: 0,
            ran,
            checked: 0,
            first: None,
            last: None,
        })
    }

    /// What a failure of the submission is about: its first and last kernel.
    pub fn subject(&self) -> String {
        match (self.first, self.last) {
            (Some(first), Some(last)) if first != last => format!("kernels {first} to {last}"),
            (Some(first), _) => format!("kernel {first}"),
            _ => "copies to or from the device".to_owned(),
        }
    }

    /// The encoder, for commands that touch `buffers`.
    pub fn encoder(&mut self, context: &Context, buffers: impl IntoIterator<Item = u64>) -> &mut wgpu::CommandEncoder {
        self.used.extend(buffers);
        self.encoder.get_or_insert_with(|| new_encoder(context))
    }

    pub fn uses(&self, buffer: u64) -> bool {
        self.used.contains(&buffer)
    }

    /// Puts a launch's parameters into the next slot and returns what to bind. Call `make_room` before.
    pub fn slot(&mut self, name: &'static str, params: &[u8], flops: f64) -> Result<wgpu::BufferBinding<'_>> {
        if params.len() > self.slot_bytes {
            return Err(Error::internal(format!("kernel {name}"), format!("{} bytes of parameters", params.len())));
        }
        let offset = self.params.len() as u64;
        self.params.extend_from_slice(params);
        self.params.resize(offset as usize + self.slot_bytes, 0);
        self.flops += flops;
        self.first.get_or_insert(name);
        self.last = Some(name);
        // Uniform structs are padded to 16 bytes.
        let size = wgpu::BufferSize::new((params.len() as u64).next_multiple_of(16));
        Ok(wgpu::BufferBinding { buffer: &self.uniforms, offset, size })
    }

    /// Submits when the next launch would not fit.
    pub fn make_room(&mut self, context: &Context) -> Result<()> {
        if self.params.len() >= SLOTS * self.slot_bytes || self.flops > MAX_FLOPS { self.submit(context) } else { Ok(()) }
    }

    /// Counts memory that only a finished submission gives back; waits when it is much.
    pub fn hold(&mut self, context: &Context, bytes: u64) -> Result<()> {
        self.waiting += bytes;
        if self.waiting > MAX_WAITING {
            let subject = self.subject();
            self.submit(context)?;
            self.wait(context, &subject)?;
        }
        Ok(())
    }

    /// Submits what is encoded, and host writes that wait for a submission.
    pub fn submit(&mut self, context: &Context) -> Result<()> {
        self.submissions += 1;
        let (from, to) = (self.params.len() as u64, 4 * place_of(self.submissions) as u64);
        self.params.extend_from_slice(&number(self.submissions).to_le_bytes());
        let mut commands = self.encoder.take().unwrap_or_else(|| new_encoder(context));
        let result = context.guarded(
            || self.subject(),
            || {
                context.queue.write_buffer(&self.uniforms, 0, &self.params);
                commands.copy_buffer_to_buffer(&self.uniforms, from, &self.ran, to, 4);
                context.queue.submit([commands.finish()]);
            },
        );
        self.params.clear();
        self.used.clear();
        self.flops = 0.0;
        if result.is_err() {
            // It has not run, and the next one takes its number.
            self.submissions -= 1;
        }
        result?;
        // Without this, callbacks and freed memory would pile up until the next wait.
        context.poll(|| self.subject())?;
        (self.first, self.last) = (None, None);
        Ok(())
    }

    /// Forgets what was not submitted, after an error: the encoder may be broken.
    pub fn discard(&mut self) {
        self.encoder = None;
        self.params.clear();
        self.used.clear();
        self.flops = 0.0;
        (self.first, self.last) = (None, None);
    }

    /// Begins to map what `check` reads, after a submission and before the wait for it.
    pub fn map(&self, done: impl FnOnce(Result<(), wgpu::BufferAsyncError>) + Send + 'static) {
        self.ran.map_async(wgpu::MapMode::Read, .., done);
    }

    /// Have all submissions run? After the wait; `mapped` says whether what `map` began came about.
    ///
    /// Errors: device if one has not.
    pub fn check(&mut self, subject: &str, mapped: bool) -> Result<()> {
        let view = if mapped { self.ran.get_mapped_range(..).ok() } else { None };
        let missing = view.map(|view| missing(bytemuck::cast_slice(&view), self.checked, self.submissions));
        self.ran.unmap();
        self.checked = self.submissions;
        match missing {
            Some(None) => Ok(()),
            Some(Some(number)) => Err(Error::device(
                subject,
                format!(
                    "submission {number} has not run, and the driver reports no error (out of memory, or a launch that took too long); close \
                     other programs, lower --max-vram or use --device cpu"
                ),
            )),
            None => Err(Error::device(subject, "what has run cannot be read back")),
        }
    }

    /// Waits until the device has done all that was submitted.
    pub fn wait(&mut self, context: &Context, subject: &str) -> Result<()> {
        self.waiting = 0;
        context.wait(|| subject.to_owned())
    }
}

fn new_encoder(context: &Context) -> wgpu::CommandEncoder {
    context.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None })
}

/// What submission `index` leaves in its place: never 0, which is there before.
fn number(index: u64) -> u32 {
    index as u32 | 1 << 31
}

fn place_of(index: u64) -> usize {
    (index % SLOTS as u64) as usize
}

/// The first submission after `checked`, up to `last`, whose number is not in its place; those whose place another one has taken count as seen.
fn missing(ran: &[u32], checked: u64, last: u64) -> Option<u64> {
    let oldest = (last + 1).saturating_sub(SLOTS as u64);
    ((checked + 1).max(oldest)..=last).find(|index| ran[place_of(*index)] != number(*index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_submission_that_did_not_run_is_missed() {
        let mut ran = vec![0; SLOTS];
        let mut run = |index: u64| {
            ran[place_of(index)] = number(index);
            ran.clone()
        };
        assert_eq!(missing(&run(1), 0, 1), None);
        assert_eq!(missing(&run(3), 1, 3), Some(2));
        // What was seen or is overwritten is not asked for again, and what an earlier round left does not count.
        let all = (4..=1500).map(&mut run).last().unwrap();
        assert_eq!((missing(&all, 3, 1500), missing(&all, 3, 1501)), (None, Some(1501)));
    }
}
