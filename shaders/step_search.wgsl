// Free grids to grids of two levels, per row and super-block: scales become whole numbers of a step that the groups of a super-block share,
// minima minus whole numbers of another one.
//
// n_try steps around (largest |s| of a group that is not all zeros, which any s gives) / count_high are tried, try t being (1 + spread (t − n_try / 2) / (n_try / 2)) times that, rounded to its
// type (step_dtype: 0 f32, 1 f16, 2 bf16): every scale becomes the nearest count of the step that is not 0 and has its sign, every minimum
// the best one for the codes that then are nearest; the step with the least Σ_j h_j (w_hat_j − w_j)² over the super-block is kept. Then, where
// minima are stored, their step is found in the same way from (largest −m) / count_high, with the scales as they now are. With one try
// minima are not fitted.
// w [rows, cols], h (weight) [cols]; scale, zero [rows, n_group], replaced; steps [rows, n_super, 2].
//
// One workgroup of 64 threads per row and super-block, whose elements (at most 256) are staged in workgroup memory (4 KiB in all); a thread
// takes pairs of a group and a try, tries next to each other, so that neighbours read the same element.
//
// Cost: three passes of about 10 vector instructions per element and try (one without minima), 8 bytes per element: bound by arithmetic, and
// a quarter of what the search of the free grids costs.

struct StepSearchParams {
    rows: u32,
    cols: u32,
    ld: u32,
    group: u32,
    n_group: u32,
    per_super: u32,
    max_code: u32,
    minima: u32,
    n_try: u32,
    step_dtype: u32,
    count_low: f32,
    count_high: f32,
    spread: f32,
}

@group(0) @binding(0) var<uniform> p: StepSearchParams;
@group(0) @binding(1) var<storage, read> w: array<f32>; // [rows, cols], rows ld apart
@group(0) @binding(2) var<storage, read> weight: array<f32>; // [cols]
@group(0) @binding(3) var<storage, read_write> scale: array<f32>; // [rows, n_group]
@group(0) @binding(4) var<storage, read_write> zero: array<f32>; // [rows, n_group]
@group(0) @binding(5) var<storage, read_write> steps: array<f32>; // [rows, n_super, 2]

const THREADS = 64u;
const MAX_GROUPS = 16u;
const MAX_TRIES = 16u;

// Elements and their weights.
var<workgroup> staged: array<vec2<f32>, 256>;
// Scale and minimum of every group.
var<workgroup> grid: array<vec2<f32>, 16>;
// Of group g and try t at 16 g + t: the loss, and the minimum that goes with it.
var<workgroup> tried: array<vec2<f32>, 256>;
// |s| of a group that is not all zeros, else 0.
var<workgroup> sizes: array<f32, 16>;
// The losses of tries.
var<workgroup> losses: array<f32, 16>;

fn step_of(base: f32, number: u32) -> f32 {
    let half = p.n_try / 2u;
    if half == 0u {
        return stored_step(base, p.step_dtype);
    }
    return stored_step(base * (1.0 + p.spread * ((f32(number) - f32(half)) / f32(half))), p.step_dtype);
}

// The nearest count of a step with the sign of s that is not 0.
fn counted_scale(s: f32, step: f32) -> f32 {
    let most = select(-p.count_low, p.count_high, s > 0.0);
    return sign(s) * step * clamp(round(abs(s) / step), 1.0, most);
}

fn counted_minimum(m: f32, step: f32) -> f32 {
    return -step * clamp(round(-m / step), 0.0, p.count_high);
}

fn code(value: f32, s: f32, m: f32) -> f32 {
    return clamp(round((value - m) / s), 0.0, f32(p.max_code));
}

// Σ h (s q + m − w)² of a group with its nearest codes.
fn loss_of(first: u32, end: u32, s: f32, m: f32) -> f32 {
    var sum = 0.0;
    for (var i = first; i < end; i++) {
        let element = staged[i];
        let e = fma(s, code(element.x, s, m), m - element.x);
        sum = fma(element.y * e, e, sum);
    }
    return sum;
}

// The best minimum for the codes that a grid gives a group, at most 0.
fn fitted(first: u32, end: u32, s: f32, m: f32) -> f32 {
    var h = 0.0;
    var hq = 0.0;
    var hw = 0.0;
    for (var i = first; i < end; i++) {
        let element = staged[i];
        h += element.y;
        hq = fma(element.y, code(element.x, s, m), hq);
        hw = fma(element.y, element.x, hw);
    }
    return select(m, min((hw - s * hq) / h, 0.0), h > 0.0);
}

// The try with the least loss over all groups; of equals the first.
fn best_try(thread: u32, groups: u32) -> u32 {
    workgroupBarrier();
    if thread < p.n_try {
        var sum = 0.0;
        for (var g = 0u; g < groups; g++) {
            sum += tried[MAX_TRIES * g + thread].x;
        }
        losses[thread] = sum;
    }
    workgroupBarrier();
    var best = 0u;
    for (var t = 1u; t < p.n_try; t++) {
        if losses[t] < losses[best] {
            best = t;
        }
    }
    return best;
}

@compute @workgroup_size(64)
fn step_search(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let at = group.y * groups.x + group.x;
    let n_super = (p.n_group + p.per_super - 1u) / p.per_super;
    if at >= p.rows * n_super {
        return;
    }
    let row = at / n_super;
    let first_group = at % n_super * p.per_super;
    let n = min(p.per_super, p.n_group - first_group);
    let column0 = first_group * p.group;
    let size = min(n * p.group, p.cols - column0);
    for (var i = thread; i < size; i += THREADS) {
        staged[i] = vec2<f32>(w[row * p.ld + column0 + i], weight[column0 + i]);
    }
    let own = row * p.n_group + first_group + thread;
    if thread < n {
        let s = scale[own];
        // Where no minima are stored, codes count from the middle.
        grid[thread] = vec2<f32>(s, -s * zero[own]);
    }
    workgroupBarrier();
    if thread < n {
        var largest = 0.0;
        for (var i = thread * p.group; i < min((thread + 1u) * p.group, size); i++) {
            largest = max(largest, abs(staged[i].x));
        }
        sizes[thread] = select(0.0, abs(grid[thread].x), largest > 0.0);
    }
    workgroupBarrier();

    var base = 0.0;
    for (var g = 0u; g < n; g++) {
        base = max(base, sizes[g]);
    }
    base /= p.count_high;
    for (var task = thread; task < n * p.n_try; task += THREADS) {
        let g = task / p.n_try;
        let t = task % p.n_try;
        let first = g * p.group;
        let end = min(first + p.group, size);
        let s = counted_scale(grid[g].x, step_of(base, t));
        var m = grid[g].y;
        if p.minima == 0u {
            m = -s * (f32(p.max_code) + 1.0) / 2.0;
        } else if p.n_try > 1u {
            m = fitted(first, end, s, m);
        }
        tried[MAX_TRIES * g + t] = vec2<f32>(loss_of(first, end, s, m), m);
    }
    let chosen = best_try(thread, n);
    let step = step_of(base, chosen);
    // All have read what the tries left before it is overwritten.
    workgroupBarrier();
    if thread < n {
        grid[thread] = vec2<f32>(counted_scale(grid[thread].x, step), tried[MAX_TRIES * thread + chosen].y);
    }
    workgroupBarrier();

    var step_minimum = 0.0;
    if p.minima != 0u {
        base = 0.0;
        for (var g = 0u; g < n; g++) {
            base = max(base, -grid[g].y);
        }
        base /= p.count_high;
        for (var task = thread; task < n * p.n_try; task += THREADS) {
            let g = task / p.n_try;
            let t = task % p.n_try;
            let first = g * p.group;
            let m = counted_minimum(grid[g].y, step_of(base, t));
            tried[MAX_TRIES * g + t].x = loss_of(first, min(first + p.group, size), grid[g].x, m);
        }
        step_minimum = step_of(base, best_try(thread, n));
    }
    if thread < n {
        let s = grid[thread].x;
        scale[own] = s;
        if p.minima != 0u {
            zero[own] = -counted_minimum(grid[thread].y, step_minimum) / s;
        }
    }
    if thread == 0u {
        steps[2u * at] = step;
        steps[2u * at + 1u] = step_minimum;
    }
}
