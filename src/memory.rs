//! How much of this machine's memory the process has asked for, and how much it had at most.
//!
//! The program's allocator counts (`main` installs it), so that a dry run, whose allocations nobody touches, knows what the real run will need.

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
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        pretend(layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give_back(layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        pretend(size);
        give_back(layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.realloc(pointer, layout, size) }
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
