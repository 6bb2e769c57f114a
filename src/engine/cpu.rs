//! The native engine: buffers in RAM, kernels as Rust functions over all cores.

use super::buffer::{Element, RawBuffer, Scalar};
use super::kernel::{Constants, Launch, read_params};
use super::profile::Profile;
use super::recording::{Bytes, Command, Dispatch, Downloads, Recording, last_uses};
use super::{Engine, Limits};
use crate::{Error, Result};
use std::cell::{Ref, RefCell, RefMut};
use std::collections::HashMap;
use std::time::Instant;

type Words = RefCell<Vec<u32>>;

/// Runs recordings on this machine's cores.
#[derive(Debug, Default)]
pub struct CpuEngine {
    buffers: HashMap<u64, Words>,
    profile: Profile,
    max_buffer: Option<u64>,
    poison: bool,
}

impl CpuEngine {
    pub fn new() -> Self {
        Self::default()
    }

    /// Refuses buffers above `bytes`, as a GPU would: for tests of the splitting.
    pub fn with_max_buffer(bytes: u64) -> Self {
        Self { max_buffer: Some(bytes), ..Self::default() }
    }

    /// Fills new buffers with NaN patterns, so that a read before the first write shows: for tests.
    pub fn poisoned() -> Self {
        Self { poison: true, ..Self::default() }
    }

    fn buffer(&self, raw: RawBuffer) -> Result<&Words> {
        self.buffers.get(&raw.id).ok_or_else(|| Error::internal("buffer", format!("{raw:?} is not allocated (freed too early?)")))
    }

    fn allocate(&mut self, buffer: RawBuffer, zeroed: bool, label: &str) -> Result<()> {
        let bytes = buffer.bytes() as u64;
        self.check_size(bytes, label)?;
        // Zeros that the system makes when they are first touched, by the kernel and on its cores.
        let mut words = bytemuck::allocation::try_zeroed_vec::<u32>(buffer.bytes() / 4)
            .map_err(|()| Error::device(format!("buffer {label}"), format!("out of memory: {bytes} bytes")))?;
        if self.poison && !zeroed {
            words.fill(0x7fc0_7fc0);
        }
        self.buffers.insert(buffer.id, RefCell::new(words));
        self.profile.allocate(buffer.id, bytes);
        Ok(())
    }

    /// A new buffer out of what is uploaded to it, in the same memory if that was given away.
    fn fill(&mut self, buffer: RawBuffer, data: Bytes<'_>, label: &str) -> Result<()> {
        let bytes = buffer.bytes() as u64;
        self.check_size(bytes, label)?;
        self.profile.uploaded_bytes += data.len() as u64;
        let words = data.into_words();
        if words.len() != buffer.bytes() / 4 {
            return Err(Error::internal("upload", format!("{} words into buffer {label} of {bytes} bytes", words.len())));
        }
        self.buffers.insert(buffer.id, RefCell::new(words));
        self.profile.allocate(buffer.id, bytes);
        Ok(())
    }

    fn check_size(&self, bytes: u64, label: &str) -> Result<()> {
        if bytes > self.limits().max_buffer {
            return Err(Error::device(format!("buffer {label}"), format!("{bytes} bytes exceed this engine's limit")));
        }
        Ok(())
    }

    fn execute_all(&mut self, commands: Vec<Command<'_>>, mut out: Downloads) -> Result<Downloads> {
        let last = last_uses(&commands);
        let mut commands = commands.into_iter().zip(last).peekable();
        while let Some((command, last)) = commands.next() {
            match (command, commands.peek()) {
                (Command::Alloc { buffer, label, .. }, Some((Command::Upload { buffer: filled, .. }, _))) if buffer.id == filled.id => {
                    if let Some((Command::Upload { data, .. }, _)) = commands.next() {
                        self.fill(buffer, data, label)?;
                    }
                }
                (command, _) => self.execute(command, last, &mut out)?,
            }
        }
        Ok(out)
    }

    /// `last`: is a buffer that is brought back not needed afterwards?
    fn execute(&mut self, command: Command<'_>, last: bool, out: &mut Downloads) -> Result<()> {
        match command {
            Command::Alloc { buffer, zeroed, label } => self.allocate(buffer, zeroed, label)?,
            Command::Upload { buffer, data } => {
                let mut words = self.buffer(buffer)?.borrow_mut();
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
                let target = bytes.get_mut(..data.len()).ok_or_else(|| Error::internal("upload", "longer than its buffer"))?;
                target.copy_from_slice(&data);
                drop(words);
                self.profile.uploaded_bytes += data.len() as u64;
            }
            Command::Dispatch(dispatch) => self.launch(&dispatch)?,
            Command::Copy { from, to } => {
                let from = self.buffer(from)?.borrow();
                self.buffer(to)?.borrow_mut().copy_from_slice(&from);
            }
            Command::Download { buffer, slot } => {
                let words = self.buffer(buffer)?;
                out.set(slot, if last { words.take() } else { words.borrow().clone() });
                self.profile.downloaded_bytes += buffer.bytes() as u64;
            }
            Command::Free { buffer } => {
                self.buffers.remove(&buffer.id).ok_or_else(|| Error::internal("free", format!("{buffer:?} is not allocated")))?;
                self.profile.free(buffer.id);
            }
        }
        Ok(())
    }

    fn launch(&mut self, dispatch: &Dispatch) -> Result<()> {
        let start = Instant::now();
        let buffers = dispatch
            .buffers
            .iter()
            .map(|raw| if raw.is_none() { Ok(None) } else { self.buffer(*raw).map(Some) })
            .collect::<Result<Vec<_>>>()?;
        (dispatch.kernel.native)(&Args { dispatch, buffers })?;
        self.profile.launch(dispatch, start.elapsed().as_secs_f64());
        Ok(())
    }
}

impl Engine for CpuEngine {
    fn describe(&self) -> String {
        format!("native engine on {} CPU threads", rayon::current_num_threads())
    }

    fn limits(&self) -> Limits {
        Limits { max_buffer: self.max_buffer.unwrap_or(u64::MAX), f16_operands: true }
    }

    fn is_native(&self) -> bool {
        true
    }

    fn run(&mut self, recording: Recording<'_>) -> Result<Downloads> {
        let (commands, downloads) = recording.into_commands()?;
        // On a thread of the pool: from outside of it every launch would be handed over, and waited for asleep.
        rayon::scope(|_| self.execute_all(commands, Downloads::new(downloads)))
    }

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn profile_mut(&mut self) -> &mut Profile {
        &mut self.profile
    }
}

/// What a native twin gets: parameters, constants, and its buffers by binding index.
pub struct Args<'a> {
    dispatch: &'a Dispatch,
    buffers: Vec<Option<&'a Words>>,
}

impl Args<'_> {
    pub fn params<P: Launch>(&self) -> Result<P> {
        read_params(&self.dispatch.params)
    }

    pub fn constants(&self) -> &Constants {
        &self.dispatch.constants
    }

    pub fn elem(&self) -> Scalar {
        self.dispatch.kernel.elem(&self.dispatch.buffers)
    }

    /// The elements of a read binding; empty for an absent buffer.
    pub fn read<T: Element>(&self, index: usize) -> Result<Slice<'_, T>> {
        let Some(words) = self.buffers.get(index).copied().flatten() else { return Ok(Slice::Empty) };
        let words = words.try_borrow().map_err(|e| self.aliased(index).caused_by(e.to_string()))?;
        Ok(Slice::Words(Ref::map(words, |w| bytemuck::cast_slice(w))))
    }

    /// The elements of a read-write binding.
    pub fn write<T: Element>(&self, index: usize) -> Result<RefMut<'_, [T]>> {
        let words = self.buffers.get(index).copied().flatten().ok_or_else(|| self.aliased(index))?;
        let words = words.try_borrow_mut().map_err(|e| self.aliased(index).caused_by(e.to_string()))?;
        Ok(RefMut::map(words, |w| bytemuck::cast_slice_mut(w)))
    }

    fn aliased(&self, index: usize) -> Error {
        let binding = self.dispatch.kernel.bindings.get(index).map_or("?", |b| b.name);
        Error::internal(format!("kernel {}", self.dispatch.kernel.name), format!("binding {binding} is absent or bound twice"))
    }
}

/// A borrowed buffer, or nothing where an optional one is absent.
pub enum Slice<'a, T> {
    Empty,
    Words(Ref<'a, [T]>),
}

impl<T> std::ops::Deref for Slice<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Slice::Empty => &[],
            Slice::Words(words) => words,
        }
    }
}
