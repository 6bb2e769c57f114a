//! The command line. Scripts depend on these names; allowed values come from the registries.

mod args;
mod demo;
mod devices;
mod eval;
mod inspect;
mod progress;
mod quantize;
mod verify;

use crate::{Error, Kind, Result, interrupt};
use args::{Arguments, Command};
use clap::Parser;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

/// Runs the program on the process's arguments.
pub fn main() -> ExitCode {
    quiet_drivers();
    let arguments = Arguments::parse();
    log(arguments.verbose);
    match run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Mesa's drivers complain on standard error where this variable is missing, as on headless nodes, and work all the same.
fn quiet_drivers() {
    const NAME: &str = "XDG_RUNTIME_DIR";
    if cfg!(target_os = "linux") && std::env::var_os(NAME).is_none() {
        // SAFETY: called first of all, when there is no other thread that could read the environment.
        #[allow(unsafe_code, reason = "changing the environment is unsafe once there are threads")]
        unsafe {
            std::env::set_var(NAME, std::env::temp_dir());
        }
    }
}

fn run(command: Command) -> Result<()> {
    interrupt::install()?;
    match command {
        Command::Quantize(quantize) => quantize::run(*quantize),
        Command::Plan { quantize, json } => quantize::plan(&quantize, json),
        Command::Eval(eval) => eval::run(&eval),
        Command::Devices { bench: true, device, json } => devices::bench(&device, json),
        Command::Devices { json, .. } => devices::run(json),
        Command::Inspect { model, json } => inspect::run(&model, json),
        Command::Verify { path } => verify::run(&path),
    }
}

/// Logs go to standard error: warnings by default, more with -v and -vv, or whatever `RUST_LOG` asks for.
fn log(verbose: u8) {
    let default = match verbose {
        0 => "warn,aespa_gpu=info,wgpu_hal=error,wgpu_core=error",
        1 => "info,aespa_gpu=debug,wgpu_hal=error,wgpu_core=warn,naga=warn",
        _ => "debug,aespa_gpu=trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into());
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    log.with_target(false).without_time().init();
}

/// Prints to standard output; a reader that has gone away ends the program quietly, as pipes expect.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
    match written {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::output("standard output", "cannot be written").caused_by(e)),
        _ => Ok(()),
    }
}

/// One JSON object.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(value);
    print(&json.map_err(|e| Error::new(Kind::Internal, "JSON", "the result cannot be written").caused_by(e))?)
}
