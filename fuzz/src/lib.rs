//! Hostile models for `aespa-gpu verify` and `aespa-gpu eval`: what the two fuzz targets share. How to run them: `tests/README.md`.
//!
//! A target's input is a GGUF file, or the files of a folder in an `archive`. libFuzzer starts from `seeds`, small outputs of our own in
//! several formats, and changes them by `gguf`, `safetensors` and `json`, which know what the bytes mean, or byte by byte. `drive` does with
//! the result what the program does; `guard` ends the process where more memory is asked for than an input of this size can need.

pub mod archive;
pub mod choice;
pub mod drive;
pub mod gguf;
pub mod guard;
pub mod json;
pub mod safetensors;
pub mod seeds;

// Writers of small models and their round-to-nearest, which the tests have too.
#[path = "../../tests/common/rtn.rs"]
mod rtn;
#[path = "../../tests/common/tiny_model.rs"]
#[allow(dead_code, reason = "tests use more of it")]
mod tiny_model;
