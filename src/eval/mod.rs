//! How good a model is: perplexity on a text, and how far it is from a reference model.

mod blocks;
mod head;
mod perplexity;
mod trace;

pub use perplexity::{Evaluation, MIN_WINDOW, evaluate};
pub use trace::{Trace, trace};
