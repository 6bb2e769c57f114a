// GPTQ's column sweep inside a block (Frantar et al., ICLR 2023): for each column j of the block, in order,
//   q = clamp(round(w_j / s) + z, 0, max_code);  e = (w_j − s (q − z)) / U_jj;  w_k −= e U_jk for the later k of the block.
//
// w [rows, cols] in quantization order, columns col0 .. col0 + width (at most 32) are swept; u: their rows of the factor; order maps a
// position to the original column, which decides the group and where the code is written; err [rows, err_col + width].
// The columns after the block are updated by one product: W −= err U (matmul_nn).
//
// One workgroup of 64 threads per 64 rows. Tensors move through one tile of workgroup memory (12.5 KiB with U), so that memory is
// read and written along rows, while a thread keeps its own row in eight registers of four columns: nothing is indexed
// at run time. Each four columns are swept one by one, then their errors are taken from the later fours at once. A block that is
// narrower is filled up with zero weights and the identity.
//
// Cost: rows width (width + 8) flops; 16 bytes a weight. Neither is the limit, the chain of 32 divisions and roundings is: some 4000
// cycles a launch. Compiled for navi21 (and gfx1100): 256 (132) VGPRs (the compiler loads all grids ahead), no spills, 2 (3) waves of
// 64 per SIMD, more than launches of a few thousand rows can fill.

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
@group(0) @binding(6) var<storage, read_write> codes: array<u32>; // [rows, cols] in original order, rows ld apart
@group(0) @binding(7) var<storage, read_write> err: array<f32>; // [rows, err_col + width], rows ld_err apart

const ROWS = 64u;
const WIDTH = 32u;
const TILE_LD = 33u; // odd, so that a column of the tile lies in different banks

// The block of one tensor at a time: neighbours in memory are columns, a thread's own are a row.
var<workgroup> tile: array<f32, 2112>; // [ROWS][TILE_LD]
// Four columns of the block of U; past the block it is the identity.
var<workgroup> u_block: array<vec4<f32>, 256>; // [WIDTH][WIDTH / 4]
// Original columns of the block, and their groups.
var<workgroup> column_of: array<u32, 32>;
var<workgroup> group_of: array<u32, 32>;

struct Grids {
    scale: vec4<f32>,
    zero: vec4<f32>,
}

// What became of four columns of a row: compensated weights as they were quantized, errors, codes.
struct Four {
    w: vec4<f32>,
    err: vec4<f32>,
    code: vec4<f32>,
}

// The grids of columns 4 b.. for one row.
fn grids(b: u32, row: u32) -> Grids {
    let start = row * p.n_group;
    let at = start + vec4<u32>(group_of[4u * b], group_of[4u * b + 1u], group_of[4u * b + 2u], group_of[4u * b + 3u]);
    return Grids(vec4<f32>(scale[at.x], scale[at.y], scale[at.z], scale[at.w]), vec4<f32>(zero[at.x], zero[at.y], zero[at.z], zero[at.w]));
}

// The code of one weight and its error.
fn one(w: f32, scale: f32, zero: f32, diagonal: f32) -> vec2<f32> {
    let whole = round(zero);
    let code = clamp(round(w / scale + (zero - whole)) + whole, 0.0, f32(p.max_code));
    return vec2<f32>(code, (w - scale * (code - zero)) / diagonal);
}

// Columns 4 b.., one after the other.
fn four(b: u32, before: vec4<f32>, grid: Grids) -> Four {
    let u0 = u_block[33u * b];
    let u1 = u_block[33u * b + 8u];
    let u2 = u_block[33u * b + 16u];
    let u3 = u_block[33u * b + 24u];
    var w = before;
    let r0 = one(w.x, grid.scale.x, grid.zero.x, u0.x);
    w = vec4<f32>(w.x, w.yzw - r0.y * u0.yzw);
    let r1 = one(w.y, grid.scale.y, grid.zero.y, u1.y);
    w = vec4<f32>(w.xy, w.zw - r1.y * u1.zw);
    let r2 = one(w.z, grid.scale.z, grid.zero.z, u2.z);
    w = vec4<f32>(w.xyz, w.w - r2.y * u2.w);
    let r3 = one(w.w, grid.scale.w, grid.zero.w, u3.w);
    return Four(w, vec4<f32>(r0.y, r1.y, r2.y, r3.y), vec4<f32>(r0.x, r1.x, r2.x, r3.x));
}

// Columns 4 later.. after the errors of columns 4 b...
fn less(b: u32, later: u32, err: vec4<f32>, before: vec4<f32>) -> vec4<f32> {
    var w = before;
    w -= err.x * u_block[32u * b + later];
    w -= err.y * u_block[32u * b + 8u + later];
    w -= err.z * u_block[32u * b + 16u + later];
    w -= err.w * u_block[32u * b + 24u + later];
    return w;
}

// The block of U; past its width it is the identity, so that columns there stay zero. Below the diagonal nothing is used.
fn u_at(r: u32, c: u32) -> f32 {
    if max(r, c) < p.width {
        return u[(p.u_row + r) * p.ld_u + p.col0 + c];
    }
    return f32(r == c);
}

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

@compute @workgroup_size(64)
fn gptq_sweep(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row0 = group.x * ROWS;

    // When tensors move, a thread takes one column of every other row.
    let j = thread % WIDTH;
    let half = thread / WIDTH;
    let inside = j < p.width;
    let rows = min(ROWS, p.rows - row0);
    if half == 0u {
        let column = order[p.col0 + min(j, p.width - 1u)];
        column_of[j] = column;
        // The order is data, so it is not trusted: a group outside the row would be read from anywhere.
        group_of[j] = min(column / p.group, p.n_group - 1u);
    }
    for (var i = 0u; i < 4u; i++) {
        let at = thread + ROWS * i;
        let r = at / 8u;
        let c = 4u * (at % 8u);
        u_block[at] = vec4<f32>(u_at(r, c), u_at(r, c + 1u), u_at(r, c + 2u), u_at(r, c + 3u));
    }
    // A loop of known length, so that all loads are under way at once.
    for (var i = half; i < ROWS; i += 2u) {
        // Rows past the end repeat the last; columns past the end are zero. Neither is stored.
        let value = w[(row0 + min(i, rows - 1u)) * p.ld + p.col0 + min(j, p.width - 1u)];
        tile[i * TILE_LD + j] = select(0.0, value, inside);
    }
    workgroupBarrier();

    // The sweep: a thread has one row in registers. Grids are read one step ahead.
    let row = row0 + min(thread, rows - 1u);
    var w0 = take(thread, 0u);
    var w1 = take(thread, 1u);
    var w2 = take(thread, 2u);
    var w3 = take(thread, 3u);
    var w4 = take(thread, 4u);
    var w5 = take(thread, 5u);
    var w6 = take(thread, 6u);
    var w7 = take(thread, 7u);
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

    put(thread, 0u, r0.w);
    put(thread, 1u, r1.w);
    put(thread, 2u, r2.w);
    put(thread, 3u, r3.w);
    put(thread, 4u, r4.w);
    put(thread, 5u, r5.w);
    put(thread, 6u, r6.w);
    put(thread, 7u, r7.w);
    workgroupBarrier();
    if inside {
        for (var i = half; i < rows; i += 2u) {
            w[(row0 + i) * p.ld + p.col0 + j] = tile[i * TILE_LD + j];
        }
    }
    workgroupBarrier();
    put(thread, 0u, r0.err);
    put(thread, 1u, r1.err);
    put(thread, 2u, r2.err);
    put(thread, 3u, r3.err);
    put(thread, 4u, r4.err);
    put(thread, 5u, r5.err);
    put(thread, 6u, r6.err);
    put(thread, 7u, r7.err);
    workgroupBarrier();
    if inside {
        for (var i = half; i < rows; i += 2u) {
            err[(row0 + i) * p.ld_err + p.err_col + j] = tile[i * TILE_LD + j];
        }
    }
    workgroupBarrier();
    put(thread, 0u, r0.code);
    put(thread, 1u, r1.code);
    put(thread, 2u, r2.code);
    put(thread, 3u, r3.code);
    put(thread, 4u, r4.code);
    put(thread, 5u, r5.code);
    put(thread, 6u, r6.code);
    put(thread, 7u, r7.code);
    workgroupBarrier();
    let column = column_of[j];
    if inside && column < p.cols {
        for (var i = half; i < rows; i += 2u) {
            codes[(row0 + i) * p.ld + column] = u32(tile[i * TILE_LD + j]);
        }
    }
}
