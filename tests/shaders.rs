//! Registry and shaders must agree, in both directions, and every shader must translate to SPIR-V, MSL and HLSL.
//!
//! The shaders run without bounds checks and get their parameters as bytes, so a field in the wrong place would not be an error
//! but a wrong model. naga reads what a shader declares; this test compares it with what the registry says.

use aespa_gpu::engine::Scalar;
use aespa_gpu::engine::kernel::{Binding, BindingScalar, Kernel, dtype_constant};
use aespa_gpu::engine::kernels::KERNELS;
use aespa_gpu::engine::shader::{Matrices, Needs};
use naga::back::PipelineConstants;
use naga::back::pipeline_constants::process_overrides;
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, ArraySize, Module, ShaderStage, StorageAccess, TypeInner};
use std::collections::BTreeSet;

/// What every WebGPU device has.
const MAX_INVOCATIONS: u32 = 256;
const MAX_WORKGROUP_BYTES: u32 = 16384;

fn parse(source: &str) -> Result<(Module, ModuleInfo), String> {
    let module = naga::front::wgsl::parse_str(source).map_err(|e| e.emit_to_string(source))?;
    let capabilities =
        Capabilities::SHADER_FLOAT16 | Capabilities::SHADER_FLOAT16_IN_FLOAT32 | Capabilities::SUBGROUP | Capabilities::COOPERATIVE_MATRIX;
    let info = Validator::new(ValidationFlags::all(), capabilities).validate(&module).map_err(|e| e.emit_to_string(source))?;
    Ok((module, info))
}

/// A kernel and one of its texts.
#[derive(Clone, Copy)]
struct Text {
    kernel: &'static Kernel,
    text: Option<usize>,
}

impl Text {
    fn all() -> impl Iterator<Item = Self> {
        KERNELS.iter().flat_map(|kernel| kernel.texts().map(|text| Self { kernel, text }))
    }

    fn name(self) -> String {
        let shader = self.kernel.shader(self.text);
        let parts = shader.libs.iter().map(|(file, _)| *file).chain([shader.file]);
        format!("{} ({})", self.kernel.name, parts.collect::<Vec<_>>().join(" "))
    }

    fn needs(self) -> Option<Needs> {
        self.text.map(|index| self.kernel.variants[index].needs)
    }

    fn source(self, elem: Scalar) -> String {
        self.kernel.source(self.text, elem)
    }

    fn matrices(self) -> Option<Matrices> {
        if let Some(Needs::Matrices(matrices)) = self.needs() { Some(matrices) } else { None }
    }

    /// The operand types that it exists for.
    fn elems(self) -> &'static [Scalar] {
        match (self.kernel.generic, self.matrices()) {
            (true, Some(Matrices { operands: Scalar::F16, .. })) => &[Scalar::F16],
            (true, _) => &[Scalar::F32, Scalar::F16],
            (false, _) => &[Scalar::F32],
        }
    }

    /// Bytes of workgroup memory that it may take.
    fn max_workgroup_bytes(self) -> u32 {
        self.matrices().map_or(MAX_WORKGROUP_BYTES, |matrices| matrices.workgroup_bytes)
    }

    /// The overrides that it must have.
    fn overrides(self) -> BTreeSet<String> {
        let dtypes = self.kernel.bindings.iter().filter(|b| b.scalar == BindingScalar::Stored).map(|b| dtype_constant(b.name));
        self.kernel.shader(self.text).tuning.iter().map(|tunable| tunable.name.to_owned()).chain(dtypes).collect()
    }

    /// Constants for every tuning, with weights stored as `dtype` (0 f32, 1 f16, 2 bf16).
    fn constants(self, dtype: u32) -> Vec<PipelineConstants> {
        let tunings = self.kernel.shader(self.text).tunings();
        let of = |tuning: Vec<(&str, u32)>| {
            let tuned = |name: &str| tuning.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
            self.overrides().into_iter().map(|name| (name.clone(), f64::from(tuned(&name).unwrap_or(dtype)))).collect()
        };
        tunings.into_iter().map(of).collect()
    }
}

/// Everything in which a text, changed by `edit`, differs from its registry line.
fn differences(of: Text, edit: impl Fn(&str) -> String) -> Vec<String> {
    let (kernel, shader) = (of.kernel, of.kernel.shader(of.text));
    let mut found = Vec::new();
    let stem = shader.file.trim_end_matches(".wgsl");
    if stem != kernel.name && (of.text.is_none() || !stem.starts_with(&format!("{}_", kernel.name))) {
        found.push(format!("lies in {}", shader.file));
    }
    for elem in of.elems() {
        match parse(&edit(&of.source(*elem))) {
            Ok((module, info)) => {
                found.extend(entry_point(of, &module, &info));
                found.extend(bindings(kernel, &module, *elem));
                found.extend(declared_overrides(of, &module));
            }
            Err(error) => found.push(format!("does not parse: {error}")),
        }
    }
    for wgsl in std::iter::once(shader.wgsl).chain(shader.libs.iter().map(|(_, wgsl)| *wgsl)) {
        found.extend(comments(&edit(wgsl)));
    }
    found
}

fn entry_point(of: Text, module: &Module, info: &ModuleInfo) -> Vec<String> {
    let [entry] = module.entry_points.as_slice() else { return vec![format!("{} entry points", module.entry_points.len())] };
    let mut found = Vec::new();
    if entry.name != of.kernel.name || entry.stage != ShaderStage::Compute {
        found.push(format!("entry point {} ({:?})", entry.name, entry.stage));
    }
    for constants in of.constants(0) {
        match process_overrides(module, info, None, &constants) {
            Ok((module, _)) => found.extend(size(&module, of.max_workgroup_bytes())),
            Err(error) => found.push(format!("overrides: {error}")),
        }
    }
    found
}

/// Are a workgroup's threads and memory within limits?
fn size(module: &Module, max_bytes: u32) -> Vec<String> {
    let mut found = Vec::new();
    let [x, y, z] = module.entry_points[0].workgroup_size;
    if x * y * z == 0 || x * y * z > MAX_INVOCATIONS || z > 64 {
        found.push(format!("workgroups of {x} x {y} x {z}"));
    }
    let shared = module.global_variables.iter().filter(|(_, v)| v.space == AddressSpace::WorkGroup);
    let bytes: u32 = shared.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx()).next_multiple_of(16)).sum();
    if bytes > max_bytes {
        found.push(format!("{bytes} bytes of workgroup memory"));
    }
    found
}

fn bindings(kernel: &Kernel, module: &Module, elem: Scalar) -> Vec<String> {
    let mut found = Vec::new();
    let mut bound: Vec<_> = module.global_variables.iter().filter_map(|(_, v)| v.binding.map(|b| (b.group, b.binding, v))).collect();
    bound.sort_by_key(|(group, binding, _)| (*group, *binding));
    let slots: Vec<_> = bound.iter().map(|(group, binding, _)| (*group, *binding)).collect();
    let expected: Vec<_> = (0..=kernel.bindings.len() as u32).map(|binding| (0, binding)).collect();
    if slots != expected {
        return vec![format!("bindings (group, binding) {slots:?} instead of {expected:?}")];
    }
    let names: Vec<_> = bound.iter().map(|(_, _, v)| v.name.as_deref().unwrap_or("")).collect();
    let expected: Vec<_> = std::iter::once("p").chain(kernel.bindings.iter().map(|b| b.name)).collect();
    if names != expected {
        found.push(format!("bindings {names:?} instead of {expected:?}"));
    }
    found.extend(params(kernel, module, bound[0].2));
    for ((_, _, variable), binding) in bound[1..].iter().zip(kernel.bindings) {
        let access = if binding.writes { StorageAccess::LOAD | StorageAccess::STORE } else { StorageAccess::LOAD };
        if variable.space != (AddressSpace::Storage { access }) {
            found.push(format!("{} is {:?}", binding.name, variable.space));
        }
        found.extend(array(module, &module.types[variable.ty].inner, binding, elem));
    }
    found
}

/// Must be `struct NAME { field: type, ... }` as a uniform, with every field where Rust puts it.
fn params(kernel: &Kernel, module: &Module, variable: &naga::GlobalVariable) -> Vec<String> {
    let mut found = Vec::new();
    let ty = &module.types[variable.ty];
    if variable.space != AddressSpace::Uniform || ty.name.as_deref() != Some(kernel.params.name) {
        found.push(format!("parameters are {:?} in {:?}", ty.name, variable.space));
    }
    let TypeInner::Struct { members, .. } = &ty.inner else { return vec!["parameters are no struct".to_owned()] };
    let declared: Vec<_> = members.iter().map(|m| (m.name.as_deref().unwrap_or(""), scalar(&module.types[m.ty].inner), m.offset)).collect();
    let expected: Vec<_> = (0..).zip(kernel.params.fields).map(|(i, (name, ty))| (*name, Some((*ty).to_owned()), 4 * i)).collect();
    if declared != expected {
        found.push(format!("parameters {declared:?} instead of {expected:?}"));
    }
    found
}

/// Must be a runtime-sized array of the registry's scalar, or of vectors of it.
fn array(module: &Module, ty: &TypeInner, binding: &Binding, elem: Scalar) -> Option<String> {
    let expected = match (binding.scalar, elem) {
        (BindingScalar::U32 | BindingScalar::Stored, _) => "u32",
        (BindingScalar::Elem, Scalar::F16) => "f16",
        _ => "f32",
    };
    let TypeInner::Array { base, size: ArraySize::Dynamic, stride } = ty else { return Some(format!("{} is {ty:?}", binding.name)) };
    let base = &module.types[*base].inner;
    let packed = *stride == base.size(module.to_ctx());
    (scalar(base).as_deref() != Some(expected) || !packed).then(|| format!("{} is an array of {base:?} with stride {stride}", binding.name))
}

/// The WGSL name of a scalar, or of a vector's scalar.
fn scalar(ty: &TypeInner) -> Option<String> {
    let (TypeInner::Scalar(scalar) | TypeInner::Vector { scalar, .. }) = ty else { return None };
    let letter = match scalar.kind {
        naga::ScalarKind::Float => "f",
        naga::ScalarKind::Uint => "u",
        _ => return None,
    };
    Some(format!("{letter}{}", scalar.width * 8))
}

fn declared_overrides(of: Text, module: &Module) -> Vec<String> {
    let mut found = Vec::new();
    let declared: BTreeSet<_> = module.overrides.iter().filter_map(|(_, o)| o.name.clone()).collect();
    if declared != of.overrides() {
        found.push(format!("overrides {declared:?} instead of {:?}", of.overrides()));
    }
    // naga makes nameless ones of its own for array lengths that depend on an override.
    for (_, o) in module.overrides.iter().filter(|(_, o)| o.name.is_some()) {
        if o.init.is_some() || o.id.is_some() || scalar(&module.types[o.ty].inner).as_deref() != Some("u32") {
            found.push(format!("override {:?} has a default, an id, or is not u32", o.name));
        }
    }
    found
}

/// A header, and a shape on every storage binding.
fn comments(wgsl: &str) -> Vec<String> {
    let shapeless =
        wgsl.lines().filter(|l| l.contains("var<storage") && !l.split_once("; // ").is_some_and(|(_, shape)| shape.contains('[')));
    let headless = (!wgsl.starts_with("// ")).then(|| "no header".to_owned());
    shapeless.map(|l| format!("no shape: {l}")).chain(headless).collect()
}

#[test]
fn registry_and_shaders_agree() {
    let found: Vec<_> =
        Text::all().flat_map(|of| differences(of, str::to_owned).into_iter().map(move |d| format!("{}: {d}", of.name()))).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn every_shader_has_a_line_and_every_line_a_shader() {
    let shaders = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let files = |folder: &std::path::Path| -> BTreeSet<String> {
        let files = folder.read_dir().expect("a folder").map(|f| f.expect("a file")).filter(|f| f.path().is_file());
        files.map(|f| f.file_name().into_string().expect("UTF-8")).collect()
    };
    let texts: Vec<_> = Text::all().map(|of| of.kernel.shader(of.text)).collect();
    let named: BTreeSet<_> = texts.iter().map(|shader| shader.file.to_owned()).collect();
    assert_eq!(files(&shaders), named);
    let bases: BTreeSet<_> = KERNELS.iter().map(|kernel| kernel.base.file).collect();
    assert_eq!(bases.len(), KERNELS.len(), "two kernels share a file");
    let libs: BTreeSet<_> = texts.iter().flat_map(|shader| shader.libs).map(|(file, _)| (*file).to_owned()).collect();
    assert_eq!(files(&shaders.join("lib")), libs);
}

#[test]
fn every_shader_translates_to_every_backend() {
    for of in Text::all() {
        for elem in of.elems() {
            let (module, info) = parse(&of.source(*elem)).expect("valid WGSL");
            for (dtype, constants) in (0..3).flat_map(|dtype| of.constants(dtype).into_iter().map(move |c| (dtype, c))) {
                let (module, info) = process_overrides(&module, &info, None, &constants).expect("complete constants");
                translate(of, &module, &info)
                    .unwrap_or_else(|e| panic!("{} with {elem:?}, stored dtype {dtype} and {constants:?}: {e}", of.name()));
            }
        }
    }
}

/// To every backend that has what the text needs: 16 x 16 matrices are Vulkan's, 8 x 8 Metal's too, and HLSL has none.
fn translate(of: Text, module: &Module, info: &ModuleInfo) -> Result<(), String> {
    let side = of.matrices().map(|matrices| matrices.side);
    let mut empty = vec![spirv(of, module, info)?.is_empty()];
    if side != Some(16) {
        empty.push(msl(module, info)?.is_empty());
    }
    if side.is_none() {
        empty.push(hlsl(module, info)?.is_empty());
    }
    if empty.contains(&true) { Err("nothing was written".to_owned()) } else { Ok(()) }
}

fn spirv(of: Text, module: &Module, info: &ModuleInfo) -> Result<Vec<u32>, String> {
    use naga::back::spv;
    let pipeline = spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: of.kernel.name.to_owned() };
    // Subgroups came with 1.3, which wgpu asks for where it finds them.
    let options = spv::Options { lang_version: (1, 3), ..Default::default() };
    spv::write_vec(module, info, &options, Some(&pipeline)).map_err(|e| format!("SPIR-V: {e}"))
}

fn msl(module: &Module, info: &ModuleInfo) -> Result<String, String> {
    use naga::back::msl;
    // Metal 2.4 is on every macOS 12.
    let options = msl::Options { lang_version: (2, 4), ..Default::default() };
    let (text, points) = msl::write_string(module, info, &options, &msl::PipelineOptions::default()).map_err(|e| format!("MSL: {e}"))?;
    points.entry_point_names.into_iter().try_for_each(|e| e.map(drop).map_err(|e| format!("MSL: {e}")))?;
    Ok(text)
}

fn hlsl(module: &Module, info: &ModuleInfo) -> Result<String, String> {
    use naga::back::hlsl;
    // Shader model 6.2 has 16-bit types.
    let options = hlsl::Options { shader_model: hlsl::ShaderModel::V6_2, ..Default::default() };
    let mut text = String::new();
    let pipeline = hlsl::PipelineOptions::default();
    let points = hlsl::Writer::new(&mut text, &options, &pipeline).write(module, info, None).map_err(|e| format!("HLSL: {e}"))?;
    points.entry_point_names.into_iter().try_for_each(|e| e.map(drop).map_err(|e| format!("HLSL: {e}")))?;
    Ok(text)
}

/// Shaders broken in every way that the comparison must notice.
#[test]
fn a_broken_shader_is_noticed() {
    // (kernel, what, by what it is replaced, what the comparison says)
    let broken = [
        ("quantize", "fn quantize(", "fn quantise(", "entry point"),
        ("quantize", "@compute", "@compute @workgroup_size(1) fn second() {}\n@compute", "entry points"),
        ("quantize", "@binding(2)", "@binding(7)", "bindings (group, binding)"),
        ("quantize", "@group(0) @binding(2)", "@group(1) @binding(2)", "bindings (group, binding)"),
        ("quantize", "read> scale", "read> scala", "does not parse"),
        ("quantize", "var<storage, read> zero", "var<storage, read_write> zero", "zero is Storage"),
        ("quantize", "w: array<f32>; // [rows, ld]", "w: array<f32, 64>; // [rows, ld]", "w is Array"),
        ("quantize", "    rows: u32,\n    cols: u32,", "    cols: u32,\n    rows: u32,", "parameters"),
        ("quantize", "    max_code: u32,", "    @align(16) max_code: u32,", "parameters"),
        ("quantize", "    max_code: u32,", "    max_code: f32,", "parameters"),
        ("quantize", "    max_code: u32,", "    max_code: u32,\n    extra: u32,", "parameters"),
        ("quantize", "QuantizeParams", "QuantParams", "parameters are"),
        ("quantize", "array<f32>; // [rows, ld]", "array<f32>;", "no shape"),
        ("quantize", "struct Quant", "override TILE: u32;\nstruct Quant", "overrides {\"TILE\"}"),
        ("embed", "override TABLE_DTYPE: u32;", "override TABLE_DTYPE: u32 = 0;", "has a default"),
        ("quantize", "@workgroup_size(256)", "@workgroup_size(512)", "workgroups of 512"),
        ("rms_norm", "const THREADS = 256u", "const THREADS = 4097u", "bytes of workgroup memory"),
        ("gptq_sweep_heads", "feedback: array<f32, THREADS>", "feedback: array<f32, 4097>", "bytes of workgroup memory"),
        ("gptq_sweep_heads", "// GPTQ's column sweep inside a block where the rows of a head are coupled, as in", "", "no header"),
        ("rms_norm", "// RMSNorm", "\n// RMSNorm", "no header"),
        ("select_rows", ": array<u32>; // [rows, ld]", ": array<f32>; // [rows, ld]", "is an array of"),
        ("scale_refit", "fn stored_scale(", "fn stored_scales(", "does not parse"),
        ("scale_refit", "// Scales, minima", "\n// Scales, minima", "no header"),
        ("swiglu", "out: array<Elem>", "out: array<f32>", "does not parse"),
        // Equal types in the wrong order translate well and compute nonsense.
        (
            "row_dot",
            "> a: array<f32>; // [rows, ld]\n@group(0) @binding(2) var<storage, read> b:",
            "> b: array<f32>; // [rows, ld]\n@group(0) @binding(2) var<storage, read> a:",
            "bindings [\"p\", \"b\"",
        ),
    ];
    for (name, from, to, says) in broken {
        let mut texts = Text::all().filter(|of| of.kernel.name == name);
        let of = texts.find(|of| of.source(Scalar::F32).contains(from)).unwrap_or_else(|| panic!("'{from}' is not in {name}"));
        let found = differences(of, |wgsl| wgsl.replace(from, to));
        assert!(found.iter().any(|f| f.contains(says)), "'{to}' in {name}: {found:?}");
    }
}
