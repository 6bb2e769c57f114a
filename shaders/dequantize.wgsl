// w_hat = s (q − z); s and z per row and group of columns.
//
// One thread per element. Memory bound: reads codes and writes w_hat once; grids are shared by `group` neighbours.

struct DequantizeParams {
    rows: u32,
    cols: u32,
    ld: u32,
    group: u32,
    n_group: u32,
}

@group(0) @binding(0) var<uniform> p: DequantizeParams;
@group(0) @binding(1) var<storage, read> codes: array<u32>; // [rows, ld]
@group(0) @binding(2) var<storage, read> scale: array<f32>; // [rows, n_group]
@group(0) @binding(3) var<storage, read> zero: array<f32>; // [rows, n_group]
@group(0) @binding(4) var<storage, read_write> w_hat: array<f32>; // [rows, ld]

@compute @workgroup_size(256)
fn dequantize(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    let r = i / p.cols;
    let j = i % p.cols;
    if r >= p.rows {
        return;
    }
    let grid = r * p.n_group + j / p.group;
    w_hat[r * p.ld + j] = scale[grid] * (f32(codes[r * p.ld + j]) - zero[grid]);
}
