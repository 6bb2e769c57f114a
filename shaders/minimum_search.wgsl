// Grids with a stored minimum per row and group, w_hat = s q + m: tries ranges whose two ends are clipped apart, improves each by the best
// s and m for its codes, and keeps the best n_keep by Σ_j h_j (w_hat_j − w_j)², best first, ties to the lower index.
//
// Candidate i n_clip + j: low = lo + i clip (hi − lo), high = hi − j clip (hi − lo), s = (high − low) / max_code, m = low; with n_clip > 1
// the least squares fit of s and m to its codes takes their place. s and m are rounded to the type in which they are stored (scale_dtype:
// 0 f32, 1 f16, 2 bf16) before anything is measured, m after it was found anew for the rounded s. s is at least 2^−14 of the largest |w|.
// below_zero: no minimum is above 0. w [rows, cols], h (weight) [cols]; scale s, zero −m / s, loss [n_keep, rows, n_group].
//
// One workgroup of 64 threads per row and group, a thread per candidate; the group's elements (at most 256) are staged in workgroup memory
// (2 KiB) and read by all threads at once. The best are found by atomic minima over the bits of the losses, with subgroups one or
// two of every subgroup (see scale_search).
//
// Cost: two passes of about 10 vector instructions per element and candidate, 8 bytes per 64 candidates: bound by arithmetic, with a
// division each; with n_clip = 8 all threads work, with n_clip = 1 (min/max) one does.

struct MinimumSearchParams {
    rows: u32,
    cols: u32,
    ld: u32,
    group: u32,
    n_group: u32,
    max_code: u32,
    n_clip: u32,
    n_keep: u32,
    scale_dtype: u32,
    clip: f32,
    below_zero: u32,
}

@group(0) @binding(0) var<uniform> p: MinimumSearchParams;
@group(0) @binding(1) var<storage, read> w: array<f32>; // [rows, cols], rows ld apart
@group(0) @binding(2) var<storage, read> weight: array<f32>; // [cols]
@group(0) @binding(3) var<storage, read_write> scale: array<f32>; // [n_keep, rows, n_group]
@group(0) @binding(4) var<storage, read_write> zero: array<f32>; // [n_keep, rows, n_group]
@group(0) @binding(5) var<storage, read_write> loss: array<f32>; // [n_keep, rows, n_group]

const THREADS = 64u;
const MAX_GROUP = 256u;

// Elements and their weights.
var<workgroup> staged: array<vec2<f32>, 256>;
// Largest and smallest weight by thread.
var<workgroup> extreme: array<vec2<f32>, 64>;

fn code(value: f32, s: f32, m: f32) -> f32 {
    return clamp(round((value - m) / s), 0.0, f32(p.max_code));
}

@compute @workgroup_size(64)
fn minimum_search(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let at = group.y * groups.x + group.x;
    if at >= p.rows * p.n_group {
        return;
    }
    let column0 = at % p.n_group * p.group;
    let size = min(p.group, p.cols - column0);
    let start = at / p.n_group * p.ld + column0;

    clear_ranks(thread);
    // Threads without an element of their own repeat the first.
    let first = w[start];
    var ends = vec2<f32>(first, first);
    for (var i = thread; i < size; i += THREADS) {
        let value = w[start + i];
        staged[i] = vec2<f32>(value, weight[column0 + i]);
        ends = vec2<f32>(max(ends.x, value), min(ends.y, value));
    }
    extreme[thread] = ends;
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            let other = extreme[thread + half];
            extreme[thread] = vec2<f32>(max(extreme[thread].x, other.x), min(extreme[thread].y, other.y));
        }
    }
    ends = workgroupUniformLoad(&extreme[0]);
    if p.below_zero != 0u {
        ends.y = min(ends.y, 0.0);
    }

    let n = p.n_clip * p.n_clip;
    let unit = p.clip * (ends.x - ends.y);
    let low = ends.y + f32(thread / p.n_clip) * unit;
    let high = ends.x - f32(thread % p.n_clip) * unit;
    let least = max(max(abs(ends.x), abs(ends.y)) / 16384.0, smallest(p.scale_dtype));
    var s = max((high - low) / f32(p.max_code), least);
    var m = low;
    if p.n_clip > 1u {
        // Σh, Σhq, Σhq², Σhw, Σhqw.
        var h = 0.0;
        var hq = 0.0;
        var hqq = 0.0;
        var hw = 0.0;
        var hqw = 0.0;
        for (var i = 0u; i < size; i++) {
            let element = staged[i];
            let q = code(element.x, s, m);
            let weighted = element.y * q;
            h += element.y;
            hq += weighted;
            hqq = fma(weighted, q, hqq);
            hw = fma(element.y, element.x, hw);
            hqw = fma(weighted, element.x, hqw);
        }
        let det = h * hqq - hq * hq;
        let slope = h * hqw - hq * hw;
        // Codes that are all alike say nothing about the scale.
        if det > 1e-6 * h * hqq && slope > 0.0 {
            s = max(slope / det, least);
        }
        s = stored_scale(s, p.scale_dtype);
        if h > 0.0 {
            m = (hw - s * hq) / h;
        }
    } else {
        s = stored_scale(s, p.scale_dtype);
    }
    m = stored_minimum(select(m, min(m, 0.0), p.below_zero != 0u), p.scale_dtype);
    var sum = 0.0;
    for (var i = 0u; i < size; i++) {
        let element = staged[i];
        let e = fma(s, code(element.x, s, m), m - element.x);
        sum = fma(element.y * e, e, sum);
    }

    var key = select(WORST, bitcast<u32>(sum), thread < n);
    for (var keep = 0u; keep < p.n_keep; keep++) {
        if thread == ranked(keep, key, thread) {
            let to = keep * p.rows * p.n_group + at;
            scale[to] = s;
            zero[to] = -m / s;
            loss[to] = sum;
            key = WORST;
        }
    }
}
