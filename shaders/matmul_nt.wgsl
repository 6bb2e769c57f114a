// C[b, i, j] = alpha Σ_k A[b, i, k] W[b, j, k] + bias[j] + beta C[b, i, j]: every linear layer, E H, and score products of groups.
//
// A [n, k], W [m, k] and C [n, m] lie at an offset with a row stride each, batch b a batch stride further; all are in elements and
// multiples of 8, so that every row starts on 16 bytes, and a buffer holds the padding of its last row. Padding may be NaN: it is
// loaded, then replaced. A is Elem (f32 or f16), W as the checkpoint stores it (W_DTYPE: 0 f32, 1 f16, 2 bf16; 16-bit floats are
// widened with core built-ins, so they need no feature), sums are f32. With beta 0 the old C is not read.
//
// A workgroup makes a tile of TILE_N x TILE_M (64 or 128 each) with TILE_N TILE_M / 64 threads, 8 x 8 sums per thread in registers, eight k
// at a time through 2 x 8 (TILE_N + TILE_M) 4 bytes of workgroup memory (12 KiB at 128 x 64). Both operands have k along rows and stay so:
// four k are 16 reads of 128 bits for 256 multiply-adds, as a transposed tile would have, and 16-bit weights are widened where they are
// stored, so nothing is moved around. Tiles are double-buffered: the loads of the next eight k are under way while 512 multiply-adds per
// thread use the last eight, and one barrier a step is enough. Only the first step and the stores know about edges: rows past the end
// repeat the last one.
//
// Cost: 2 n m k flops. Memory traffic per tile and 8 k: (128 + 64) 8 4 bytes for 2 128 64 8 flops, 21 flops a byte (32 with f16 A and W,
// which W at 16 bits alone nearly gives), above the balance of last-level caches; workgroup memory: 64 bytes for 128 flops. Memory sees A,
// W and C a few times: hundreds of flops a byte where n, m and k are in the thousands.
// Compiled for navi21 (and gfx1100): 120 to 128 (120 to 132) VGPRs, no spills, 8 (10 to 12) waves of 32 per SIMD; the loop over k, staging
// included, is 512 multiply-adds of 539 (f32) to 561 vector instructions (f16 A and W, gfx1100) and 32 ds_read_b128.
// Expected share of peak f32, not measured, for k in the hundreds and more: mobile 30 to 45 % (few registers, slow workgroup memory), M
// series 60 to 70 %, RTX 4090 and H100 (without tensor cores) 70 to 80 %.

override TILE_N: u32;
override TILE_M: u32;

const STEP = 8u;

// Four k of one row; [2][TILE][STEP / 4]. One half is read while the next step goes to the other.
var<workgroup> a_tile: array<vec4<f32>, TILE_N * 4u>;
// The same, but place s of row r is s ^ (r / 4 % 8): neighbours read rows four apart, which then lie in different banks.
var<workgroup> w_tile: array<vec4<f32>, TILE_M * 4u>;

// Four k of four columns of the result, one k in each column of the matrix.
fn columns_of_w(at: vec4<u32>) -> mat4x4<f32> {
    return transpose(mat4x4<f32>(w_tile[at.x], w_tile[at.y], w_tile[at.z], w_tile[at.w]));
}

// Adds four k of one row of A times four columns of W, one k in each column of the matrix.
fn sums(row: vec4<f32>, columns: mat4x4<f32>, before: vec4<f32>) -> vec4<f32> {
    let two = fma(vec4<f32>(row.y), columns[1], fma(vec4<f32>(row.x), columns[0], before));
    return fma(vec4<f32>(row.w), columns[3], fma(vec4<f32>(row.z), columns[2], two));
}

fn store_row(row: u32, batch: u32, column: vec2<u32>, left: vec4<f32>, right: vec4<f32>, left_bias: vec4<f32>, right_bias: vec4<f32>) {
    if row < p.n {
        let at = (p.c_offset + batch * p.c_batch + row * p.ldc + column) / 4u;
        store(at.x, column.x, fma(vec4<f32>(p.alpha), left, left_bias));
        store(at.y, column.y, fma(vec4<f32>(p.alpha), right, right_bias));
    }
}

@compute @workgroup_size(TILE_N * TILE_M / 64u)
fn matmul_nt(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let threads = TILE_N * TILE_M / 64u;
    let n4 = TILE_N / 4u;
    let m4 = TILE_M / 4u;
    let row0 = group.y * TILE_N;
    let column0 = group.x * TILE_M;

    // Staging: two neighbours read 32 bytes of a row; where the other side is 64 a thread has two rows. Rows past the end repeat the last,
    // their results are not stored.
    let twice_a = TILE_M == 64u;
    let twice_w = TILE_N == 64u;
    let part = thread % 2u; // of the step: which four k
    let odd = part == 1u; // rows start on eight elements
    let row = thread / 2u;
    let a_start = p.a_offset + group.z * p.a_batch;
    let w_start = p.w_offset + group.z * p.w_batch;
    let a_row0 = (a_start + min(row0 + row, p.n - 1u) * p.lda) / 4u + part;
    let a_row1 = (a_start + min(row0 + row + TILE_N / 2u, p.n - 1u) * p.lda) / 4u + part;
    let w_row0 = (w_start + min(column0 + row, p.m - 1u) * p.ldw) / 4u + part;
    let w_row1 = (w_start + min(column0 + row + TILE_M / 2u, p.m - 1u) * p.ldw) / 4u + part;
    let w_to = thread ^ (row / 4u % 8u);

    // A thread owns rows 4 ty.. and TILE_N / 2 + 4 ty.., columns likewise: reads of neighbours lie side by side.
    let tx = thread % (TILE_M / 8u);
    let ty = thread / (TILE_M / 8u);
    var acc: array<vec4<f32>, 16>;

    // The last k come first, since they may be fewer than a step: the loop knows whole steps only.
    if p.k > 0u {
        let last = (p.k - 1u) / STEP * (STEP / 4u);
        let k = 4u * (last + part);
        a_tile[thread] = keep(vec4<f32>(a[a_row0 + last]), k);
        if twice_a { a_tile[thread + threads] = keep(vec4<f32>(a[a_row1 + last]), k); }
        w_tile[w_to] = keep(widen(words(w_row0 + last), odd), k);
        if twice_w { w_tile[w_to + threads] = keep(widen(words(w_row1 + last), odd), k); }
    }
    workgroupBarrier();
    var half = 0u;
    for (var k0 = 0u; k0 < p.k; k0 += STEP) {
        // The next step's loads are under way while this one is summed; the last turn loads in vain.
        let next = k0 / 4u;
        let next_a = a[a_row0 + next];
        let next_w = words(w_row0 + next);
        var later_a: vec4<Elem>;
        var later_w: vec4<u32>;
        if twice_a { later_a = a[a_row1 + next]; }
        if twice_w { later_w = words(w_row1 + next); }
        for (var k4 = 0u; k4 < STEP / 4u; k4++) {
            let a_from = half * TILE_N + 8u * ty + k4;
            let w_from = half * TILE_M + 8u * tx;
            let at = vec4<u32>(w_from) + (vec4<u32>(k4 ^ (tx % 8u)) ^ vec4<u32>(0u, 2u, 4u, 6u));
            let left = columns_of_w(at);
            let right = columns_of_w(at + TILE_M);
            acc[0] = sums(a_tile[a_from + 0u], left, acc[0]);
            acc[1] = sums(a_tile[a_from + 0u], right, acc[1]);
            acc[2] = sums(a_tile[a_from + 2u], left, acc[2]);
            acc[3] = sums(a_tile[a_from + 2u], right, acc[3]);
            acc[4] = sums(a_tile[a_from + 4u], left, acc[4]);
            acc[5] = sums(a_tile[a_from + 4u], right, acc[5]);
            acc[6] = sums(a_tile[a_from + 6u], left, acc[6]);
            acc[7] = sums(a_tile[a_from + 6u], right, acc[7]);
            acc[8] = sums(a_tile[a_from + TILE_N + 0u], left, acc[8]);
            acc[9] = sums(a_tile[a_from + TILE_N + 0u], right, acc[9]);
            acc[10] = sums(a_tile[a_from + TILE_N + 2u], left, acc[10]);
            acc[11] = sums(a_tile[a_from + TILE_N + 2u], right, acc[11]);
            acc[12] = sums(a_tile[a_from + TILE_N + 4u], left, acc[12]);
            acc[13] = sums(a_tile[a_from + TILE_N + 4u], right, acc[13]);
            acc[14] = sums(a_tile[a_from + TILE_N + 6u], left, acc[14]);
            acc[15] = sums(a_tile[a_from + TILE_N + 6u], right, acc[15]);
        }
        half = 2u - half;
        a_tile[half * TILE_N + thread] = vec4<f32>(next_a);
        if twice_a { a_tile[half * TILE_N + thread + threads] = vec4<f32>(later_a); }
        w_tile[half * TILE_M + w_to] = widen(next_w, odd);
        if twice_w { w_tile[half * TILE_M + w_to + threads] = widen(later_w, odd); }
        workgroupBarrier();
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
