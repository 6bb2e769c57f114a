// LayerNorm: out[t, j] = (x[t, j] − mean) / sqrt(var + eps) · gain[j] + bias[j], variance with divisor d.
//
// One workgroup per token: a pass for the mean, one for the variance around it (one pass with Σ x² would cancel), one to write;
// the row stays in cache. Memory bound, about 7 flops per element; two sums of eleven barriers each, of two with subgroups (see rms_norm).

struct LayerNormParams {
    n_tok: u32,
    d: u32,
    ld_x: u32,
    ld_out: u32,
    has_bias: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> p: LayerNormParams;
@group(0) @binding(1) var<storage, read> x: array<f32>; // [n_tok, ld_x]
@group(0) @binding(2) var<storage, read> gain: array<f32>; // [d]
@group(0) @binding(3) var<storage, read> bias: array<f32>; // [d], or absent when has_bias is 0
@group(0) @binding(4) var<storage, read_write> out: array<Elem>; // [n_tok, ld_out]

const THREADS = 256u;

@compute @workgroup_size(THREADS)
fn layer_norm(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    at: Place,
) {
    let t = group.y * groups.x + group.x;
    if t >= p.n_tok {
        return;
    }
    let row = t * p.ld_x;
    var sum = 0.0;
    for (var j = at.thread; j < p.d; j += THREADS) {
        sum += x[row + j];
    }
    let mean = total(at, sum) / f32(p.d);
    var squares = 0.0;
    for (var j = at.thread; j < p.d; j += THREADS) {
        let centred = x[row + j] - mean;
        squares += centred * centred;
    }
    let scale = 1.0 / sqrt(total(at, squares) / f32(p.d) + p.eps);
    for (var j = at.thread; j < p.d; j += THREADS) {
        var value = (x[row + j] - mean) * scale * gain[j];
        if p.has_bias != 0u {
            value += bias[j];
        }
        out[t * p.ld_out + j] = Elem(value);
    }
}
