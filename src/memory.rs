//! How much of this machine's memory the process has asked for, and how much it had at most.
//!
//! The program's allocator counts (`main` installs it), so that a dry run, whose allocations nobody touches, knows what the real run will need. It
//! also asks for large pages where much is asked for: memory that is new is touched some four times faster then.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with a count.
pub struct Counting;

#[allow(unsafe_code, reason = "an allocator is unsafe to be; this one hands everything to the system's")]
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        pretend(layout.size());
        // SAFETY: the caller's promises are the same.
        large_pages(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        pretend(layout.size());
        // SAFETY: the caller's promises are the same.
        large_pages(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give_back(layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // What shrinks does so in its place.
        if size < layout.size() {
            give_back(layout.size() - size);
        } else {
            pretend(size);
            give_back(layout.size());
        }
        // SAFETY: the caller's promises are the same.
        large_pages(unsafe { System.realloc(pointer, layout, size) }, size)
    }
}

/// Lets the system back the middle of new memory with large pages, if it is large. What `pointer` points to stays as it is.
fn large_pages(pointer: *mut u8, size: usize) -> *mut u8 {
    #[cfg(target_os = "linux")]
    {
        use nix::sys::mman::{MmapAdvise, madvise};
        use std::ptr::NonNull;
        /// Bytes of a large page, and those from which on memory is always new; what is smaller is mostly used again.
        const PAGE: usize = 2 << 20;
        const NEW: usize = 32 << 20;
        let start = pointer.addr().next_multiple_of(PAGE);
        let end = (pointer.addr() + size) / PAGE * PAGE;
        if size >= NEW
            && end > start
            && let Some(start_of) = NonNull::new(pointer.with_addr(start).cast())
        {
            // SAFETY: the range lies inside what was just allocated, and the advice changes no content.
            // It is advice: a system that does not take it has smaller pages.
            #[allow(unsafe_code, reason = "advice about memory is given by address")]
            let _ = unsafe { madvise(start_of, end - start, MmapAdvise::MADV_HUGEPAGE) };
        }
    }
    pointer
}

/// Sets up the system's allocator for buffers of megabytes that come and go: it keeps up to 64 MiB that are free, and gives back what is
/// larger at once. By itself it would give back, and touch anew, what the next launch needs. All threads share one heap: buffers are made on whichever
/// thread of the pool runs a recording, and a heap for each would keep free memory of its own.
pub fn keep_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: called before there are other threads; all are tuning parameters.
    #[allow(unsafe_code, reason = "the C library's own setting")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 20);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Counts bytes that an estimate only talks of.
pub fn pretend(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed).wrapping_add(bytes);
    PEAK.fetch_max(live, Ordering::Relaxed);
}

/// The opposite of [`pretend`].
pub fn give_back(bytes: usize) {
    LIVE.fetch_sub(bytes, Ordering::Relaxed);
}

/// The most that was asked for at one time while `work` ran, over what was there before, in bytes. Work on other threads counts too.
pub fn peak_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.load(Ordering::Relaxed);
    let earlier = PEAK.swap(before, Ordering::Relaxed);
    let result = work();
    // What was only looked into is no peak of the process.
    let peak = PEAK.swap(earlier.max(LIVE.load(Ordering::Relaxed)), Ordering::Relaxed);
    (result, peak.saturating_sub(before))
}

/// The most that was asked for so far, without what [`peak_of`] looked into.
pub fn peak() -> usize {
    PEAK.load(Ordering::Relaxed)
}

/// What is asked for now, in bytes.
pub fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
}

/// Is the allocator installed? Without it nothing is known.
pub fn is_counted() -> bool {
    LIVE.load(Ordering::Relaxed) > 0
}
