//! Ctrl-C: the handler raises a flag, long work asks for it at every step and stops with an error, so that everything on the way
//! out (temporary folders above all) is cleaned up as after any other error. Work that does not ask in time is ended.

use crate::{Error, Kind, Result};
use std::path::PathBuf;
use std::process::exit;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

static RAISED: AtomicBool = AtomicBool::new(false);

/// How long work may go on after Ctrl-C.
const PATIENCE: Duration = Duration::from_millis(1500);
const CODE: i32 = 130;

/// What a process leaves that is ended in the middle of its work.
#[derive(Clone, Debug, Default)]
pub struct Leaving {
    /// A folder that nobody can use.
    pub remove: Option<PathBuf>,
    /// What becomes of the work.
    pub message: String,
}

static LEAVING: Mutex<Leaving> = Mutex::new(Leaving { remove: None, message: String::new() });

/// Installs the handler. A second Ctrl-C ends the process at once.
pub fn install() -> Result<()> {
    let handler = || {
        if RAISED.swap(true, Ordering::SeqCst) {
            end();
        }
        std::thread::spawn(|| {
            std::thread::sleep(PATIENCE);
            end();
        });
    };
    ctrlc::set_handler(handler).map_err(|e| Error::internal("Ctrl-C", "the handler cannot be installed").caused_by(e))
}

/// Says what is left if the process must be ended.
pub fn leave(leaving: Leaving) {
    if let Ok(mut current) = LEAVING.lock() {
        *current = leaving;
    }
}

/// Ends the process in the middle of its work.
fn end() -> ! {
    let leaving = LEAVING.try_lock().map(|leaving| leaving.clone()).unwrap_or_default();
    if let Some(folder) = &leaving.remove {
        // What it still holds then the next run with the same output removes.
        let _ = std::fs::remove_dir_all(folder);
    }
    eprintln!("error: {}", stopped().with_end(&leaving.message));
    exit(CODE)
}

fn stopped() -> Error {
    Error::new(Kind::Interrupted, "interrupted", "stopped as asked")
}

/// `Kind::Interrupted` once the user has pressed Ctrl-C (or the process was asked to terminate).
pub fn check() -> Result<()> {
    if RAISED.load(Ordering::SeqCst) { Err(stopped()) } else { Ok(()) }
}
