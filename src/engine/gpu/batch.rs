//! The submission under construction: encoded commands, the parameters of their launches, and what to read back after it.

use super::context::Context;
use crate::{Error, Result};
use std::collections::HashSet;

/// Launches per submission: the number of slots in the uniform buffer.
const SLOTS: usize = 1024;

/// Arithmetic per submission. Drivers reset a GPU that works on one submission for seconds; this much takes a slow one a tenth of
/// a second, and a fast one long enough to hide the cost of submitting.
const MAX_FLOPS: f64 = 5e10;

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
    first: Option<&'static str>,
    last: Option<&'static str>,
}

impl Batch {
    pub fn new(context: &Context) -> Result<Self> {
        // A slot holds any parameter struct (at most 128 bytes, see `slot`) and starts where the device wants it.
        let slot_bytes = (context.device.limits().min_uniform_buffer_offset_alignment as usize).max(256);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let uniforms = context.buffer("kernel parameters", (SLOTS * slot_bytes) as u64, usage)?;
        Ok(Self {
            encoder: None,
            uniforms,
            slot_bytes,
            params: Vec::new(),
            used: HashSet::new(),
            flops: 0.0,
            waiting: 0,
            submissions: 0,
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
        self.encoder.get_or_insert_with(|| context.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None }))
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
        let commands = self.encoder.take();
        self.submissions += 1;
        let result = context.guarded(
            || self.subject(),
            || {
                if !self.params.is_empty() {
                    context.queue.write_buffer(&self.uniforms, 0, &self.params);
                }
                context.queue.submit(commands.map(wgpu::CommandEncoder::finish));
            },
        );
        self.params.clear();
        self.used.clear();
        self.flops = 0.0;
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

    /// Waits until the device has done all that was submitted.
    pub fn wait(&mut self, context: &Context, subject: &str) -> Result<()> {
        self.waiting = 0;
        context.wait(|| subject.to_owned())
    }
}
