//! Files of an output folder: their space, their bytes, and what a full disk says.

use super::plan::Shard;
use crate::{Error, Result};
use fs4::fs_std::FileExt;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// An output error where a folder's disk has less than `needed` bytes to spare.
pub fn check_space(folder: &Path, needed: u64) -> Result<()> {
    let shown = folder.parent().unwrap_or(folder);
    let free = fs4::available_space(folder).map_err(|e| Error::output(shown.display(), "has an unknown amount of space").caused_by(e))?;
    if free < needed {
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let message = format!("the disk is full: {:.1} MB are needed, {:.1} MB are free", megabytes(needed), megabytes(free));
        return Err(Error::output(shown.display(), message));
    }
    Ok(())
}

/// Makes a weight file of its final size and takes its space from the disk.
pub fn reserve(folder: &Path, shard: &Shard) -> Result<(PathBuf, File)> {
    let path = folder.join(&shard.file_name);
    let make = || {
        let file = File::create_new(&path)?;
        // Some file systems cannot reserve, each with an error of its own; there a full disk shows when it is full.
        if let Err(e) = file.allocate(shard.len)
            && (is_full(&e) || e.kind() == std::io::ErrorKind::FileTooLarge)
        {
            return Err(e);
        }
        file.set_len(shard.len)?;
        Ok(file)
    };
    let file = make().map_err(|e| cannot_write(&path, e))?;
    Ok((path, file))
}

/// Opens a weight file that an earlier run has reserved; a header that it may have got is taken away again.
pub fn reopen(folder: &Path, shard: &Shard) -> Result<(PathBuf, File)> {
    let path = folder.join(&shard.file_name);
    let open = || {
        let mut file = File::options().read(true).write(true).open(&path)?;
        if file.metadata()?.len() != shard.len {
            return Err(std::io::Error::other("has another size than planned"));
        }
        file.write_all(&vec![0; shard.header.len()])?;
        Ok(file)
    };
    let file = open()
        .map_err(|e| Error::output(path.display(), "is of an unfinished run and cannot be gone on with; use --restart").caused_by(e))?;
    Ok((path, file))
}

/// Writes the header of a weight file, which is last: until all of its data are there, no reader takes it for a model, however the run ends.
/// `alone`: the file is a model by itself, so that not even a machine that stops may leave a header without data.
pub fn seal(file: &mut File, header: &[u8], alone: bool) -> std::io::Result<()> {
    if alone {
        file.sync_data()?;
    }
    file.seek(SeekFrom::Start(0))?;
    file.write_all(header)?;
    file.sync_all()
}

pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).map_err(|e| Error::input(from.display(), "cannot be read").caused_by(e))?;
    let mut write = || {
        to.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        let mut file = File::create(to)?;
        std::io::copy(&mut source, &mut file)?;
        file.sync_all()
    };
    write().map_err(|e| cannot_write(to, e))
}

pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::internal(path.display(), "is no JSON").caused_by(e))?;
    text.push(b'\n');
    write_file(path, &text)
}

/// Makes or replaces a file in a folder that nobody reads yet.
pub fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(|e| cannot_write(path, e))
}

pub fn cannot_write(path: &Path, e: std::io::Error) -> Error {
    let what = if is_full(&e) { "cannot be written: the disk is full" } else { "cannot be written" };
    Error::output(path.display(), what).caused_by(e)
}

fn is_full(e: &std::io::Error) -> bool {
    matches!(e.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}
