// Running log-softmax statistics over chunks of the vocabulary: per token the maximum logit m so far, Σ exp(l − m), the target's
// logit, and the index of the maximum (ties keep the lower one). After the last chunk the loss is m + ln(sum) − target.
//
// One workgroup per token: a pass for the maximum of the chunk, one for the sum relative to the maximum so far. Memory bound:
// logits are read twice, the second time from cache where the row fits. Thousands of logits a thread leave little to gain from fewer
// barriers: with subgroups only the sum, which others share, has them.

struct CrossEntropyParams {
    n_tok: u32,
    cols: u32,
    ld: u32,
    col0: u32,
    first: u32,
}

@group(0) @binding(0) var<uniform> p: CrossEntropyParams;
@group(0) @binding(1) var<storage, read> logits: array<f32>; // [n_tok, ld], vocabulary entries col0..col0 + cols
@group(0) @binding(2) var<storage, read> targets: array<u32>; // [n_tok]
@group(0) @binding(3) var<storage, read_write> state: array<f32>; // [n_tok, 4]: max, sum, target logit, index of max

// Below every logit; WGSL may assume that there are no infinities.
const LOWEST = -3.4e38;

var<workgroup> maxima: array<f32, 256>;
var<workgroup> places: array<u32, 256>;

const THREADS = 256u;

@compute @workgroup_size(THREADS)
fn cross_entropy(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    at: Place,
) {
    let t = group.y * groups.x + group.x;
    if t >= p.n_tok {
        return;
    }
    let row = t * p.ld;
    var best = LOWEST;
    var place = 0u;
    for (var j = at.thread; j < p.cols; j += THREADS) {
        if logits[row + j] > best {
            best = logits[row + j];
            place = j;
        }
    }
    maxima[at.thread] = best;
    places[at.thread] = place;
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if at.thread < half {
            let other = maxima[at.thread + half];
            if other > maxima[at.thread] || (other == maxima[at.thread] && places[at.thread + half] < places[at.thread]) {
                maxima[at.thread] = other;
                places[at.thread] = places[at.thread + half];
            }
        }
    }
    let chunk_max = workgroupUniformLoad(&maxima[0]);
    let old_max = select(state[4u * t], LOWEST, p.first != 0u);
    let new_max = max(old_max, chunk_max);
    var sum = 0.0;
    for (var j = at.thread; j < p.cols; j += THREADS) {
        sum += exp(logits[row + j] - new_max);
    }
    sum = total(at, sum);
    if at.thread == 0u {
        if p.first != 0u {
            state[4u * t + 1u] = 0.0;
            state[4u * t + 2u] = 0.0;
            state[4u * t + 3u] = 0.0;
        }
        if chunk_max > old_max {
            state[4u * t + 3u] = f32(p.col0 + places[0]);
        }
        state[4u * t] = new_max;
        state[4u * t + 1u] = state[4u * t + 1u] * exp(max(old_max - new_max, -87.0)) + sum;
        let wanted = targets[t];
        if wanted >= p.col0 && wanted - p.col0 < p.cols {
            state[4u * t + 2u] = logits[row + wanted - p.col0];
        }
    }
}
