//! The output folder: where it may be, and how it comes into being in one step.
//!
//! Everything is written into a folder in a hidden sibling (see `journal`) on the same file system, which becomes OUT by a rename. Until then
//! OUT is as it was. Up to the last flush the folder is no model to any reader (see `disk::seal` and [`super::Writer::complete`]); from then to
//! the rename it is a whole one, since it is judged by reading it as its users will.

use crate::journal::Journal;
use crate::model::Checkpoint;
use crate::{Error, Result};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

#[derive(Debug)]
pub(super) struct Target {
    /// Absolute, without symbolic links.
    out: PathBuf,
    overwrite: bool,
    staging: PathBuf,
    /// Of a folder that is written for itself and not as a part of a run; it goes with this.
    _own: Option<Journal>,
}

impl Target {
    /// Refuses an OUT that exists (unless it is a model folder and `overwrite`), that is, holds or lies in the model's folder, or
    /// whose parent cannot be written to. `staging` is the folder to write to, if the caller keeps one for the whole run.
    pub fn prepare(out: &Path, overwrite: bool, checkpoint: &Checkpoint, staging: Option<&Path>) -> Result<Self> {
        let resolved = check_target(out, overwrite, checkpoint)?;
        let own = if staging.is_none() { Some(Journal::open(&resolved, true)?) } else { None };
        let staging = staging.map_or_else(|| own.as_ref().map_or(PathBuf::new(), |own| own.folder().join("out")), Path::to_owned);
        fs::create_dir_all(&staging).map_err(|e| Error::output(staging.display(), "cannot be made").caused_by(e))?;
        Ok(Self { out: resolved, overwrite, staging, _own: own })
    }

    /// Where to write.
    pub fn staging(&self) -> &Path {
        &self.staging
    }

    /// Moves the staged folder to OUT; what was there is moved aside first and removed last.
    pub fn publish(self) -> Result<()> {
        let out = &self.out;
        let aside = match out.symlink_metadata() {
            Err(_) => None,
            Ok(_) if !self.overwrite => return Err(exists(out)),
            Ok(_) => {
                check_replaceable(out, out, true)?;
                let aside = aside_of(out)?;
                fs::rename(out, aside.path().join("old"))
                    .map_err(|e| Error::output(out.display(), "cannot be moved aside").caused_by(e))?;
                Some(aside)
            }
        };
        if let Err(e) = fs::rename(&self.staging, out) {
            let error = Error::output(out.display(), "cannot be made by a rename").caused_by(e);
            return Err(match aside.map(|aside| (fs::rename(aside.path().join("old"), out), aside)) {
                Some((Err(_), aside)) => {
                    let kept = aside.keep();
                    Error::output(out.display(), format!("what was there before is now in {}", kept.join("old").display())).caused_by(error)
                }
                _ => error,
            });
        }
        sync_folder(out.parent().unwrap_or(out))?;
        if let Some(aside) = aside {
            let path = aside.path().to_owned();
            if let Err(e) = aside.close() {
                tracing::warn!("the replaced folder could not be removed from {}: {e}", path.display());
            }
        }
        Ok(())
    }
}

/// OUT as an absolute path, if a folder for `checkpoint` may be made there.
///
/// Errors: usage, if it exists and is not to be replaced, or overlaps the model's folder; output, if it has no folder to be in.
pub fn check_target(out: &Path, overwrite: bool, checkpoint: &Checkpoint) -> Result<PathBuf> {
    let resolved = resolve(out)?;
    check_apart(out, &resolved, checkpoint)?;
    if resolved.exists() {
        check_replaceable(out, &resolved, overwrite)?;
        check_movable(out, &resolved)?;
    }
    Ok(resolved)
}

/// A folder that something is mounted on cannot be replaced by a rename.
#[cfg(unix)]
fn check_movable(out: &Path, resolved: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let device = |path: &Path| path.metadata().map(|meta| meta.dev()).ok();
    if resolved.parent().is_some_and(|parent| device(parent) != device(resolved)) {
        return Err(Error::usage(out.display(), "is a mount point, which cannot be replaced; give a folder inside of it"));
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_movable(_: &Path, _: &Path) -> Result<()> {
    Ok(())
}

/// OUT as an absolute path without symbolic links; its parent must exist, OUT itself need not.
fn resolve(out: &Path) -> Result<PathBuf> {
    let cannot = |what: &str| Error::output(out.display(), what);
    if out.symlink_metadata().is_ok() {
        return out.canonicalize().map_err(|e| cannot("is a link that leads nowhere").caused_by(e));
    }
    let Some(name) = out.file_name() else {
        return Err(Error::usage(out.display(), "does not name a folder to write"));
    };
    let parent = match out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let parent = parent.canonicalize().map_err(|e| cannot("has no parent folder; make it first").caused_by(e))?;
    if !parent.is_dir() {
        return Err(cannot("cannot be made, since what it is in is not a folder"));
    }
    Ok(parent.join(name))
}

/// Writing must not touch the model that is being read, not even through links in either folder.
fn check_apart(out: &Path, resolved: &Path, checkpoint: &Checkpoint) -> Result<()> {
    let folder = checkpoint.dir();
    let model = folder.canonicalize().map_err(|e| Error::input(folder.display(), "cannot be read").caused_by(e))?;
    let files = checkpoint.files().iter().filter_map(|f| f.canonicalize().ok());
    let relation = if resolved == model {
        "is the model itself"
    } else if resolved.starts_with(&model) {
        "lies inside the model's folder"
    } else if model.starts_with(resolved) || files.into_iter().any(|f| f.starts_with(resolved)) {
        "holds the model"
    } else {
        return Ok(());
    };
    Err(Error::usage(out.display(), format!("{relation} {}; choose another output folder", folder.display())))
}

/// Only what this program or one like it has written may be replaced, and an empty folder.
fn check_replaceable(shown: &Path, out: &Path, overwrite: bool) -> Result<()> {
    if !overwrite {
        return Err(exists(shown));
    }
    if !out.is_dir() {
        return Err(Error::usage(shown.display(), "exists and is not a folder"));
    }
    let unreadable = |e| Error::output(shown.display(), "exists and cannot be listed").caused_by(e);
    let mut entries = fs::read_dir(out).map_err(unreadable)?;
    if entries.next().is_some() && !out.join("config.json").is_file() && super::gguf_file(out).is_none() {
        return Err(Error::usage(
            shown.display(),
            "is not overwritten: it is no model folder, for it has files but no config.json or .gguf",
        ));
    }
    Ok(())
}

fn exists(out: &Path) -> Error {
    Error::usage(out.display(), "exists; choose another folder, or replace it with --overwrite")
}

/// A hidden folder beside `out` to move what is replaced into.
fn aside_of(out: &Path) -> Result<TempDir> {
    let parent = out.parent().ok_or_else(|| Error::usage(out.display(), "is not a folder that can be written"))?;
    let mut prefix = OsString::from(".");
    prefix.push(out.file_name().unwrap_or_default());
    prefix.push(".");
    let folder = tempfile::Builder::new().prefix(&prefix).suffix(".old").tempdir_in(parent);
    folder.map_err(|e| Error::output(parent.display(), "cannot be written to").caused_by(e))
}

/// Makes a folder's entries durable, where the system knows such a thing.
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    fs::File::open(folder)
        .and_then(|f| f.sync_all())
        .map_err(|e| Error::output(folder.display(), "cannot be flushed to disk").caused_by(e))?;
    let _ = folder;
    Ok(())
}
