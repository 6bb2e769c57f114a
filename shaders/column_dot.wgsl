// out[j] += Σ_r a[r, j] b[r, j]: with a = E H and b = U the gradient of the loss with respect to factors of U's columns.
//
// One workgroup of 256 threads per 32 columns: 8 slices of rows, each summed by its own threads, then a tree over the slices; the
// launch's sum is added to out once. Neighbours read 128 contiguous bytes of a row. Memory bound: a and b once, 8 bytes per 2 flops;
// 128 workgroups for 4096 columns keep about 0.25 MB of loads under way.

struct ColumnDotParams {
    rows: u32,
    cols: u32,
    ld: u32,
}

@group(0) @binding(0) var<uniform> p: ColumnDotParams;
@group(0) @binding(1) var<storage, read> a: array<f32>; // [rows, ld]
@group(0) @binding(2) var<storage, read> b: array<f32>; // [rows, ld]
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // [cols]

var<workgroup> sums: array<f32, 256>;

@compute @workgroup_size(256)
fn column_dot(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let j = (group.y * groups.x + group.x) * 32u + thread % 32u;
    var sum = 0.0;
    if j < p.cols {
        for (var r = thread / 32u; r < p.rows; r += 8u) {
            sum = fma(a[r * p.ld + j], b[r * p.ld + j], sum);
        }
    }
    sums[thread] = sum;
    for (var half = 128u; half >= 32u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            sums[thread] += sums[thread + half];
        }
    }
    if thread < 32u && j < p.cols {
        out[j] += sums[thread];
    }
}
