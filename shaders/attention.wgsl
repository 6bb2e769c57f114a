// Causal softmax attention with grouped queries: out[i] = Σ_{j ≤ i} softmax_j(scale q_i · k_j) v_j inside each sequence.
//
// q, out [n_seq seq_len, n_head d_head], k, v [n_seq seq_len, n_kv d_head]; query head h reads key/value head h n_kv / n_head; d_head is
// even, at most 256. Scores never reach memory: one workgroup of 128 threads has 32 queries of one head, walks over tiles of
// 64 keys up to the diagonal, and keeps a running maximum, norm and output per query (online softmax; Milakov & Gimelshein 2018, Dao
// et al. 2022). What was summed so far fades by 2^(old − new maximum). All in f32.
//
// Per tile of keys: scores from 16 elements of the heads at a time (4 x 4 per thread), maxima across the 16 threads of a row, weights to
// workgroup memory (8 KiB), then the output 64 columns at a time from 32 staged keys (4 x 4 per thread and slice). The other 8 KiB hold
// whatever is staged. Tiles past the diagonal are skipped, masks are computed on the diagonal only.
//
// Cost: 4 d_head flops per pair of query and key on or below the diagonal, plus half a tile each. 8192 d_head flops per tile of keys for
// 640 d_head bytes: 12.8 a byte, from cache; memory sees q, k, v and out about once. Workgroup memory: 32 flops for 32 bytes, one a byte,
// half of what FMA units want, which is the limit.
// Compiled for navi21 and gfx1100: 120 VGPRs, no spills, 8 waves of 32 per SIMD; the sum over values, staging included, is 512
// multiply-adds of 597 vector instructions.
// Expected share of peak f32, not measured: mobile 20 to 30 %, M series 35 to 45 %, RTX 4090 and H100 (without tensor cores) 40 to 50 %;
// for what is a few percent of a block's flops at usual lengths.

struct AttentionParams {
    n_seq: u32,
    seq_len: u32,
    n_head: u32,
    n_kv: u32,
    d_head: u32,
    ld_q: u32,
    ld_kv: u32,
    ld_out: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: AttentionParams;
@group(0) @binding(1) var<storage, read> q: array<vec2<f32>>; // [n_seq * seq_len, n_head * d_head], rows ld_q apart
@group(0) @binding(2) var<storage, read> k: array<vec2<f32>>; // [n_seq * seq_len, n_kv * d_head], rows ld_kv apart
@group(0) @binding(3) var<storage, read> v: array<vec2<f32>>; // [n_seq * seq_len, n_kv * d_head], rows ld_kv apart
@group(0) @binding(4) var<storage, read_write> out: array<vec2<Elem>>; // [n_seq * seq_len, n_head * d_head], rows ld_out apart

const QUERIES = 32u;
const KEYS = 64u;
const STEP = 16u; // elements of a head that one pass of the score product stages
const SLICE = 64u; // columns of V that one pass of the output product stages
const LOG2_E = 1.4426950408889634;
const LOWEST = -3.4e38; // infinities are not portable

// Scores, then weights, of four queries at one key; [KEYS][QUERIES / 4], the column of queries g at key t is g ^ (t / 4 % 8).
var<workgroup> weights: array<vec4<f32>, 512>;
// By turns: four queries at one element of the head [STEP][QUERIES / 4] and behind them four keys [STEP][KEYS / 4];
// partial results of a row [KEYS / 4][QUERIES / 4]; four columns of V at one key [KEYS / 2][SLICE / 4].
var<workgroup> stage: array<vec4<f32>, 512>;
const K_STAGE = 128u; // STEP * QUERIES / 4

// Outputs of a thread: four queries (the fields), four columns of one slice.
struct Rows {
    x: vec4<f32>,
    y: vec4<f32>,
    z: vec4<f32>,
    w: vec4<f32>,
}

// Four elements from element e of a head on, of four rows, one in each column of the result. Row starts and e are even and count
// single elements. Unless all lanes are `whole`, inside the head, what is past the end repeats its last pair.
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
    return mat4x4<f32>(
        vec4<f32>(q[low.x], q[high.x]), vec4<f32>(q[low.y], q[high.y]),
        vec4<f32>(q[low.z], q[high.z]), vec4<f32>(q[low.w], q[high.w]),
    );
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
    return mat4x4<f32>(
        vec4<f32>(k[low.x], k[high.x]), vec4<f32>(k[low.y], k[high.y]),
        vec4<f32>(k[low.z], k[high.z]), vec4<f32>(k[low.w], k[high.w]),
    );
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
    return mat4x4<f32>(
        vec4<f32>(v[low.x], v[high.x]), vec4<f32>(v[low.y], v[high.y]),
        vec4<f32>(v[low.z], v[high.z]), vec4<f32>(v[low.w], v[high.w]),
    );
}

// Zero past the end of a head.
fn inside_head(block: mat4x4<f32>, e: u32) -> mat4x4<f32> {
    let real = vec4<u32>(e, e, e + 2u, e + 2u) < vec4<u32>(p.d_head);
    let none = vec4<f32>();
    return mat4x4<f32>(
        select(none, block[0], real), select(none, block[1], real), select(none, block[2], real), select(none, block[3], real),
    );
}

// Adds the values of one tile of keys, weighted, to one slice of columns.
fn add_values(into: ptr<function, Rows>, first_row: u32, key0: u32, column: u32, thread: u32) {
    let tx = thread % 16u;
    let ty = thread / 16u;
    for (var half = 0u; half < 2u; half++) {
        // Keys past the end repeat the last; their weights are zero.
        let key = ty + vec4<u32>(0u, 8u, 16u, 24u);
        let row = first_row + min(key0 + KEYS / 2u * half + key, vec4<u32>(p.seq_len - 1u)) * p.ld_kv;
        let values = block_of_v(row, column + 4u * tx, column + SLICE <= p.d_head);
        workgroupBarrier();
        stage[16u * ty + tx] = values[0];
        stage[16u * (ty + 8u) + tx] = values[1];
        stage[16u * (ty + 16u) + tx] = values[2];
        stage[16u * (ty + 24u) + tx] = values[3];
        workgroupBarrier();
        for (var key4 = 0u; key4 < 8u; key4++) {
            let queries = 32u * (8u * half + key4) + (ty ^ key4);
            for (var key = 0u; key < 4u; key++) {
                let weight = weights[queries + 8u * key];
                let value = stage[16u * (4u * key4 + key) + tx];
                (*into).x = fma(vec4<f32>(weight.x), value, (*into).x);
                (*into).y = fma(vec4<f32>(weight.y), value, (*into).y);
                (*into).z = fma(vec4<f32>(weight.z), value, (*into).z);
                (*into).w = fma(vec4<f32>(weight.w), value, (*into).w);
            }
        }
    }
}

fn rescale(rows: Rows, by: vec4<f32>) -> Rows {
    return Rows(rows.x * by.x, rows.y * by.y, rows.z * by.z, rows.w * by.w);
}

fn store_row(first: u32, query: u32, head: u32, column: u32, value: vec4<f32>) {
    if query < p.seq_len && column < p.d_head {
        let at = ((first + query) * p.ld_out + head * p.d_head + column) / 2u;
        out[at] = vec2<Elem>(value.xy);
        if column + 2u < p.d_head { out[at + 1u] = vec2<Elem>(value.zw); }
    }
}

fn store(first: u32, query: u32, head: u32, column: u32, rows: Rows) {
    store_row(first, query, head, column, rows.x);
    store_row(first, query + 1u, head, column, rows.y);
    store_row(first, query + 2u, head, column, rows.z);
    store_row(first, query + 3u, head, column, rows.w);
}

@compute @workgroup_size(128)
fn attention(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    // Later queries see more keys: they start first, so that the last ones to run are short.
    let query0 = QUERIES * (groups.x - 1u - group.x);
    let head = group.y;
    let first = group.z * p.seq_len;
    let kv_column = head * p.n_kv / p.n_head * p.d_head;
    let kv_row = first * p.ld_kv + kv_column;

    // A thread owns queries 4 ty.. and keys, later columns, 4 tx...
    let tx = thread % 16u;
    let ty = thread / 16u;
    let query = vec4<u32>(query0 + 4u * ty) + vec4<u32>(0u, 1u, 2u, 3u);

    // Staging of the score product: threads 0..64 take 4 x 4 blocks of K, the next 32 of Q; the others wait.
    let stages_k = thread < 64u;
    let stages_q = thread >= 64u && thread < 96u;
    let part = (thread % 64u) / 4u;
    let part_e = 4u * (thread % 4u);
    let last = p.seq_len - 1u;

    var o0: Rows;
    var o1: Rows;
    var o2: Rows;
    var o3: Rows;
    var highest = vec4<f32>(LOWEST);
    var norm = vec4<f32>(); // this thread's keys only, until the end

    let end = min(query0 + QUERIES, p.seq_len); // keys that the last query sees
    for (var key0 = 0u; key0 < end; key0 += KEYS) {
        var s0 = vec4<f32>();
        var s1 = vec4<f32>();
        var s2 = vec4<f32>();
        var s3 = vec4<f32>();
        for (var e0 = 0u; e0 < p.d_head; e0 += STEP) {
            var block: mat4x4<f32>;
            let whole = e0 + STEP <= p.d_head;
            // Queries and keys past the end repeat the last: the former are not stored, the latter masked.
            if stages_k {
                let row = kv_row + min(key0 + 4u * part + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(last)) * p.ld_kv;
                block = block_of_k(row, e0 + part_e, whole);
            } else if stages_q {
                let row = (first + min(query0 + 4u * part + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(last))) * p.ld_q + head * p.d_head;
                block = block_of_q(row, e0 + part_e, whole);
            }
            if !whole {
                block = inside_head(block, e0 + part_e);
            }
            workgroupBarrier();
            if stages_k {
                let by_e = transpose(block);
                let to = K_STAGE + 16u * part_e + (part ^ (part_e / 2u));
                stage[to] = by_e[0];
                stage[to + 16u] = by_e[1];
                stage[to + 32u] = by_e[2];
                stage[to + 48u] = by_e[3];
            } else if stages_q {
                let by_e = transpose(block);
                let to = 8u * part_e + (part ^ (part_e / 2u));
                stage[to] = by_e[0];
                stage[to + 8u] = by_e[1];
                stage[to + 16u] = by_e[2];
                stage[to + 24u] = by_e[3];
            }
            workgroupBarrier();
            for (var e4 = 0u; e4 < STEP / 4u; e4++) {
                let q_from = 32u * e4 + (ty ^ (2u * e4));
                let k_from = K_STAGE + 64u * e4 + (tx ^ (2u * e4));
                for (var e = 0u; e < 4u; e++) {
                    let queries = stage[q_from + 8u * e];
                    let keys = stage[k_from + 16u * e];
                    s0 = fma(queries, vec4<f32>(keys.x), s0);
                    s1 = fma(queries, vec4<f32>(keys.y), s1);
                    s2 = fma(queries, vec4<f32>(keys.z), s2);
                    s3 = fma(queries, vec4<f32>(keys.w), s3);
                }
            }
        }

        // Powers of two instead of e: the factor is folded into the scale.
        let scale = p.scale * LOG2_E;
        s0 *= scale;
        s1 *= scale;
        s2 *= scale;
        s3 *= scale;
        let key = key0 + 4u * tx;
        if key0 + KEYS > query0 {
            let none = vec4<f32>(LOWEST);
            s0 = select(none, s0, vec4<u32>(key) <= query);
            s1 = select(none, s1, vec4<u32>(key + 1u) <= query);
            s2 = select(none, s2, vec4<u32>(key + 2u) <= query);
            s3 = select(none, s3, vec4<u32>(key + 3u) <= query);
        }

        // The maximum of a row over the threads that share it. Every query sees the first key of all, so after the first
        // tile it is that of real scores and what is masked weighs nothing.
        workgroupBarrier();
        stage[8u * tx + ty] = max(max(s0, s1), max(s2, s3));
        workgroupBarrier();
        var now = highest;
        for (var i = 0u; i < 16u; i++) {
            now = max(now, stage[8u * i + ty]);
        }
        let fade = exp2(highest - now);
        highest = now;
        s0 = exp2(s0 - now);
        s1 = exp2(s1 - now);
        s2 = exp2(s2 - now);
        s3 = exp2(s3 - now);
        norm = fma(norm, fade, (s0 + s1) + (s2 + s3));
        let to = 32u * tx + (ty ^ (tx % 8u));
        weights[to] = s0;
        weights[to + 8u] = s1;
        weights[to + 16u] = s2;
        weights[to + 24u] = s3;

        // The barrier inside `add_values` makes the weights visible.
        o0 = rescale(o0, fade);
        add_values(&o0, kv_row, key0, 0u, thread);
        if p.d_head > SLICE {
            o1 = rescale(o1, fade);
            add_values(&o1, kv_row, key0, SLICE, thread);
        }
        if p.d_head > 2u * SLICE {
            o2 = rescale(o2, fade);
            add_values(&o2, kv_row, key0, 2u * SLICE, thread);
        }
        if p.d_head > 3u * SLICE {
            o3 = rescale(o3, fade);
            add_values(&o3, kv_row, key0, 3u * SLICE, thread);
        }
    }

    workgroupBarrier();
    stage[8u * tx + ty] = norm;
    workgroupBarrier();
    var total = vec4<f32>();
    for (var i = 0u; i < 16u; i++) {
        total += stage[8u * i + ty];
    }
    let share = 1.0 / total;
    let column = 4u * tx;
    store(first, query.x, head, column, rescale(o0, share));
    store(first, query.x, head, column + SLICE, rescale(o1, share));
    store(first, query.x, head, column + 2u * SLICE, rescale(o2, share));
    store(first, query.x, head, column + 3u * SLICE, rescale(o3, share));
}
