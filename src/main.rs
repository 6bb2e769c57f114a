//! Arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    aespa_gpu::cli::main()
}
