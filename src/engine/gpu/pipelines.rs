//! Shaders to pipelines. A pipeline is made once per kernel, variant, operand type and constants.

use super::choice::Choice;
use super::context::Context;
use crate::engine::Scalar;
use crate::engine::kernel::{Constants, Kernel};
use crate::engine::recording::Dispatch;
use crate::{Error, Result};
use std::collections::HashMap;

/// Kernels write workgroup memory before they read it; clearing it costs a pass over it per workgroup, which some drivers leave to
/// one thread.
pub const ZERO_INITIALIZE_WORKGROUP_MEMORY: bool = false;

/// The checks that shaders run with: none that costs anything in a compute shader. They would cost up to half the speed of the inner
/// loops of matrix products; `module` says why they are not needed.
pub fn runtime_checks() -> wgpu::ShaderRuntimeChecks {
    let mut checks = wgpu::ShaderRuntimeChecks::checked();
    checks.bounds_checks = false;
    checks.force_loop_bounding = false;
    checks.int_div_checks = false;
    checks
}

#[derive(Debug)]
pub(super) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
}

/// Kernel name, its text, f16 operands?, constants.
type Key = (&'static str, Option<usize>, bool, Constants);

#[derive(Debug, Default)]
pub(super) struct Pipelines {
    made: HashMap<Key, Pipeline>,
}

impl Pipelines {
    pub fn get(&mut self, context: &Context, dispatch: &Dispatch, choice: &Choice<'_>) -> Result<&Pipeline> {
        let kernel = dispatch.kernel;
        let f16 = kernel.elem(&dispatch.buffers) == Scalar::F16;
        let key = (kernel.name, choice.text, f16, choice.constants.clone().into_owned());
        // A lookup before the entry, since making a pipeline may fail.
        if !self.made.contains_key(&key) {
            let pipeline = make(context, kernel, f16, choice)?;
            self.made.insert(key.clone(), pipeline);
        }
        self.made.get(&key).ok_or_else(|| Error::internal(format!("kernel {}", kernel.name), "its pipeline is gone"))
    }
}

fn make(context: &Context, kernel: &Kernel, f16: bool, choice: &Choice<'_>) -> Result<Pipeline> {
    let subject = || format!("kernel {}", kernel.name);
    if f16 && !context.f16 {
        return Err(Error::device(subject(), "f16 operands on an adapter without shader_f16"));
    }
    let scalar = if f16 { Scalar::F16 } else { Scalar::F32 };
    let source = kernel.source(choice.text, scalar);
    let label = Some(kernel.name);
    context.guarded(subject, || {
        let module = module(context, label, source);
        let layout = layout(context, kernel);
        let pipeline_layout = context.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let constants: Vec<_> = choice.constants.iter().map(|(name, value)| (name, f64::from(value))).collect();
        let pipeline = context.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(kernel.name),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                zero_initialize_workgroup_memory: ZERO_INITIALIZE_WORKGROUP_MEMORY,
            },
            cache: None,
        });
        Pipeline { pipeline, layout }
    })
}

#[allow(unsafe_code, reason = "the only way to turn off run-time checks in shaders that are part of this program")]
fn module(context: &Context, label: Option<&str>, source: String) -> wgpu::ShaderModule {
    let descriptor = wgpu::ShaderModuleDescriptor { label, source: wgpu::ShaderSource::Wgsl(source.into()) };
    // SAFETY: the shaders are this program's own files, never a user's.
    // - Bounds: `Recording::dispatch` compares every extent that a launch's parameters imply with the lengths of its buffers
    //   before the launch is recorded; indices that come from data (token ids, column orders) are compared in the shader.
    // - Loops: every loop counts up to a bound that its parameters give; none can be infinite.
    // - Integer division: divisors are parameters that `Launch::check` refuses when zero; operands are unsigned.
    unsafe { context.device.create_shader_module_trusted(descriptor, runtime_checks()) }
}

/// Binding 0 holds the parameters, the registry's bindings follow in order.
fn layout(context: &Context, kernel: &Kernel) -> wgpu::BindGroupLayout {
    let params = wgpu::BufferBindingType::Uniform;
    let storage = kernel.bindings.iter().map(|b| wgpu::BufferBindingType::Storage { read_only: !b.writes });
    let entries: Vec<_> = (0..)
        .zip(std::iter::once(params).chain(storage))
        .map(|(binding, ty)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        })
        .collect();
    context.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(kernel.name), entries: &entries })
}
