// RMSNorm: out[t, j] = x[t, j] / sqrt(mean_j x² + eps) · gain[j].
//
// One workgroup per token: 256 threads sum squares of every 256th column, a tree adds them up (so a sum of d terms rounds about
// d / 256 + 8 times), then all threads write. Memory bound: reads x twice (the second time from cache), writes out once, about 4 flops
// per element. For a d of 4096 a thread reads 16 values, so the tree's eleven barriers in workgroup memory (lib/total.wgsl) take
// about as long as the loads; with subgroups (lib/total_subgroups.wgsl) there are two.

struct RmsNormParams {
    n_tok: u32,
    d: u32,
    ld_x: u32,
    ld_out: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> p: RmsNormParams;
@group(0) @binding(1) var<storage, read> x: array<f32>; // [n_tok, ld_x]
@group(0) @binding(2) var<storage, read> gain: array<f32>; // [d]
@group(0) @binding(3) var<storage, read_write> out: array<Elem>; // [n_tok, ld_out]

const THREADS = 256u;

@compute @workgroup_size(THREADS)
fn rms_norm(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    at: Place,
) {
    let t = group.y * groups.x + group.x;
    if t >= p.n_tok {
        return;
    }
    let row = t * p.ld_x;
    var squares = 0.0;
    for (var j = at.thread; j < p.d; j += THREADS) {
        squares += x[row + j] * x[row + j];
    }
    let rms = 1.0 / sqrt(total(at, squares) / f32(p.d) + p.eps);
    for (var j = at.thread; j < p.d; j += THREADS) {
        out[t * p.ld_out + j] = Elem(x[row + j] * rms * gain[j]);
    }
}
