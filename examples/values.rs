//! What a model's matrices hold, for comparison with other people's readers: `cargo run --example values -- MODEL`.
//!
//! MODEL is a folder or GGUF file of any format. Prints one JSON object: for every matrix that is quantized, by its module, the SHA-256 of
//! its dequantized values [d_out, d_in] as little-endian f32, each rounded to the type that the format's own reader computes with.

use aespa_gpu::export;
use aespa_gpu::model::ModelSpec;
use aespa_gpu::{Error, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn values(path: &Path) -> Result<BTreeMap<String, String>> {
    let reader = export::open_packed(path)?;
    let spec: &ModelSpec = reader.spec();
    let mut all = BTreeMap::new();
    for linear in spec.matrices() {
        if reader.packed(linear)?.is_some() {
            let values = reader.linear(linear)?.to_f32();
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let digest = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
            all.insert(linear.module.clone(), digest);
        }
    }
    Ok(all)
}

fn main() -> ExitCode {
    let path = std::env::args().nth(1).map(PathBuf::from);
    let found = path.ok_or_else(|| Error::usage("MODEL", "is missing")).and_then(|path| values(&path));
    match found.and_then(|all| serde_json::to_string(&all).map_err(|e| Error::internal("values", e.to_string()))) {
        Ok(json) => {
            println!("{json}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}
