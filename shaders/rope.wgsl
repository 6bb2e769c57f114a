// Rotary position embedding in place, half-split layout: for i < d_head / 2, at position (token mod seq_len),
//   x[i]              = x[i] cos − x[i + d_head / 2] sin
//   x[i + d_head / 2] = x[i + d_head / 2] cos + x[i] sin
//
// One thread per pair, so that both halves are read before either is written. Memory bound: x once in, once out; the tables are
// shared by all heads and come from cache.

struct RopeParams {
    n_tok: u32,
    seq_len: u32,
    n_head: u32,
    d_head: u32,
    ld: u32,
}

@group(0) @binding(0) var<uniform> p: RopeParams;
@group(0) @binding(1) var<storage, read> cos: array<f32>; // [seq_len, d_head / 2]
@group(0) @binding(2) var<storage, read> sin: array<f32>; // [seq_len, d_head / 2]
@group(0) @binding(3) var<storage, read_write> x: array<f32>; // [n_tok, ld], heads side by side

@compute @workgroup_size(256)
fn rope(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let pair = (group.y * groups.x + group.x) * 256u + thread;
    let pairs = p.d_head / 2u;
    let i = pair % pairs;
    let head = pair / pairs % p.n_head;
    let t = pair / pairs / p.n_head;
    if t >= p.n_tok {
        return;
    }
    let low = t * p.ld + head * p.d_head + i;
    let angle = t % p.seq_len * pairs + i;
    let a = x[low];
    let b = x[low + pairs];
    x[low] = a * cos[angle] - b * sin[angle];
    x[low + pairs] = b * cos[angle] + a * sin[angle];
}
