//! What a real GPU compiler makes of the kernels, without a GPU: registers, occupancy and machine code for AMD chips, by Mesa's RADV.
//!
//! usage: cargo bench --bench isa -- [KERNEL ...] [--tiles] [--json] [--families A,B] [--assembly FOLDER]
//!   --tiles     every tile that the matrix products can be built with, not only the registry's
//!   --json      one JSON object per row
//!   --families  names that RADV_FORCE_FAMILY takes (default: navi21,gfx1100, which are RDNA2 and RDNA3)
//!   --assembly  leaves the machine code of every row in FOLDER
//!
//! A row per kernel, operand type, dtype of stored weights and tile. Waves count 32 lanes each, as the driver counts: RADV compiles compute
//! shaders for waves of 64, which count twice. Inverse throughput is the driver's estimate of cycles per wave on a full SIMD, in which
//! every loop counts as if it ran a few times: it compares versions of one kernel. `hot` columns are about the innermost loop
//! with the most multiply-adds. What cannot be seen here: caches, bank conflicts, clocks.
//!
//! Shaders are read from the folder `shaders`, so the built program shows an edit at once: a profiler's loop of seconds.

#[path = "../../tests/common/isa/mod.rs"]
mod isa;

use isa::{Error, FAMILIES, Job, Row};
use std::process::ExitCode;

struct Options {
    job: Job,
    json: bool,
    families: Vec<String>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, Error> {
        let mut options = Self { job: Job::default(), json: false, families: FAMILIES.map(str::to_owned).to_vec() };
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} wants a value"));
            match argument.as_str() {
                "--bench" => {} // cargo's
                "--tiles" => options.job.every_tile = true,
                "--json" => options.json = true,
                "--families" => options.families = value()?.split(',').map(str::to_owned).collect(),
                "--assembly" => options.job.assembly = Some(std::path::absolute(value()?)?),
                _ if argument.starts_with('-') => return Err(format!("unknown option {argument}").into()),
                _ => options.job.kernels.push(argument),
            }
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("isa: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Error> {
    if isa::child()? {
        return Ok(());
    }
    let options = Options::parse(std::env::args().skip(1))?;
    if let Some(folder) = &options.job.assembly {
        std::fs::create_dir_all(folder)?;
    }
    let rows = isa::rows(&options.families, &options.job, &[])?;
    if options.json {
        rows.iter().try_for_each(|row| serde_json::to_string(row).map(|line| println!("{line}")))?;
    } else {
        print(&rows);
    }
    Ok(())
}

fn print(rows: &[Row]) {
    println!(
        "{:<26} {:<4} {:<6} {:<7} {:<8} {:>5} {:>5} {:>6} {:>5} {:>8} | {:>5} {:>6} {:>6} {:>5} {:>5} {:>5} {:>6} {:>4} | {:>8} {:>6} {:>8}",
        "kernel",
        "elem",
        "stored",
        "tile",
        "family",
        "vgprs",
        "spill",
        "shared",
        "waves",
        "inv.thr.",
        "fma",
        "vector",
        "scalar",
        "reads",
        "write",
        "loads",
        "stores",
        "barr",
        "hot fmas",
        "hot %",
        "reads/16"
    );
    for row in rows {
        let (all, hot) = (row.all, row.hot);
        println!(
            "{:<26} {:<4} {:<6} {:<7} {:<8} {:>5} {:>5} {:>6} {:>5} {:>8} | {:>5} {:>6} {:>6} {:>5} {:>5} {:>5} {:>6} {:>4} | {:>8} {:>6.1} {:>8.2}",
            row.kernel,
            row.elem,
            row.stored,
            row.tile,
            row.family,
            row.vgprs,
            row.spilled,
            row.workgroup_memory,
            row.waves,
            row.inverse_throughput,
            all.fma,
            all.vector,
            all.scalar,
            all.local_reads,
            all.local_writes,
            all.loads,
            all.stores,
            all.barriers,
            hot.fma,
            hot.fma_percent(),
            hot.reads_per_16_fmas()
        );
    }
}
