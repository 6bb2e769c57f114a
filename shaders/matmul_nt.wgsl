// C[b, i, j] = alpha Σ_k A[b, i, k] W[b, j, k] + bias[j] + beta C[b, i, j]: every linear layer, E H, and score products of groups.
//
// A [n, k], W [m, k] and C [n, m] lie at an offset with a row stride each, batch b a batch stride further; all are in elements and
// multiples of 8, so that every row starts on 16 bytes, and a buffer holds the padding of its last row. Padding may be NaN: it is
// loaded, then replaced. A is Elem (f32 or f16), W as the checkpoint stores it (W_DTYPE: 0 f32, 1 f16, 2 bf16; 16-bit floats are
// widened with core built-ins, so they need no feature), sums are f32. With beta 0 the old C is not read.
//
// A workgroup makes a tile of TILE_N x TILE_M (64 or 128 each) with TILE_N TILE_M / 64 threads, 8 x 8 sums per thread in registers,
// 16 k at a time through 16 (TILE_N + TILE_M) 4 bytes of workgroup memory (12 KiB at 128 x 64). Tiles are stored k-major, so that a
// step of k is four 128-bit reads for 64 multiply-adds. Only the last step of k and the stores know about edges: rows past the end
// repeat the last one. Not double-buffered, unlike its siblings: both operands need a transposition and W mostly a widening, and tried in a
// loop of eight k these left 81 to 91 % of the vector instructions to multiply-adds. Other workgroups on the same unit fill the gap while
// one waits.
//
// Cost: 2 n m k flops. Memory traffic per tile and 16 k: (128 + 64) 16 4 bytes for 2 128 64 16 flops, 21 flops a byte (32 with f16 A and W,
// which W at 16 bits alone nearly gives), above the balance of last-level caches; workgroup memory: 64 bytes for 128 flops. Memory sees A,
// W and C a few times: hundreds of flops a byte where n, m and k are in the thousands.
// Compiled for navi21 (and gfx1100): 112 to 128 (120 to 132) VGPRs, no spills, 8 waves of 32 per SIMD (10 to 12); the inner loop is 256
// multiply-adds of 260 vector instructions and 16 ds_read_b128; staging adds 60 to 110 vector instructions per 1024 multiply-adds. Vector
// issue is thus 91 to 94 % useful.
// Expected share of peak f32, not measured, for k in the hundreds and more: mobile 30 to 45 % (few registers, slow workgroup memory), M
// series 55 to 65 %, RTX 4090 and H100 (without tensor cores) 65 to 80 %, by how well other workgroups hide the waits for loads.

override W_DTYPE: u32;
override TILE_N: u32;
override TILE_M: u32;

struct MatmulNtParams {
    n: u32,
    m: u32,
    k: u32,
    lda: u32,
    ldw: u32,
    ldc: u32,
    a_offset: u32,
    w_offset: u32,
    c_offset: u32,
    a_batch: u32,
    w_batch: u32,
    c_batch: u32,
    batches: u32,
    bias_offset: u32,
    has_bias: u32,
    alpha: f32,
    beta: f32,
}

@group(0) @binding(0) var<uniform> p: MatmulNtParams;
@group(0) @binding(1) var<storage, read> a: array<vec4<Elem>>; // [batches][n, k], rows lda apart
@group(0) @binding(2) var<storage, read> w: array<vec4<u32>>; // [batches][m, k] as stored, rows ldw apart
@group(0) @binding(3) var<storage, read> bias: array<f32>; // [bias_offset + m], or unused
@group(0) @binding(4) var<storage, read_write> c: array<vec4<f32>>; // [batches][n, m], rows ldc apart

const STEP = 16u;

// Four rows at one k; [STEP][TILE / 4], the column of a row group g at k is g ^ 2 (k / 4).
var<workgroup> a_tile: array<vec4<f32>, TILE_N * 4u>;
var<workgroup> w_tile: array<vec4<f32>, TILE_M * 4u>;

// Four elements of a row of W; i counts groups of four elements.
fn widen(i: u32) -> vec4<f32> {
    if W_DTYPE == 0u {
        return bitcast<vec4<f32>>(w[i]);
    }
    let eight = w[i / 2u];
    let four = select(eight.xy, eight.zw, (i & 1u) == 1u);
    if W_DTYPE == 1u {
        return vec4<f32>(unpack2x16float(four.x), unpack2x16float(four.y));
    }
    return bitcast<vec4<f32>>(vec4<u32>(four.x << 16u, four.x & 0xffff0000u, four.y << 16u, four.y & 0xffff0000u));
}

// A block of four rows and four k, one row in each column of the result. `rows` counts groups of four elements.
fn block_of_a(rows: vec4<u32>, k4: u32) -> mat4x4<f32> {
    return mat4x4<f32>(vec4<f32>(a[rows.x + k4]), vec4<f32>(a[rows.y + k4]), vec4<f32>(a[rows.z + k4]), vec4<f32>(a[rows.w + k4]));
}

fn block_of_w(rows: vec4<u32>, k4: u32) -> mat4x4<f32> {
    return mat4x4<f32>(widen(rows.x + k4), widen(rows.y + k4), widen(rows.z + k4), widen(rows.w + k4));
}

// Padding may hold NaN, so it is replaced rather than multiplied by zero.
fn keep(block: mat4x4<f32>, real: vec4<bool>) -> mat4x4<f32> {
    let none = vec4<f32>();
    return mat4x4<f32>(
        select(none, block[0], real), select(none, block[1], real), select(none, block[2], real), select(none, block[3], real),
    );
}

// Row starts of four rows of a matrix; rows past the end repeat the last, their results are not stored.
fn row_starts(first: u32, rows: u32, offset: u32, ld: u32) -> vec4<u32> {
    let row = min(vec4<u32>(first, first + 1u, first + 2u, first + 3u), vec4<u32>(rows - 1u));
    return (offset + row * ld) / 4u;
}

fn blend(value: vec4<f32>, bias: vec4<f32>, at: u32) -> vec4<f32> {
    let sum = fma(vec4<f32>(p.alpha), value, bias);
    if p.beta == 0.0 {
        return sum;
    }
    return fma(vec4<f32>(p.beta), c[at], sum);
}

// Four columns of one row of C; at the right edge only those that exist, since a view may continue behind them.
fn store(at: u32, column: u32, value: vec4<f32>, bias: vec4<f32>) {
    if column >= p.m {
        return;
    }
    let out = blend(value, bias, at);
    if column + 4u <= p.m {
        c[at] = out;
        return;
    }
    c[at].x = out.x;
    if column + 1u < p.m { c[at].y = out.y; }
    if column + 2u < p.m { c[at].z = out.z; }
}

fn store_row(row: u32, batch: u32, column: vec2<u32>, left: vec4<f32>, right: vec4<f32>, left_bias: vec4<f32>, right_bias: vec4<f32>) {
    if row < p.n {
        let at = (p.c_offset + batch * p.c_batch + row * p.ldc + column) / 4u;
        store(at.x, column.x, left, left_bias);
        store(at.y, column.y, right, right_bias);
    }
}

fn bias_at(column: u32) -> vec4<f32> {
    var out = vec4<f32>();
    if p.has_bias != 0u {
        let last = p.m - 1u;
        let start = p.bias_offset;
        out = vec4<f32>(
            bias[start + min(column, last)], bias[start + min(column + 1u, last)],
            bias[start + min(column + 2u, last)], bias[start + min(column + 3u, last)],
        );
    }
    return out;
}

@compute @workgroup_size(TILE_N * TILE_M / 64u)
fn matmul_nt(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let threads = TILE_N * TILE_M / 64u;
    let n4 = TILE_N / 4u;
    let m4 = TILE_M / 4u;
    let row0 = group.y * TILE_N;
    let column0 = group.x * TILE_M;

    // Staging: four neighbours read 64 bytes of a row; the exclusive or spreads their blocks over all banks.
    let block = thread / 4u;
    let block_k = thread % 4u;
    let stages_a = TILE_M == 64u || thread < TILE_N;
    let stages_w = TILE_N == 64u || thread >= threads - TILE_M;
    let block_w = block - (threads - TILE_M) / 4u;
    let a_rows = row_starts(row0 + 4u * block, p.n, p.a_offset + group.z * p.a_batch, p.lda);
    let w_rows = row_starts(column0 + 4u * block_w, p.m, p.w_offset + group.z * p.w_batch, p.ldw);
    let a_to = 4u * block_k * n4 + (block ^ (2u * block_k));
    let w_to = 4u * block_k * m4 + (block_w ^ (2u * block_k));

    // A thread owns rows 4 ty.. and TILE_N / 2 + 4 ty.., columns likewise: reads of neighbours lie side by side.
    let tx = thread % (TILE_M / 8u);
    let ty = thread / (TILE_M / 8u);
    var acc: array<vec4<f32>, 16>;

    for (var k0 = 0u; k0 < p.k; k0 += STEP) {
        let k4 = k0 / 4u + block_k;
        var a_block: mat4x4<f32>;
        var w_block: mat4x4<f32>;
        if k0 + STEP <= p.k {
            if stages_a { a_block = block_of_a(a_rows, k4); }
            if stages_w { w_block = block_of_w(w_rows, k4); }
        } else {
            let inside = min(k4, (p.k - 1u) / 4u);
            let real = vec4<u32>(4u * k4) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.k);
            if stages_a { a_block = keep(block_of_a(a_rows, inside), real); }
            if stages_w { w_block = keep(block_of_w(w_rows, inside), real); }
        }
        workgroupBarrier();
        if stages_a {
            let by_k = transpose(a_block);
            a_tile[a_to] = by_k[0];
            a_tile[a_to + n4] = by_k[1];
            a_tile[a_to + 2u * n4] = by_k[2];
            a_tile[a_to + 3u * n4] = by_k[3];
        }
        if stages_w {
            let by_k = transpose(w_block);
            w_tile[w_to] = by_k[0];
            w_tile[w_to + m4] = by_k[1];
            w_tile[w_to + 2u * m4] = by_k[2];
            w_tile[w_to + 3u * m4] = by_k[3];
        }
        workgroupBarrier();
        for (var k4 = 0u; k4 < STEP / 4u; k4++) {
            let a_from = 4u * k4 * n4 + (ty ^ (2u * k4));
            let w_from = 4u * k4 * m4 + (tx ^ (2u * k4));
            for (var k = 0u; k < 4u; k++) {
                let a0 = a_tile[a_from + k * n4];
                let a1 = a_tile[a_from + k * n4 + n4 / 2u];
                let w0 = w_tile[w_from + k * m4];
                let w1 = w_tile[w_from + k * m4 + m4 / 2u];
                acc[0] = fma(vec4<f32>(a0.x), w0, acc[0]);
                acc[1] = fma(vec4<f32>(a0.x), w1, acc[1]);
                acc[2] = fma(vec4<f32>(a0.y), w0, acc[2]);
                acc[3] = fma(vec4<f32>(a0.y), w1, acc[3]);
                acc[4] = fma(vec4<f32>(a0.z), w0, acc[4]);
                acc[5] = fma(vec4<f32>(a0.z), w1, acc[5]);
                acc[6] = fma(vec4<f32>(a0.w), w0, acc[6]);
                acc[7] = fma(vec4<f32>(a0.w), w1, acc[7]);
                acc[8] = fma(vec4<f32>(a1.x), w0, acc[8]);
                acc[9] = fma(vec4<f32>(a1.x), w1, acc[9]);
                acc[10] = fma(vec4<f32>(a1.y), w0, acc[10]);
                acc[11] = fma(vec4<f32>(a1.y), w1, acc[11]);
                acc[12] = fma(vec4<f32>(a1.z), w0, acc[12]);
                acc[13] = fma(vec4<f32>(a1.z), w1, acc[13]);
                acc[14] = fma(vec4<f32>(a1.w), w0, acc[14]);
                acc[15] = fma(vec4<f32>(a1.w), w1, acc[15]);
            }
        }
    }

    let column = column0 + vec2<u32>(4u * tx, 4u * tx + TILE_M / 2u);
    let bias0 = bias_at(column.x);
    let bias1 = bias_at(column.y);
    let top = row0 + 4u * ty;
    let bottom = top + TILE_N / 2u;
    store_row(top, group.z, column, acc[0], acc[1], bias0, bias1);
    store_row(top + 1u, group.z, column, acc[2], acc[3], bias0, bias1);
    store_row(top + 2u, group.z, column, acc[4], acc[5], bias0, bias1);
    store_row(top + 3u, group.z, column, acc[6], acc[7], bias0, bias1);
    store_row(bottom, group.z, column, acc[8], acc[9], bias0, bias1);
    store_row(bottom + 1u, group.z, column, acc[10], acc[11], bias0, bias1);
    store_row(bottom + 2u, group.z, column, acc[12], acc[13], bias0, bias1);
    store_row(bottom + 3u, group.z, column, acc[14], acc[15], bias0, bias1);
}
