//! Post-training quantization of large language models on any GPU or CPU.
//!
//! Data flows one way: a model folder and a text go in, statistics are collected block by block, a method (four choices:
//! transform, metric, scale, rounding) decides codes, an exporter writes them, and the written folder is re-read and judged.
//! Modules have ranks; a file may use lower ranks only, and `tests/architecture.rs` holds us to it.
//!
//! Symbols, the same in Rust, WGSL, docs and reports: `n_tok` tokens, `d_in`, `d_out`, `n_head`, `n_kv`, `d_head`, `group`,
//! `bits`; W is [d_out, d_in], X is [n_tok, d_in], both row-major; H = Xᵀ X / n_tok; E = Ŵ − W; loss = tr(E H Eᵀ);
//! codes q, scale s, zero point z, dequantized s (q − z).

#![deny(unsafe_code)]
#![allow(rustdoc::broken_intra_doc_links, reason = "[rows, cols] in a comment is a shape, not a link")]

pub mod cache;
pub mod calib;
pub mod cli;
pub mod engine;
pub mod error;
pub mod eval;
pub mod export;
pub mod interrupt;
pub mod journal;
pub mod measure;
pub mod memory;
pub mod method;
pub mod metric;
pub mod model;
pub mod pipeline;
pub mod plan;
pub mod quant;
pub mod report;
pub mod round;
pub mod scale;
pub mod tensor;
pub mod text;
pub mod transform;

pub use error::{Error, Kind, Result};
