// C[i, j] = alpha Σ_k A[i, k] B[k, j] + beta C[i, j]: GPTQ's trailing update (alpha −1, beta 1, in place), attention weights times inputs.
//
// A [n, k], B [k, m] and C [n, m] lie at an offset with a row stride each, in elements and multiples of 8, so that every row starts on
// 16 bytes; a buffer holds the padding of its last row. Padding may be NaN: it is loaded, then replaced or left out. With beta 0 the
// old C is not read. A is f32, B is Elem (f32 or f16), sums are f32. Tile sizes and threads are those of matmul_nt; tiles are k-major, as
// rows of B are already, so A is transposed on the way. They are double-buffered: the loads of the next eight k are under way while 512
// multiply-adds per thread use the last eight, and one barrier a step is enough.
//
// Cost: 2 n m k flops. 21 flops a byte of A and B read, 2 per byte of workgroup memory (12 KiB at 128 x 64); with the k of one GPTQ block
// (32) reading and writing C, 8 bytes for 64 flops, is the limit: memory bound on every GPU, whatever the inner loop.
// Compiled for navi21 (and gfx1100): 120 VGPRs, no spills, 8 (12) waves of 32 per SIMD; the loop over k, staging included, is 512
// multiply-adds of 551 vector instructions and 32 ds_read_b128.
// Expected, not measured. Long k, share of peak f32: mobile 30 to 45 % (few registers, slow workgroup memory), M series 60 to 70 %, RTX
// 4090 and H100 (without tensor cores) 70 to 80 %. k of 32: 8 flops a byte of C are below every balance (20 on an H100, 30 to 35 on mobile
// and M series, 82 on an RTX 4090), so 75 to 85 % of memory bandwidth, which is 30 to 35 % of peak f32 on an H100, 20 % on mobile and M
// series, and 8 % on an RTX 4090, more where C stays in its 72 MB of cache.

override TILE_N: u32;
override TILE_M: u32;

struct MatmulNnParams {
    n: u32,
    m: u32,
    k: u32,
    lda: u32,
    ldb: u32,
    ldc: u32,
    a_offset: u32,
    b_offset: u32,
    c_offset: u32,
    alpha: f32,
    beta: f32,
}

@group(0) @binding(0) var<uniform> p: MatmulNnParams;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>; // [n, k], rows lda apart
@group(0) @binding(2) var<storage, read> b: array<vec4<Elem>>; // [k, m], rows ldb apart
@group(0) @binding(3) var<storage, read_write> c: array<vec4<f32>>; // [n, m], rows ldc apart

const STEP = 8u;

// Four rows at one k; [2][STEP][TILE_N / 4], the column of a row group g at k is g ^ 4 (k / 4). One half is read while the next step goes
// to the other.
var<workgroup> a_tile: array<vec4<f32>, TILE_N * 4u>;
// Four columns at one k; [2][STEP][TILE_M / 4].
var<workgroup> b_tile: array<vec4<f32>, TILE_M * 4u>;

// Four rows and four k of A, one row in each column of the result. `rows` counts groups of four elements.
fn block_of_a(rows: vec4<u32>, k4: u32) -> mat4x4<f32> {
    let at = rows + k4;
    return mat4x4<f32>(a[at.x], a[at.y], a[at.z], a[at.w]);
}

// The same in the first step, zero past the end: padding may hold NaN, so it is replaced rather than multiplied by zero.
fn first_of_a(rows: vec4<u32>, k4: u32) -> mat4x4<f32> {
    let block = block_of_a(rows, k4);
    let real = vec4<u32>(4u * k4) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.k);
    let none = vec4<f32>();
    return mat4x4<f32>(
        select(none, block[0], real), select(none, block[1], real), select(none, block[2], real), select(none, block[3], real),
    );
}

fn stage_a(block: mat4x4<f32>, to: u32) {
    let by_k = transpose(block);
    a_tile[to] = by_k[0];
    a_tile[to + TILE_N / 4u] = by_k[1];
    a_tile[to + TILE_N / 2u] = by_k[2];
    a_tile[to + TILE_N / 4u * 3u] = by_k[3];
}

// A k of B past the end repeats the last, where A is zero.
fn inside(k: u32) -> u32 {
    return min(k, p.k - 1u);
}

// Row starts of four rows of a matrix; rows past the end repeat the last, their results are not stored.
fn row_starts(first: u32, rows: u32, offset: u32, ld: u32) -> vec4<u32> {
    let row = min(vec4<u32>(first, first + 1u, first + 2u, first + 3u), vec4<u32>(rows - 1u));
    return (offset + row * ld) / 4u;
}

fn store_row(row: u32, column: vec2<u32>, left: vec4<f32>, right: vec4<f32>) {
    if row < p.n {
        let at = (p.c_offset + row * p.ldc + column) / 4u;
        store(at.x, column.x, p.alpha * left);
        store(at.y, column.y, p.alpha * right);
    }
}

@compute @workgroup_size(TILE_N * TILE_M / 64u)
fn matmul_nn(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let threads = TILE_N * TILE_M / 64u;
    let n4 = TILE_N / 4u;
    let m4 = TILE_M / 4u;
    let row0 = group.y * TILE_N;
    let column0 = group.x * TILE_M;

    // Staging of A: two neighbours read 32 bytes of a row; the exclusive or has their blocks lie in different banks.
    let stages_a = thread < TILE_N / 2u;
    let a_k4 = thread % 2u;
    let a_rows = row_starts(row0 + 4u * (thread / 2u), p.n, p.a_offset, p.lda);
    let a_to = 4u * a_k4 * n4 + ((thread / 2u) ^ (4u * a_k4));
    // Staging of B: neighbours read a row of the tile; where TILE_N is 64 a thread has two k, four apart. Columns past the end repeat the
    // last group, they are not stored.
    let twice_b = TILE_N == 64u;
    let b_k = thread / m4;
    let b_column = (p.b_offset + min(column0 + 4u * (thread % m4), p.m - 1u)) / 4u;
    let ldb = p.ldb / 4u;

    // A thread owns rows 4 ty.. and TILE_N / 2 + 4 ty.., columns likewise: reads of neighbours lie side by side.
    let tx = thread % (TILE_M / 8u);
    let ty = thread / (TILE_M / 8u);
    var acc: array<vec4<f32>, 16>;

    // The last k come first, since they may be fewer than a step: the loop knows whole steps only.
    if p.k > 0u {
        let last = (p.k - 1u) / STEP * STEP;
        if stages_a { stage_a(first_of_a(a_rows, last / 4u + a_k4), a_to); }
        b_tile[thread] = vec4<f32>(b[b_column + inside(last + b_k) * ldb]);
        if twice_b { b_tile[thread + threads] = vec4<f32>(b[b_column + inside(last + b_k + 4u) * ldb]); }
    }
    workgroupBarrier();
    var half = 0u;
    for (var k0 = 0u; k0 < p.k; k0 += STEP) {
        // The next step's loads are under way while this one is summed; the last turn loads in vain. No branch may stand between loads
        // of B and their use, or compilers move them behind it.
        var next_a: mat4x4<f32>;
        if stages_a { next_a = block_of_a(a_rows, k0 / 4u + a_k4); }
        let next_b = b[b_column + inside(k0 + b_k) * ldb];
        var later_b: vec4<Elem>;
        if twice_b { later_b = b[b_column + inside(k0 + b_k + 4u) * ldb]; }
        for (var k4 = 0u; k4 < STEP / 4u; k4++) {
            let a_from = half * n4 + 4u * k4 * n4 + (ty ^ (4u * k4));
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
        b_tile[half * m4 + thread] = vec4<f32>(next_b);
        if twice_b { b_tile[half * m4 + thread + threads] = vec4<f32>(later_b); }
        if stages_a { stage_a(next_a, half * n4 + a_to); }
        workgroupBarrier();
    }

    let column = column0 + vec2<u32>(4u * tx, 4u * tx + TILE_M / 2u);
    let top = row0 + 4u * ty;
    let bottom = top + TILE_N / 2u;
    store_row(top, column, acc[0], acc[1]);
    store_row(top + 1u, column, acc[2], acc[3]);
    store_row(top + 2u, column, acc[4], acc[5]);
    store_row(top + 3u, column, acc[6], acc[7]);
    store_row(bottom, column, acc[8], acc[9]);
    store_row(bottom + 1u, column, acc[10], acc[11]);
    store_row(bottom + 2u, column, acc[12], acc[13]);
    store_row(bottom + 3u, column, acc[14], acc[15]);
}
