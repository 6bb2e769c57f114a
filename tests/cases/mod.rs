//! The case table: inputs, launches and expected results of every kernel, for any engine. Benches use the same table.
//!
//! A case records launches through the public functions of the registry. Its oracle is plain f64 code. A tolerance is derived, not
//! tuned: c · eps · k · Σ|terms|, k the length of the sum. Outputs start as NaN, so that reading them shows, and are longer than the
//! kernel may touch: the sentinels past the end must not change. Padding and end of inputs are NaN, so that stray reads show.
//!
//! Adding a kernel: `tests/cases/NAME.rs` with `pub fn cases() -> Vec<Case>`, a `pub mod` line and a line in `for_each_kernel`.

#![allow(dead_code, unused_imports, reason = "shared by several test programs, none of which uses everything")]

use aespa_gpu::engine::{Buffer, Downloads, Elem, Element, Engine, Pending, Recording, Stored};
use aespa_gpu::tensor::Dtype;
use half::{bf16, f16};

/// All kernels with cases: `for_each_kernel!(m)` expands to `m! { axpy ... }`.
macro_rules! for_each_kernel {
    ($do:ident) => {
        $do! {
            attention
            attention_backward_kv
            attention_backward_q
            attention_weights
            axpy
            cross_entropy
            dequantize
            descent_block
            descent_heads
            embed
            gather_columns
            gptq_sweep
            gptq_sweep_heads
            gram
            kl_divergence
            layer_norm
            matmul_nn
            matmul_nt
            matmul_tn
            near_ties
            pack_bits
            quantize
            rms_norm
            rope
            row_dot
            scale_refit
            scale_search
            minimum_search
            minimum_refit
            multiply_add
            step_search
            select_rows
            swiglu
            rescale
            column_dot
            adaround_step
            unpack_bits
        }
    };
}
pub(crate) use for_each_kernel;

pub mod adaround_step;
pub mod attention;
pub mod attention_backward_kv;
pub mod attention_backward_q;
pub mod attention_weights;
pub mod axpy;
pub mod column_dot;
pub mod cross_entropy;
pub mod dequantize;
pub mod descent_block;
pub mod descent_heads;
pub mod embed;
pub mod gather_columns;
pub mod gptq_sweep;
pub mod gptq_sweep_heads;
pub mod gram;
pub mod kl_divergence;
pub mod layer_norm;
pub mod matmul_nn;
pub mod matmul_nt;
pub mod matmul_tn;
pub mod minimum_refit;
pub mod minimum_search;
pub mod multiply_add;
pub mod near_ties;
pub mod pack_bits;
pub mod quantize;
pub mod rescale;
pub mod rms_norm;
pub mod rope;
pub mod row_dot;
pub mod scale_refit;
pub mod scale_search;
pub mod select_rows;
pub mod step_search;
pub mod swiglu;
pub mod unpack_bits;

macro_rules! table {
    ($($name:ident)*) => {
        /// (kernel, its cases).
        pub static TABLE: &[(&str, fn() -> Vec<Case>)] = &[$((stringify!($name), $name::cases)),*];
    };
}
for_each_kernel!(table);

/// f32 and f16 machine epsilon: twice the largest relative error of one rounding.
pub const EPS: f64 = f32::EPSILON as f64;
pub const EPS_F16: f64 = 1.0 / 1024.0;

/// Elements past the end of every output.
pub const SENTINELS: usize = 64;

/// Sizes that break kernels: nothing, one, around a tile of 64 and a workgroup of 256, primes.
pub const AWKWARD: [usize; 10] = [0, 1, 7, 63, 64, 65, 251, 255, 257, 1021];

pub struct Case {
    pub name: String,
    /// Does it need f16 operands, which not every adapter has?
    pub f16: bool,
    pub record: Box<dyn Fn(&mut Io)>,
}

impl Case {
    pub fn new(name: impl Into<String>, record: impl Fn(&mut Io) + 'static) -> Self {
        Self { name: name.into(), f16: false, record: Box::new(record) }
    }

    /// A case of a kernel with operands of type `E`.
    pub fn of<E: TestElem>(name: impl Into<String>, record: impl Fn(&mut Io) + 'static) -> Self {
        Self { name: format!("{} {}", E::NAME, name.into()), f16: E::NAME == "f16", record: Box::new(record) }
    }
}

/// f32 and f16 with the error of rounding to them.
pub trait TestElem: Elem + TestElement {
    const NAME: &'static str;
    const EPS: f64;
}
impl TestElem for f32 {
    const NAME: &'static str = "f32";
    const EPS: f64 = EPS;
}
impl TestElem for f16 {
    const NAME: &'static str = "f16";
    const EPS: f64 = EPS_F16;
}

/// What an output's elements can be.
pub trait TestElement: Element + PartialEq {
    /// Not a number: fills outputs, so that reading them before writing shows.
    const UNWRITTEN: Self;
    /// A number that no kernel computes: follows outputs. Not NaN, since NaN survives being added to.
    const SENTINEL: Self;
    fn to_f64(self) -> f64;
    fn bits(self) -> u32;
}
impl TestElement for f32 {
    const UNWRITTEN: Self = f32::from_bits(0x7fc0_dead);
    const SENTINEL: Self = -123_456.79;
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn bits(self) -> u32 {
        self.to_bits()
    }
}
impl TestElement for f16 {
    const UNWRITTEN: Self = f16::from_bits(0x7ead);
    const SENTINEL: Self = f16::from_bits(0xe4d2);
    fn to_f64(self) -> f64 {
        f16::to_f64(self)
    }
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}
impl TestElement for u32 {
    const UNWRITTEN: Self = 0xdead_beef;
    const SENTINEL: Self = 0xbeef_dead;
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn bits(self) -> u32 {
        self
    }
}

/// What one element of an output must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Want {
    /// Within a distance of a value.
    Near(f64, f64),
    /// These bits.
    Bits(u32),
    /// What it was before.
    Same,
    /// Padding.
    Anything,
}

/// A buffer whose contents are judged: see `Io::output` and `Io::inout`.
pub struct Output<T: Element> {
    pub buffer: Buffer<T>,
    name: &'static str,
    before: Vec<T>,
}

type Free = Box<dyn FnOnce(&mut Recording<'static>)>;
type Judge = Box<dyn FnOnce(&mut Downloads) -> Vec<String>>;

/// What a case records into.
pub struct Io {
    pub rec: Recording<'static>,
    pub rng: Rng,
    judges: Vec<Judge>,
    /// Frees every buffer, after all downloads.
    frees: Vec<Free>,
}

impl Io {
    pub fn new(seed: u64) -> Self {
        Self { rec: Recording::new(), rng: Rng(seed), judges: Vec::new(), frees: Vec::new() }
    }

    pub fn upload<T: Element>(&mut self, data: Vec<T>) -> Buffer<T> {
        let buffer = self.rec.upload("input", data);
        self.frees.push(Box::new(move |rec| rec.free(buffer)));
        buffer
    }

    /// Random values in (−1, 1): a [rows, cols] matrix with row stride `ld`, padded with NaN and followed by
    /// more of it, so that stray reads show; on the device and here.
    pub fn matrix<T: TestElem>(&mut self, rows: usize, cols: usize, ld: usize) -> (Buffer<T>, Vec<f64>) {
        let values: Vec<T> = self.rng.padded(rows, cols, ld).into_iter().map(T::from_f32).collect();
        let mut data = values.clone();
        data.resize(values.len() + SENTINELS, T::UNWRITTEN);
        (self.upload(data), values.into_iter().map(TestElement::to_f64).collect())
    }

    /// Weights as a checkpoint stores them. `values` are rounded to `dtype`; the rounded ones come back.
    pub fn stored(&mut self, dtype: Dtype, values: &[f32]) -> (Buffer<Stored>, Vec<f64>) {
        let (bytes, exact): (Vec<Vec<u8>>, Vec<f64>) = match dtype {
            Dtype::F32 => values.iter().map(|v| (v.to_le_bytes().to_vec(), f64::from(*v))).unzip(),
            Dtype::F16 => values.iter().map(|v| f16::from_f32(*v)).map(|v| (v.to_le_bytes().to_vec(), v.to_f64())).unzip(),
            Dtype::Bf16 => values.iter().map(|v| bf16::from_f32(*v)).map(|v| (v.to_le_bytes().to_vec(), v.to_f64())).unzip(),
        };
        let buffer = self.rec.upload_stored("weights", dtype, bytes.concat().into());
        self.frees.push(Box::new(move |rec| rec.free(buffer)));
        (buffer, exact)
    }

    /// An output of `len` elements that starts as NaN, which a kernel must overwrite and must not read.
    pub fn output<T: TestElement>(&mut self, name: &'static str, len: usize) -> Output<T> {
        self.inout(name, vec![T::UNWRITTEN; len])
    }

    /// An output that starts as `before`. Sentinels follow it.
    pub fn inout<T: TestElement>(&mut self, name: &'static str, mut before: Vec<T>) -> Output<T> {
        before.resize(before.len() + SENTINELS, T::SENTINEL);
        let buffer = self.upload(before.clone());
        Output { buffer, name, before }
    }

    /// After all launches: element i of `output` must be `want(i)`; what follows must be untouched.
    pub fn expect<T: TestElement>(&mut self, output: Output<T>, want: impl Fn(usize) -> Want) {
        let pending: Pending<T> = self.rec.download(output.buffer);
        let want: Vec<Want> = (0..output.before.len() - SENTINELS).map(want).collect();
        self.judges.push(Box::new(move |downloads| match downloads.take(pending) {
            Err(error) => vec![error.to_string()],
            Ok(got) => judge(output.name, &got, &output.before, &want),
        }));
    }

    /// After all launches: outputs that are judged together, since only their combination is right or wrong; what follows each must be
    /// untouched.
    pub fn expect_all(&mut self, outputs: Vec<Output<f32>>, judge_all: impl FnOnce(&[Vec<f32>]) -> Vec<String> + 'static) {
        let pending: Vec<Pending<f32>> = outputs.iter().map(|output| self.rec.download(output.buffer)).collect();
        self.judges.push(Box::new(move |downloads| {
            let (mut got, mut wrong) = (Vec::new(), Vec::new());
            for (pending, output) in pending.into_iter().zip(&outputs) {
                match downloads.take(pending) {
                    Ok(data) => got.push(data),
                    Err(error) => return vec![error.to_string()],
                }
                let data = got.last().expect("just pushed");
                wrong.extend(judge(output.name, data, &output.before, &vec![Want::Anything; output.before.len() - SENTINELS]));
            }
            wrong.extend(judge_all(&got));
            wrong
        }));
    }

    /// As `expect`, for a [rows, cols] output with row stride `ld` whose padding may be anything.
    pub fn expect_matrix<T: TestElement>(&mut self, output: Output<T>, cols: usize, ld: usize, want: impl Fn(usize, usize) -> Want) {
        self.expect(output, |i| if i % ld < cols { want(i / ld, i % ld) } else { Want::Anything });
    }
}

/// Every element that is not as wanted, and every sentinel that changed.
pub fn judge<T: TestElement>(name: &str, got: &[T], before: &[T], want: &[Want]) -> Vec<String> {
    let len = want.len();
    let sentinels = std::iter::repeat(&Want::Same);
    let elements = got.iter().zip(before).zip(want.iter().chain(sentinels)).enumerate();
    let mut wrong = Vec::new();
    for (i, ((got, before), want)) in elements {
        let fine = match *want {
            // Written so that NaN is not fine.
            Want::Near(value, tolerance) => (got.to_f64() - value).abs() <= tolerance,
            Want::Bits(bits) => got.bits() == bits,
            Want::Same => got.bits() == before.bits(),
            Want::Anything => true,
        };
        if !fine {
            let place = if i < len { "" } else { ", past the end," };
            wrong.push(format!("{name}[{i}]{place} is {} ({:#x}), wanted {want:?}", got.to_f64(), got.bits()));
        }
    }
    if got.len() < before.len() {
        wrong.push(format!("{name} holds {} of {} elements", got.len(), before.len()));
    }
    wrong
}

/// Runs a case and says what is wrong with its results.
pub fn run(case: &Case, seed: u64, engine: &mut dyn Engine) -> Vec<String> {
    let mut io = Io::new(seed);
    (case.record)(&mut io);
    for free in io.frees {
        free(&mut io.rec);
    }
    let mut downloads = match engine.run(io.rec) {
        Ok(downloads) => downloads,
        Err(error) => return vec![error.to_string()],
    };
    let mut wrong: Vec<String> = io.judges.into_iter().flat_map(|judge| judge(&mut downloads)).collect();
    if engine.profile().live_buffers() != 0 {
        wrong.push(format!("{} buffers are left", engine.profile().live_buffers()));
    }
    wrong
}

/// SplitMix64: a case's inputs depend on its seed only.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (−1, 1).
    pub fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0 + f32::EPSILON / 2.0
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    /// A [rows, cols] matrix with row stride `ld`, its padding NaN.
    pub fn padded(&mut self, rows: usize, cols: usize, ld: usize) -> Vec<f32> {
        (0..rows * ld).map(|i| if i % ld < cols { self.value() } else { f32::NAN }).collect()
    }

    /// A zero point in the middle of the codes up to `max_code`: whole, as on integer grids, or not, as where groups have minima.
    pub fn zero_point(&mut self, max_code: u32) -> f32 {
        let part = if self.below(2) == 0 { 0.0 } else { 0.5 * self.value() };
        (max_code / 2) as f32 + self.below(2) as f32 + part
    }

    /// A permutation of 0..n.
    pub fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}
