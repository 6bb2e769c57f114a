//! Arguments in, exit code out.

use aespa_gpu::memory::Counting;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    aespa_gpu::cli::main()
}
