// GPTQ's column sweep inside a block (Frantar et al., ICLR 2023): for each column j of the block, in order,
//   q = clamp(round(w_j / s) + z, 0, max_code);  e = (w_j − s (q − z)) / U_jj;  w_k −= e U_jk for the later k of the block.
//
// w [rows, cols] in quantization order, columns col0 .. col0 + width (at most 32) are swept; u: their rows of the factor; order maps a
// position to the original column, which decides the group; err [rows, err_col + width].
// The columns after the block are updated by one product: W −= err U (matmul_nn). Codes are not written: in their original columns they
// would be scattered, a sector of memory each; one pass of `quantize` over the compensated weights makes them when all columns are done.
//
// One workgroup of 64 threads per 64 rows. Tensors move through one tile of workgroup memory, half the block at a time (7 KiB with the
// upper triangle of U), so that memory is read and written along rows, while a thread keeps its own row in eight registers of four columns:
// nothing is indexed at run time. Each four columns are swept one by one, then their errors are taken from the later fours at once. A block
// that is narrower is filled up with zero weights and the identity.
//
// Cost: rows width (width + 8) flops; 12 bytes a weight: 3.3 flops a byte, memory bound if anything. But the chain of 32 divisions and
// roundings takes some 4000 cycles a launch, which a few thousand rows, a workgroup per 64, do not hide on a large GPU. Compiled for navi21
// (and gfx1100): 128 (132) VGPRs, no spills, 8 (10) waves of 32 per SIMD.
// Expected share of memory bandwidth, not measured, for 4096 rows, 2 MB: mobile and M series 50 to 70 %, 20 to 30 µs of traffic next to a
// chain of 3 to 6 µs; RTX 4090 30 to 50 % and H100 10 to 20 %, as 64 workgroups leave half of the units idle and the chain is as long as
// the traffic or longer. Shares of peak f32 are below 10 % everywhere. The product that follows has the flops.

struct GptqSweepParams {
    rows: u32,
    cols: u32,
    ld: u32,
    col0: u32,
    width: u32,
    u_row: u32,
    ld_u: u32,
    ld_err: u32,
    err_col: u32,
    group: u32,
    n_group: u32,
    max_code: u32,
}

@group(0) @binding(0) var<uniform> p: GptqSweepParams;
@group(0) @binding(1) var<storage, read> u: array<f32>; // [u_row + width, cols], rows ld_u apart
@group(0) @binding(2) var<storage, read> order: array<u32>; // [cols]
@group(0) @binding(3) var<storage, read> scale: array<f32>; // [rows, n_group]
@group(0) @binding(4) var<storage, read> zero: array<f32>; // [rows, n_group]
@group(0) @binding(5) var<storage, read_write> w: array<f32>; // [rows, cols] in quantization order, rows ld apart
@group(0) @binding(6) var<storage, read_write> err: array<f32>; // [rows, err_col + width], rows ld_err apart

const ROWS = 64u;
const WIDTH = 32u;
const SLICE = 16u; // columns in the tile
const TILE_LD = 17u; // odd, so that a column of the tile lies in different banks

// Half the block of one tensor at a time: neighbours in memory are columns, a thread's own are a row.
var<workgroup> tile: array<f32, 1088>; // [ROWS][TILE_LD]
// Four columns of the block of U, on and above the diagonal only; past the block it is the identity.
var<workgroup> u_block: array<vec4<f32>, 144>; // [WIDTH / 4][4 rows][fours from the diagonal on]
// Groups of the block's columns.
var<workgroup> group_of: array<u32, 32>;

struct Grids {
    scale: vec4<f32>,
    zero: vec4<f32>,
}

// What became of four columns of a row: compensated weights as they were quantized, errors.
struct Four {
    w: vec4<f32>,
    err: vec4<f32>,
}

// Where u_block has row 4 b + r, columns 4 c.., c ≥ b.
fn u_at(b: u32, r: u32, c: u32) -> u32 {
    return b * (34u - 2u * b) + r * (8u - b) + c - b;
}

// The grids of columns 4 b.. for one row.
fn grids(b: u32, row: u32) -> Grids {
    let start = row * p.n_group;
    let at = start + vec4<u32>(group_of[4u * b], group_of[4u * b + 1u], group_of[4u * b + 2u], group_of[4u * b + 3u]);
    return Grids(vec4<f32>(scale[at.x], scale[at.y], scale[at.z], scale[at.w]), vec4<f32>(zero[at.x], zero[at.y], zero[at.z], zero[at.w]));
}

// The error of one weight.
fn one(w: f32, scale: f32, zero: f32, diagonal: f32) -> f32 {
    let whole = round(zero);
    let code = clamp(round(w / scale + (zero - whole)) + whole, 0.0, f32(p.max_code));
    return (w - scale * (code - zero)) / diagonal;
}

// Columns 4 b.., one after the other.
fn four(b: u32, before: vec4<f32>, grid: Grids) -> Four {
    let u0 = u_block[u_at(b, 0u, b)];
    let u1 = u_block[u_at(b, 1u, b)];
    let u2 = u_block[u_at(b, 2u, b)];
    let u3 = u_block[u_at(b, 3u, b)];
    var w = before;
    let r0 = one(w.x, grid.scale.x, grid.zero.x, u0.x);
    w = vec4<f32>(w.x, w.yzw - r0 * u0.yzw);
    let r1 = one(w.y, grid.scale.y, grid.zero.y, u1.y);
    w = vec4<f32>(w.xy, w.zw - r1 * u1.zw);
    let r2 = one(w.z, grid.scale.z, grid.zero.z, u2.z);
    w = vec4<f32>(w.xyz, w.w - r2 * u2.w);
    let r3 = one(w.w, grid.scale.w, grid.zero.w, u3.w);
    return Four(w, vec4<f32>(r0, r1, r2, r3));
}

// Columns 4 later.. after the errors of columns 4 b...
fn less(b: u32, later: u32, err: vec4<f32>, before: vec4<f32>) -> vec4<f32> {
    var w = before;
    w -= err.x * u_block[u_at(b, 0u, later)];
    w -= err.y * u_block[u_at(b, 1u, later)];
    w -= err.z * u_block[u_at(b, 2u, later)];
    w -= err.w * u_block[u_at(b, 3u, later)];
    return w;
}

// The block of U; past its width it is the identity, so that columns there stay zero. Nothing is read where the matrix ends.
fn u_or_identity(r: u32, c: u32) -> f32 {
    let last = p.width - 1u;
    let value = u[(p.u_row + min(r, last)) * p.ld_u + p.col0 + min(c, last)];
    return select(f32(r == c), value, max(r, c) < p.width);
}

// Columns 4 b.. of a row of the tile.
fn take(row: u32, b: u32) -> vec4<f32> {
    let at = row * TILE_LD + 4u * b;
    return vec4<f32>(tile[at], tile[at + 1u], tile[at + 2u], tile[at + 3u]);
}

fn put(row: u32, b: u32, value: vec4<f32>) {
    let at = row * TILE_LD + 4u * b;
    tile[at] = value.x;
    tile[at + 1u] = value.y;
    tile[at + 2u] = value.z;
    tile[at + 3u] = value.w;
}

// A row of the tile, when all have read the last one.
fn put_row(row: u32, a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>) {
    workgroupBarrier();
    put(row, 0u, a);
    put(row, 1u, b);
    put(row, 2u, c);
    put(row, 3u, d);
    workgroupBarrier();
}

// When the tile moves, a thread takes one column of every fourth row. The loop counts to a constant, so that all loads
// are under way at once.
fn load_w(first: u32, row0: u32, rows: u32, thread: u32) {
    let j = first + thread % SLICE;
    workgroupBarrier();
    for (var turn = 0u; turn < SLICE; turn++) {
        let i = thread / SLICE + ROWS / SLICE * turn;
        // Rows past the end repeat the last; columns past the end are zero. Neither is stored.
        let value = w[(row0 + min(i, rows - 1u)) * p.ld + p.col0 + min(j, p.width - 1u)];
        tile[i * TILE_LD + thread % SLICE] = select(0.0, value, j < p.width);
    }
    workgroupBarrier();
}

fn store_w(first: u32, row0: u32, rows: u32, thread: u32) {
    let j = first + thread % SLICE;
    if j < p.width {
        for (var i = thread / SLICE; i < rows; i += ROWS / SLICE) {
            w[(row0 + i) * p.ld + p.col0 + j] = tile[i * TILE_LD + thread % SLICE];
        }
    }
}

fn store_err(first: u32, row0: u32, rows: u32, thread: u32) {
    let j = first + thread % SLICE;
    if j < p.width {
        for (var i = thread / SLICE; i < rows; i += ROWS / SLICE) {
            err[(row0 + i) * p.ld_err + p.err_col + j] = tile[i * TILE_LD + thread % SLICE];
        }
    }
}

@compute @workgroup_size(64)
fn gptq_sweep(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row0 = group.x * ROWS;

    let rows = min(ROWS, p.rows - row0);
    if thread < WIDTH {
        // The order is data, so it is not trusted: a group outside the row would be read from anywhere.
        group_of[thread] = min(order[p.col0 + min(thread, p.width - 1u)] / p.group, p.n_group - 1u);
    }
    for (var i = 0u; i < 4u; i++) {
        let r = thread / 8u + 8u * i;
        let c = 4u * (thread % 8u);
        let four = vec4<f32>(u_or_identity(r, c), u_or_identity(r, c + 1u), u_or_identity(r, c + 2u), u_or_identity(r, c + 3u));
        if c / 4u >= r / 4u { u_block[u_at(r / 4u, r % 4u, c / 4u)] = four; }
    }

    // The sweep: a thread has one row in registers. Grids are read one step ahead.
    let row = row0 + min(thread, rows - 1u);
    load_w(0u, row0, rows, thread);
    var w0 = take(thread, 0u);
    var w1 = take(thread, 1u);
    var w2 = take(thread, 2u);
    var w3 = take(thread, 3u);
    load_w(SLICE, row0, rows, thread);
    var w4 = take(thread, 0u);
    var w5 = take(thread, 1u);
    var w6 = take(thread, 2u);
    var w7 = take(thread, 3u);
    let g0 = grids(0u, row);
    let g1 = grids(1u, row);
    let r0 = four(0u, w0, g0);
    w1 = less(0u, 1u, r0.err, w1);
    w2 = less(0u, 2u, r0.err, w2);
    w3 = less(0u, 3u, r0.err, w3);
    w4 = less(0u, 4u, r0.err, w4);
    w5 = less(0u, 5u, r0.err, w5);
    w6 = less(0u, 6u, r0.err, w6);
    w7 = less(0u, 7u, r0.err, w7);
    let g2 = grids(2u, row);
    let r1 = four(1u, w1, g1);
    w2 = less(1u, 2u, r1.err, w2);
    w3 = less(1u, 3u, r1.err, w3);
    w4 = less(1u, 4u, r1.err, w4);
    w5 = less(1u, 5u, r1.err, w5);
    w6 = less(1u, 6u, r1.err, w6);
    w7 = less(1u, 7u, r1.err, w7);
    let g3 = grids(3u, row);
    let r2 = four(2u, w2, g2);
    w3 = less(2u, 3u, r2.err, w3);
    w4 = less(2u, 4u, r2.err, w4);
    w5 = less(2u, 5u, r2.err, w5);
    w6 = less(2u, 6u, r2.err, w6);
    w7 = less(2u, 7u, r2.err, w7);
    let g4 = grids(4u, row);
    let r3 = four(3u, w3, g3);
    w4 = less(3u, 4u, r3.err, w4);
    w5 = less(3u, 5u, r3.err, w5);
    w6 = less(3u, 6u, r3.err, w6);
    w7 = less(3u, 7u, r3.err, w7);
    let g5 = grids(5u, row);
    let r4 = four(4u, w4, g4);
    w5 = less(4u, 5u, r4.err, w5);
    w6 = less(4u, 6u, r4.err, w6);
    w7 = less(4u, 7u, r4.err, w7);
    let g6 = grids(6u, row);
    let r5 = four(5u, w5, g5);
    w6 = less(5u, 6u, r5.err, w6);
    w7 = less(5u, 7u, r5.err, w7);
    let g7 = grids(7u, row);
    let r6 = four(6u, w6, g6);
    w7 = less(6u, 7u, r6.err, w7);
    let r7 = four(7u, w7, g7);

    put_row(thread, r0.w, r1.w, r2.w, r3.w);
    store_w(0u, row0, rows, thread);
    put_row(thread, r4.w, r5.w, r6.w, r7.w);
    store_w(SLICE, row0, rows, thread);
    put_row(thread, r0.err, r1.err, r2.err, r3.err);
    store_err(0u, row0, rows, thread);
    put_row(thread, r4.err, r5.err, r6.err, r7.err);
    store_err(SLICE, row0, rows, thread);
}
