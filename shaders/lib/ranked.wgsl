// The candidates of a workgroup that lose least, one after the other, by atomic minima over the bits of the losses: losses are not negative,
// so their bits are ordered like they are. Of equal losses the candidate with the lower index comes first.

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

// The k-th best candidate, where every thread names the best of its own that are left: the bits of its loss, and its index.
fn ranked(k: u32, loss: u32, candidate: u32) -> u32 {
    atomicMin(&best[k], loss);
    workgroupBarrier();
    if loss == atomicLoad(&best[k]) {
        atomicMin(&who[k], candidate);
    }
    workgroupBarrier();
    return atomicLoad(&who[k]);
}
