// The candidates of a workgroup that lose least, one after the other, as in ranked.wgsl: the least of every subgroup is found by the subgroup,
// so workgroup memory sees one or two atomic minima of every subgroup instead of one of every thread, all on one address. Minima do not
// depend on their order, so the answer is the same.

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
