// The least key of a workgroup, by an atomic minimum and a thread that reads and resets it: three barriers.

const NOBODY = 0xffffffffu;

var<workgroup> first: atomic<u32>;
var<workgroup> chosen: u32;

// Must come before the first `least_of`, a barrier between them.
fn clear_first(at: Place) {
    if at.thread == 0u {
        atomicStore(&first, NOBODY);
    }
}

// The least of all threads' keys. `turn` counts the calls.
fn least_of(at: Place, key: u32, turn: u32) -> u32 {
    atomicMin(&first, key);
    workgroupBarrier();
    if at.thread == 0u {
        chosen = atomicLoad(&first);
        atomicStore(&first, NOBODY);
    }
    // Its barriers also order the reset before the next minimum.
    return workgroupUniformLoad(&chosen);
}
