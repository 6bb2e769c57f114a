// C[b, i, j] = alpha Σ_t A[b, t, i] B[b, t, j] + beta C[b, i, j]: second moments of two sets of rows, and of the heads of one.
//
// A [k, n], B [k, m] and C [n, m] lie at an offset with a row stride each, batch b a batch stride further; all are in elements and
// multiples of 8, so that every row starts on 16 bytes, and a buffer holds the padding of its last row. Padding may be NaN: it is loaded,
// then left out. A is f32, B is Elem (f32 or f16), sums are f32. With beta 0 the old C is not read. An a_offset of i0 with n rows makes
// rows i0 .. i0 + n of the whole product, so C may be split into panels of rows.
//
// Both operands are k-major as they are, so staging needs no transposition; scheme and double buffering are those of gram, the tile is that
// of matmul_nn, TILE_N x TILE_M with TILE_N TILE_M / 64 threads and 8 x 8 sums each. The sum of a launch is made by itself and added to C
// once (two-level sums).
//
// Cost: 2 n m k flops. 21 flops a byte of A and B read (f32) from the last-level cache, 2 per byte of workgroup memory (12 KiB at 128 x
// 64); memory sees A and B a few times and C once. Compiled for navi21 (and gfx1100): 104 (108) VGPRs, no spills, 8 (12) waves of 32 per
// SIMD; the loop over k, staging included, is 512 multiply-adds of 532 vector instructions and 32 ds_read_b128.
// Expected share of peak f32, not measured, for n and m in the thousands: mobile 35 to 50 % (few registers), M series 60 to 70 %, RTX 4090
// and H100 (without tensor cores) 70 to 80 %: 21 flops a byte are above the balance of their caches, and vector issue is 96 % useful.
// Moments of heads (n = m = d_head) have one to four tiles a head, which leaves a large GPU partly idle, but they are d_head / d_model of
// the projections' flops.

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

const STEP = 8u;

// Four columns at one k; [2][STEP][TILE / 4]. One half is read while the next step goes to the other.
var<workgroup> a_tile: array<vec4<f32>, TILE_N * 4u>;
var<workgroup> b_tile: array<vec4<f32>, TILE_M * 4u>;

// A k past the end repeats the last.
fn inside(k: u32) -> u32 {
    return min(k, p.k - 1u);
}

// Four columns of A at a k of the first step, zero past the end.
fn first_of_a(column: u32, k: u32) -> vec4<f32> {
    return select(vec4<f32>(), a[column + inside(k) * (p.lda / 4u)], k < p.k);
}

fn store_row(row: u32, batch: u32, column: vec2<u32>, left: vec4<f32>, right: vec4<f32>) {
    if row < p.n {
        let at = (p.c_offset + batch * p.c_batch + row * p.ldc + column) / 4u;
        store(at.x, column.x, p.alpha * left);
        store(at.y, column.y, p.alpha * right);
    }
}

@compute @workgroup_size(TILE_N * TILE_M / 64u)
fn matmul_tn(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let threads = TILE_N * TILE_M / 64u;
    let n4 = TILE_N / 4u;
    let m4 = TILE_M / 4u;
    let row0 = group.y * TILE_N;
    let column0 = group.x * TILE_M;

    // Staging: neighbours read a row of the tile; where the other side is 64 a thread has two k, four apart. Columns past the end repeat the
    // last group, they are not stored.
    let twice_a = TILE_M == 64u;
    let twice_b = TILE_N == 64u;
    let a_k = thread / n4;
    let b_k = thread / m4;
    let a_column = (p.a_offset + group.z * p.a_batch + min(row0 + 4u * (thread % n4), p.n - 1u)) / 4u;
    let b_column = (p.b_offset + group.z * p.b_batch + min(column0 + 4u * (thread % m4), p.m - 1u)) / 4u;
    let lda = p.lda / 4u;
    let ldb = p.ldb / 4u;

    // A thread owns rows 4 ty.. and TILE_N / 2 + 4 ty.., columns likewise: reads of neighbours lie side by side.
    let tx = thread % (TILE_M / 8u);
    let ty = thread / (TILE_M / 8u);
    var acc: array<vec4<f32>, 16>;

    // The last k come first, since they may be fewer than a step: the loop knows whole steps only.
    if p.k > 0u {
        let last = (p.k - 1u) / STEP * STEP;
        a_tile[thread] = first_of_a(a_column, last + a_k);
        b_tile[thread] = vec4<f32>(b[b_column + inside(last + b_k) * ldb]);
        if twice_a { a_tile[thread + threads] = first_of_a(a_column, last + a_k + 4u); }
        if twice_b { b_tile[thread + threads] = vec4<f32>(b[b_column + inside(last + b_k + 4u) * ldb]); }
    }
    workgroupBarrier();
    var half = 0u;
    for (var k0 = 0u; k0 < p.k; k0 += STEP) {
        // The next step's loads are under way while this one is summed; the last turn loads in vain.
        let next_a = a[a_column + inside(k0 + a_k) * lda];
        let next_b = b[b_column + inside(k0 + b_k) * ldb];
        var later_a: vec4<f32>;
        var later_b: vec4<Elem>;
        if twice_a { later_a = a[a_column + inside(k0 + a_k + 4u) * lda]; }
        if twice_b { later_b = b[b_column + inside(k0 + b_k + 4u) * ldb]; }
        for (var k4 = 0u; k4 < STEP / 4u; k4++) {
            let a_from = half * n4 + 4u * k4 * n4 + ty;
            let b_from = half * m4 + 4u * k4 * m4 + tx;
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
        half = STEP - half;
        a_tile[half * n4 + thread] = next_a;
        b_tile[half * m4 + thread] = vec4<f32>(next_b);
        if twice_a { a_tile[half * n4 + thread + threads] = later_a; }
        if twice_b { b_tile[half * m4 + thread + threads] = vec4<f32>(later_b); }
        workgroupBarrier();
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
