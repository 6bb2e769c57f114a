//! Counts memory: a file of some kilobytes that makes the program ask for gigabytes is a finding, also where the system would only promise
//! them and never be asked for the pages.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// More than any small model, its codes and its activations take.
const MOST: usize = 256 << 20;

static LIVE: AtomicUsize = AtomicUsize::new(0);

pub struct Guard;

fn take(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    if live > MOST {
        // Nothing may be allocated on the way out; the stack is in libFuzzer's report.
        LIVE.store(0, Ordering::Relaxed);
        eprintln!("an input takes {live} bytes, {bytes} of them at once");
        std::process::abort();
    }
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Guard {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size.saturating_sub(layout.size()));
        LIVE.fetch_sub(layout.size().saturating_sub(size), Ordering::Relaxed);
        unsafe { System.realloc(at, layout, size) }
    }
}
