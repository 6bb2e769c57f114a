// The candidates of a workgroup that lose least, one after the other, as in ranked.wgsl: the least of every subgroup is found by the subgroup,
// so workgroup memory sees one or two atomic minima of every subgroup instead of one of every thread, all on one address. Minima do not
// depend on their order, so the answer is the same.

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
    let least = subgroupMin(loss);
    // Where several lose equally little each of them tells, which does no harm.
    if loss == least {
        atomicMin(&best[k], least);
    }
    workgroupBarrier();
    let lowest = subgroupMin(select(WORST, candidate, loss == atomicLoad(&best[k])));
    if candidate == lowest {
        atomicMin(&who[k], lowest);
    }
    workgroupBarrier();
    return atomicLoad(&who[k]);
}
