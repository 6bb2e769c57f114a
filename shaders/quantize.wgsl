// Nearest codes on a grid, and what they stand for:
//   q = clamp(round(w / s + z), 0, max_code), w_hat = s (q − z); s and z per row and group of columns. Ties of w / s + z − round(z) go to
// the even number, so that a whole z moves all codes alike.
//
// One thread per element. Memory bound: reads w, writes codes and w_hat, 12 bytes per 9 flops; grids are shared by `group`
// neighbours and come from cache. Division, not multiplication by 1 / s, so that codes equal the native twin's.

struct QuantizeParams {
    rows: u32,
    cols: u32,
    ld: u32,
    group: u32,
    n_group: u32,
    max_code: u32,
}

@group(0) @binding(0) var<uniform> p: QuantizeParams;
@group(0) @binding(1) var<storage, read> w: array<f32>; // [rows, ld]
@group(0) @binding(2) var<storage, read> scale: array<f32>; // [rows, n_group]
@group(0) @binding(3) var<storage, read> zero: array<f32>; // [rows, n_group]
@group(0) @binding(4) var<storage, read_write> codes: array<u32>; // [rows, ld]
@group(0) @binding(5) var<storage, read_write> w_hat: array<f32>; // [rows, ld]

@compute @workgroup_size(256)
fn quantize(
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
    let s = scale[grid];
    let z = zero[grid];
    let whole = round(z);
    let q = clamp(round(w[r * p.ld + j] / s + (z - whole)) + whole, 0.0, f32(p.max_code));
    codes[r * p.ld + j] = u32(q);
    w_hat[r * p.ld + j] = s * (q - z);
}
