// out[r, g] = Σ_j a[r, j] b[r, j] over the columns j of group g: with a = E H and b = E the loss e H eᵀ of every row.
//
// One workgroup of 64 threads per row and group: every 64th column, then a tree. Memory bound: a and b once, 8 bytes per 2 flops.

struct RowDotParams {
    rows: u32,
    cols: u32,
    ld: u32,
    group: u32,
    n_group: u32,
}

@group(0) @binding(0) var<uniform> p: RowDotParams;
@group(0) @binding(1) var<storage, read> a: array<f32>; // [rows, ld]
@group(0) @binding(2) var<storage, read> b: array<f32>; // [rows, ld]
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // [rows, n_group]

var<workgroup> sums: array<f32, 64>;

// Sum over the workgroup of each thread's value.
fn total(thread: u32, value: f32) -> f32 {
    // Threads may still read the result of the sum before.
    workgroupBarrier();
    sums[thread] = value;
    for (var half = 32u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            sums[thread] += sums[thread + half];
        }
    }
    return workgroupUniformLoad(&sums[0]);
}

@compute @workgroup_size(64)
fn row_dot(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = group.y * groups.x + group.x;
    let r = i / p.n_group;
    if r >= p.rows {
        return;
    }
    let start = i % p.n_group * p.group;
    let end = min(start + p.group, p.cols);
    var sum = 0.0;
    for (var j = start + thread; j < end; j += 64u) {
        sum += a[r * p.ld + j] * b[r * p.ld + j];
    }
    sum = total(thread, sum);
    if thread == 0u {
        out[i] = sum;
    }
}
