//! What a GPU's own compiler makes of the kernels, without the GPU: Mesa's RADV compiles for any AMD chip that RADV_FORCE_FAMILY names.
//!
//! The driver takes the chip from the environment when it is loaded, so every chip gets a process of its own: the program that asks runs
//! itself again, with a `Job` in an environment variable, and gets back a `Row` per version of a kernel. Shared by `benches/isa`, which
//! prints the rows, and `tests/isa.rs`, which holds them to limits.
//!
//! - `driver`: Vulkan.
//! - `shader`: versions of a kernel, WGSL to SPIR-V.
//! - `assembly`: counts instructions.

mod assembly;
mod driver;
mod shader;

pub use assembly::Counts;
use driver::{Compiled, Driver};
use serde::{Deserialize, Serialize};
use shader::{Version, versions};
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub type Error = Box<dyn std::error::Error>;

const JOB: &str = "AESPA_ISA_JOB";

/// RDNA2 and RDNA3.
pub const FAMILIES: [&str; 2] = ["navi21", "gfx1100"];

/// What to compile.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Job {
    /// Names of kernels; all, if none.
    pub kernels: Vec<String>,
    /// Tiles of all sides, not only the registry's?
    pub every_tile: bool,
    /// Let workgroup memory be cleared by the shader.
    pub cleared: bool,
    /// A folder for the machine code.
    pub assembly: Option<PathBuf>,
}

/// What became of one version of a kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub kernel: String,
    pub elem: String,
    pub stored: String,
    pub tile: String,
    pub family: String,
    pub vgprs: u64,
    /// Vector and scalar registers that did not fit.
    pub spilled: u64,
    /// Bytes of workgroup memory.
    pub workgroup_memory: u64,
    /// Waves that a SIMD holds at a time, counted in waves of 32 lanes: a wave of 64, as RADV compiles compute shaders, counts twice.
    pub waves: u64,
    /// The driver's estimate of cycles per wave when the SIMD is full.
    pub inverse_throughput: u64,
    /// All instructions.
    pub all: Counts,
    /// Those of the hot loop.
    pub hot: Counts,
}

impl Row {
    fn new(version: &Version, family: &str, compiled: &Compiled) -> Result<Self, Error> {
        let get = |name: &str| compiled.statistics.get(name).copied().ok_or_else(|| format!("the driver does not tell '{name}'"));
        Ok(Self {
            kernel: version.name(),
            elem: version.elem_name().to_owned(),
            stored: version.stored_name().to_owned(),
            tile: version.tile(),
            family: family.to_owned(),
            vgprs: get("VGPRs")?,
            spilled: get("Spilled VGPRs")? + get("Spilled SGPRs")?,
            workgroup_memory: get("LDS size")?,
            waves: get("Subgroups per SIMD")?,
            inverse_throughput: get("Inverse Throughput")?,
            all: Counts::of(&compiled.assembly),
            hot: Counts::of_hot_loop(&compiled.assembly),
        })
    }

    /// For messages and file names.
    pub fn name(&self) -> String {
        [&self.kernel, &self.elem, &self.stored, &self.tile, &self.family].map(String::as_str).join(" ")
    }
}

/// Does the work of a process that `rows` started; false in any other.
pub fn child() -> Result<bool, Error> {
    let Some(job) = std::env::var_os(JOB) else { return Ok(false) };
    let (out, job): (PathBuf, Job) = serde_json::from_slice(job.as_encoded_bytes())?;
    let family = std::env::var("RADV_FORCE_FAMILY")?;
    let mut out = std::fs::File::options().append(true).open(out)?;
    let driver = Driver::open()?;
    for version in versions(job.every_tile) {
        let kernel = version.kernel;
        if !job.kernels.is_empty() && !job.kernels.iter().any(|name| name == kernel.name) {
            continue;
        }
        let compiled = driver.compile(&version.spirv(job.cleared)?, kernel.name, kernel.bindings.len())?;
        let row = Row::new(&version, &family, &compiled)?;
        if let Some(folder) = &job.assembly {
            std::fs::write(folder.join(row.name().replace(' ', ".") + ".s"), &compiled.assembly)?;
        }
        writeln!(out, "{}", serde_json::to_string(&row)?)?;
    }
    Ok(true)
}

/// Compiles for every family. `arguments` lead this program to `child` when it is started again.
pub fn rows(families: &[String], job: &Job, arguments: &[&str]) -> Result<Vec<Row>, Error> {
    let manifests = manifests()?;
    let mut started = Vec::new();
    for family in families {
        let out = tempfile::NamedTempFile::new()?;
        let job = serde_json::to_string(&(out.path(), job))?;
        started.push((family, start(family, &manifests, &job, arguments)?, out));
    }
    let mut rows = Vec::new();
    for (family, child, out) in started {
        let end = child.wait_with_output()?;
        if !end.status.success() {
            let said = [end.stdout, end.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
            return Err(format!("RADV does not compile for {family}: {}", said.trim()).into());
        }
        for line in BufReader::new(out).lines() {
            rows.push(serde_json::from_str(&line?)?);
        }
    }
    Ok(rows)
}

fn start(family: &str, manifests: &OsStr, job: &str, arguments: &[&str]) -> Result<Child, Error> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).env(JOB, job).env("RADV_FORCE_FAMILY", family);
    // The newer name of the variable and the older one. A cache of the driver could answer without the machine code.
    command.env("VK_DRIVER_FILES", manifests).env("VK_ICD_FILENAMES", manifests).env("MESA_SHADER_CACHE_DISABLE", "true");
    Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// RADV's manifests, as the loader takes them; it leaves out those of other architectures.
fn manifests() -> Result<OsString, Error> {
    let folders = ["/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d"].map(Path::new);
    let files = folders.iter().filter_map(|folder| folder.read_dir().ok()).flatten().filter_map(|file| Some(file.ok()?.path()));
    let radv: Vec<PathBuf> = files.filter(|f| f.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"radeon_icd"))).collect();
    if radv.is_empty() {
        return Err("no RADV here, Mesa's Vulkan driver for AMD GPUs, whose compiler judges the kernels: run ./test, which installs it \
                    (Debian: mesa-vulkan-drivers libvulkan1; Fedora: mesa-vulkan-drivers vulkan-loader; Arch: vulkan-radeon \
                    vulkan-icd-loader)"
            .into());
    }
    Ok(std::env::join_paths(radv)?)
}
