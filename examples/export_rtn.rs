//! Writes a model quantized by round-to-nearest in any export format: the input of `tests/conformance`.
//!
//! `export_rtn MODEL_DIR OUT_DIR FORMAT BITS GROUP_SIZE sym|asym [MAX_SHARD_BYTES]`

#[path = "../tests/common/rtn.rs"]
mod rtn;

use aespa_gpu::export::{self, MAX_SHARD, Writer};
use aespa_gpu::model::Checkpoint;
use aespa_gpu::quant::Scheme;
use aespa_gpu::{Error, Result};
use std::path::Path;
use std::process::ExitCode;

fn run(args: &[String]) -> Result<()> {
    let [model, out, format, bits, group, symmetry, rest @ ..] = args else {
        return Err(Error::usage("export_rtn", "MODEL_DIR OUT_DIR FORMAT BITS GROUP_SIZE sym|asym [MAX_SHARD_BYTES]"));
    };
    let number = |text: &str| text.parse::<i64>().map_err(|e| Error::usage(text, "is no number").caused_by(e));
    let scheme = Scheme::new(number(bits)? as u32, number(group)?, symmetry == "sym")?;
    let max_shard = rest.first().map_or(Ok(MAX_SHARD), |text| number(text).map(|n| n as u64))?;
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let mut writer = Writer::with_shard_size(Path::new(out), false, export::find(format)?, &checkpoint, scheme, max_shard)?;
    rtn::quantize_model(&checkpoint, scheme, |linear, packed| writer.put_linear(linear, &packed))?;
    let staged = writer.complete(&checkpoint)?;
    let verified = staged.verify(&checkpoint)?;
    staged.publish(&[])?;
    println!("{out}: {} linears and {} other tensors verified", verified.linears, verified.tensors);
    Ok(())
}

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(e.exit_code())
        }
    }
}
