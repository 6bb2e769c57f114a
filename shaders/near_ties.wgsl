// Weights that the last bits of f32 arithmetic round: ties[r] counts the weights of row r whose place on the grid, y = value / s + z,
// lies within `tolerance` of the middle between two of its codes 0 .. max_code.
//
// One workgroup of 64 threads per row: every 64th column, then a tree. Memory bound: value once, 4 bytes per 6 flops; grids are shared
// by neighbours and come from cache.

struct NearTiesParams {
    rows: u32,
    cols: u32,
    ld: u32,
    group: u32,
    n_group: u32,
    max_code: u32,
    tolerance: f32,
}

@group(0) @binding(0) var<uniform> p: NearTiesParams;
@group(0) @binding(1) var<storage, read> value: array<f32>; // [rows, ld]
@group(0) @binding(2) var<storage, read> scale: array<f32>; // [rows, n_group]
@group(0) @binding(3) var<storage, read> zero: array<f32>; // [rows, n_group]
@group(0) @binding(4) var<storage, read_write> ties: array<u32>; // [rows]

var<workgroup> sums: array<u32, 64>;

@compute @workgroup_size(64)
fn near_ties(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let r = group.y * groups.x + group.x;
    if r >= p.rows {
        return;
    }
    var count = 0u;
    for (var j = thread; j < p.cols; j += 64u) {
        let grid = r * p.n_group + j / p.group;
        let y = value[r * p.ld + j] / scale[grid] + zero[grid];
        let below = floor(y);
        count += u32(abs(y - below - 0.5) <= p.tolerance && below >= 0.0 && below < f32(p.max_code));
    }
    sums[thread] = count;
    for (var half = 32u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            sums[thread] += sums[thread + half];
        }
    }
    if thread == 0u {
        ties[r] = sums[0];
    }
}
