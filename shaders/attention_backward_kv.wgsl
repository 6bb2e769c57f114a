// The gradient of causal attention with respect to its keys and values: for the scalar f = Σ_i dout_i · out_i,
//   dk_j = scale Σ_{i ≥ j} P_ij (dP_ij − delta_i) q_i,  dv_j = Σ_{i ≥ j} P_ij dout_i,
// summed over the query heads that share the key/value head. P, dP and delta are those of attention_backward_q, whose row statistics this
// kernel reads: P_ij = 2^(scale log2 e q_i · k_j − log2 norm_i).
//
// One workgroup of 128 threads has 32 keys of one key/value head and up to 128 columns of dk and dv; for every query head of the group it
// walks over tiles of 64 queries from the diagonal on. Per tile: both products, 16 elements of the heads at a time (4 x 4 per thread), P to
// workgroup memory (8 KiB) and its product with dout, 64 columns at a time from 32 staged queries (the other 8 KiB); then
// scale P (dP − delta) in its place and its product with q. No atomics: a key's sums are made by one workgroup in a fixed order. Heads
// wider than 128 make the first two products once per 128 columns, since twice 4 x 64 sums would not fit the registers.
//
// Cost: 8 d_head flops per pair on or below the diagonal, one flop a byte of workgroup memory, which is the limit. Compiled for navi21 (and
// gfx1100): 128 (132) VGPRs, no spills, 8 waves of 32 per SIMD; a sum over queries, staging included, is 512 multiply-adds of 613 vector
// instructions. Expect 25 to 35 % of peak f32.

struct AttentionBackwardKvParams {
    n_seq: u32,
    seq_len: u32,
    n_head: u32,
    n_kv: u32,
    d_head: u32,
    ld_q: u32,
    ld_kv: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: AttentionBackwardKvParams;
@group(0) @binding(1) var<storage, read> q: array<vec2<f32>>; // [n_seq * seq_len, n_head * d_head], rows ld_q apart
@group(0) @binding(2) var<storage, read> k: array<vec2<f32>>; // [n_seq * seq_len, n_kv * d_head], rows ld_kv apart
@group(0) @binding(3) var<storage, read> v: array<vec2<f32>>; // [n_seq * seq_len, n_kv * d_head], rows ld_kv apart
@group(0) @binding(4) var<storage, read> dout: array<vec2<f32>>; // [n_seq * seq_len, n_head * d_head], rows ld_q apart
@group(0) @binding(5) var<storage, read> statistics: array<vec2<f32>>; // [n_seq * seq_len, n_head]: log2 of the norm, delta
@group(0) @binding(6) var<storage, read_write> dk: array<vec2<f32>>; // [n_seq * seq_len, n_kv * d_head], rows ld_kv apart
@group(0) @binding(7) var<storage, read_write> dv: array<vec2<f32>>; // [n_seq * seq_len, n_kv * d_head], rows ld_kv apart

const OWN = 32u; // keys
const FAR = 64u; // queries of a tile
const STEP = 16u; // elements of a head that one pass of a product stages
const SLICE = 64u; // columns that one pass of a sum stages
const WIDTH = 128u; // columns of a workgroup
const LOG2_E = 1.4426950408889634;

// P, then scale P (dP − delta), of four keys at one query; [FAR][OWN / 4], the column of keys g at query t is g ^ (t / 4 % 8).
var<workgroup> factors: array<vec4<f32>, 512>;
// By turns: four keys at one element of the head [STEP][OWN / 4] and behind them four queries [STEP][FAR / 4]; four columns of dout or q
// at one query [FAR / 2][SLICE / 4].
var<workgroup> stage: array<vec4<f32>, 512>;
const FAR_STAGE = 128u; // STEP * OWN / 4

// Results of a thread: four rows of the tile (the fields), four columns of one slice.
struct Rows {
    x: vec4<f32>,
    y: vec4<f32>,
    z: vec4<f32>,
    w: vec4<f32>,
}

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

fn block_of_v(rows: vec4<u32>, e: u32, whole: bool) -> mat4x4<f32> {
    if whole {
        let at = (rows + e) / 2u;
        return mat4x4<f32>(
            vec4<f32>(v[at.x], v[at.x + 1u]), vec4<f32>(v[at.y], v[at.y + 1u]),
            vec4<f32>(v[at.z], v[at.z + 1u]), vec4<f32>(v[at.w], v[at.w + 1u]),
        );
    }
    let low = (rows + min(e, p.d_head - 2u)) / 2u;
    let high = (rows + min(e + 2u, p.d_head - 2u)) / 2u;
    return inside_head(mat4x4<f32>(
        vec4<f32>(v[low.x], v[high.x]), vec4<f32>(v[low.y], v[high.y]),
        vec4<f32>(v[low.z], v[high.z]), vec4<f32>(v[low.w], v[high.w]),
    ), e);
}

fn block_of_dout(rows: vec4<u32>, e: u32, whole: bool) -> mat4x4<f32> {
    if whole {
        let at = (rows + e) / 2u;
        return mat4x4<f32>(
            vec4<f32>(dout[at.x], dout[at.x + 1u]), vec4<f32>(dout[at.y], dout[at.y + 1u]),
            vec4<f32>(dout[at.z], dout[at.z + 1u]), vec4<f32>(dout[at.w], dout[at.w + 1u]),
        );
    }
    let low = (rows + min(e, p.d_head - 2u)) / 2u;
    let high = (rows + min(e + 2u, p.d_head - 2u)) / 2u;
    return inside_head(mat4x4<f32>(
        vec4<f32>(dout[low.x], dout[high.x]), vec4<f32>(dout[low.y], dout[high.y]),
        vec4<f32>(dout[low.z], dout[high.z]), vec4<f32>(dout[low.w], dout[high.w]),
    ), e);
}

fn inside_head(block: mat4x4<f32>, e: u32) -> mat4x4<f32> {
    let real = vec4<u32>(e, e, e + 2u, e + 2u) < vec4<u32>(p.d_head);
    let none = vec4<f32>();
    return mat4x4<f32>(
        select(none, block[0], real), select(none, block[1], real), select(none, block[2], real), select(none, block[3], real),
    );
}

// Products of this thread's four keys (the components) and four queries (the columns): k · q, or v · dout. `own` and `far` are the row
// starts of the rows that the thread stages.
fn products(which: u32, own: vec4<u32>, far: vec4<u32>, thread: u32) -> mat4x4<f32> {
    let tx = thread % 16u;
    let ty = thread / 16u;
    // Staging: threads 0..64 take 4 x 4 blocks of the queries, the next 32 of the keys; the others wait.
    let stages_far = thread < 64u;
    let stages_own = thread >= 64u && thread < 96u;
    let part = (thread % 64u) / 4u;
    let part_e = 4u * (thread % 4u);
    var s: mat4x4<f32>;
    for (var e0 = 0u; e0 < p.d_head; e0 += STEP) {
        var block: mat4x4<f32>;
        let whole = e0 + STEP <= p.d_head;
        if stages_far {
            if which == 0u { block = block_of_q(far, e0 + part_e, whole); } else { block = block_of_dout(far, e0 + part_e, whole); }
        } else if stages_own {
            if which == 0u { block = block_of_k(own, e0 + part_e, whole); } else { block = block_of_v(own, e0 + part_e, whole); }
        }
        let by_e = transpose(block);
        workgroupBarrier();
        if stages_far {
            let to = FAR_STAGE + 16u * part_e + (part ^ (part_e / 2u));
            stage[to] = by_e[0];
            stage[to + 16u] = by_e[1];
            stage[to + 32u] = by_e[2];
            stage[to + 48u] = by_e[3];
        } else if stages_own {
            let to = 8u * part_e + (part ^ (part_e / 2u));
            stage[to] = by_e[0];
            stage[to + 8u] = by_e[1];
            stage[to + 16u] = by_e[2];
            stage[to + 24u] = by_e[3];
        }
        workgroupBarrier();
        for (var e4 = 0u; e4 < STEP / 4u; e4++) {
            let own_from = 32u * e4 + (ty ^ (2u * e4));
            let far_from = FAR_STAGE + 64u * e4 + (tx ^ (2u * e4));
            for (var e = 0u; e < 4u; e++) {
                let a = stage[own_from + 8u * e];
                let b = stage[far_from + 16u * e];
                s[0] = fma(a, vec4<f32>(b.x), s[0]);
                s[1] = fma(a, vec4<f32>(b.y), s[1]);
                s[2] = fma(a, vec4<f32>(b.z), s[2]);
                s[3] = fma(a, vec4<f32>(b.w), s[3]);
            }
        }
    }
    return s;
}

// Leaves this thread's 4 x 4 factors where all threads find them. Nobody may still read the old ones.
fn keep_factors(block: mat4x4<f32>, thread: u32) {
    let tx = thread % 16u;
    let to = 32u * tx + ((thread / 16u) ^ (tx % 8u));
    factors[to] = block[0];
    factors[to + 8u] = block[1];
    factors[to + 16u] = block[2];
    factors[to + 24u] = block[3];
}

// What this thread left there.
fn kept_factors(thread: u32) -> mat4x4<f32> {
    let tx = thread % 16u;
    let at = 32u * tx + ((thread / 16u) ^ (tx % 8u));
    return mat4x4<f32>(factors[at], factors[at + 8u], factors[at + 16u], factors[at + 24u]);
}

// Adds rows of dout (which 0) or q (1), times the factors, to one slice of columns.
fn add_queries(into: ptr<function, Rows>, which: u32, q_row: u32, query0: u32, column: u32, thread: u32) {
    let tx = thread % 16u;
    let ty = thread / 16u;
    for (var half = 0u; half < 2u; half++) {
        // Queries past the end repeat the last; their factors are zero.
        let query = query0 + FAR / 2u * half + ty + vec4<u32>(0u, 8u, 16u, 24u);
        let rows = q_row + min(query, vec4<u32>(p.seq_len - 1u)) * p.ld_q;
        var values: mat4x4<f32>;
        if which == 0u {
            values = block_of_dout(rows, column + 4u * tx, column + SLICE <= p.d_head);
        } else {
            values = block_of_q(rows, column + 4u * tx, column + SLICE <= p.d_head);
        }
        workgroupBarrier();
        stage[thread] = values[0];
        stage[thread + 128u] = values[1];
        stage[thread + 256u] = values[2];
        stage[thread + 384u] = values[3];
        workgroupBarrier();
        for (var far4 = 0u; far4 < 8u; far4++) {
            let own = 32u * (8u * half + far4) + (ty ^ far4);
            for (var far = 0u; far < 4u; far++) {
                let factor = factors[own + 8u * far];
                let value = stage[16u * (4u * far4 + far) + tx];
                (*into).x = fma(vec4<f32>(factor.x), value, (*into).x);
                (*into).y = fma(vec4<f32>(factor.y), value, (*into).y);
                (*into).z = fma(vec4<f32>(factor.z), value, (*into).z);
                (*into).w = fma(vec4<f32>(factor.w), value, (*into).w);
            }
        }
    }
}

fn store_row(first: u32, key: u32, head: u32, column: u32, dk_row: vec4<f32>, dv_row: vec4<f32>) {
    if key < p.seq_len && column < p.d_head {
        let at = ((first + key) * p.ld_kv + head * p.d_head + column) / 2u;
        dk[at] = dk_row.xy;
        dv[at] = dv_row.xy;
        if column + 2u < p.d_head {
            dk[at + 1u] = dk_row.zw;
            dv[at + 1u] = dv_row.zw;
        }
    }
}

fn store(first: u32, key: u32, head: u32, column: u32, dk_rows: Rows, dv_rows: Rows) {
    store_row(first, key, head, column, dk_rows.x, dv_rows.x);
    store_row(first, key + 1u, head, column, dk_rows.y, dv_rows.y);
    store_row(first, key + 2u, head, column, dk_rows.z, dv_rows.z);
    store_row(first, key + 3u, head, column, dk_rows.w, dv_rows.w);
}

@compute @workgroup_size(128)
fn attention_backward_kv(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    // Earlier keys are seen by more queries: they start first, so that the last ones to run are short.
    let key0 = OWN * group.x;
    let kv_head = group.y % p.n_kv;
    let column0 = WIDTH * (group.y / p.n_kv);
    let first = group.z * p.seq_len;
    let last = vec4<u32>(p.seq_len - 1u);
    let four = vec4<u32>(0u, 1u, 2u, 3u);

    // A thread owns keys 4 ty.. and queries, later columns, 4 tx... Keys past the end repeat the last, they are not stored.
    let tx = thread % 16u;
    let ty = thread / 16u;
    let key = key0 + 4u * ty + four;
    let part = (thread % 64u) / 4u;
    let own = (first + min(key0 + 4u * part + four, last)) * p.ld_kv + kv_head * p.d_head;

    var dk0: Rows;
    var dk1: Rows;
    var dv0: Rows;
    var dv1: Rows;
    let heads = p.n_head / p.n_kv;
    for (var head = kv_head * heads; head < (kv_head + 1u) * heads; head++) {
        let q_row = first * p.ld_q + head * p.d_head;
        for (var query0 = key0 / FAR * FAR; query0 < p.seq_len; query0 += FAR) {
            let far = q_row + min(query0 + 4u * part + four, last) * p.ld_q;
            var s = products(0u, own, far, thread);
            for (var i = 0u; i < 4u; i++) {
                let query = query0 + 4u * tx + i;
                let log_norm = statistics[(first + min(query, last.x)) * p.n_head + head].x;
                // Zero above the diagonal, where the power may overflow, and for queries past the end.
                let real = (key <= vec4<u32>(query)) & vec4<bool>(query < p.seq_len);
                s[i] = select(vec4<f32>(), exp2(fma(vec4<f32>(p.scale * LOG2_E), s[i], vec4<f32>(-log_norm))), real);
            }
            // Barriers inside make factors visible before they are read, and have all readers done before they are replaced. P waits
            // in workgroup memory for dP, not in 16 registers.
            keep_factors(s, thread);
            add_queries(&dv0, 0u, q_row, query0, column0, thread);
            if p.d_head > column0 + SLICE { add_queries(&dv1, 0u, q_row, query0, column0 + SLICE, thread); }
            let dp = products(1u, own, far, thread);
            var slopes = kept_factors(thread);
            for (var i = 0u; i < 4u; i++) {
                let delta = statistics[(first + min(query0 + 4u * tx + i, last.x)) * p.n_head + head].y;
                slopes[i] = p.scale * slopes[i] * (dp[i] - delta);
            }
            keep_factors(slopes, thread);
            add_queries(&dk0, 1u, q_row, query0, column0, thread);
            if p.d_head > column0 + SLICE { add_queries(&dk1, 1u, q_row, query0, column0 + SLICE, thread); }
        }
    }
    let column = column0 + 4u * tx;
    store(first, key.x, kv_head, column, dk0, dv0);
    store(first, key.x, kv_head, column + SLICE, dk1, dv1);
}
