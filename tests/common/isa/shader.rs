//! The versions of a kernel that the engine may ask for, and their SPIR-V as wgpu makes it.

use super::Error;
use aespa_gpu::engine::gpu::{ZERO_INITIALIZE_WORKGROUP_MEMORY, runtime_checks};
use aespa_gpu::engine::kernel::{BindingScalar, Kernel, dtype_constant};
use aespa_gpu::engine::shader::Needs;
use aespa_gpu::engine::{Scalar, kernels::KERNELS};
use naga::back::spv::{self, ZeroInitializeWorkgroupMemoryMode as ZeroInitialize};
use naga::back::{PipelineConstants, pipeline_constants::process_overrides};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use std::path::Path;

/// A text of a kernel with an operand type, a dtype of stored weights and tuning constants.
#[derive(Clone)]
pub struct Version {
    pub kernel: &'static Kernel,
    /// The index of the variant; the base, if none.
    pub text: Option<usize>,
    pub elem: Scalar,
    /// Code of the dtype, where the kernel reads stored weights.
    pub stored: Option<u32>,
    pub tuning: Vec<(&'static str, u32)>,
}

impl Version {
    /// Such as `rms_norm` and `rms_norm+subgroups`.
    pub fn name(&self) -> String {
        let variant = if self.text.is_some() { "+subgroups" } else { "" };
        format!("{}{variant}", self.kernel.name)
    }

    pub fn elem_name(&self) -> &'static str {
        if self.elem == Scalar::F16 { "f16" } else { "f32" }
    }

    pub fn stored_name(&self) -> &'static str {
        self.stored.map_or("-", |code| ["f32", "f16", "bf16"][code as usize])
    }

    /// Such as `128x64`.
    pub fn tile(&self) -> String {
        let sides: Vec<_> = self.tuning.iter().map(|(_, side)| side.to_string()).collect();
        if sides.is_empty() { "-".to_owned() } else { sides.join("x") }
    }

    /// SPIR-V by the options of wgpu's Vulkan backend. `clear` has workgroup memory cleared as on drivers that cannot do it themselves.
    pub fn spirv(&self, clear: bool) -> Result<Vec<u32>, Error> {
        let (kernel, shader) = (self.kernel, self.kernel.shader(self.text));
        // The shader's own file from the folder, not from the program, so that an edit shows without a build.
        let wgsl = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders").join(shader.file))?;
        let mut source = kernel.source(self.text, self.elem);
        source.truncate(source.len() - shader.wgsl.len());
        source += &wgsl;
        let module = naga::front::wgsl::parse_str(&source).map_err(|e| e.emit_to_string(&source))?;
        let info = Validator::new(ValidationFlags::all(), Capabilities::all()).validate(&module).map_err(|e| e.emit_to_string(&source))?;
        let stage = naga::ShaderStage::Compute;
        let (module, info) = process_overrides(&module, &info, Some((stage, kernel.name)), &self.constants())?;
        let checks = runtime_checks();
        let bounds = if checks.bounds_checks { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
        let clear = clear || ZERO_INITIALIZE_WORKGROUP_MEMORY;
        let options = spv::Options {
            lang_version: (1, 6),
            flags: spv::WriterFlags::empty(),
            bounds_check_policies: BoundsCheckPolicies { index: bounds, buffer: bounds, image_load: bounds, binding_array: bounds },
            zero_initialize_workgroup_memory: if clear { ZeroInitialize::Polyfill } else { ZeroInitialize::None },
            force_loop_bounding: checks.force_loop_bounding,
            emit_int_div_checks: checks.int_div_checks,
            ..Default::default()
        };
        let pipeline = spv::PipelineOptions { shader_stage: stage, entry_point: kernel.name.to_owned() };
        Ok(spv::write_vec(&module, &info, &options, Some(&pipeline))?)
    }

    fn constants(&self) -> PipelineConstants {
        let stored = stored_bindings(self.kernel).map(|name| (name, f64::from(self.stored.unwrap_or(0))));
        self.tuning.iter().map(|(name, value)| ((*name).to_owned(), f64::from(*value))).chain(stored).collect()
    }
}

fn stored_bindings(kernel: &Kernel) -> impl Iterator<Item = String> {
    kernel.bindings.iter().filter(|b| b.scalar == BindingScalar::Stored).map(|b| dtype_constant(b.name))
}

/// All versions of all kernels, but those with cooperative matrices, which the driver does not know: with the registry's tiles, or with
/// `every_tile`.
pub fn versions(every_tile: bool) -> Vec<Version> {
    let mut all = Vec::new();
    let matrices =
        |kernel: &Kernel, text: Option<usize>| text.is_some_and(|index| matches!(kernel.variants[index].needs, Needs::Matrices(_)));
    let texts = KERNELS.iter().flat_map(|kernel| kernel.texts().map(|text| (*kernel, text)));
    for (kernel, text) in texts.filter(|(kernel, text)| !matrices(kernel, *text)) {
        let elems = if kernel.generic { &[Scalar::F32, Scalar::F16][..] } else { &[Scalar::F32][..] };
        let stored = if stored_bindings(kernel).next().is_some() { vec![Some(0), Some(1), Some(2)] } else { vec![None] };
        let mut tunings = kernel.shader(text).tunings();
        if !every_tile {
            tunings.truncate(1);
        }
        for elem in elems {
            for stored in &stored {
                for tuning in &tunings {
                    all.push(Version { kernel, text, elem: *elem, stored: *stored, tuning: tuning.clone() });
                }
            }
        }
    }
    all
}
