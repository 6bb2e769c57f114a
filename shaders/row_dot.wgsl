// out[r, g] = Σ_j a[r, j] b[r, j] over the columns j of group g: with a = E H and b = E the loss e H eᵀ of every row.
//
// One workgroup of 64 threads per row and group: every 64th column, then a tree. Memory bound: a and b once, 8 bytes per 2 flops. With
// groups of 128 columns a thread reads two pairs, and the tree's nine barriers are the longer part; with subgroups there are two.

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

const THREADS = 64u;

@compute @workgroup_size(THREADS)
fn row_dot(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    at: Place,
) {
    let i = group.y * groups.x + group.x;
    let r = i / p.n_group;
    if r >= p.rows {
        return;
    }
    let start = i % p.n_group * p.group;
    let end = min(start + p.group, p.cols);
    var sum = 0.0;
    for (var j = start + at.thread; j < end; j += THREADS) {
        sum += a[r * p.ld + j] * b[r * p.ld + j];
    }
    sum = total(at, sum);
    if at.thread == 0u {
        out[i] = sum;
    }
}
