//! A recording: commands as data. Solvers and the forward pass record; engines run what was recorded.
//!
//! Because it is data it can be estimated without being run, profiled, and run by any engine. Commands take effect in order.
//! The first mistake made while recording (a buffer too short for a kernel's parameters, say) is kept and reported by the
//! engine before anything runs, so recording code needs no error handling of its own.

use super::buffer::{Buffer, BufferType, Element, RawBuffer, Scalar, Stored};
use super::kernel::{Constants, Kernel};
use crate::tensor::Dtype;
use crate::{Error, Result};
use bytemuck::Pod;
use std::borrow::Cow;
use std::collections::HashSet;
use std::marker::PhantomData;
use std::sync::Arc;

/// Workgroups that a dimension of a launch may have.
pub const MAX_GROUPS: u32 = 65535;

/// One launch of a kernel.
#[derive(Clone, Debug)]
pub struct Dispatch {
    pub kernel: &'static Kernel,
    /// The parameter struct's bytes, as the shader's uniform sees them.
    pub params: Vec<u8>,
    pub constants: Constants,
    /// In the order of the kernel's bindings.
    pub buffers: Vec<RawBuffer>,
    /// Workgroups in x, y, z.
    pub grid: [u32; 3],
}

#[derive(Clone, Debug)]
pub enum Command<'a> {
    /// A new buffer. Not zeroed: its contents are unspecified.
    Alloc {
        buffer: RawBuffer,
        zeroed: bool,
        label: &'static str,
    },
    /// Fills a buffer from the host. The data may be shorter than the buffer by the padding to whole words.
    Upload {
        buffer: RawBuffer,
        data: Bytes<'a>,
    },
    Dispatch(Dispatch),
    /// Copies whole buffers of equal size.
    Copy {
        from: RawBuffer,
        to: RawBuffer,
    },
    /// Brings a buffer back to the host.
    Download {
        buffer: RawBuffer,
        slot: usize,
    },
    Free {
        buffer: RawBuffer,
    },
}

/// Names the result of a download within one recording.
#[derive(Debug)]
pub struct Pending<T> {
    slot: usize,
    marker: PhantomData<fn() -> T>,
}

/// Commands in order, and the first mistake made while recording them.
#[derive(Debug, Default)]
pub struct Recording<'a> {
    pub(super) commands: Vec<Command<'a>>,
    pub(super) downloads: usize,
    pub(super) mistake: Option<Error>,
}

impl<'a> Recording<'a> {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn commands(&self) -> &[Command<'a>] {
        &self.commands
    }

    /// The commands, or the first mistake.
    pub fn into_commands(self) -> Result<(Vec<Command<'a>>, usize)> {
        match self.mistake {
            Some(mistake) => Err(mistake),
            None => Ok((self.commands, self.downloads)),
        }
    }

    /// Keeps the first mistake; later ones follow from it.
    pub fn fail(&mut self, error: Error) {
        self.mistake.get_or_insert(error);
    }

    /// A buffer whose contents are unspecified until written.
    pub fn alloc<T: Element>(&mut self, label: &'static str, len: usize) -> Buffer<T> {
        let buffer = Buffer::new(len, T::SCALAR);
        self.commands.push(Command::Alloc { buffer: buffer.raw, zeroed: false, label });
        buffer
    }

    pub fn zeros<T: Element>(&mut self, label: &'static str, len: usize) -> Buffer<T> {
        let buffer = Buffer::new(len, T::SCALAR);
        self.commands.push(Command::Alloc { buffer: buffer.raw, zeroed: true, label });
        buffer
    }

    pub fn upload<T: Element>(&mut self, label: &'static str, data: impl Into<Cow<'a, [T]>>) -> Buffer<T> {
        let data = data.into();
        let buffer = Buffer::new(data.len(), T::SCALAR);
        self.commands.push(Command::Alloc { buffer: buffer.raw, zeroed: false, label });
        self.commands.push(Command::Upload { buffer: buffer.raw, data: bytes_of(data) });
        buffer
    }

    /// Weights as stored: `data` holds whole rows of `dtype` values. See `Scalar::Stored`.
    pub fn upload_stored(&mut self, label: &'static str, dtype: Dtype, data: Cow<'a, [u8]>) -> Buffer<Stored> {
        let buffer = Buffer::new(data.len() / dtype.size(), Scalar::Stored(dtype));
        self.commands.push(Command::Alloc { buffer: buffer.raw, zeroed: false, label });
        self.commands.push(Command::Upload { buffer: buffer.raw, data: bytes_of(data) });
        buffer
    }

    /// The same of bytes that others keep too.
    pub fn upload_shared(&mut self, label: &'static str, dtype: Dtype, data: Arc<dyn AsBytes>) -> Buffer<Stored> {
        let buffer = Buffer::new(data.bytes().len() / dtype.size(), Scalar::Stored(dtype));
        self.commands.push(Command::Alloc { buffer: buffer.raw, zeroed: false, label });
        self.commands.push(Command::Upload { buffer: buffer.raw, data: Bytes::Owned(data) });
        buffer
    }

    pub fn copy<T: BufferType>(&mut self, from: Buffer<T>, to: Buffer<T>) {
        if from.raw.bytes() != to.raw.bytes() {
            self.fail(Error::internal("copy", format!("from {} to {} bytes", from.raw.bytes(), to.raw.bytes())));
        }
        self.commands.push(Command::Copy { from: from.raw, to: to.raw });
    }

    pub fn download<T: Element>(&mut self, buffer: Buffer<T>) -> Pending<T> {
        let slot = self.downloads;
        self.downloads += 1;
        self.commands.push(Command::Download { buffer: buffer.raw, slot });
        Pending { slot, marker: PhantomData }
    }

    /// Gives a buffer back; absent buffers are ignored.
    pub fn free<T: BufferType>(&mut self, buffer: Buffer<T>) {
        if !buffer.raw.is_none() {
            self.commands.push(Command::Free { buffer: buffer.raw });
        }
    }

    pub fn dispatch(&mut self, dispatch: Dispatch) {
        let d = &dispatch;
        let named = |message: String| Error::internal(format!("kernel {}", d.kernel.name), message);
        if d.grid.contains(&0) {
            return;
        }
        if d.grid.iter().any(|g| *g > MAX_GROUPS) {
            return self.fail(named(format!("grid {:?} exceeds {MAX_GROUPS} workgroups in a dimension", d.grid)));
        }
        for (i, written) in d.kernel.bindings.iter().zip(&d.buffers).filter(|(b, _)| b.writes) {
            if d.buffers.iter().filter(|b| b.id == written.id).count() > 1 {
                return self.fail(named(format!("binding {} is written and also bound elsewhere", i.name)));
            }
        }
        let lens: Vec<usize> = d.buffers.iter().map(|b| b.len).collect();
        if let Err(message) = (d.kernel.check)(&d.params, &lens) {
            return self.fail(named(message));
        }
        self.commands.push(Command::Dispatch(dispatch));
    }
}

/// Which of the commands bring back a buffer that nothing needs afterwards: its memory can be given away instead of copied.
pub(super) fn last_uses(commands: &[Command<'_>]) -> Vec<bool> {
    let mut freed = HashSet::new();
    let mut last = vec![false; commands.len()];
    for (command, last) in commands.iter().zip(&mut last).rev() {
        match command {
            Command::Free { buffer } => {
                freed.insert(buffer.id);
            }
            Command::Download { buffer, .. } => *last = freed.remove(&buffer.id),
            Command::Copy { from, to } => {
                freed.remove(&from.id);
                freed.remove(&to.id);
            }
            Command::Dispatch(dispatch) => dispatch.buffers.iter().for_each(|buffer| {
                freed.remove(&buffer.id);
            }),
            Command::Upload { buffer, .. } => {
                freed.remove(&buffer.id);
            }
            Command::Alloc { .. } => {}
        }
    }
    last
}

/// Data of an upload: the caller's, or a vector of any type that has been given away, which is not copied to become bytes.
#[derive(Clone)]
pub enum Bytes<'a> {
    Borrowed(&'a [u8]),
    Owned(Arc<dyn AsBytes>),
}

/// Something whose content can be seen as bytes.
pub trait AsBytes: Send + Sync {
    fn bytes(&self) -> &[u8];
    /// The content as words, in the same memory where that can be.
    fn into_words(self: Arc<Self>) -> Vec<u32>;
}

impl<T: Pod + Send + Sync> AsBytes for Vec<T> {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self)
    }

    fn into_words(self: Arc<Self>) -> Vec<u32> {
        match Arc::try_unwrap(self).map(bytemuck::try_cast_vec) {
            Ok(Ok(words)) => words,
            Ok(Err((_, elements))) => words_of(elements.bytes()),
            Err(shared) => words_of(shared.bytes()),
        }
    }
}

/// A copy, with zeros up to a whole word.
fn words_of(bytes: &[u8]) -> Vec<u32> {
    let mut words = Vec::with_capacity(bytes.len().div_ceil(4));
    let (whole, rest) = bytes.as_chunks::<4>();
    words.extend(whole.iter().map(|word| u32::from_le_bytes(*word)));
    if !rest.is_empty() {
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        words.push(u32::from_le_bytes(last));
    }
    words
}

impl Bytes<'_> {
    /// As words; data that was given away is not copied.
    pub(super) fn into_words(self) -> Vec<u32> {
        match self {
            Self::Borrowed(bytes) => words_of(bytes),
            Self::Owned(data) => data.into_words(),
        }
    }
}

impl std::ops::Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Owned(data) => data.bytes(),
        }
    }
}

impl std::fmt::Debug for Bytes<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

fn bytes_of<T: Pod + Send + Sync>(data: Cow<'_, [T]>) -> Bytes<'_> {
    match data {
        Cow::Borrowed(slice) => Bytes::Borrowed(bytemuck::cast_slice(slice)),
        Cow::Owned(vec) => Bytes::Owned(Arc::new(vec)),
    }
}

/// What a run brought back.
#[derive(Debug, Default)]
pub struct Downloads {
    slots: Vec<Option<Vec<u32>>>,
    blank: bool,
}

impl Downloads {
    pub(super) fn new(count: usize) -> Self {
        Self { slots: vec![None; count], blank: false }
    }

    /// As [`Self::new`], for zeros that stand for what was not computed.
    pub(super) fn blank(count: usize) -> Self {
        Self { blank: true, ..Self::new(count) }
    }

    /// Are these zeros that stand for what was not computed? Nobody should touch large ones: what is not touched takes no memory.
    pub fn is_blank(&self) -> bool {
        self.blank
    }

    pub(super) fn set(&mut self, slot: usize, words: Vec<u32>) {
        self.slots[slot] = Some(words);
    }

    /// All that came back, as words.
    pub(super) fn into_words(self) -> Vec<Option<Vec<u32>>> {
        self.slots
    }

    /// The elements of one download; an internal error when taken twice or from another recording's run.
    pub fn take<T: Element>(&mut self, pending: Pending<T>) -> Result<Vec<T>> {
        let words = self.slots.get_mut(pending.slot).and_then(Option::take);
        let words = words.ok_or_else(|| Error::internal("download", "not part of this run, or taken twice"))?;
        Ok(match bytemuck::try_cast_vec(words) {
            Ok(elements) => elements,
            Err((_, words)) => bytemuck::pod_collect_to_vec(&words),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_is_used_again_is_no_last_use() {
        let mut rec = Recording::new();
        let [a, b] = [(); 2].map(|()| rec.zeros::<f32>("buffer", 4));
        rec.download(a);
        rec.copy(a, b);
        let taken = rec.commands.len();
        rec.download(a);
        rec.download(b);
        rec.commands.push(Command::Upload { buffer: b.raw, data: bytes_of(Cow::Owned(vec![1.0f32; 4])) });
        rec.free(a);
        rec.free(b);
        let last = last_uses(&rec.commands);
        let found: Vec<usize> = (0..last.len()).filter(|i| last[*i]).collect();
        assert_eq!(found, [taken]);
    }
}
