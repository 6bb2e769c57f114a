// C[b, i, j] = alpha Σ_k A[b, i, k] W[b, j, k] + bias[j] + beta C[b, i, j] by cooperative matrices: what matmul_nt.wgsl computes, with the same
// parameters, edges and sums in f32, on the units that GPUs have for products of small matrices.
//
// Never run on such hardware: no driver at hand has cooperative matrices. It is known to translate (tests/shaders.rs: SPIR-V, and MSL for 8 x 8),
// and all but the matrices to be right (tests/matrices.rs has functions in their place). Engines run it only where they are asked to and
// the adapter reports its matrices (lib/matrices_8.wgsl, lib/matrices_16.wgsl).
//
// A workgroup of 128 threads makes a tile of 8 x 8 matrices (128 x 128 at side 16, 64 x 64 at side 8), a subgroup a quarter of it, 4 x 4
// matrices of sums in registers: 16 products for eight loads of operands. With 32 lanes the four quarters have a subgroup each. With 64 the
// two subgroups make two passes over k; with fewer than 32 the subgroups past the fourth repeat the last quarter in vain, since
// matrices need uniform control flow. So any size is right and 32 is fast.
// Tiles of A and W go through workgroup memory in Operand, k along rows, a step of SIDE k at a time, double-buffered as in matmul_nt: the
// loads of the next step are under way while this one is multiplied, one barrier a step. Rows are 8 (side 16) or 4 (side 8) elements longer
// than a step: rows that a matrix loads side by side then lie in different banks, and still start on 16 bytes. Sums return through workgroup
// memory, one matrix of every subgroup at a time, since only stored ones have elements that alpha, beta, bias and edges can be applied to.
//
// Cost: 2 n m k flops. At side 16, f16: 256 rows of 32 bytes a step for 2 128 128 16 flops, 64 flops a byte from caches; workgroup memory:
// 8 loads of 512 bytes for 16 products of 8192 flops, 32 flops a byte. 29 KiB of workgroup memory (13.25 KiB at side 8), and by count, not by a
// compiler, 128 registers of sums per lane at side 16 (32 lanes), 32 at side 8.
// Expected, not measured, for n, m and k of thousands: RTX 4090 and H100 30 to 40 % of their dense f16 rate with f32 sums (a third of a
// cuBLAS kernel's loop is asynchronous copies, which WGSL lacks); M series 70 to 80 % of peak f32, 10 % more than the base, as their
// matrices run on the same units and save loads and registers.

override TILE_N: u32;
override TILE_M: u32;

const THREADS = 128u;
const QUARTERS = 4u;
const FOURS = SIDE / 4u; // of k in a step
const EACH = SIDE * SIDE / 64u; // fours of k of each operand that a thread loads in a step

// Rows of a tile are this far apart: 24 at side 16, 12 at side 8.
const LD = SIDE + SIDE / 2u;

// [2][TILE][LD]. One half is read while the next step goes to the other.
var<workgroup> a_tile: array<Operand, TILE_N * 2u * LD>;
var<workgroup> w_tile: array<Operand, TILE_M * 2u * LD>;
// A matrix of sums of every quarter, and one that nobody reads: [QUARTERS + 1][SIDE][SIDE].
var<workgroup> stored: array<f32, 5u * SIDE * SIDE>;

// Fours of k of the rows of A and W that a thread loads in a step.
struct Loaded {
    a: array<vec4<Operand>, EACH>,
    w: array<vec4<Operand>, EACH>,
}

// A thread's part of the step whose first four of k is `four`, zero past the end. Rows past the end repeat the last, their results are not
// stored; what lies behind k is not read, since buffers end with the padding to 8 elements.
fn load(thread: u32, row0: u32, column0: u32, batch: u32, four: u32) -> Loaded {
    var out: Loaded;
    for (var i = 0u; i < EACH; i++) {
        let t = thread + i * THREADS;
        let k4 = four + t % FOURS;
        let inside = min(k4, (p.k - 1u) / 4u);
        let a_row = p.a_offset + batch * p.a_batch + min(row0 + t / FOURS, p.n - 1u) * p.lda;
        let w_row = p.w_offset + batch * p.w_batch + min(column0 + t / FOURS, p.m - 1u) * p.ldw;
        out.a[i] = vec4<Operand>(keep(vec4<f32>(a[a_row / 4u + inside]), 4u * k4));
        out.w[i] = vec4<Operand>(keep(widen(words(w_row / 4u + inside), inside % 2u == 1u), 4u * k4));
    }
    return out;
}

fn put(thread: u32, half: u32, loaded: Loaded) {
    for (var i = 0u; i < EACH; i++) {
        let t = thread + i * THREADS;
        let at = t / FOURS * LD + 4u * (t % FOURS);
        let a_at = half * TILE_N * LD + at;
        let w_at = half * TILE_M * LD + at;
        let four_a = loaded.a[i];
        let four_w = loaded.w[i];
        a_tile[a_at] = four_a.x;
        a_tile[a_at + 1u] = four_a.y;
        a_tile[a_at + 2u] = four_a.z;
        a_tile[a_at + 3u] = four_a.w;
        w_tile[w_at] = four_w.x;
        w_tile[w_at + 1u] = four_w.y;
        w_tile[w_at + 2u] = four_w.z;
        w_tile[w_at + 3u] = four_w.w;
    }
}

// Matrix (row, column) of the sums of all quarters that this pass has, from quarter `first` on, to C.
fn flush(sums: Sums, place: Place, group: vec3<u32>, first: u32, row: u32, column: u32) {
    workgroupBarrier();
    coopStoreT(sums, &stored[min(first + place.subgroup, QUARTERS) * SIDE * SIDE], SIDE);
    workgroupBarrier();
    let last = min(first + place.subgroups, QUARTERS);
    for (var t = first * SIDE * FOURS + place.thread; t < last * SIDE * FOURS; t += THREADS) {
        let quarter = t / (SIDE * FOURS);
        let i = group.y * TILE_N + quarter / 2u * (TILE_N / 2u) + row * SIDE + t / FOURS % SIDE;
        let j = group.x * TILE_M + quarter % 2u * (TILE_M / 2u) + column * SIDE + 4u * (t % FOURS);
        if i < p.n && j < p.m {
            let value = vec4<f32>(stored[4u * t], stored[4u * t + 1u], stored[4u * t + 2u], stored[4u * t + 3u]);
            store((p.c_offset + group.z * p.c_batch + i * p.ldc + j) / 4u, j, fma(vec4<f32>(p.alpha), value, bias_at(j)));
        }
    }
}

@compute @workgroup_size(THREADS)
fn matmul_nt(@builtin(workgroup_id) group: vec3<u32>, place: Place) {
    let row0 = group.y * TILE_N;
    let column0 = group.x * TILE_M;
    for (var first = 0u; first < QUARTERS; first += place.subgroups) {
        let quarter = min(first + place.subgroup, QUARTERS - 1u);
        let rows = quarter / 2u * (TILE_N / 2u) * LD;
        let columns = quarter % 2u * (TILE_M / 2u) * LD;

        // Matrices start as a stored one that is zero.
        workgroupBarrier();
        for (var i = place.thread; i < SIDE * SIDE; i += THREADS) {
            stored[i] = 0.0;
        }
        if p.k > 0u {
            put(place.thread, 0u, load(place.thread, row0, column0, group.z, 0u));
        }
        workgroupBarrier();
        var c00 = coopLoadT<Sums>(&stored[0], SIDE);
        var c01 = coopLoadT<Sums>(&stored[0], SIDE);
        var c02 = coopLoadT<Sums>(&stored[0], SIDE);
        var c03 = coopLoadT<Sums>(&stored[0], SIDE);
        var c10 = coopLoadT<Sums>(&stored[0], SIDE);
        var c11 = coopLoadT<Sums>(&stored[0], SIDE);
        var c12 = coopLoadT<Sums>(&stored[0], SIDE);
        var c13 = coopLoadT<Sums>(&stored[0], SIDE);
        var c20 = coopLoadT<Sums>(&stored[0], SIDE);
        var c21 = coopLoadT<Sums>(&stored[0], SIDE);
        var c22 = coopLoadT<Sums>(&stored[0], SIDE);
        var c23 = coopLoadT<Sums>(&stored[0], SIDE);
        var c30 = coopLoadT<Sums>(&stored[0], SIDE);
        var c31 = coopLoadT<Sums>(&stored[0], SIDE);
        var c32 = coopLoadT<Sums>(&stored[0], SIDE);
        var c33 = coopLoadT<Sums>(&stored[0], SIDE);
        var half = 0u;
        for (var k0 = 0u; k0 < p.k; k0 += SIDE) {
            // The next step's loads are under way while this one is multiplied; the last turn loads zeros in vain.
            let next = load(place.thread, row0, column0, group.z, (k0 + SIDE) / 4u);
            let a_from = half * TILE_N * LD + rows;
            let w_from = half * TILE_M * LD + columns;
            let b0 = coopLoad<Right>(&w_tile[w_from + 0u * SIDE * LD], LD);
            let b1 = coopLoad<Right>(&w_tile[w_from + 1u * SIDE * LD], LD);
            let b2 = coopLoad<Right>(&w_tile[w_from + 2u * SIDE * LD], LD);
            let b3 = coopLoad<Right>(&w_tile[w_from + 3u * SIDE * LD], LD);
            let a0 = coopLoadT<Left>(&a_tile[a_from + 0u * SIDE * LD], LD);
            c00 = coopMultiplyAdd(a0, b0, c00);
            c01 = coopMultiplyAdd(a0, b1, c01);
            c02 = coopMultiplyAdd(a0, b2, c02);
            c03 = coopMultiplyAdd(a0, b3, c03);
            let a1 = coopLoadT<Left>(&a_tile[a_from + 1u * SIDE * LD], LD);
            c10 = coopMultiplyAdd(a1, b0, c10);
            c11 = coopMultiplyAdd(a1, b1, c11);
            c12 = coopMultiplyAdd(a1, b2, c12);
            c13 = coopMultiplyAdd(a1, b3, c13);
            let a2 = coopLoadT<Left>(&a_tile[a_from + 2u * SIDE * LD], LD);
            c20 = coopMultiplyAdd(a2, b0, c20);
            c21 = coopMultiplyAdd(a2, b1, c21);
            c22 = coopMultiplyAdd(a2, b2, c22);
            c23 = coopMultiplyAdd(a2, b3, c23);
            let a3 = coopLoadT<Left>(&a_tile[a_from + 3u * SIDE * LD], LD);
            c30 = coopMultiplyAdd(a3, b0, c30);
            c31 = coopMultiplyAdd(a3, b1, c31);
            c32 = coopMultiplyAdd(a3, b2, c32);
            c33 = coopMultiplyAdd(a3, b3, c33);
            half = 1u - half;
            put(place.thread, half, next);
            workgroupBarrier();
        }
        flush(c00, place, group, first, 0u, 0u);
        flush(c01, place, group, first, 0u, 1u);
        flush(c02, place, group, first, 0u, 2u);
        flush(c03, place, group, first, 0u, 3u);
        flush(c10, place, group, first, 1u, 0u);
        flush(c11, place, group, first, 1u, 1u);
        flush(c12, place, group, first, 1u, 2u);
        flush(c13, place, group, first, 1u, 3u);
        flush(c20, place, group, first, 2u, 0u);
        flush(c21, place, group, first, 2u, 1u);
        flush(c22, place, group, first, 2u, 2u);
        flush(c23, place, group, first, 2u, 3u);
        flush(c30, place, group, first, 3u, 0u);
        flush(c31, place, group, first, 3u, 1u);
        flush(c32, place, group, first, 3u, 2u);
        flush(c33, place, group, first, 3u, 3u);
    }
}
