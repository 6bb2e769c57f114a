//! Hidden folders beside OUT, and what becomes of those that a process leaves that is killed.
//!
//! Up to the last flush a staging folder is no model to any reader (see `disk::seal` and [`super::Writer::complete`]). From then to the rename
//! it is a whole one, since it is judged by reading it as its users will: every byte is on the disk as it was decided, so whoever opens a
//! hidden folder called `.partial` by its full name gets what the name OUT would have given. The next run with the same OUT removes it: a
//! process holds a lock on its folder as long as it lives, and a folder of such a name that nobody holds is a dead one's. What was moved aside
//! to be replaced (`.old`) may be the only copy of somebody's model and is left.

use crate::{Error, Result};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::path::Path;
use tempfile::TempDir;

const PARTIAL: &str = ".partial";
/// Random characters in the names of siblings.
const RANDOM: usize = 6;

/// What the names of hidden folders beside `out` begin with.
fn prefix(out: &Path) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(out.file_name().unwrap_or_default());
    prefix.push(".");
    prefix
}

/// What the names of those begin with that a later run may remove.
fn held_prefix(out: &Path) -> OsString {
    let mut prefix = prefix(out);
    prefix.push(concat!(env!("CARGO_PKG_NAME"), "-"));
    prefix
}

/// A folder to move what is replaced into.
pub fn aside(out: &Path) -> Result<TempDir> {
    sibling(out, &prefix(out), ".old")
}

/// A folder to write to beside `out`, and its lock. Where folders cannot be locked it has a name that no run removes.
pub fn staging(out: &Path) -> Result<(TempDir, Option<File>)> {
    const ATTEMPTS: usize = 8;
    for _ in 0..ATTEMPTS {
        let folder = sibling(out, &held_prefix(out), PARTIAL)?;
        match hold(folder.path()) {
            // Another run that removes leftovers may have come between.
            Ok(held) if folder.path().exists() => return Ok((folder, Some(held))),
            Ok(_) | Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(_)) => break,
        }
    }
    Ok((sibling(out, &prefix(out), PARTIAL)?, None))
}

/// Locks a folder until the file is dropped or the process ends, however it ends.
fn hold(folder: &Path) -> std::result::Result<File, TryLockError> {
    if !cfg!(unix) {
        // Folders cannot be opened there.
        return Err(TryLockError::Error(std::io::ErrorKind::Unsupported.into()));
    }
    let file = File::open(folder).map_err(TryLockError::Error)?;
    file.try_lock()?;
    Ok(file)
}

/// Removes what runs with this `out` that were killed have left beside it. What cannot be removed is in nobody's way.
pub fn remove_leftovers(out: &Path) {
    let Some(Ok(siblings)) = out.parent().map(fs::read_dir) else { return };
    for sibling in siblings.flatten().filter(|s| is_held_name(out, &s.file_name()) && s.file_type().is_ok_and(|kind| kind.is_dir())) {
        let path = sibling.path();
        // Held for as long as it takes: a run that has just made it and has no lock yet makes another.
        let Ok(_held) = hold(&path) else { continue };
        match fs::remove_dir_all(&path) {
            Ok(()) => tracing::info!("removed {}, left by a run that was killed", path.display()),
            Err(e) => tracing::warn!("{}, left by a run that was killed, cannot be removed: {e}", path.display()),
        }
    }
}

fn is_held_name(out: &Path, name: &OsStr) -> bool {
    let rest = name.as_encoded_bytes().strip_prefix(held_prefix(out).as_encoded_bytes());
    let random = rest.and_then(|rest| rest.strip_suffix(PARTIAL.as_bytes()));
    random.is_some_and(|random| random.len() == RANDOM && random.iter().all(u8::is_ascii_alphanumeric))
}

/// A new hidden folder beside `out`.
fn sibling(out: &Path, prefix: &OsStr, suffix: &str) -> Result<TempDir> {
    let parent = out.parent().ok_or_else(|| Error::usage(out.display(), "is not a folder that can be written"))?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).suffix(suffix).rand_bytes(RANDOM);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The folder stays; unlike a temporary one, it gets the permissions that mkdir would give.
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(parent).map_err(|e| Error::output(parent.display(), "cannot be written to").caused_by(e))
}
