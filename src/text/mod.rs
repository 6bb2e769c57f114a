//! Text in, token windows out: tokenizers, corpora, and the windows that calibration and evaluation run on.
//!
//! The rules, all deterministic:
//!
//! - **Tokens of a corpus.** A plain text file is one document and is tokenized whole (long ones in pieces that give the same tokens). A
//!   JSONL file is one document per line; each is tokenized by itself, with a blank line ("\n\n") after every document but the last, and the ids are joined in
//!   file order. No special tokens are added.
//! - **Calibration** ([`sample_windows`]): `samples` windows of `length` tokens that do not overlap, on a grid with a random offset,
//!   picked at random. See there for the exact draw.
//!   A safetensors file with token ids ([`TokenFile`]) is taken as it is.
//! - **Evaluation** ([`eval_windows`]): consecutive windows from the first token on, without overlap; a rest shorter than a window is
//!   left out.

mod corpus;
mod pieces;
mod token_file;
mod tokenizer;
mod windows;

pub use corpus::Corpus;
pub use token_file::TokenFile;
pub use tokenizer::Tokenizer;
pub use windows::{check_ids, eval_windows, sample_windows};
