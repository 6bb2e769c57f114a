//! Mesa's RADV driver on its null device: it compiles for a chip that is not there, and tells what became of it.
//!
//! wgpu does not start on the null device, so Vulkan is called directly; pipelines are all that is needed. Nothing is destroyed: the
//! process ends with its work.

use super::Error;
use ash::{khr, vk};
use std::collections::BTreeMap;
use std::ffi::CString;

pub struct Driver {
    _library: ash::Entry,
    device: ash::Device,
    executables: khr::pipeline_executable_properties::Device,
}

/// What the driver says about a pipeline: its statistics by name, and the machine code as text.
pub struct Compiled {
    pub statistics: BTreeMap<String, u64>,
    pub assembly: String,
}

impl Driver {
    /// Opens the first device of the drivers that the environment names.
    pub fn open() -> Result<Self, Error> {
        // SAFETY: the loader and the driver are trusted to do what Vulkan says, and what is passed to them outlives the calls.
        unsafe {
            let library = ash::Entry::load()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
            let instance = library.create_instance(&vk::InstanceCreateInfo::default().application_info(&application), None)?;
            let physical = *instance.enumerate_physical_devices()?.first().ok_or("the driver shows no device")?;
            let queues = [vk::DeviceQueueCreateInfo::default().queue_priorities(&[1.0])];
            // What wgpu-hal asks for, as far as it changes code: robust accesses limit how loads are merged.
            let core = vk::PhysicalDeviceFeatures::default().robust_buffer_access(true);
            let mut f16 = vk::PhysicalDeviceVulkan12Features::default().shader_float16(true);
            let mut storage16 = vk::PhysicalDeviceVulkan11Features::default().storage_buffer16_bit_access(true);
            let mut robust = vk::PhysicalDeviceRobustness2FeaturesEXT::default().robust_buffer_access2(true);
            let mut executable = vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
            let extensions = [khr::pipeline_executable_properties::NAME.as_ptr(), ash::ext::robustness2::NAME.as_ptr()];
            let info = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queues)
                .enabled_features(&core)
                .enabled_extension_names(&extensions)
                .push_next(&mut f16)
                .push_next(&mut storage16)
                .push_next(&mut robust)
                .push_next(&mut executable);
            let device = instance.create_device(physical, &info, None)?;
            let executables = khr::pipeline_executable_properties::Device::new(&instance, &device);
            Ok(Self { _library: library, device, executables })
        }
    }

    /// A compute pipeline whose binding 0 is a uniform buffer and the next `storage` ones are storage buffers.
    pub fn compile(&self, spirv: &[u32], entry: &str, storage: usize) -> Result<Compiled, Error> {
        let entry = CString::new(entry)?;
        let binding = |binding| {
            let ty = if binding == 0 { vk::DescriptorType::UNIFORM_BUFFER } else { vk::DescriptorType::STORAGE_BUFFER };
            let layout = vk::DescriptorSetLayoutBinding::default().binding(binding).descriptor_type(ty).descriptor_count(1);
            layout.stage_flags(vk::ShaderStageFlags::COMPUTE)
        };
        let bindings: Vec<_> = (0..=storage as u32).map(binding).collect();
        // SAFETY: as in `open`; naga wrote the module.
        unsafe {
            let module = self.device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(spirv), None)?;
            let set = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
            let sets = [self.device.create_descriptor_set_layout(&set, None)?];
            let layout = self.device.create_pipeline_layout(&vk::PipelineLayoutCreateInfo::default().set_layouts(&sets), None)?;
            let stage = vk::PipelineShaderStageCreateInfo::default().stage(vk::ShaderStageFlags::COMPUTE).module(module).name(&entry);
            let capture = vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR | vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR;
            let info = vk::ComputePipelineCreateInfo::default().stage(stage).layout(layout).flags(capture);
            let made = self.device.create_compute_pipelines(vk::PipelineCache::null(), &[info], None).map_err(|(_, e)| e)?;
            self.describe(made[0])
        }
    }

    /// # Safety
    /// The pipeline is this device's.
    unsafe fn describe(&self, pipeline: vk::Pipeline) -> Result<Compiled, Error> {
        let which = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline);
        let mut statistics = BTreeMap::new();
        // SAFETY: RADV states all of its statistics as 64-bit counts; texts get as many bytes as the driver asks for.
        unsafe {
            for s in self.executables.get_pipeline_executable_statistics(&which)? {
                statistics.insert(s.name_as_c_str()?.to_str()?.to_owned(), s.value.u64);
            }
            let mut texts = self.executables.get_pipeline_executable_internal_representations(&which)?;
            let mut room: Vec<Vec<u8>> = texts.iter().map(|t| vec![0; t.data_size]).collect();
            for (text, room) in texts.iter_mut().zip(&mut room) {
                text.p_data = room.as_mut_ptr().cast();
            }
            let mut count = texts.len() as u32;
            let get = self.executables.fp().get_pipeline_executable_internal_representations_khr;
            get(self.executables.device(), &raw const which, &raw mut count, texts.as_mut_ptr()).result()?;
            let named = |t: &vk::PipelineExecutableInternalRepresentationKHR<'_>| t.name_as_c_str().is_ok_and(|n| n == c"Assembly");
            let found = texts.iter().position(named).ok_or("the driver shows no machine code")?;
            let assembly = String::from_utf8_lossy(&room[found]).trim_end_matches('\0').to_owned();
            Ok(Compiled { statistics, assembly })
        }
    }
}
