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
/// The end of the message where no work is kept.
pub const NOTHING_WRITTEN: &str = "; nothing was written";

/// What a process leaves that is ended in the middle of its work.
#[derive(Clone, Debug, Default)]
pub struct Leaving {
    /// A folder that nobody can use.
    pub remove: Option<PathBuf>,
    /// What becomes of the work.
    pub message: String,
}

static LEAVING: Mutex<Leaving> = Mutex::new(Leaving { remove: None, message: String::new() });

/// What is removed instead, see [`remove_if_ended`].
static WHOLE: Mutex<Option<PathBuf>> = Mutex::new(None);

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

/// A folder that goes with all it holds if the process must be ended, whatever runs inside of it would leave. `None` takes that back.
pub fn remove_if_ended(folder: Option<PathBuf>) {
    if let Ok(mut whole) = WHOLE.lock() {
        *whole = folder;
    }
}

/// Ends the process in the middle of its work.
fn end() -> ! {
    let whole = WHOLE.try_lock().map(|whole| whole.clone()).unwrap_or_default();
    let leaving = match whole {
        Some(folder) => Leaving { remove: Some(folder), message: NOTHING_WRITTEN.to_owned() },
        None => LEAVING.try_lock().map(|leaving| leaving.clone()).unwrap_or_default(),
    };
    if let Some(folder) = &leaving.remove {
        // What a run's folder still holds then the next run with the same output removes.
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
