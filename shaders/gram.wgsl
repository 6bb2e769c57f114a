// G[i, j] += Σ_t x[t, i] x[t, j] for j ≤ i: the column metric of every linear layer that reads X. Half of the symmetric product.
//
// X [n_tok, d] is Elem (f32 or f16), sums are f32. G may be split into panels of rows: a launch fills rows row0 .. row0 + rows, from row g_row of g on. Above
// the diagonal G holds anything afterwards. Row strides and row0 are multiples of 8 and buffers hold the padding of their last row.
// Two-level sums: the launch sums its tokens in registers and adds the result to G once.
//
// One workgroup per tile of TILE x TILE (64 or 128) on or below the diagonal, found from a linear index, so that none is idle; TILE² / 64
// threads, 8 x 8 sums each. Rows of X are k-major as they are: both operands go from 128-bit loads (64-bit for f16) to 128-bit stores in
// workgroup memory (8 KiB at 64, 16 KiB at 128) without a transposition. It is double-buffered: the loads of the next eight tokens are
// under way while 512 multiply-adds per thread use the last eight, and one barrier a step is enough.
//
// Cost: n_tok d (d + 1) flops; each element of X is read d / TILE times by other workgroups: 16 flops a byte at TILE 64 (f32; 32 for f16),
// twice that at 128, from the last-level cache; memory sees a few passes over X. 2 flops per byte of workgroup memory.
// Compiled for navi21 (and gfx1100): 104 (108) VGPRs, no spills, 8 waves of 32 per SIMD, limited by registers and workgroup memory alike;
// the loop over tokens, staging included, is 512 multiply-adds of 527 vector instructions and 32 ds_read_b128.
// Expected share of peak f32, not measured, for a d of thousands, counting useful flops; 1 / (d / 64 + 1) of the work is the upper half of
// tiles on the diagonal. Mobile: 35 to 50 %, few registers. M series: 60 to 70 %. RTX 4090: 65 to 80 %; at 16 flops a byte its cache of
// some 5 TB/s only just feeds 83 TFLOP/s, so TILE 128 suits it. H100: 70 to 80 % of 67 TFLOP/s without tensor cores.

override TILE: u32;

struct GramParams {
    n_tok: u32,
    d: u32,
    ldx: u32,
    ldg: u32,
    row0: u32,
    rows: u32,
    g_row: u32,
}

@group(0) @binding(0) var<uniform> p: GramParams;
@group(0) @binding(1) var<storage, read> x: array<vec4<Elem>>; // [n_tok, d], rows ldx apart
@group(0) @binding(2) var<storage, read_write> g: array<vec4<f32>>; // its row g_row is row row0 of [d, d], rows ldg apart

const STEP = 8u;

// Four columns of X at one token; [2][STEP][TILE / 4]: the columns that are rows of G, and those that are columns of G. One half is read
// while the next step's tokens go to the other.
var<workgroup> i_tile: array<vec4<f32>, TILE * 4u>;
var<workgroup> j_tile: array<vec4<f32>, TILE * 4u>;

// Where a row of X starts; tokens past the end repeat the last.
fn row_of_x(token: u32) -> u32 {
    return min(token, p.n_tok - 1u) * (p.ldx / 4u);
}

// Four columns at a token of the first step, zero past the end.
fn first_of_i(column: u32, token: u32) -> vec4<f32> {
    return select(vec4<f32>(), vec4<f32>(x[column + row_of_x(token)]), token < p.n_tok);
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
    let at = ((p.g_row + row) * p.ldg + column) / 4u;
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
    if row0 >= p.rows || column0 >= p.d || p.n_tok == 0u {
        return;
    }
    let t4 = TILE / 4u;

    // Staging: neighbours read a row of the tile; at TILE 64 a thread has two tokens, four apart. Columns past the end repeat the last
    // group, they are not stored.
    let twice = TILE == 64u;
    let part = thread / t4;
    let i_column = min(p.row0 + row0 + 4u * (thread % t4), p.d - 1u) / 4u;
    let j_column = min(column0 + 4u * (thread % t4), p.d - 1u) / 4u;

    // A thread owns rows 4 ty.. and TILE / 2 + 4 ty.., columns likewise: reads of neighbours lie side by side.
    let tx = thread % (TILE / 8u);
    let ty = thread / (TILE / 8u);
    var acc: array<vec4<f32>, 16>;

    // The last tokens come first, since they may be fewer than a step: the loop knows whole steps only.
    let last = (p.n_tok - 1u) / STEP * STEP + part;
    i_tile[thread] = first_of_i(i_column, last);
    j_tile[thread] = vec4<f32>(x[j_column + row_of_x(last)]);
    if twice {
        i_tile[thread + 64u] = first_of_i(i_column, last + 4u);
        j_tile[thread + 64u] = vec4<f32>(x[j_column + row_of_x(last + 4u)]);
    }
    workgroupBarrier();
    var half = 0u;
    for (var token = 0u; token < p.n_tok; token += STEP) {
        // The next step's loads are under way while this one is summed; the last turn loads in vain.
        let next = token + part;
        let at = row_of_x(next);
        let next_i = x[i_column + at];
        let next_j = x[j_column + at];
        var later_i: vec4<Elem>;
        var later_j: vec4<Elem>;
        if twice {
            let later = row_of_x(next + 4u);
            later_i = x[i_column + later];
            later_j = x[j_column + later];
        }
        for (var k4 = 0u; k4 < STEP / 4u; k4++) {
            let i_from = half + 4u * k4 * t4 + ty;
            let j_from = half + 4u * k4 * t4 + tx;
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
        half = 2u * TILE - half;
        i_tile[half + thread] = vec4<f32>(next_i);
        j_tile[half + thread] = vec4<f32>(next_j);
        if twice {
            i_tile[half + thread + 64u] = vec4<f32>(later_i);
            j_tile[half + thread + 64u] = vec4<f32>(later_j);
        }
        workgroupBarrier();
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
