//! How good a model is: perplexity on a text, and how far it is from a reference model.

mod head;
mod perplexity;

pub use perplexity::{Evaluation, MIN_WINDOW, evaluate};
