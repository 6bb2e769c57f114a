//! What a real GPU compiler makes of the kernels, without a GPU: `cargo run --example isa -- TOOL [KERNEL] [NAME=VALUE ...]`.
//!
//! TOOL is called as `TOOL SHADER.spv ENTRY KINDS FAMILY` (KINDS: u uniform, s storage, one letter a binding) and prints
//! `Name=value` lines: registers, spills, workgroup memory, waves, and counts of instruction kinds. Shaders are specialised
//! with the registry's tuning constants, or those given, and translated as wgpu does for a trusted shader: no bounds checks,
//! no loop bounding, no zero fill of workgroup memory. `waves` counts waves of 32 lanes per SIMD, as the driver does; `loop` columns
//! are about the basic block with the most multiply-adds. Families come from ISA_FAMILIES (default "navi21 gfx1100"); the
//! translated files stay in the target folder.

use aespa_gpu::engine::kernel::{BindingScalar, Kernel, dtype_constant};
use aespa_gpu::engine::{Scalar, kernels::KERNELS};
use naga::back::{PipelineConstants, pipeline_constants::process_overrides, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let tool = args.next().ok_or("which tool? see the head of examples/isa.rs")?;
    let (given, names): (Vec<String>, Vec<String>) = args.partition(|a| a.contains('='));
    let given: Vec<(&str, &str)> = given.iter().filter_map(|a| a.split_once('=')).collect();
    let families = std::env::var("ISA_FAMILIES").unwrap_or_else(|_| "navi21 gfx1100".to_owned());
    let folder = PathBuf::from(std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".to_owned())).join("isa");
    std::fs::create_dir_all(&folder)?;
    println!(
        "{:<14} {:<4} {:<4} {:<8} {:>5} {:>5} {:>6} {:>5} {:>8} {:>5} {:>6} {:>8} {:>6} {:>5} {:>5}",
        "kernel",
        "elem",
        "w",
        "family",
        "vgpr",
        "spill",
        "lds",
        "waves",
        "inv.thr",
        "fma",
        "vector",
        "loop fma",
        "loop %",
        "ds rd",
        "ds wr"
    );
    for kernel in KERNELS.iter().filter(|k| names.is_empty() || names.iter().any(|n| n == k.name)) {
        let elems = if kernel.generic { &[Scalar::F32, Scalar::F16][..] } else { &[Scalar::F32][..] };
        let stored = kernel.bindings.iter().find(|b| b.scalar == BindingScalar::Stored).map(|b| dtype_constant(b.name));
        let dtypes = if stored.is_some() { &["f32", "f16", "bf16"][..] } else { &["-"][..] };
        for elem in elems {
            for (code, dtype) in dtypes.iter().enumerate() {
                let mut constants: PipelineConstants = kernel.tuning.iter().map(|(n, v)| ((*n).to_owned(), f64::from(*v))).collect();
                constants.extend(stored.iter().map(|name| (name.clone(), code as f64)));
                for (name, value) in &given {
                    constants.insert((*name).to_owned(), value.parse()?);
                }
                let tag = if *elem == Scalar::F16 { "f16" } else { "f32" };
                let file = folder.join(format!("{}.{tag}.{dtype}.spv", kernel.name));
                translate(kernel, *elem, &constants, &file)?;
                for family in families.split_whitespace() {
                    row(kernel, &tool, &file, family, tag, dtype)?;
                }
            }
        }
    }
    Ok(())
}

fn translate(kernel: &Kernel, elem: Scalar, constants: &PipelineConstants, to: &Path) -> Result<(), Error> {
    let source = kernel.source(elem);
    let module = naga::front::wgsl::parse_str(&source).map_err(|e| e.emit_to_string(&source))?;
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
    let info = validator.validate(&module).map_err(|e| e.emit_to_string(&source))?;
    let stage = Some((naga::ShaderStage::Compute, kernel.name));
    let (module, info) = process_overrides(&module, &info, stage, constants)?;
    let options = spv::Options {
        lang_version: (1, 3),
        flags: spv::WriterFlags::empty(),
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        emit_int_div_checks: false,
        ..Default::default()
    };
    let pipeline = spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: kernel.name.to_owned() };
    let words = spv::write_vec(&module, &info, &options, Some(&pipeline))?;
    std::fs::write(to, words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>())?;
    Ok(())
}

fn row(kernel: &Kernel, tool: &str, file: &Path, family: &str, elem: &str, dtype: &str) -> Result<(), Error> {
    let kinds = format!("u{}", "s".repeat(kernel.bindings.len()));
    let out = Command::new(tool).arg(file).arg(kernel.name).arg(kinds).arg(family).output()?;
    if !out.status.success() {
        return Err(format!("{} {family}: {}", kernel.name, String::from_utf8_lossy(&out.stderr)).into());
    }
    let text = String::from_utf8(out.stdout)?;
    // `Spilled VGPRs=0` stands on a line of its own, the instruction counts share one.
    let mut values: HashMap<&str, u64> = HashMap::new();
    for line in text.lines() {
        let parts: Vec<&str> = if line.matches('=').count() > 1 { line.split_whitespace().collect() } else { vec![line] };
        values.extend(parts.iter().filter_map(|p| p.split_once('=')).filter_map(|(k, v)| Some((k, v.parse().ok()?))));
    }
    let get = |name: &str| values.get(name).copied().unwrap_or(0);
    let vector = get("fma") + get("other_vector");
    let (loop_fma, loop_vector) = hottest(&std::fs::read_to_string(file.with_extension(format!("{family}.s")))?);
    println!(
        "{:<14} {elem:<4} {dtype:<4} {family:<8} {:>5} {:>5} {:>6} {:>5} {:>8} {:>5} {vector:>6} {loop_fma:>8} {:>6.1} {:>5} {:>5}",
        kernel.name,
        get("VGPRs"),
        get("Spilled VGPRs") + get("Spilled SGPRs"),
        get("LDS size"),
        get("Subgroups per SIMD"),
        get("Inverse Throughput"),
        get("fma"),
        100.0 * loop_fma as f64 / loop_vector.max(1) as f64,
        get("lds_read"),
        get("lds_write"),
    );
    Ok(())
}

/// Multiply-adds and all vector instructions of the basic block with the most multiply-adds: the inner loop.
fn hottest(assembly: &str) -> (usize, usize) {
    let (mut best, mut now) = ((0, 0), (0, 0));
    for word in assembly.lines().filter_map(|l| l.split_whitespace().next()) {
        if word.starts_with("BB") {
            now = (0, 0);
        }
        // A dual-issued pair of RDNA3 counts once: it takes one issue slot.
        now.0 += usize::from(["v_fma", "v_pk_fma", "v_dual_fmac", "v_dot"].iter().any(|p| word.starts_with(p)));
        now.1 += usize::from(word.starts_with("v_"));
        best = best.max(now);
    }
    best
}
