//! `aespa-gpu verify`.

use super::print;
use crate::Result;
use crate::export::{self, Verdict};
use std::path::Path;

pub fn run(path: &Path) -> Result<()> {
    let Verdict { format, quantized, plain, rules } = export::verify(path)?;
    print(&format!("{}: {format}, {quantized} matrices quantized, {plain} not; all {rules} rules hold", path.display()))
}
