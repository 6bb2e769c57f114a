//! Runs recordings on a GPU, command by command.

mod launch;

use super::batch::{Batch, MAX_LAUNCH};
use super::choice::{Ability, Choice, Choices, Variants};
use super::context::Context;
use super::pipelines::Pipelines;
use super::timer::Timer;
use crate::engine::recording::{Command, Dispatch, Downloads, Recording};
use crate::engine::{Engine, Limits, Profile, RawBuffer};
use crate::{Error, Result};
use std::collections::HashMap;
use std::time::Instant;

/// Launches of a recording that can be timed; further ones are not.
const TIMED: u32 = 1024;

/// A read-back that is encoded: which slot it fills, and the buffer that can be mapped.
struct Readback {
    slot: usize,
    staging: wgpu::Buffer,
    bytes: usize,
}

/// Runs recordings through wgpu.
#[derive(Debug)]
pub struct GpuEngine {
    context: Context,
    choices: Choices,
    pipelines: Pipelines,
    buffers: HashMap<u64, wgpu::Buffer>,
    /// What recordings may ask for in one piece: the device's limit, or less.
    max_buffer: u64,
    /// Launches of more arithmetic are parted.
    max_launch: f64,
    /// Bound where an optional input is absent; such bindings are read-only.
    dummy: Option<wgpu::Buffer>,
    batch: Option<Batch>,
    /// While launches are timed.
    timer: Option<Timer>,
    profile: Profile,
    /// Is every launch waited for, so that its time is known?
    timed: bool,
}

impl GpuEngine {
    pub(super) fn new(context: Context) -> Self {
        let max_buffer = context.max_buffer;
        Self {
            choices: Choices::new(context.ability.clone()),
            context,
            max_buffer,
            max_launch: MAX_LAUNCH,
            pipelines: Pipelines::default(),
            buffers: HashMap::new(),
            dummy: None,
            batch: None,
            timer: None,
            profile: Profile::default(),
            timed: false,
        }
    }

    /// Refuses buffers above `bytes`, as a smaller GPU would: for tests of the splitting.
    pub fn with_max_buffer(mut self, bytes: u64) -> Self {
        self.max_buffer = self.max_buffer.min(bytes);
        self
    }

    /// Parts launches of more arithmetic, for tests.
    pub fn with_max_launch(mut self, flops: f64) -> Self {
        self.max_launch = flops;
        self
    }

    /// Runs these variants instead of the stable ones.
    pub fn with_variants(mut self, variants: Variants) -> Self {
        self.choices.variants = variants;
        self
    }

    /// Runs a kernel's base shader with these tuning constants instead of the registry's; names that it does not have are ignored.
    pub fn with_tiles(mut self, kernel: &'static str, tiles: &[(&str, u32)]) -> Self {
        for f16 in [false, true] {
            self.set_tiles(kernel, f16, tiles.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect());
        }
        self
    }

    /// Launches with operands of this type run with these constants.
    pub(super) fn set_tiles(&mut self, kernel: &'static str, f16_operands: bool, tiles: Vec<(String, u32)>) {
        self.choices.set_tiles((kernel, None, f16_operands), tiles);
    }

    /// What the tuner's picks are about: adapter, backend, and the driver with its version.
    pub(super) fn subject(&self) -> &str {
        &self.context.subject
    }

    /// Runs a recording and returns the seconds that its launches, a thousand at most, took on the device. Where the adapter has no timestamps
    /// it is wall-clock time, everything else in the recording and the way to the device included.
    ///
    /// # Errors
    /// As `run`.
    pub fn time(&mut self, recording: Recording<'_>) -> Result<f64> {
        self.finish()?;
        if self.context.timestamps {
            self.timer = Some(Timer::new(&self.context, TIMED)?);
        }
        let start = Instant::now();
        let ran = self.run(recording).and_then(|_| self.finish());
        let timer = self.timer.take();
        ran?;
        match timer {
            Some(timer) => timer.read(&self.context),
            None => Ok(start.elapsed().as_secs_f64()),
        }
    }

    /// Submits what recordings have left to be submitted with what comes next, and waits for it.
    fn finish(&mut self) -> Result<()> {
        match &mut self.batch {
            Some(batch) => {
                let subject = batch.subject();
                batch.submit(&self.context)?;
                batch.wait(&self.context, &subject)
            }
            None => self.context.wait(|| "what runs before".to_owned()),
        }
    }

    /// Variants add in another order, so runs with others are other runs.
    fn variants(&self) -> &'static str {
        match self.choices.variants {
            Variants::None => ", base shaders",
            Variants::Stable => "",
            Variants::All => ", all variants",
        }
    }

    /// Has the device been lost, so that nothing more can run on it?
    pub(super) fn is_lost(&self) -> bool {
        self.context.check(String::new).is_err()
    }

    /// What the adapter can do that not every one can.
    pub fn ability(&self) -> &Ability {
        &self.context.ability
    }

    /// What would run for a launch.
    pub fn choice<'a>(&self, dispatch: &'a Dispatch) -> Choice<'a> {
        self.choices.of(dispatch)
    }

    /// Drops the device as a driver reset would: for tests of what happens then.
    pub fn lose_device(&self) {
        self.context.device.destroy();
    }

    fn buffer(&self, raw: RawBuffer) -> Result<&wgpu::Buffer> {
        self.buffers.get(&raw.id).ok_or_else(|| Error::internal("buffer", format!("{raw:?} is not allocated (freed too early?)")))
    }

    fn execute(&mut self, command: Command<'_>, batch: &mut Batch, readbacks: &mut Vec<Readback>) -> Result<()> {
        match command {
            Command::Alloc { buffer, zeroed, label } => self.allocate(buffer, zeroed, label, batch),
            Command::Upload { buffer, data } => self.upload(buffer, &data, batch),
            Command::Dispatch(dispatch) => self.dispatch(&dispatch, batch),
            Command::Copy { from, to } => self.copy(from, to, batch),
            Command::Download { buffer, slot } => {
                readbacks.push(self.download(buffer, slot, batch)?);
                Ok(())
            }
            Command::Free { buffer } => {
                self.buffers.remove(&buffer.id).ok_or_else(|| Error::internal("free", format!("{buffer:?} is not allocated")))?;
                self.profile.free(buffer.id);
                // The memory comes back when the launches that use it are done.
                if batch.uses(buffer.id) { batch.hold(&self.context, buffer.bytes() as u64) } else { Ok(()) }
            }
        }
    }

    fn allocate(&mut self, raw: RawBuffer, zeroed: bool, label: &str, batch: &mut Batch) -> Result<()> {
        use wgpu::BufferUsages as Usage;
        let bytes = raw.bytes() as u64;
        if bytes > self.max_buffer {
            let message = format!("{bytes} bytes exceed this device's limit of {} bytes per buffer", self.max_buffer);
            return Err(Error::device(format!("buffer {label}"), message));
        }
        let buffer = self.context.buffer(label, bytes, Usage::STORAGE | Usage::COPY_SRC | Usage::COPY_DST)?;
        if zeroed {
            batch.encoder(&self.context, [raw.id]).clear_buffer(&buffer, 0, None);
        }
        self.buffers.insert(raw.id, buffer);
        self.profile.allocate(raw.id, bytes);
        Ok(())
    }

    fn upload(&mut self, raw: RawBuffer, data: &[u8], batch: &mut Batch) -> Result<()> {
        /// Bytes per host write: bounds the staging memory.
        const PIECE: usize = 64 << 20;
        let buffer = self.buffer(raw)?;
        if data.len() > raw.bytes() {
            return Err(Error::internal("upload", "longer than its buffer"));
        }
        // Host writes take effect before the encoder that is under construction.
        if batch.uses(raw.id) {
            batch.submit(&self.context)?;
        }
        let (words, tail) = data.split_at(data.len() / 4 * 4);
        let mut last = [0u8; 4];
        last[..tail.len()].copy_from_slice(tail);
        let pieces = words.chunks(PIECE).enumerate().map(|(i, piece)| (i * PIECE, piece));
        let tail = (!tail.is_empty()).then_some((words.len(), last.as_slice()));
        for (offset, piece) in pieces.chain(tail) {
            let write = || self.context.queue.write_buffer(buffer, offset as u64, piece);
            self.context.guarded(|| "upload".to_owned(), write)?;
            batch.hold(&self.context, piece.len() as u64)?;
        }
        self.profile.uploaded_bytes += data.len() as u64;
        Ok(())
    }

    fn copy(&mut self, from: RawBuffer, to: RawBuffer, batch: &mut Batch) -> Result<()> {
        let (source, target) = (self.buffer(from)?, self.buffer(to)?);
        if from.id != to.id && from.bytes() > 0 {
            batch.encoder(&self.context, [from.id, to.id]).copy_buffer_to_buffer(source, 0, target, 0, from.bytes() as u64);
        }
        Ok(())
    }

    fn download(&mut self, raw: RawBuffer, slot: usize, batch: &mut Batch) -> Result<Readback> {
        let bytes = raw.bytes();
        let staging = self.context.buffer("read-back", bytes as u64, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)?;
        let source = self.buffer(raw)?;
        if bytes > 0 {
            batch.encoder(&self.context, [raw.id]).copy_buffer_to_buffer(source, 0, &staging, 0, bytes as u64);
        }
        self.profile.downloaded_bytes += bytes as u64;
        Ok(Readback { slot, staging, bytes })
    }

    /// Waits for the device and copies what was asked for. Where nothing was, launches stay with those that follow: what leads up to a
    /// read-back is one submission, or as many as its work is long.
    fn read_back(&self, readbacks: Vec<Readback>, batch: &mut Batch, out: &mut Downloads) -> Result<()> {
        if readbacks.is_empty() {
            return Ok(());
        }
        let subject = batch.subject();
        batch.submit(&self.context)?;
        let (sender, mapped) = std::sync::mpsc::channel();
        let map = || {
            for readback in &readbacks {
                let sender = sender.clone();
                // A receiver that is gone means that another mapping failed, which is reported.
                readback.staging.map_async(wgpu::MapMode::Read, .., move |result| drop(sender.send(result)));
            }
            let sender = sender.clone();
            batch.map(move |result| drop(sender.send(result)));
        };
        self.context.guarded(|| subject.clone(), map)?;
        drop(sender);
        batch.wait(&self.context, &subject)?;
        let mapped: Result<(), _> = mapped.into_iter().collect();
        let ran = batch.check(&subject, mapped.is_ok());
        let failed = |e: String| Error::device(&subject, "its results cannot be read back").caused_by(e);
        mapped.map_err(|e| failed(e.to_string()))?;
        ran?;
        for readback in readbacks {
            let view = readback.staging.get_mapped_range(..).map_err(|e| failed(e.to_string()))?;
            out.set(readback.slot, bytemuck::pod_collect_to_vec(&view[..readback.bytes]));
        }
        Ok(())
    }

    fn run_all(&mut self, commands: Vec<Command<'_>>, batch: &mut Batch, out: &mut Downloads) -> Result<()> {
        let mut readbacks = Vec::new();
        for command in commands {
            self.execute(command, batch, &mut readbacks)?;
        }
        self.read_back(readbacks, batch, out)
    }
}

impl Engine for GpuEngine {
    fn describe(&self) -> String {
        format!("{}{}", self.context.name, self.variants())
    }

    fn fingerprint(&self) -> String {
        format!("{}{}", self.context.subject, self.variants())
    }

    fn limits(&self) -> Limits {
        Limits { max_buffer: self.max_buffer, f16_operands: self.context.f16 }
    }

    fn run(&mut self, recording: Recording<'_>) -> Result<Downloads> {
        let (commands, downloads) = recording.into_commands()?;
        let mut out = Downloads::new(downloads);
        let mut batch = match self.batch.take() {
            Some(batch) => batch,
            None => Batch::new(&self.context)?,
        };
        let result = self.run_all(commands, &mut batch, &mut out);
        // Launches of earlier recordings may wait in the batch; a broken one has nothing to save.
        if result.is_err() && batch.submit(&self.context).is_err() {
            batch.discard();
        }
        self.profile.submissions = batch.submissions;
        self.batch = Some(batch);
        result.map(|()| out)
    }

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn time_kernels(&mut self) {
        self.timed = true;
    }

    fn profile_mut(&mut self) -> &mut Profile {
        &mut self.profile
    }
}
