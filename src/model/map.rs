//! Memory maps of model files, and which of their pages are in memory.

use crate::{Error, Result};
use memmap2::Mmap;
use std::ops::{Deref, Range};
use std::path::Path;

/// A whole file, mapped for reading.
#[derive(Debug)]
pub struct Map(Mmap);

impl Map {
    /// # Errors
    /// Input, naming the file, if it is none, is empty, or cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let cannot = |e: std::io::Error| Error::input(path.display(), "cannot be read").caused_by(e);
        // Before opening, since opening a pipe would wait for its writer.
        let meta = std::fs::metadata(path).map_err(cannot)?;
        if !meta.is_file() {
            return Err(Error::input(path.display(), "is not a file"));
        }
        if meta.len() == 0 {
            return Err(Error::input(path.display(), "is truncated: it is empty"));
        }
        let file = std::fs::File::open(path).map_err(cannot)?;
        map_file(&file).map(Self).map_err(cannot)
    }

    /// Pages that have been read stop counting as this process's memory; they are read anew, mostly from the system's cache, when they are
    /// touched again. A model that streams by would otherwise end up resident as a whole.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        release_pages(&self.0, range);
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Has the system read a range while other things happen. What cannot be read shows when it is touched.
    pub fn prefetch(&self, range: Range<usize>) {
        #[cfg(unix)]
        let _ = self.0.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(unix)]
#[allow(unsafe_code, reason = "dropping pages is unsafe in memmap2, since it would lose what was written to a map of memory")]
fn release_pages(map: &Mmap, range: Range<usize>) {
    // SAFETY: the map is a read-only one of a file: pages that are dropped come back with the same content.
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
}

#[allow(unsafe_code, reason = "memory maps are the only way to read a model larger than the memory; memmap2 makes every map unsafe")]
fn map_file(file: &std::fs::File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only. Another process that shortens the file while we read would end this one with a bus error, and
    // one that rewrites it would change the weights under us; both are what happens to every memory-mapped reader, and every byte
    // pattern is a valid u8.
    unsafe { Mmap::map(file) }
}
