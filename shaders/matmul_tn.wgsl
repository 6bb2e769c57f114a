// C[b, i, j] = alpha Σ_t A[b, t, i] B[b, t, j] + beta C[b, i, j]: second moments of two sets of rows, and of the heads of one.
//
// A [k, n], B [k, m] and C [n, m] lie at an offset with a row stride each, batch b a batch stride further; all are in elements and
// multiples of 8, so that every row starts on 16 bytes, and a buffer holds the padding of its last row. Padding may be NaN: it is loaded,
// then left out. A is f32, B is Elem (f32 or f16), sums are f32. With beta 0 the old C is not read. An a_offset of i0 with n rows makes
// rows i0 .. i0 + n of the whole product, so C may be split into panels of rows.
//
// Both operands are k-major as they are, so staging needs no transposition (as in gram); the tile is that of matmul_nn, TILE_N x TILE_M
// with TILE_N TILE_M / 64 threads and 8 x 8 sums each. The sum of a launch is made by itself and added to C once (two-level sums).
//
// Cost: 2 n m k flops. 21 flops a byte of A and B read (f32), 2 per byte of workgroup memory (12 KiB at 128 x 64). Compiled for navi21 (and
// gfx1100): 112 (108) VGPRs, no spills, 4 (6) waves of 64 per SIMD; the inner loop is 256 multiply-adds of 260 vector instructions and 16
// ds_read_b128. Expect 70 to 85 % of peak f32 for n and m in the thousands. Moments of heads (n = m = d_head) have one to four tiles a
// head, which leaves a large GPU partly idle, but they are d_head / d_model of the projections' flops.

override TILE_N: u32;
override TILE_M: u32;

struct MatmulTnParams {
    n: u32,
    m: u32,
    k: u32,
    lda: u32,
    ldb: u32,
    ldc: u32,
    a_offset: u32,
    b_offset: u32,
    c_offset: u32,
    a_batch: u32,
    b_batch: u32,
    c_batch: u32,
    batches: u32,
    alpha: f32,
    beta: f32,
}

@group(0) @binding(0) var<uniform> p: MatmulTnParams;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>; // [batches][k, n], rows lda apart
@group(0) @binding(2) var<storage, read> b: array<vec4<Elem>>; // [batches][k, m], rows ldb apart
@group(0) @binding(3) var<storage, read_write> c: array<vec4<f32>>; // [batches][n, m], rows ldc apart

const STEP = 16u;

// Four columns at one k; [STEP][TILE / 4].
var<workgroup> a_tile: array<vec4<f32>, TILE_N * 4u>;
var<workgroup> b_tile: array<vec4<f32>, TILE_M * 4u>;

// Four k and four columns, one k in each column of the result; a k past the end repeats the last.
fn block_of_a(column: u32, k: u32) -> mat4x4<f32> {
    let at = column + min(vec4<u32>(k, k + 1u, k + 2u, k + 3u), vec4<u32>(p.k - 1u)) * (p.lda / 4u);
    return mat4x4<f32>(a[at.x], a[at.y], a[at.z], a[at.w]);
}

fn block_of_b(column: u32, k: u32) -> mat4x4<f32> {
    let at = column + min(vec4<u32>(k, k + 1u, k + 2u, k + 3u), vec4<u32>(p.k - 1u)) * (p.ldb / 4u);
    return mat4x4<f32>(vec4<f32>(b[at.x]), vec4<f32>(b[at.y]), vec4<f32>(b[at.z]), vec4<f32>(b[at.w]));
}

// A with zeros for k past the end, where B repeats its last row: nothing but real values is multiplied.
fn last_block_of_a(column: u32, k: u32) -> mat4x4<f32> {
    var block = block_of_a(column, k);
    let none = vec4<f32>();
    if k >= p.k { block[0] = none; }
    if k + 1u >= p.k { block[1] = none; }
    if k + 2u >= p.k { block[2] = none; }
    if k + 3u >= p.k { block[3] = none; }
    return block;
}

fn blend(value: vec4<f32>, at: u32) -> vec4<f32> {
    if p.beta == 0.0 {
        return p.alpha * value;
    }
    return fma(vec4<f32>(p.beta), c[at], p.alpha * value);
}

// Four columns of one row of C; at the right edge only those that exist, since a view may continue behind them.
fn store(at: u32, column: u32, value: vec4<f32>) {
    if column >= p.m {
        return;
    }
    let out = blend(value, at);
    if column + 4u <= p.m {
        c[at] = out;
        return;
    }
    c[at].x = out.x;
    if column + 1u < p.m { c[at].y = out.y; }
    if column + 2u < p.m { c[at].z = out.z; }
}

fn store_row(row: u32, batch: u32, column: vec2<u32>, left: vec4<f32>, right: vec4<f32>) {
    if row < p.n {
        let at = (p.c_offset + batch * p.c_batch + row * p.ldc + column) / 4u;
        store(at.x, column.x, left);
        store(at.y, column.y, right);
    }
}

@compute @workgroup_size(TILE_N * TILE_M / 64u)
fn matmul_tn(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let threads = TILE_N * TILE_M / 64u;
    let n4 = TILE_N / 4u;
    let m4 = TILE_M / 4u;
    let row0 = group.y * TILE_N;
    let column0 = group.x * TILE_M;

    // Staging: neighbours read a row of the tile. Columns past the end repeat the last group, they are not stored.
    let stages_a = TILE_M == 64u || thread < TILE_N;
    let stages_b = TILE_N == 64u || thread >= threads - TILE_M;
    let b_thread = thread - (threads - TILE_M);
    let a_k = 4u * (thread / n4);
    let b_k = 4u * (b_thread / m4);
    let a_column = (p.a_offset + group.z * p.a_batch + min(row0 + 4u * (thread % n4), p.n - 1u)) / 4u;
    let b_column = (p.b_offset + group.z * p.b_batch + min(column0 + 4u * (b_thread % m4), p.m - 1u)) / 4u;
    let a_to = a_k * n4 + thread % n4;
    let b_to = b_k * m4 + b_thread % m4;

    // A thread owns rows 4 ty.. and TILE_N / 2 + 4 ty.., columns likewise: reads of neighbours lie side by side.
    let tx = thread % (TILE_M / 8u);
    let ty = thread / (TILE_M / 8u);
    var acc: array<vec4<f32>, 16>;

    for (var k0 = 0u; k0 < p.k; k0 += STEP) {
        var a_block: mat4x4<f32>;
        var b_block: mat4x4<f32>;
        if k0 + STEP <= p.k {
            if stages_a { a_block = block_of_a(a_column, k0 + a_k); }
        } else {
            if stages_a { a_block = last_block_of_a(a_column, k0 + a_k); }
        }
        if stages_b { b_block = block_of_b(b_column, k0 + b_k); }
        workgroupBarrier();
        if stages_a {
            a_tile[a_to] = a_block[0];
            a_tile[a_to + n4] = a_block[1];
            a_tile[a_to + 2u * n4] = a_block[2];
            a_tile[a_to + 3u * n4] = a_block[3];
        }
        if stages_b {
            b_tile[b_to] = b_block[0];
            b_tile[b_to + m4] = b_block[1];
            b_tile[b_to + 2u * m4] = b_block[2];
            b_tile[b_to + 3u * m4] = b_block[3];
        }
        workgroupBarrier();
        for (var k4 = 0u; k4 < STEP / 4u; k4++) {
            let a_from = 4u * k4 * n4 + ty;
            let b_from = 4u * k4 * m4 + tx;
            for (var k = 0u; k < 4u; k++) {
                let a0 = a_tile[a_from + k * n4];
                let a1 = a_tile[a_from + k * n4 + n4 / 2u];
                let b0 = b_tile[b_from + k * m4];
                let b1 = b_tile[b_from + k * m4 + m4 / 2u];
                acc[0] = fma(vec4<f32>(a0.x), b0, acc[0]);
                acc[1] = fma(vec4<f32>(a0.x), b1, acc[1]);
                acc[2] = fma(vec4<f32>(a0.y), b0, acc[2]);
                acc[3] = fma(vec4<f32>(a0.y), b1, acc[3]);
                acc[4] = fma(vec4<f32>(a0.z), b0, acc[4]);
                acc[5] = fma(vec4<f32>(a0.z), b1, acc[5]);
                acc[6] = fma(vec4<f32>(a0.w), b0, acc[6]);
                acc[7] = fma(vec4<f32>(a0.w), b1, acc[7]);
                acc[8] = fma(vec4<f32>(a1.x), b0, acc[8]);
                acc[9] = fma(vec4<f32>(a1.x), b1, acc[9]);
                acc[10] = fma(vec4<f32>(a1.y), b0, acc[10]);
                acc[11] = fma(vec4<f32>(a1.y), b1, acc[11]);
                acc[12] = fma(vec4<f32>(a1.z), b0, acc[12]);
                acc[13] = fma(vec4<f32>(a1.z), b1, acc[13]);
                acc[14] = fma(vec4<f32>(a1.w), b0, acc[14]);
                acc[15] = fma(vec4<f32>(a1.w), b1, acc[15]);
            }
        }
    }

    let column = column0 + vec2<u32>(4u * tx, 4u * tx + TILE_M / 2u);
    let top = row0 + 4u * ty;
    let bottom = top + TILE_N / 2u;
    store_row(top, group.z, column, acc[0], acc[1]);
    store_row(top + 1u, group.z, column, acc[2], acc[3]);
    store_row(top + 2u, group.z, column, acc[4], acc[5]);
    store_row(top + 3u, group.z, column, acc[6], acc[7]);
    store_row(bottom, group.z, column, acc[8], acc[9]);
    store_row(bottom + 1u, group.z, column, acc[10], acc[11]);
    store_row(bottom + 2u, group.z, column, acc[12], acc[13]);
    store_row(bottom + 3u, group.z, column, acc[14], acc[15]);
}
