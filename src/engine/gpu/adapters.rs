//! What adapters there are, what they can do, and opening one.

use super::context::Context;
use super::run::GpuEngine;
use crate::Result;
use serde::Serialize;

/// What matters about an adapter when choosing one. Sizes are in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterReport {
    /// What `--device gpu:INDEX` takes.
    pub index: usize,
    pub name: String,
    /// vulkan, metal or dx12.
    pub backend: String,
    pub driver: String,
    /// discrete, integrated, virtual, software or other.
    pub kind: &'static str,
    /// A software rasterizer: right answers, but slower than the native engine.
    pub software: bool,
    pub max_buffer: u64,
    pub max_storage_binding: u64,
    pub workgroup_storage: u32,
    pub max_invocations: u32,
    pub shader_f16: bool,
    pub subgroups: bool,
    pub subgroup_min: u32,
    pub subgroup_max: u32,
    pub timestamps: bool,
    /// Is it the one that `--device auto` takes? When none is, auto takes the native engine.
    pub auto_choice: bool,
}

/// All adapters of this machine, in the order of their indices.
pub struct Adapters {
    adapters: Vec<wgpu::Adapter>,
    reports: Vec<AdapterReport>,
}

impl std::fmt::Debug for Adapters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.reports).finish()
    }
}

impl Adapters {
    /// Loads the drivers that are installed; none at all is an empty list.
    pub fn enumerate() -> Self {
        if wgpu::Instance::enabled_backend_features().is_empty() {
            return Self { adapters: Vec::new(), reports: Vec::new() };
        }
        // Instance flags stay at their defaults: WGPU_VALIDATION=1 and WGPU_BACKEND=... help when hunting driver bugs.
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = wgpu::Backends::PRIMARY;
        let instance = wgpu::Instance::new(descriptor.with_env());
        let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
        let mut reports: Vec<_> = adapters.iter().enumerate().map(|(index, adapter)| report(index, adapter)).collect();
        if let Some(best) = best(&reports).filter(|best| !reports[*best].software) {
            reports[best].auto_choice = true;
        }
        Self { adapters, reports }
    }

    pub fn reports(&self) -> &[AdapterReport] {
        &self.reports
    }

    /// Index of the best adapter of any kind: discrete before integrated before virtual before unknown before software.
    pub fn best(&self) -> Option<usize> {
        best(&self.reports)
    }

    /// Opens the adapter with this index.
    ///
    /// # Errors
    /// `Kind::Device` with the adapter's name when the driver refuses.
    pub fn open(&self, index: usize) -> Result<GpuEngine> {
        let adapter = self.adapters.get(index).ok_or_else(|| crate::Error::usage("--device", format!("there is no adapter {index}")))?;
        Ok(GpuEngine::new(Context::open(adapter)?))
    }
}

fn best(reports: &[AdapterReport]) -> Option<usize> {
    const ORDER: [&str; 4] = ["discrete", "integrated", "virtual", "other"];
    let rank = |report: &AdapterReport| ORDER.iter().position(|kind| *kind == report.kind).unwrap_or(ORDER.len());
    reports.iter().min_by_key(|report| (rank(report), report.index)).map(|report| report.index)
}

fn report(index: usize, adapter: &wgpu::Adapter) -> AdapterReport {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    AdapterReport {
        index,
        name: info.name,
        backend: info.backend.to_string(),
        driver: [info.driver, info.driver_info].join(" ").trim().to_owned(),
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        },
        software: info.device_type == wgpu::DeviceType::Cpu,
        max_buffer: limits.max_buffer_size,
        max_storage_binding: limits.max_storage_buffer_binding_size,
        workgroup_storage: limits.max_compute_workgroup_storage_size,
        max_invocations: limits.max_compute_invocations_per_workgroup,
        shader_f16: features.contains(wgpu::Features::SHADER_F16),
        subgroups: features.contains(wgpu::Features::SUBGROUP),
        subgroup_min: info.subgroup_min_size,
        subgroup_max: info.subgroup_max_size,
        timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
        auto_choice: false,
    }
}
