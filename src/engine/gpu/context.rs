//! The device, and the one place that turns wgpu's ways of failing into typed errors.
//!
//! wgpu reports errors in three ways: through error scopes (per thread, around the call that failed), through a callback for what
//! no scope caught, and through the device-lost callback. All three end in `Context::guarded` or `Context::check`.

use super::choice::Ability;
use crate::engine::Scalar;
use crate::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use wgpu::{CooperativeScalarType, Features};

/// What went wrong outside of any error scope; the first one is kept, since later ones follow from it.
type Fault = Arc<Mutex<Option<String>>>;

#[derive(Debug)]
pub(super) struct Context {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub name: String,
    /// The same with the driver's version.
    pub subject: String,
    /// Bytes of the largest buffer that may be asked for.
    pub max_buffer: u64,
    pub f16: bool,
    /// Can passes be timed on the device?
    pub timestamps: bool,
    /// What it can do beyond that.
    pub ability: Ability,
    fault: Fault,
}

/// What variants may count on: what the adapter reports, of the features that the device was opened with.
fn ability(adapter: &wgpu::Adapter, features: Features, limits: &wgpu::Limits) -> Ability {
    let scalar = |ty: CooperativeScalarType| match ty {
        CooperativeScalarType::F32 => Some(Scalar::F32),
        CooperativeScalarType::F16 => Some(Scalar::F16),
        CooperativeScalarType::I32 | CooperativeScalarType::U32 => None,
    };
    let properties = match features.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        true => adapter.cooperative_matrix_properties(),
        false => Vec::new(),
    };
    let square = properties.iter().filter(|p| p.m_size == p.n_size && p.n_size == p.k_size && p.cr_type == CooperativeScalarType::F32);
    Ability {
        subgroup_min: if features.contains(Features::SUBGROUP) { adapter.get_info().subgroup_min_size } else { 0 },
        matrices: square.filter_map(|p| Some((p.m_size, scalar(p.ab_type)?))).collect(),
        workgroup_bytes: limits.max_compute_workgroup_storage_size,
    }
}

#[allow(unsafe_code, reason = "the only way to a device with cooperative matrices")]
fn experimental() -> wgpu::ExperimentalFeatures {
    // SAFETY: wgpu asks for it because features that it calls experimental may be unsound. Of these the device gets cooperative matrices
    // only, and only `shaders/matmul_nt_matrices.wgsl` uses them, in the way that their validation is meant for: whole subgroups in uniform
    // control flow, loads and stores inside of arrays of fixed length.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

fn keep(fault: &Fault, message: String) {
    fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(message);
}

impl Context {
    pub fn open(adapter: &wgpu::Adapter) -> Result<Self> {
        let info = adapter.get_info();
        let limits = adapter.limits();
        let wanted = Features::SHADER_F16 | Features::SUBGROUP | Features::TIMESTAMP_QUERY | Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        let features = adapter.features() & wanted;
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("aespa-gpu"),
            required_features: features,
            // All that the adapter has: buffers and bindings larger than WebGPU's defaults mean fewer panels.
            required_limits: limits.clone(),
            experimental_features: if features.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
                experimental()
            } else {
                wgpu::ExperimentalFeatures::disabled()
            },
            // Buffers are few and large; suballocating from big blocks would waste memory.
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            trace: wgpu::Trace::Off,
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|e| Error::device(format!("adapter {}", info.name), "cannot be opened").caused_by(e))?;
        let fault = Fault::default();
        let (uncaptured, lost) = (fault.clone(), fault.clone());
        device.on_uncaptured_error(Arc::new(move |error| keep(&uncaptured, describe(&error))));
        device.set_device_lost_callback(move |reason, message| {
            // It explains all other faults, so it replaces them.
            let message = format!("the device was lost ({reason:?}) {message}; nothing more can run on it");
            *lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
        });
        // Shaders index with 32 bits, and some translations turn an element index into a 32-bit byte offset.
        let addressable = u64::from(u32::MAX);
        let max_buffer = limits.max_buffer_size.min(limits.max_storage_buffer_binding_size).min(addressable) / 16 * 16;
        let name = format!("{} ({}, {})", info.name, info.backend, info.driver);
        let ability = ability(adapter, features, &limits);
        let subject = format!("{name} {}", info.driver_info);
        Ok(Self {
            device,
            queue,
            name,
            subject,
            max_buffer,
            f16: features.contains(Features::SHADER_F16),
            timestamps: features.contains(Features::TIMESTAMP_QUERY),
            ability,
            fault,
        })
    }

    /// Runs calls that create or submit something; their errors come back about `subject`.
    pub fn guarded<T>(&self, subject: impl Fn() -> String, work: impl FnOnce() -> T) -> Result<T> {
        use wgpu::ErrorFilter::{Internal, OutOfMemory, Validation};
        let scopes = [Validation, Internal, OutOfMemory].map(|filter| self.device.push_error_scope(filter));
        let out = work();
        let mut first = None;
        // Scopes are a stack: the last one pushed is popped first.
        for scope in scopes.into_iter().rev() {
            let error = pollster::block_on(scope.pop());
            first = first.or(error);
        }
        match first {
            Some(error) => {
                // A lost device shows first as odd errors of other kinds; polling calls its callback.
                self.poll(&subject)?;
                Err(Error::device(subject(), describe(&error)))
            }
            None => self.check(subject).map(|()| out),
        }
    }

    /// An error if the device was lost or something failed outside of any scope.
    pub fn check(&self, subject: impl Fn() -> String) -> Result<()> {
        match self.fault.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            Some(message) => Err(Error::device(subject(), message)),
            None => Ok(()),
        }
    }

    /// Waits until the device has done all that was submitted.
    pub fn wait(&self, subject: impl Fn() -> String) -> Result<()> {
        self.poll_as(wgpu::PollType::wait_indefinitely(), subject)
    }

    /// Lets wgpu take back memory that the device no longer uses, without waiting.
    pub fn poll(&self, subject: impl Fn() -> String) -> Result<()> {
        self.poll_as(wgpu::PollType::Poll, subject)
    }

    fn poll_as(&self, poll: wgpu::PollType, subject: impl Fn() -> String) -> Result<()> {
        // wgpu panics when the device turns out to be lost while it is polled, instead of returning an error.
        let polled = catch_unwind(AssertUnwindSafe(|| self.device.poll(poll)));
        match polled {
            Ok(Ok(_)) => self.check(subject),
            Ok(Err(error)) => Err(Error::device(subject(), "waiting for the device failed").caused_by(error)),
            Err(_) => {
                keep(
                    &self.fault,
                    "the device was lost while it worked (out of memory, a driver reset, or a launch that took too long)".to_owned(),
                );
                self.check(subject)
            }
        }
    }

    /// A buffer of at least `bytes`.
    pub fn buffer(&self, label: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        let subject = || format!("buffer {label}");
        // Shaders may read four words at once, and wgpu refuses empty bindings.
        let size = bytes.next_multiple_of(16).max(16);
        self.guarded(subject, || {
            self.device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false })
        })
        .map_err(|e| Error::device(e.subject, format!("{bytes} bytes: {}", e.message)))
    }
}

fn describe(error: &wgpu::Error) -> String {
    match error {
        wgpu::Error::OutOfMemory { .. } => "out of device memory; close other programs, lower --max-vram or use --device cpu".to_owned(),
        // wgpu's descriptions are trees over several lines.
        other => other.to_string().split_whitespace().collect::<Vec<_>>().join(" "),
    }
}
