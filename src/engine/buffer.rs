//! Typed handles of device buffers. A handle is plain data: it names a buffer, the engine that runs a recording owns it.

use crate::tensor::Dtype;
use bytemuck::Pod;
use half::f16;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the elements of a buffer are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scalar {
    F32,
    F16,
    U32,
    /// Weights as a checkpoint stores them, in 32-bit words: two values of a 2-byte type lie in one word, low half first.
    Stored(Dtype),
}

impl Scalar {
    /// Bytes per element; for stored weights the bytes of one weight.
    pub const fn size(self) -> usize {
        match self {
            Scalar::F32 | Scalar::U32 => 4,
            Scalar::F16 => 2,
            Scalar::Stored(dtype) => dtype.size(),
        }
    }
}

/// Element types that have a fixed layout on both sides.
pub trait Element: Pod + Send + Sync {
    const SCALAR: Scalar;
}

impl Element for f32 {
    const SCALAR: Scalar = Scalar::F32;
}
impl Element for f16 {
    const SCALAR: Scalar = Scalar::F16;
}
impl Element for u32 {
    const SCALAR: Scalar = Scalar::U32;
}

/// Element types of the operands of matrix products: the `Elem` of the shaders' prelude. Sums are always f32.
pub trait Elem: Element {
    const DTYPE: Dtype;
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
    /// The slice itself where it is f32 already; products on the CPU take that short cut.
    fn as_f32(slice: &[Self]) -> Option<&[f32]>;
}

impl Elem for f32 {
    const DTYPE: Dtype = Dtype::F32;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
    fn as_f32(slice: &[Self]) -> Option<&[f32]> {
        Some(slice)
    }
}

impl Elem for f16 {
    const DTYPE: Dtype = Dtype::F16;
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

/// Marker of buffers that hold weights as stored; their dtype travels in the handle.
#[derive(Clone, Copy, Debug)]
pub enum Stored {}

/// Marker types that a handle may carry.
pub trait BufferType {}
impl<T: Element> BufferType for T {}
impl BufferType for Stored {}

/// An untyped handle: what commands carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawBuffer {
    /// Unique in the process. 0 stands for "no buffer": an optional input that is absent.
    pub id: u64,
    pub len: usize,
    pub scalar: Scalar,
}

impl RawBuffer {
    /// Bytes, rounded up to whole 32-bit words.
    pub const fn bytes(self) -> usize {
        (self.len * self.scalar.size()).next_multiple_of(4)
    }

    pub const fn is_none(self) -> bool {
        self.id == 0
    }
}

/// Handle of a device buffer of `len` elements of `T`.
#[derive(Debug)]
pub struct Buffer<T: BufferType> {
    pub(super) raw: RawBuffer,
    marker: PhantomData<fn() -> T>,
}

impl<T: BufferType> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T: BufferType> Copy for Buffer<T> {}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl<T: BufferType> Buffer<T> {
    pub(super) fn new(len: usize, scalar: Scalar) -> Self {
        Self { raw: RawBuffer { id: NEXT_ID.fetch_add(1, Ordering::Relaxed), len, scalar }, marker: PhantomData }
    }

    pub fn len(self) -> usize {
        self.raw.len
    }

    pub fn is_empty(self) -> bool {
        self.raw.len == 0
    }

    pub fn raw(self) -> RawBuffer {
        self.raw
    }
}

impl<T: Element> Buffer<T> {
    /// Stands for an optional input that is absent: kernels see an empty array and a flag in their parameters.
    pub fn none() -> Self {
        Self { raw: RawBuffer { id: 0, len: 0, scalar: T::SCALAR }, marker: PhantomData }
    }
}

impl Buffer<f32> {
    /// The same buffer as bit patterns, for kernels that only move elements.
    pub fn as_words(self) -> Buffer<u32> {
        Buffer { raw: RawBuffer { scalar: Scalar::U32, ..self.raw }, marker: PhantomData }
    }
}

impl Buffer<Stored> {
    /// The same buffer as the words that it lies in.
    pub fn as_words(self) -> Buffer<u32> {
        Buffer { raw: RawBuffer { len: self.raw.bytes() / 4, scalar: Scalar::U32, ..self.raw }, marker: PhantomData }
    }
}

impl<E: Elem> Buffer<E> {
    /// The same buffer as the weight operand of a product, or the source of a gather.
    pub fn as_stored(self) -> Buffer<Stored> {
        Buffer { raw: RawBuffer { scalar: Scalar::Stored(E::DTYPE), ..self.raw }, marker: PhantomData }
    }
}
