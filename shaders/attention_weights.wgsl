// out[b, r, j] = softmax_{j ≤ i}(scale q_i · k_j) with i = i0 + r step, zero for the other j up to the padded width: rows of one head's
// causal attention weights, for products that need them as a matrix. Batches are sequences.
//
// q_i lies at q_offset + b q_batch + i ld_q, k_j at k_offset + b k_batch + j ld_k, d_head elements each, d_head even; offsets and strides
// count elements and are even, those of out multiples of 8. Columns of out reach from 0 to `cols`, rounded up to a multiple of 8,
// and hold every key that the last row sees.
//
// One workgroup of 128 threads has 32 rows and walks over tiles of 64 keys twice: first it leaves scores in out and keeps, per thread, a
// running maximum and norm of its own columns (no barriers for them); then, with those of the whole row, each thread turns the scores
// that it wrote itself into weights. Reading them back costs 4 bytes a weight, computing them again 2 d_head flops. The score product
// is that of the attention kernel: 16 elements of the head at a time, 4 x 4 per thread.
//
// Cost: 2 d_head flops per pair on or below the diagonal and 12 bytes per element of out; 10 KiB of workgroup memory, of which one flop a
// byte is the limit. Compiled for navi21 (and gfx1100): 80 (84) VGPRs, no spills, 12 (14) waves of 32 per SIMD. Expect 30 to 40 % of peak
// f32, next to a product that reads the weights and has d_model / d_head times the flops.

struct AttentionWeightsParams {
    rows: u32,
    i0: u32,
    step: u32,
    cols: u32,
    d_head: u32,
    ld_q: u32,
    ld_k: u32,
    ld_out: u32,
    q_offset: u32,
    k_offset: u32,
    q_batch: u32,
    k_batch: u32,
    out_batch: u32,
    batches: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: AttentionWeightsParams;
@group(0) @binding(1) var<storage, read> q: array<vec2<f32>>; // [batches][i0 + (rows - 1) step + 1, d_head], rows ld_q apart
@group(0) @binding(2) var<storage, read> k: array<vec2<f32>>; // [batches][i0 + (rows - 1) step + 1, d_head], rows ld_k apart
@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>; // [batches][rows, cols], rows ld_out apart

const ROWS = 32u;
const KEYS = 64u;
const STEP = 16u; // elements of a head that one pass of the score product stages
const LOG2_E = 1.4426950408889634;
const LOWEST = -3.4e38; // infinities are not portable

// Four queries at one element of the head [STEP][ROWS / 4], four keys [STEP][KEYS / 4].
var<workgroup> q_stage: array<vec4<f32>, 128>;
var<workgroup> k_stage: array<vec4<f32>, 256>;
// Maximum and norm of four rows, by the threads that share them: [KEYS / 4][ROWS / 4].
var<workgroup> highest_of: array<vec4<f32>, 128>;
var<workgroup> norm_of: array<vec4<f32>, 128>;

// Four elements from element e of a head on, of four rows, one in each column of the result; zero past the end of the head. Row starts
// and e are even and count single elements. `whole`: all lanes are inside the head.
fn block_of_q(rows: vec4<u32>, e: u32, whole: bool) -> mat4x4<f32> {
    if whole {
        let at = (rows + e) / 2u;
        return mat4x4<f32>(
            vec4<f32>(q[at.x], q[at.x + 1u]), vec4<f32>(q[at.y], q[at.y + 1u]),
            vec4<f32>(q[at.z], q[at.z + 1u]), vec4<f32>(q[at.w], q[at.w + 1u]),
        );
    }
    let low = (rows + min(e, p.d_head - 2u)) / 2u;
    let high = (rows + min(e + 2u, p.d_head - 2u)) / 2u;
    return inside_head(mat4x4<f32>(
        vec4<f32>(q[low.x], q[high.x]), vec4<f32>(q[low.y], q[high.y]),
        vec4<f32>(q[low.z], q[high.z]), vec4<f32>(q[low.w], q[high.w]),
    ), e);
}

fn block_of_k(rows: vec4<u32>, e: u32, whole: bool) -> mat4x4<f32> {
    if whole {
        let at = (rows + e) / 2u;
        return mat4x4<f32>(
            vec4<f32>(k[at.x], k[at.x + 1u]), vec4<f32>(k[at.y], k[at.y + 1u]),
            vec4<f32>(k[at.z], k[at.z + 1u]), vec4<f32>(k[at.w], k[at.w + 1u]),
        );
    }
    let low = (rows + min(e, p.d_head - 2u)) / 2u;
    let high = (rows + min(e + 2u, p.d_head - 2u)) / 2u;
    return inside_head(mat4x4<f32>(
        vec4<f32>(k[low.x], k[high.x]), vec4<f32>(k[low.y], k[high.y]),
        vec4<f32>(k[low.z], k[high.z]), vec4<f32>(k[low.w], k[high.w]),
    ), e);
}

fn inside_head(block: mat4x4<f32>, e: u32) -> mat4x4<f32> {
    let real = vec4<u32>(e, e, e + 2u, e + 2u) < vec4<u32>(p.d_head);
    let none = vec4<f32>();
    return mat4x4<f32>(
        select(none, block[0], real), select(none, block[1], real), select(none, block[2], real), select(none, block[3], real),
    );
}

// Row r of the result has the query at this position.
fn position(row: vec4<u32>) -> vec4<u32> {
    return p.i0 + min(row, vec4<u32>(p.rows - 1u)) * p.step;
}

// Scores of this thread's four queries (the components) at its four keys (the columns), times log2 e, masked.
fn scores(batch: u32, row0: u32, key0: u32, thread: u32) -> mat4x4<f32> {
    let tx = thread % 16u;
    let ty = thread / 16u;
    // Staging: threads 0..64 take 4 x 4 blocks of K, the next 32 of Q; the others wait.
    let stages_k = thread < 64u;
    let stages_q = thread >= 64u && thread < 96u;
    let part = (thread % 64u) / 4u;
    let part_e = 4u * (thread % 4u);
    let four = vec4<u32>(0u, 1u, 2u, 3u);
    // Keys past the last query repeat it; they are masked.
    let last = p.i0 + (p.rows - 1u) * p.step;
    let k_rows = p.k_offset + batch * p.k_batch + min(key0 + 4u * part + four, vec4<u32>(last)) * p.ld_k;
    let q_rows = p.q_offset + batch * p.q_batch + position(row0 + 4u * part + four) * p.ld_q;

    var s: mat4x4<f32>;
    for (var e0 = 0u; e0 < p.d_head; e0 += STEP) {
        var by_e: mat4x4<f32>;
        let whole = e0 + STEP <= p.d_head;
        if stages_k {
            by_e = transpose(block_of_k(k_rows, e0 + part_e, whole));
        } else if stages_q {
            by_e = transpose(block_of_q(q_rows, e0 + part_e, whole));
        }
        workgroupBarrier();
        if stages_k {
            let to = 16u * part_e + (part ^ (part_e / 2u));
            k_stage[to] = by_e[0];
            k_stage[to + 16u] = by_e[1];
            k_stage[to + 32u] = by_e[2];
            k_stage[to + 48u] = by_e[3];
        } else if stages_q {
            let to = 8u * part_e + (part ^ (part_e / 2u));
            q_stage[to] = by_e[0];
            q_stage[to + 8u] = by_e[1];
            q_stage[to + 16u] = by_e[2];
            q_stage[to + 24u] = by_e[3];
        }
        workgroupBarrier();
        for (var e4 = 0u; e4 < STEP / 4u; e4++) {
            let q_from = 32u * e4 + (ty ^ (2u * e4));
            let k_from = 64u * e4 + (tx ^ (2u * e4));
            for (var e = 0u; e < 4u; e++) {
                let queries = q_stage[q_from + 8u * e];
                let keys = k_stage[k_from + 16u * e];
                s[0] = fma(queries, vec4<f32>(keys.x), s[0]);
                s[1] = fma(queries, vec4<f32>(keys.y), s[1]);
                s[2] = fma(queries, vec4<f32>(keys.z), s[2]);
                s[3] = fma(queries, vec4<f32>(keys.w), s[3]);
            }
        }
    }

    // Powers of two instead of e: the factor is folded into the scale.
    let scale = p.scale * LOG2_E;
    let none = vec4<f32>(LOWEST);
    let query = position(row0 + 4u * ty + four);
    let key = key0 + 4u * tx;
    return mat4x4<f32>(
        select(none, scale * s[0], vec4<u32>(key) <= query), select(none, scale * s[1], vec4<u32>(key + 1u) <= query),
        select(none, scale * s[2], vec4<u32>(key + 2u) <= query), select(none, scale * s[3], vec4<u32>(key + 3u) <= query),
    );
}

@compute @workgroup_size(128)
fn attention_weights(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    // Later queries see more keys: they start first, so that the last ones to run are short.
    let row0 = ROWS * (groups.x - 1u - group.x);
    let batch = group.y;
    let tx = thread % 16u;
    let ty = thread / 16u;
    let row = row0 + 4u * ty;
    let width = (p.cols + 7u) / 8u * 8u;
    let seen = p.i0 + min(row0 + ROWS - 1u, p.rows - 1u) * p.step + 1u; // keys of the last row

    var highest = vec4<f32>(LOWEST);
    var norm = vec4<f32>();
    for (var key0 = 0u; key0 < seen; key0 += KEYS) {
        let s = scores(batch, row0, key0, thread);
        let now = max(highest, max(max(s[0], s[1]), max(s[2], s[3])));
        norm = fma(norm, exp2(highest - now), (exp2(s[0] - now) + exp2(s[1] - now)) + (exp2(s[2] - now) + exp2(s[3] - now)));
        highest = now;
        let column = key0 + 4u * tx;
        if column < width {
            let by_row = transpose(s);
            for (var r = 0u; r < 4u; r++) {
                if row + r < p.rows {
                    out[(batch * p.out_batch + (row + r) * p.ld_out + column) / 4u] = by_row[r];
                }
            }
        }
    }

    // A thread that saw masked keys only has the lowest maximum, next to which its norm weighs nothing: every row sees key 0.
    highest_of[8u * tx + ty] = highest;
    norm_of[8u * tx + ty] = norm;
    workgroupBarrier();
    var most = vec4<f32>(LOWEST);
    for (var i = 0u; i < 16u; i++) {
        most = max(most, highest_of[8u * i + ty]);
    }
    var total = vec4<f32>();
    for (var i = 0u; i < 16u; i++) {
        total = fma(norm_of[8u * i + ty], exp2(highest_of[8u * i + ty] - most), total);
    }
    let share = 1.0 / total;

    // A masked score, the lowest number, becomes zero; what no tile reached is set to it.
    for (var column = 4u * tx; column < width; column += KEYS) {
        for (var r = 0u; r < 4u; r++) {
            if row + r < p.rows {
                let at = (batch * p.out_batch + (row + r) * p.ld_out + column) / 4u;
                var weight = vec4<f32>();
                if column / KEYS * KEYS < seen {
                    weight = exp2(out[at] - most[r]) * share[r];
                }
                out[at] = weight;
            }
        }
    }
}
