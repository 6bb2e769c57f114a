// Where a workgroup ranks its candidates, for lib/ranked.wgsl or lib/ranked_subgroups.wgsl.

const MAX_KEEP = 8u;
const WORST = 0xffffffffu; // above the bits of every loss, NaN included

// The bits of the loss of the k-th best candidate, and its index.
var<workgroup> best: array<atomic<u32>, 8>;
var<workgroup> who: array<atomic<u32>, 8>;

// Must come before the first `ranked`, a barrier between them.
fn clear_ranks(thread: u32) {
    if thread < MAX_KEEP {
        atomicStore(&best[thread], WORST);
        atomicStore(&who[thread], WORST);
    }
}
