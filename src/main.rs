//! Arguments in, exit code out.

use aespa_gpu::memory::{self, Counting};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    memory::keep_buffers();
    aespa_gpu::cli::main()
}
