//! Makes LLaMA-shaped checkpoints of real widths with random weights: what memory and time are measured on where no real model is at hand.
//!
//! usage: cargo bench --bench synthetic -- OUT_DIR 1b|8b|70b [BLOCKS]      (default: one block)
//!
//! Shapes are those of Llama 3.2 1B, 3.1 8B and 3.1 70B, embedding and head included.

use aespa_gpu::model::Synthetic;
use aespa_gpu::{Error, Result};
use std::path::PathBuf;

fn shape(name: &str) -> Option<Synthetic> {
    let of = |d_model, d_ff, n_head, d_head, tied| Synthetic { d_model, d_ff, n_head, n_kv: 8, d_head, n_vocab: 128_256, tied, blocks: 1 };
    match name {
        "1b" => Some(of(2048, 8192, 32, 64, true)),
        "8b" => Some(of(4096, 14336, 32, 128, false)),
        "70b" => Some(of(8192, 28672, 64, 128, false)),
        _ => None,
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let usage = || Error::usage("arguments", "are OUT_DIR 1b|8b|70b [BLOCKS]");
    let [out, name, rest @ ..] = arguments.as_slice() else { return Err(usage()) };
    let blocks: usize = rest.first().map_or(Ok(1), |n| n.parse()).map_err(|_| usage())?;
    let out = PathBuf::from(out);
    Synthetic { blocks, ..shape(name).ok_or_else(usage)? }.write(&out)?;
    println!("{}: {blocks} blocks of {name} width", out.display());
    Ok(())
}
