//! Runs plain loops with the widest vector instructions of this machine.

pub(super) use pulp::NullaryFnOnce as Loop;

/// Runs a loop, compiled for each instruction set. Its `call` must be `#[inline(always)]`, and so must what it calls: code that is
/// called instead of inlined (a closure, a function item) keeps the instructions of the least machine.
#[inline]
pub(super) fn widest<L: Loop>(work: L) -> L::Output {
    pulp::Arch::new().dispatch(work)
}
