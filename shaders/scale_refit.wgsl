// The best scale of every row for fixed codes, rows independent, in closed form: the error s u − w, u = q − z, changes by ds u and the
// loss by 2 ds b + ds² a, b = u · M, a = u H uᵀ, M = E H. ds = −b / a, rounded so that s + ds is a scale as stored (scale_dtype: 0 f32,
// 1 f16, 2 bf16; or, with per_super groups of a super-block, a whole number of its steps, count_low to count_high), is taken where it lowers
// the loss: s += ds, M += ds u H.
//
// u, uh (u H), m [rows, cols]; u counts on columns col0 .. col0 + width only, those of group `group` of scale [rows, n_group].
// folded: uh holds w H instead, and u H = (M + w H) / s.
//
// One workgroup of 64 threads per row: two sums by a tree, then the row of M. Memory bound: u, uh and m twice (the second time from
// cache), 28 bytes per 7 flops.

struct ScaleRefitParams {
    rows: u32,
    cols: u32,
    ld: u32,
    col0: u32,
    width: u32,
    group: u32,
    n_group: u32,
    scale_dtype: u32,
    folded: u32,
    per_super: u32,
    count_low: f32,
    count_high: f32,
}

@group(0) @binding(0) var<uniform> p: ScaleRefitParams;
@group(0) @binding(1) var<storage, read> u: array<f32>; // [rows, cols], rows ld apart
@group(0) @binding(2) var<storage, read> uh: array<f32>; // [rows, cols], rows ld apart
@group(0) @binding(3) var<storage, read> steps: array<f32>; // [rows, n_super, 2]
@group(0) @binding(4) var<storage, read_write> scale: array<f32>; // [rows, n_group]
@group(0) @binding(5) var<storage, read_write> m: array<f32>; // [rows, cols], rows ld apart

var<workgroup> sums: array<vec2<f32>, 64>;

// Sum over the workgroup of each thread's values.
fn total(thread: u32, value: vec2<f32>) -> vec2<f32> {
    sums[thread] = value;
    for (var half = 32u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if thread < half {
            sums[thread] += sums[thread + half];
        }
    }
    return workgroupUniformLoad(&sums[0]);
}

@compute @workgroup_size(64)
fn scale_refit(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    let start = row * p.ld;
    var sum = vec2<f32>();
    for (var j = p.col0 + thread; j < p.col0 + p.width; j += 64u) {
        sum += u[start + j] * vec2<f32>(m[start + j], uh[start + j]);
    }
    sum = total(thread, sum);
    let at = row * p.n_group + p.group;
    let s = scale[at];
    let b = sum.x;
    let a = select(sum.y, (b + sum.y) / s, p.folded != 0u);
    // The scale has been read by all before anyone writes it; a workgroup barrier would order workgroup memory only.
    storageBarrier();
    if !(a > 0.0) {
        return;
    }
    let exact = s - b / a;
    // No scale changes its sign.
    if !(exact * sign(s) > 0.0) {
        return;
    }
    var after = 0.0;
    if p.per_super == 0u {
        after = sign(s) * stored_scale(min(abs(exact), largest(p.scale_dtype)), p.scale_dtype);
    } else {
        let step = steps[2u * (row * ((p.n_group + p.per_super - 1u) / p.per_super) + p.group / p.per_super)];
        let most = select(-p.count_low, p.count_high, s > 0.0);
        after = sign(s) * step * clamp(round(abs(exact) / step), 1.0, most);
    }
    let ds = after - s;
    if !(2.0 * ds * b + ds * ds * a < 0.0) {
        return;
    }
    if thread == 0u {
        scale[at] = after;
    }
    for (var j = thread; j < p.cols; j += 64u) {
        let before = m[start + j];
        let add = uh[start + j];
        m[start + j] = before + select(ds * add, ds / s * (before + add), p.folded != 0u);
    }
}
