// The least key of a workgroup: subgroups, of at least four threads, find their own, and every subgroup then finds the least of those, which
// lie in two places by turns. One barrier, and no atomics. The least of whole numbers is the same in any order.

const NOBODY = 0xffffffffu;

var<workgroup> firsts: array<u32, THREADS / 2u>; // [2][THREADS / 4]

// Nothing needs to be cleared.
fn clear_first(at: Place) {}

// The least of all threads' keys. `turn` counts the calls: who is still reading in the last one finds its place untouched, and the barrier
// of this one ends that.
fn least_of(at: Place, key: u32, turn: u32) -> u32 {
    let place = turn % 2u * (THREADS / 4u);
    let own = subgroupMin(key);
    if at.lane == 0u {
        firsts[place + at.subgroup] = own;
    }
    workgroupBarrier();
    // All lanes turn equally often, so that the subgroup stays together.
    var least = NOBODY;
    for (var i = 0u; i < at.subgroups; i += at.lanes) {
        least = min(least, firsts[place + min(i + at.lane, at.subgroups - 1u)]);
    }
    return subgroupMin(least);
}
