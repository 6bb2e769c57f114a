//! Ctrl-C: the handler raises a flag, long work asks for it at every step and stops with an error, so that everything on the way
//! out (temporary folders above all) is cleaned up as after any other error.

use crate::{Error, Kind, Result};
use std::sync::atomic::{AtomicBool, Ordering};

static RAISED: AtomicBool = AtomicBool::new(false);

/// Installs the handler. A second Ctrl-C ends the process at once, without cleaning up.
pub fn install() -> Result<()> {
    let handler = || {
        if RAISED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    };
    ctrlc::set_handler(handler).map_err(|e| Error::internal("Ctrl-C", "the handler cannot be installed").caused_by(e))
}

/// `Kind::Interrupted` once the user has pressed Ctrl-C (or the process was asked to terminate).
pub fn check() -> Result<()> {
    if RAISED.load(Ordering::SeqCst) {
        return Err(Error::new(Kind::Interrupted, "interrupted", "stopped as asked; nothing was written"));
    }
    Ok(())
}
