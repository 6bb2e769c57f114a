// The candidates of a workgroup that lose least, one after the other, by atomic minima over the bits of the losses: losses are not negative,
// so their bits are ordered like they are. Of equal losses the candidate with the lower index comes first.

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
