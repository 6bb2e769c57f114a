// G[i, j] += Σ_t x[t, i] x[t, j] for j ≤ i: the column metric of every linear layer that reads X. Half of the symmetric product.
//
// X [n_tok, d] is Elem (f32 or f16), sums are f32. G may be split into panels of rows: a launch fills rows row0 .. row0 + rows. Above
// the diagonal G holds anything afterwards. Row strides and row0 are multiples of 8 and buffers hold the padding of their last row.
// Two-level sums: the launch sums its tokens in registers and adds the result to G once.
//
// One workgroup per tile of TILE x TILE (64 or 128) on or below the diagonal, found from a linear index, so that none is idle;
// TILE² / 64 threads, 8 x 8 sums each. Rows of X are k-major as they are: both operands go from 128-bit loads (64-bit for f16) to
// 128-bit stores in workgroup memory (8 KiB at 64, 16 KiB at 128) without a transposition.
//
// Cost: n_tok d (d + 1) flops. At TILE 64 16 flops a byte read (f32; 32 for f16), 2 per byte of workgroup memory.
// Compiled for navi21 (and gfx1100): 104 to 112 (108 to 120) VGPRs, no spills, 4 waves of 64 per SIMD, limited by registers and
// workgroup memory alike; the inner loop is 256 multiply-adds of 258 vector instructions and 16 ds_read_b128. Expect 75 to 85 % of peak
// f32 for a d of thousands, counting useful flops only; 1 / (d / 64 + 1) of the work is the upper half of tiles on the diagonal.

override TILE: u32;

struct GramParams {
    n_tok: u32,
    d: u32,
    ldx: u32,
    ldg: u32,
    row0: u32,
    rows: u32,
}

@group(0) @binding(0) var<uniform> p: GramParams;
@group(0) @binding(1) var<storage, read> x: array<vec4<Elem>>; // [n_tok, d], rows ldx apart
@group(0) @binding(2) var<storage, read_write> g: array<vec4<f32>>; // [rows, d] from row row0 of [d, d] on, rows ldg apart

const STEP = 16u;

// Four columns of X at one token; [STEP][TILE / 4]: the columns that are rows of G, and those that are columns of G.
var<workgroup> i_tile: array<vec4<f32>, TILE * 4u>;
var<workgroup> j_tile: array<vec4<f32>, TILE * 4u>;

// Four tokens, four columns each, one token in each column of the result. Tokens past the end repeat the last.
fn block_of_x(column: u32, token: u32) -> mat4x4<f32> {
    let at = column + min(vec4<u32>(token, token + 1u, token + 2u, token + 3u), vec4<u32>(p.n_tok - 1u)) * (p.ldx / 4u);
    return mat4x4<f32>(vec4<f32>(x[at.x]), vec4<f32>(x[at.y]), vec4<f32>(x[at.z]), vec4<f32>(x[at.w]));
}

// The same with zeros for tokens past the end.
fn last_block_of_x(column: u32, token: u32) -> mat4x4<f32> {
    var block = block_of_x(column, token);
    let none = vec4<f32>();
    if token >= p.n_tok { block[0] = none; }
    if token + 1u >= p.n_tok { block[1] = none; }
    if token + 2u >= p.n_tok { block[2] = none; }
    if token + 3u >= p.n_tok { block[3] = none; }
    return block;
}

// Row r of tiles has first + r + 1 of them, `first` being the tiles left of the panel's diagonal: which (row, column) has number t?
fn tile_of(t: u32, first: u32) -> vec2<u32> {
    // r tiles rows hold r (r + 1) / 2 + r first tiles. The root is rounded, so the row may be one off either way.
    let b = f32(2u * first + 1u);
    var r = u32(max(0.5 * (sqrt(b * b + 8.0 * f32(t)) - b), 0.0));
    if r * (r + 1u) / 2u + r * first > t {
        r -= 1u;
    }
    if (r + 1u) * (r + 2u) / 2u + (r + 1u) * first <= t {
        r += 1u;
    }
    return vec2<u32>(r, t - (r * (r + 1u) / 2u + r * first));
}

// Adds to four columns of one row of G, at the right edge to those that exist.
fn add(row: u32, column: u32, value: vec4<f32>) {
    if row >= p.rows || column >= p.d {
        return;
    }
    let at = (row * p.ldg + column) / 4u;
    let out = g[at] + value;
    if column + 4u <= p.d {
        g[at] = out;
        return;
    }
    g[at].x = out.x;
    if column + 1u < p.d { g[at].y = out.y; }
    if column + 2u < p.d { g[at].z = out.z; }
}

@compute @workgroup_size(TILE * TILE / 64u)
fn gram(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let first = (p.row0 + TILE - 1u) / TILE;
    let tile = tile_of(group.y * groups.x + group.x, first);
    let row0 = tile.x * TILE;
    let column0 = tile.y * TILE;
    if row0 >= p.rows || column0 >= p.d {
        return;
    }
    let t4 = TILE / 4u;

    // Staging: neighbours read a row of the tile. Columns past the end repeat the last group, they are not stored.
    let stages_i = TILE == 64u || thread < TILE;
    let stages_j = TILE == 64u || thread >= TILE * TILE / 64u - TILE;
    let part = thread % TILE;
    let part_token = 4u * (part / t4);
    let part_column = 4u * (part % t4);
    let i_column = min(p.row0 + row0 + part_column, p.d - 1u) / 4u;
    let j_column = min(column0 + part_column, p.d - 1u) / 4u;
    let to = part_token * t4 + part % t4;

    // A thread owns rows 4 ty.. and TILE / 2 + 4 ty.., columns likewise: reads of neighbours lie side by side.
    let tx = thread % (TILE / 8u);
    let ty = thread / (TILE / 8u);
    var acc: array<vec4<f32>, 16>;

    for (var token = 0u; token < p.n_tok; token += STEP) {
        var i_block: mat4x4<f32>;
        var j_block: mat4x4<f32>;
        if token + STEP <= p.n_tok {
            if stages_i { i_block = block_of_x(i_column, token + part_token); }
            if stages_j { j_block = block_of_x(j_column, token + part_token); }
        } else {
            if stages_i { i_block = last_block_of_x(i_column, token + part_token); }
            if stages_j { j_block = last_block_of_x(j_column, token + part_token); }
        }
        workgroupBarrier();
        if stages_i {
            i_tile[to] = i_block[0];
            i_tile[to + t4] = i_block[1];
            i_tile[to + 2u * t4] = i_block[2];
            i_tile[to + 3u * t4] = i_block[3];
        }
        if stages_j {
            j_tile[to] = j_block[0];
            j_tile[to + t4] = j_block[1];
            j_tile[to + 2u * t4] = j_block[2];
            j_tile[to + 3u * t4] = j_block[3];
        }
        workgroupBarrier();
        for (var k4 = 0u; k4 < STEP / 4u; k4++) {
            let i_from = 4u * k4 * t4 + ty;
            let j_from = 4u * k4 * t4 + tx;
            for (var k = 0u; k < 4u; k++) {
                let a0 = i_tile[i_from + k * t4];
                let a1 = i_tile[i_from + k * t4 + t4 / 2u];
                let b0 = j_tile[j_from + k * t4];
                let b1 = j_tile[j_from + k * t4 + t4 / 2u];
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

    let left = column0 + 4u * tx;
    let right = left + TILE / 2u;
    let top = row0 + 4u * ty;
    let bottom = top + TILE / 2u;
    add(top, left, acc[0]);
    add(top, right, acc[1]);
    add(top + 1u, left, acc[2]);
    add(top + 1u, right, acc[3]);
    add(top + 2u, left, acc[4]);
    add(top + 2u, right, acc[5]);
    add(top + 3u, left, acc[6]);
    add(top + 3u, right, acc[7]);
    add(bottom, left, acc[8]);
    add(bottom, right, acc[9]);
    add(bottom + 1u, left, acc[10]);
    add(bottom + 1u, right, acc[11]);
    add(bottom + 2u, left, acc[12]);
    add(bottom + 2u, right, acc[13]);
    add(bottom + 3u, left, acc[14]);
    add(bottom + 3u, right, acc[15]);
}
