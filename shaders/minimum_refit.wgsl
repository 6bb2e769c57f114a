// The best scale and minimum of every row and one group for fixed codes, rows independent, in closed form: the error s q + m − w changes
// by ds q + dm 1 and the loss by 2 (ds b + dm c) + ds² a + 2 ds dm f + dm² g, b = q · M, c = 1 · M, a = q H qᵀ, f = q H 1ᵀ, g = 1 H 1ᵀ,
// M = E H. The minimum over both, that over m and that over s are tried, rounded to the type in which they are stored (scale_dtype: 0 f32,
// 1 f16, 2 bf16; or, with per_super groups of a super-block, s to 1 to count_high of its steps and −m to 0 to count_high of its other steps),
// and the best that lowers the loss is taken: s, z = −m / s, M += ds q H + dm 1 H.
//
// q, qh (q H), m [rows, cols]; h (1 H) [cols]; q and 1 count on columns col0 .. col0 + width only, those of group `group` of scale and
// zero [rows, n_group].
//
// One workgroup of 64 threads per row: five sums by a tree, then the row of M. Memory bound: qh and m twice (the second time from cache),
// q and h, 20 bytes per 8 flops outside the group.

struct MinimumRefitParams {
    rows: u32,
    cols: u32,
    ld: u32,
    col0: u32,
    width: u32,
    group: u32,
    n_group: u32,
    scale_dtype: u32,
    per_super: u32,
    count_high: f32,
}

@group(0) @binding(0) var<uniform> p: MinimumRefitParams;
@group(0) @binding(1) var<storage, read> q: array<f32>; // [rows, cols], rows ld apart
@group(0) @binding(2) var<storage, read> qh: array<f32>; // [rows, cols], rows ld apart
@group(0) @binding(3) var<storage, read> h: array<f32>; // [cols]
@group(0) @binding(4) var<storage, read> steps: array<f32>; // [rows, n_super, 2]
@group(0) @binding(5) var<storage, read_write> scale: array<f32>; // [rows, n_group]
@group(0) @binding(6) var<storage, read_write> zero: array<f32>; // [rows, n_group]
@group(0) @binding(7) var<storage, read_write> m: array<f32>; // [rows, cols], rows ld apart

// b, c, a, f and g of each thread.
struct Quadratic {
    first: vec2<f32>,
    second: vec3<f32>,
}

struct Choice {
    scale: f32,
    minimum: f32,
    change: f32,
}

var<workgroup> sums: array<Quadratic, 64>;

// What is too large becomes the largest number.
fn scale_of(x: f32, step: vec2<f32>) -> f32 {
    if p.per_super == 0u {
        return stored_scale(min(x, largest(p.scale_dtype)), p.scale_dtype);
    }
    return step.x * clamp(round(x / step.x), 1.0, p.count_high);
}

fn minimum_of(x: f32, step: vec2<f32>) -> f32 {
    if p.per_super == 0u {
        let most = largest(p.scale_dtype);
        return stored_minimum(clamp(x, -most, most), p.scale_dtype);
    }
    if step.y == 0.0 {
        return 0.0;
    }
    return -step.y * clamp(round(-x / step.y), 0.0, p.count_high);
}

// `best`, or the grid that a change of the scale by `step` leads to where that is better, with the best minimum and with the present one.
fn better(best: Choice, change_of_scale: f32, s: f32, minimum: f32, all: Quadratic, step: vec2<f32>) -> Choice {
    let exact = s + change_of_scale;
    if !(exact > 0.0 && exact < 3.4e38) {
        return best;
    }
    let after = select(scale_of(exact, step), s, change_of_scale == 0.0);
    let ds = after - s;
    let b = all.first.x;
    let c = all.first.y;
    let a = all.second.x;
    let f = all.second.y;
    let g = all.second.z;
    var found = best;
    let shift = -(c + ds * f) / g;
    if g > 0.0 && abs(minimum + shift) < 3.4e38 {
        let lower = minimum_of(minimum + shift, step);
        let dm = lower - minimum;
        let change = 2.0 * (ds * b + dm * c) + ds * ds * a + 2.0 * ds * dm * f + dm * dm * g;
        if change < found.change {
            found = Choice(after, lower, change);
        }
    }
    let change = 2.0 * ds * b + ds * ds * a;
    if change < found.change {
        found = Choice(after, minimum, change);
    }
    return found;
}

@compute @workgroup_size(64)
fn minimum_refit(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    let start = row * p.ld;
    var sum = Quadratic(vec2<f32>(), vec3<f32>());
    for (var j = p.col0 + thread; j < p.col0 + p.width; j += 64u) {
        let code = q[start + j];
        let gradient = m[start + j];
        let product = qh[start + j];
        sum.first += vec2<f32>(code, 1.0) * gradient;
        sum.second += vec3<f32>(code * product, product, h[j]);
    }
    sums[thread] = sum;
    for (var half = 32u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            let other = sums[thread + half];
            sums[thread] = Quadratic(sums[thread].first + other.first, sums[thread].second + other.second);
        }
    }
    workgroupBarrier();
    let all = sums[0];
    let at = row * p.n_group + p.group;
    let s = scale[at];
    var step = vec2<f32>();
    if p.per_super != 0u {
        let super_block = row * ((p.n_group + p.per_super - 1u) / p.per_super) + p.group / p.per_super;
        step = vec2<f32>(steps[2u * super_block], steps[2u * super_block + 1u]);
    }
    let minimum = minimum_of(-s * zero[at], step);
    // The grid has been read by all before anyone writes it; a workgroup barrier would order workgroup memory only.
    storageBarrier();
    let a = all.second.x;
    let g = all.second.z;
    let det = a * g - all.second.y * all.second.y;
    var both = 0.0;
    if det > 1e-6 * a * g {
        both = (all.first.y * all.second.y - all.first.x * g) / det;
    }
    var best = better(Choice(s, minimum, 0.0), both, s, minimum, all, step);
    best = better(best, 0.0, s, minimum, all, step);
    if a > 0.0 {
        best = better(best, -all.first.x / a, s, minimum, all, step);
    }
    if !(best.change < 0.0) {
        return;
    }
    if thread == 0u {
        scale[at] = best.scale;
        zero[at] = -best.minimum / best.scale;
    }
    let ds = best.scale - s;
    let dm = best.minimum - minimum;
    for (var j = thread; j < p.cols; j += 64u) {
        m[start + j] += ds * qh[start + j] + dm * h[j];
    }
}
