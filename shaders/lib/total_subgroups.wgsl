// Sum over a workgroup of THREADS threads: subgroups, of at least four threads, add up their own, then every subgroup adds up the sums of
// all, so that each thread has the result without another exchange. Two barriers and one value per subgroup in workgroup memory.

var<workgroup> sums: array<f32, THREADS / 4u>;

// Sum over the workgroup of each thread's value.
fn total(at: Place, value: f32) -> f32 {
    // Threads may still read the result of the sum before, and those of a subgroup may come from loops of unequal length.
    workgroupBarrier();
    let own = subgroupAdd(value);
    if at.lane == 0u {
        sums[at.subgroup] = own;
    }
    workgroupBarrier();
    // All lanes turn equally often, so that the subgroup stays together.
    var part = 0.0;
    for (var i = 0u; i < at.subgroups; i += at.lanes) {
        let next = i + at.lane;
        part += select(0.0, sums[min(next, at.subgroups - 1u)], next < at.subgroups);
    }
    return subgroupAdd(part);
}
