// Grids per row and group: tries clip ratios of the group's range and keeps the best n_keep by Σ_j h_j (ŵ_j − w_j)², best first, ties
// to the larger ratio (the lower index), then the lower zero point.
//
// Asymmetric: lo = min(0, min w), hi = max(0, max w), s = ratio (hi − lo) / max_code, z = −ratio lo / s, rounded to nearest when
// there is one ratio and tried both down and up otherwise, plus zero_shift (a whole number), which clips the two ends by unequal
// ratios; clamped to zero_low and the largest code. Symmetric: s = ratio max|w| / (max_code / 2), z = (max_code + 1) / 2, and −s
// too where `signed`.
// Scales are rounded to the type in which they are stored (scale_dtype: 0 f32, 1 f16, 2 bf16) before anything is measured. A group of
// zeros gets s = 1. w [rows, cols], h (weight) [cols]; scale, zero, loss [n_keep, rows, n_group].
//
// One workgroup of 64 threads per row and group; elements are staged 1024 at a time in workgroup memory (9.5 KiB in all) and read by
// all threads at once. Candidates (at most 256) are spread over the threads, up to four each; where there are fewer than 64,
// threads share a candidate's elements. The best are found by atomic minima over the bits of the losses (lib/ranked.wgsl): 64
// threads on one address, which a unit does one after the other; with subgroups it is one or two of every subgroup.
//
// Cost: 6 vector instructions per element and candidate, 4 bytes of w per up to 256 candidates: bound by arithmetic (v_rndne and two
// clamps beside three multiply-adds and two products, so a third of issue is multiply-adds). Compiled for navi21 (and gfx1100): 40
// (36) VGPRs, no spills; workgroup memory allows 13 workgroups per 128 KiB.

struct ScaleSearchParams {
    rows: u32,
    cols: u32,
    ld: u32,
    group: u32,
    n_group: u32,
    max_code: u32,
    symmetric: u32,
    signed: u32,
    n_ratio: u32,
    n_keep: u32,
    scale_dtype: u32,
    min_ratio: f32,
    zero_shift: f32,
    zero_low: f32,
}

@group(0) @binding(0) var<uniform> p: ScaleSearchParams;
@group(0) @binding(1) var<storage, read> w: array<f32>; // [rows, cols], rows ld apart
@group(0) @binding(2) var<storage, read> weight: array<f32>; // [cols]
@group(0) @binding(3) var<storage, read_write> scale: array<f32>; // [n_keep, rows, n_group]
@group(0) @binding(4) var<storage, read_write> zero: array<f32>; // [n_keep, rows, n_group]
@group(0) @binding(5) var<storage, read_write> loss: array<f32>; // [n_keep, rows, n_group]

const THREADS = 64u;
const CHUNK = 1024u; // elements of a group that are staged at a time

// Two elements and their weights in turn: (w, h, w, h).
var<workgroup> chunk: array<vec4<f32>, 512>;
// Partial losses: [4 candidates of a thread][threads].
var<workgroup> partial: array<f32, 256>;
// Largest weight and largest negated weight, both at least 0, as bits: those of such floats are ordered like the floats.
var<workgroup> highest: atomic<u32>;
var<workgroup> lowest: atomic<u32>;

// Two candidates.
struct Grids {
    scale: vec2<f32>,
    zero: vec2<f32>,
}

fn zeros_per_ratio() -> u32 {
    return select(select(1u, 2u, p.n_ratio > 1u), select(1u, 2u, p.signed != 0u), p.symmetric != 0u);
}

// Scale and zero point of a candidate for a group with values in [low, high].
fn grid_of(candidate: u32, low: f32, high: f32) -> vec2<f32> {
    let most = f32(p.max_code);
    let n_zero = zeros_per_ratio();
    let ratio = 1.0 - f32(candidate / n_zero) * ((1.0 - p.min_ratio) / f32(max(p.n_ratio, 2u) - 1u));
    let range = select(high - low, 2.0 * max(high, -low), p.symmetric != 0u);
    var s = 1.0;
    if range > 0.0 {
        s = stored_scale(ratio * range / most, p.scale_dtype);
    }
    if p.symmetric != 0u {
        return vec2<f32>(select(s, -s, p.signed != 0u && candidate % 2u == 1u), (most + 1.0) / 2.0);
    }
    let exact = -ratio * low / s;
    let z = select(floor(exact) + f32(candidate % n_zero), round(exact), n_zero == 1u);
    return vec2<f32>(s, clamp(z + p.zero_shift, p.zero_low, most));
}

fn grids_of(candidates: vec2<u32>, low: f32, high: f32) -> Grids {
    let a = grid_of(candidates.x, low, high);
    let b = grid_of(candidates.y, low, high);
    return Grids(vec2<f32>(a.x, b.x), vec2<f32>(a.y, b.y));
}

// The loss of two candidates over every `stride`-th pair of elements of the chunk.
fn measure(grids: Grids, before: vec2<f32>, first: u32, stride: u32, pairs: u32) -> vec2<f32> {
    let inverse = 1.0 / grids.scale;
    // clamp(q + z, 0, most) − z is clamp(q, −z, most − z).
    let bottom = -grids.zero;
    let top = f32(p.max_code) - grids.zero;
    var sum = before;
    for (var i = first; i < pairs; i += stride) {
        let two = chunk[i];
        let e0 = fma(grids.scale, clamp(round(two.x * inverse), bottom, top), vec2<f32>(-two.x));
        let e1 = fma(grids.scale, clamp(round(two.z * inverse), bottom, top), vec2<f32>(-two.z));
        sum = fma(two.y * e0, e0, sum);
        sum = fma(two.w * e1, e1, sum);
    }
    return sum;
}

// The loss of a candidate: the parts that the threads of its column hold, in order.
fn total(candidate: u32, columns: u32) -> u32 {
    if candidate >= p.n_ratio * zeros_per_ratio() {
        return WORST;
    }
    let start = candidate / columns * THREADS + candidate % columns;
    var sum = 0.0;
    for (var i = 0u; i < THREADS; i += columns) {
        sum += partial[start + i];
    }
    return bitcast<u32>(sum);
}

@compute @workgroup_size(64)
fn scale_search(
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

    // The range, which includes zero.
    clear_ranks(thread);
    if thread == 0u {
        atomicStore(&highest, 0u);
        atomicStore(&lowest, 0u);
    }
    var low = 0.0;
    var high = 0.0;
    for (var i = thread; i < size; i += THREADS) {
        let value = w[start + i];
        low = min(low, value);
        high = max(high, value);
    }
    workgroupBarrier();
    // abs removes the sign of a negative zero.
    atomicMax(&highest, bitcast<u32>(abs(high)));
    atomicMax(&lowest, bitcast<u32>(abs(low)));
    workgroupBarrier();
    high = bitcast<f32>(atomicLoad(&highest));
    low = -bitcast<f32>(atomicLoad(&lowest));

    // Threads form `columns` columns (a power of two); a column has up to four candidates, its threads share the elements.
    let n = p.n_ratio * zeros_per_ratio();
    var columns = 1u;
    while 2u * columns < min(n, 2u * THREADS) {
        columns *= 2u;
    }
    let column = thread % columns;
    let slices = THREADS / columns;
    let slice = thread / columns;
    let many = n > 2u * columns;
    let near = grids_of(vec2<u32>(column, column + columns), low, high);
    let far = grids_of(vec2<u32>(column + 2u * columns, column + 3u * columns), low, high);
    var near_loss = vec2<f32>();
    var far_loss = vec2<f32>();
    for (var done = 0u; done < size; done += CHUNK) {
        let count = min(CHUNK, size - done);
        let pairs = (count + 1u) / 2u;
        workgroupBarrier();
        for (var i = thread; i < pairs; i += THREADS) {
            let j = done + 2u * i;
            var two = vec4<f32>(w[start + j], weight[column0 + j], 0.0, 0.0);
            if j + 1u < size {
                two.z = w[start + j + 1u];
                two.w = weight[column0 + j + 1u];
            }
            chunk[i] = two;
        }
        workgroupBarrier();
        near_loss = measure(near, near_loss, slice, slices, pairs);
        if many {
            far_loss = measure(far, far_loss, slice, slices, pairs);
        }
    }
    partial[thread] = near_loss.x;
    partial[THREADS + thread] = near_loss.y;
    partial[2u * THREADS + thread] = far_loss.x;
    partial[3u * THREADS + thread] = far_loss.y;
    workgroupBarrier();

    // The lower index is the larger ratio.
    let mine = vec4<u32>(0u, THREADS, 2u * THREADS, 3u * THREADS) + thread;
    var keys = vec4<u32>(total(mine.x, columns), total(mine.y, columns), total(mine.z, columns), total(mine.w, columns));
    for (var keep = 0u; keep < p.n_keep; keep++) {
        let key = min(min(keys.x, keys.y), min(keys.z, keys.w));
        let of_mine = select(vec4<u32>(WORST), mine, keys == vec4<u32>(key));
        let index = ranked(keep, key, min(min(of_mine.x, of_mine.y), min(of_mine.z, of_mine.w)));
        keys = select(keys, vec4<u32>(WORST), mine == vec4<u32>(index));
        if thread == 0u {
            let grid = grid_of(index, low, high);
            let to = keep * p.rows * p.n_group + at;
            scale[to] = grid.x;
            zero[to] = grid.y;
            loss[to] = bitcast<f32>(atomicLoad(&best[keep]));
        }
    }
}
