// The gradient of causal attention with respect to its queries: for the scalar f = Σ_i dout_i · out_i,
//   P_ij = softmax_{j ≤ i}(scale q_i · k_j), dP_ij = dout_i · v_j, delta_i = Σ_j P_ij dP_ij, dq_i = scale Σ_j P_ij (dP_ij − delta_i) k_j.
// Also leaves the row statistics (log2 Σ_j e^(scale q_i · k_j), delta_i), from which attention_backward_kv makes P and dP − delta again.
//
// Layout and limits are those of the attention kernel: n_head query heads of d_head (even, at most 256) side by side in q, dout and dq,
// n_kv in k and v; query head h reads key/value head h n_kv / n_head. P never reaches memory (FlashAttention's backward pass, Dao et al.
// 2022); delta comes from P and dP rather than from stored outputs, so its rounding is theirs. All f32, no atomics, fixed order of sums.
//
// One workgroup of 128 threads has 32 queries of one head and walks over tiles of 64 keys up to the diagonal twice. First it keeps a
// running maximum, norm and weighted sum of dP per thread, joined at the end. Then it makes both products again, leaves scale P (dP −
// delta) in workgroup memory (8 KiB; scale P waits there for dP, since registers are short) and adds its product with K, 64 columns at a
// time from 32 staged keys (the other 8 KiB).
//
// Cost: 10 d_head flops per pair on or below the diagonal (attention: 4; storing P and dP would save 4 and cost 8 L² n_head bytes), one
// flop a byte of workgroup memory, which is the limit. Compiled for navi21 (and gfx1100): 128 (132) VGPRs, no spills, 8 waves of 32 per
// SIMD; the sum over keys, staging included, is 512 multiply-adds of 605 vector instructions. Expect 30 to 40 % of peak f32.

struct AttentionBackwardQParams {
    n_seq: u32,
    seq_len: u32,
    n_head: u32,
    n_kv: u32,
    d_head: u32,
    ld_q: u32,
    ld_kv: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: AttentionBackwardQParams;
@group(0) @binding(1) var<storage, read> q: array<vec2<f32>>; // [n_seq * seq_len, n_head * d_head], rows ld_q apart
@group(0) @binding(2) var<storage, read> k: array<vec2<f32>>; // [n_seq * seq_len, n_kv * d_head], rows ld_kv apart
@group(0) @binding(3) var<storage, read> v: array<vec2<f32>>; // [n_seq * seq_len, n_kv * d_head], rows ld_kv apart
@group(0) @binding(4) var<storage, read> dout: array<vec2<f32>>; // [n_seq * seq_len, n_head * d_head], rows ld_q apart
@group(0) @binding(5) var<storage, read_write> dq: array<vec2<f32>>; // [n_seq * seq_len, n_head * d_head], rows ld_q apart
@group(0) @binding(6) var<storage, read_write> statistics: array<vec2<f32>>; // [n_seq * seq_len, n_head]: log2 of the norm, delta

const OWN = 32u; // queries
const FAR = 64u; // keys of a tile
const STEP = 16u; // elements of a head that one pass of a product stages
const SLICE = 64u; // columns of K that one pass of the sum stages
const LOG2_E = 1.4426950408889634;
const LOWEST = -3.4e38; // infinities are not portable

// scale P (dP − delta) of four queries at one key; [FAR][OWN / 4], the column of queries g at key t is g ^ (t / 4 % 8).
var<workgroup> factors: array<vec4<f32>, 512>;
// By turns: four queries at one element of the head [STEP][OWN / 4] and behind them four keys [STEP][FAR / 4]; statistics of rows by
// the threads that share them, three times [FAR / 4][OWN / 4]; four columns of K at one key [FAR / 2][SLICE / 4].
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

// Products of this thread's four queries (the components) and four keys (the columns): q · k, or dout · v. `own` and `far` are the row
// starts of the rows that the thread stages.
fn products(which: u32, own: vec4<u32>, far: vec4<u32>, thread: u32) -> mat4x4<f32> {
    let tx = thread % 16u;
    let ty = thread / 16u;
    // Staging: threads 0..64 take 4 x 4 blocks of the keys, the next 32 of the queries; the others wait.
    let stages_far = thread < 64u;
    let stages_own = thread >= 64u && thread < 96u;
    let part = (thread % 64u) / 4u;
    let part_e = 4u * (thread % 4u);
    var s: mat4x4<f32>;
    for (var e0 = 0u; e0 < p.d_head; e0 += STEP) {
        var block: mat4x4<f32>;
        let whole = e0 + STEP <= p.d_head;
        if stages_far {
            if which == 0u { block = block_of_k(far, e0 + part_e, whole); } else { block = block_of_v(far, e0 + part_e, whole); }
        } else if stages_own {
            if which == 0u { block = block_of_q(own, e0 + part_e, whole); } else { block = block_of_dout(own, e0 + part_e, whole); }
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

// Adds the keys of one tile, times the factors, to one slice of columns.
fn add_keys(into: ptr<function, Rows>, kv_row: u32, key0: u32, column: u32, thread: u32) {
    let tx = thread % 16u;
    let ty = thread / 16u;
    for (var half = 0u; half < 2u; half++) {
        // Keys past the end repeat the last; their factors are zero.
        let key = key0 + FAR / 2u * half + ty + vec4<u32>(0u, 8u, 16u, 24u);
        let values = block_of_k(kv_row + min(key, vec4<u32>(p.seq_len - 1u)) * p.ld_kv, column + 4u * tx, column + SLICE <= p.d_head);
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

fn store_row(first: u32, query: u32, head: u32, column: u32, value: vec4<f32>) {
    if query < p.seq_len && column < p.d_head {
        let at = ((first + query) * p.ld_q + head * p.d_head + column) / 2u;
        dq[at] = value.xy;
        if column + 2u < p.d_head { dq[at + 1u] = value.zw; }
    }
}

fn store(first: u32, query: u32, head: u32, column: u32, rows: Rows) {
    store_row(first, query, head, column, rows.x);
    store_row(first, query + 1u, head, column, rows.y);
    store_row(first, query + 2u, head, column, rows.z);
    store_row(first, query + 3u, head, column, rows.w);
}

// Scores times log2 e, so that weights are powers of two; the lowest number above the diagonal.
fn masked(products: mat4x4<f32>, query: vec4<u32>, key: u32) -> mat4x4<f32> {
    let scale = p.scale * LOG2_E;
    let none = vec4<f32>(LOWEST);
    return mat4x4<f32>(
        select(none, scale * products[0], vec4<u32>(key) <= query), select(none, scale * products[1], vec4<u32>(key + 1u) <= query),
        select(none, scale * products[2], vec4<u32>(key + 2u) <= query), select(none, scale * products[3], vec4<u32>(key + 3u) <= query),
    );
}

@compute @workgroup_size(128)
fn attention_backward_q(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    // Later queries see more keys: they start first, so that the last ones to run are short.
    let query0 = OWN * (groups.x - 1u - group.x);
    let head = group.y;
    let first = group.z * p.seq_len;
    let kv_row = first * p.ld_kv + head * p.n_kv / p.n_head * p.d_head;
    let last = vec4<u32>(p.seq_len - 1u);
    let four = vec4<u32>(0u, 1u, 2u, 3u);

    // A thread owns queries 4 ty.. and keys, later columns, 4 tx... Queries past the end repeat the last, they are not stored.
    let tx = thread % 16u;
    let ty = thread / 16u;
    let query = query0 + 4u * ty + four;
    let part = (thread % 64u) / 4u;
    let own = (first + min(query0 + 4u * part + four, last)) * p.ld_q + head * p.d_head;
    let end = min(query0 + OWN, p.seq_len); // keys that the last query sees

    var highest = vec4<f32>(LOWEST);
    var norm = vec4<f32>();
    var weighted = vec4<f32>(); // sum of dP
    for (var key0 = 0u; key0 < end; key0 += FAR) {
        let far = kv_row + min(key0 + 4u * part + four, last) * p.ld_kv;
        let s = masked(products(0u, own, far, thread), query, key0 + 4u * tx);
        let dp = products(1u, own, far, thread);
        let now = max(highest, max(max(s[0], s[1]), max(s[2], s[3])));
        let fade = exp2(highest - now);
        let w = mat4x4<f32>(exp2(s[0] - now), exp2(s[1] - now), exp2(s[2] - now), exp2(s[3] - now));
        norm = fma(norm, fade, (w[0] + w[1]) + (w[2] + w[3]));
        weighted = fma(weighted, fade, (w[0] * dp[0] + w[1] * dp[1]) + (w[2] * dp[2] + w[3] * dp[3]));
        highest = now;
    }

    // A thread that saw masked keys only has the lowest maximum, next to which its sums weigh nothing: every query sees key 0.
    workgroupBarrier();
    stage[8u * tx + ty] = highest;
    stage[8u * tx + ty + 128u] = norm;
    stage[8u * tx + ty + 256u] = weighted;
    workgroupBarrier();
    var most = vec4<f32>(LOWEST);
    for (var i = 0u; i < 16u; i++) {
        most = max(most, stage[8u * i + ty]);
    }
    norm = vec4<f32>();
    weighted = vec4<f32>();
    for (var i = 0u; i < 16u; i++) {
        let fade = exp2(stage[8u * i + ty] - most);
        norm = fma(stage[8u * i + ty + 128u], fade, norm);
        weighted = fma(stage[8u * i + ty + 256u], fade, weighted);
    }
    let log_norm = most + log2(norm);
    let delta = weighted / norm;
    if tx == 0u {
        for (var i = 0u; i < 4u; i++) {
            if query[i] < p.seq_len {
                statistics[(first + query[i]) * p.n_head + head] = vec2<f32>(log_norm[i], delta[i]);
            }
        }
    }

    var d0: Rows;
    var d1: Rows;
    var d2: Rows;
    var d3: Rows;
    for (var key0 = 0u; key0 < end; key0 += FAR) {
        let far = kv_row + min(key0 + 4u * part + four, last) * p.ld_kv;
        let s = masked(products(0u, own, far, thread), query, key0 + 4u * tx);
        // Barriers inside make factors visible before they are read, and have all readers done before they are replaced. scale P waits
        // in workgroup memory for dP, not in 16 registers.
        keep_factors(p.scale * mat4x4<f32>(
            exp2(s[0] - log_norm), exp2(s[1] - log_norm), exp2(s[2] - log_norm), exp2(s[3] - log_norm),
        ), thread);
        let dp = products(1u, own, far, thread);
        let w = kept_factors(thread);
        keep_factors(mat4x4<f32>(w[0] * (dp[0] - delta), w[1] * (dp[1] - delta), w[2] * (dp[2] - delta), w[3] * (dp[3] - delta)), thread);
        add_keys(&d0, kv_row, key0, 0u, thread);
        if p.d_head > SLICE { add_keys(&d1, kv_row, key0, SLICE, thread); }
        if p.d_head > 2u * SLICE { add_keys(&d2, kv_row, key0, 2u * SLICE, thread); }
        if p.d_head > 3u * SLICE { add_keys(&d3, kv_row, key0, 3u * SLICE, thread); }
    }
    let column = 4u * tx;
    store(first, query.x, head, column, d0);
    store(first, query.x, head, column + SLICE, d1);
    store(first, query.x, head, column + 2u * SLICE, d2);
    store(first, query.x, head, column + 3u * SLICE, d3);
}
