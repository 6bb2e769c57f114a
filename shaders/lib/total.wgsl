// Sum over a workgroup of THREADS threads, a power of two, by a tree: log2 THREADS + 3 barriers, 4 bytes of workgroup memory per thread.

var<workgroup> sums: array<f32, THREADS>;

// Sum over the workgroup of each thread's value.
fn total(at: Place, value: f32) -> f32 {
    // Threads may still read the result of the sum before.
    workgroupBarrier();
    sums[at.thread] = value;
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if at.thread < half {
            sums[at.thread] += sums[at.thread + half];
        }
    }
    return workgroupUniformLoad(&sums[0]);
}
