// KL(reference || model) per token over chunks of the vocabulary, and the favourite token of both. With l the model's and r the
// reference's logits, m and n their running maxima: S = Σ exp(l − m), R = Σ exp(r − n), T = Σ exp(r − n) (r − l), and at the end
// KL = T / R − (n + ln R) + (m + ln S).
//
// One workgroup per token: a pass for both maxima of the chunk, one for the three sums relative to the maxima so far. Memory
// bound: both rows are read twice, the second time from cache where they fit.

struct KlDivergenceParams {
    n_tok: u32,
    cols: u32,
    ld: u32,
    col0: u32,
    first: u32,
}

@group(0) @binding(0) var<uniform> p: KlDivergenceParams;
@group(0) @binding(1) var<storage, read> logits: array<f32>; // [n_tok, ld], vocabulary entries col0..col0 + cols
@group(0) @binding(2) var<storage, read> reference: array<f32>; // [n_tok, ld], the same entries
@group(0) @binding(3) var<storage, read_write> state: array<f32>; // [n_tok, 8]: m, S, n, R, T, argmax l, argmax r, unused

// Below every logit; WGSL may assume that there are no infinities.
const LOWEST = -3.4e38;

// x: the model, y: the reference.
var<workgroup> maxima: array<vec2f, 256>;
var<workgroup> places: array<vec2u, 256>;
// S, R and T of the chunk.
var<workgroup> sums: array<vec3f, 256>;

@compute @workgroup_size(256)
fn kl_divergence(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let t = group.y * groups.x + group.x;
    if t >= p.n_tok {
        return;
    }
    let row = t * p.ld;
    var best = vec2f(LOWEST);
    var place = vec2u(0u);
    for (var j = thread; j < p.cols; j += 256u) {
        let value = vec2f(logits[row + j], reference[row + j]);
        place = select(place, vec2u(j), value > best);
        best = max(best, value);
    }
    maxima[thread] = best;
    places[thread] = place;
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            let mine = maxima[thread];
            let other = maxima[thread + half];
            let take = (other > mine) | ((other == mine) & (places[thread + half] < places[thread]));
            maxima[thread] = max(mine, other);
            places[thread] = select(places[thread], places[thread + half], take);
        }
    }
    let chunk_max = workgroupUniformLoad(&maxima[0]);
    let old_max = select(vec2f(state[8u * t], state[8u * t + 2u]), vec2f(LOWEST), p.first != 0u);
    let new_max = max(old_max, chunk_max);
    var sum = vec3f(0.0);
    for (var j = thread; j < p.cols; j += 256u) {
        let l = logits[row + j];
        let r = reference[row + j];
        let weight = exp(r - new_max.y);
        sum += vec3f(exp(l - new_max.x), weight, weight * (r - l));
    }
    sums[thread] = sum;
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            sums[thread] += sums[thread + half];
        }
    }
    if thread == 0u {
        if p.first != 0u {
            for (var i = 0u; i < 8u; i++) {
                state[8u * t + i] = 0.0;
            }
        }
        let favourite = vec2f(places[0] + p.col0);
        if chunk_max.x > old_max.x {
            state[8u * t + 5u] = favourite.x;
        }
        if chunk_max.y > old_max.y {
            state[8u * t + 6u] = favourite.y;
        }
        let shrink = exp(max(old_max - new_max, vec2f(-87.0)));
        state[8u * t] = new_max.x;
        state[8u * t + 1u] = state[8u * t + 1u] * shrink.x + sums[0].x;
        state[8u * t + 2u] = new_max.y;
        state[8u * t + 3u] = state[8u * t + 3u] * shrink.y + sums[0].y;
        state[8u * t + 4u] = state[8u * t + 4u] * shrink.y + sums[0].z;
    }
}
