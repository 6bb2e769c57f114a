// Coordinate descent inside a block of columns, rows independent: every weight in turn moves to its best code while all others stay.
// With M = E H the best value lies x = −M_j / (H_jj s) steps away from the code q:
//   q' = clamp(round(q + x + ε), 0, max_code), taken where 2 n x > (1 + 1e-4) n², n = q' − q;  δ = s n;  M_k += δ H_jk for the later k.
// ε = √(T heat_r / H_jj) / s · normal(hash(key, row, column)) anneals; a noisy step is judged by x + ε.
//
// m, codes [rows, cols]; h: the block's square of the metric at (h_row, h_col); change [rows, change_col + width]: δ of every weight of the
// block; moves [rows] counts codes that changed. M is only read: the product M += change H (matmul_nn) follows.
//
// One workgroup of 64 threads per 64 rows, a thread owns a row. M is staged through one tile of workgroup memory (12.4 KiB with H), read
// along rows; a column's slot holds M until it is done and δ afterwards, so a thread gathers M_j + Σ_k δ_k H_kj from its own row of the
// tile: no barrier inside the sweep. Codes are read by their thread, whose 32 columns are one line of memory, and written where they change.
//
// Cost: rows width (width + 12) flops; 12 bytes a weight: 3.7 flops a byte at width 32. Neither is the limit: the chain of 32 roundings is,
// each after a sum as long as the column's number, from workgroup memory, 10 to 20 thousand cycles a launch; and launches of a few thousand
// rows do not fill a GPU. The products that follow take most of the time. Compiled for navi21 and gfx1100: 24 VGPRs, no spills, 6 waves of
// 32 per SIMD, limited by the tile of M.
// Expected share of memory bandwidth, not measured, for 4096 rows, 1.6 MB: mobile and M series 40 to 65 %, 16 to 25 µs of traffic next to a
// chain of 10 to 15; RTX 4090 15 to 25 %, H100 5 to 8 %, whose traffic takes 1.6 and 0.5 µs. Shares of peak f32 are below 2 % there, below
// 10 % elsewhere.

struct DescentBlockParams {
    rows: u32,
    cols: u32,
    ld: u32,
    col0: u32,
    width: u32,
    h_row: u32,
    h_col: u32,
    ld_h: u32,
    ld_change: u32,
    change_col: u32,
    group: u32,
    n_group: u32,
    max_code: u32,
    row0: u32,
    key: u32,
    temperature: f32,
}

@group(0) @binding(0) var<uniform> p: DescentBlockParams;
@group(0) @binding(1) var<storage, read> h: array<f32>; // [h_row + width, h_col + width], rows ld_h apart
@group(0) @binding(2) var<storage, read> scale: array<f32>; // [rows, n_group]
@group(0) @binding(3) var<storage, read> heat: array<f32>; // [rows]
@group(0) @binding(4) var<storage, read> m: array<f32>; // [rows, cols], rows ld apart
@group(0) @binding(5) var<storage, read_write> codes: array<u32>; // [rows, cols], rows ld apart
@group(0) @binding(6) var<storage, read_write> change: array<f32>; // [rows, change_col + width], rows ld_change apart
@group(0) @binding(7) var<storage, read_write> moves: array<u32>; // [rows]

const ROWS = 64u;
const WIDTH = 32u;
const TILE_LD = 33u; // odd, so that a column of the tile lies in different banks
const MARGIN = 1e-4;

// M of the block, replaced column by column by the change.
var<workgroup> tile: array<f32, 2112>; // [ROWS][TILE_LD]
var<workgroup> h_block: array<f32, 1024>; // [WIDTH][WIDTH]

// Wellons' lowbias32.
fn mix_bits(x: u32) -> u32 {
    var y = (x ^ (x >> 16u)) * 0x7feb352du;
    y = (y ^ (y >> 15u)) * 0x846ca68bu;
    return y ^ (y >> 16u);
}

// The sum of four bytes, less its mean, over its standard deviation √21845.
fn normal(bits: u32) -> f32 {
    let sum = (bits & 255u) + ((bits >> 8u) & 255u) + ((bits >> 16u) & 255u) + (bits >> 24u);
    return f32(i32(sum) - 510) * 0.006765846;
}

// Steps from code q to the best code, whose distance is x.
fn step_of(q: f32, x: f32) -> f32 {
    let n = clamp(round(q + x), 0.0, f32(p.max_code)) - q;
    return select(0.0, n, 2.0 * n * x > (1.0 + MARGIN) * n * n);
}

@compute @workgroup_size(64)
fn descent_block(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row0 = group.x * ROWS;
    let rows = min(ROWS, p.rows - row0);

    // When tensors move, a thread takes one column of every other row. Rows and columns past the end repeat the last; neither is stored.
    let column = min(thread % WIDTH, p.width - 1u);
    let half = thread / WIDTH;
    for (var i = half; i < ROWS; i += 2u) {
        tile[i * TILE_LD + thread % WIDTH] = m[(row0 + min(i, rows - 1u)) * p.ld + p.col0 + column];
    }
    for (var i = half; i < WIDTH; i += 2u) {
        h_block[i * WIDTH + thread % WIDTH] = h[(p.h_row + min(i, p.width - 1u)) * p.ld_h + p.h_col + column];
    }
    workgroupBarrier();

    let row = row0 + min(thread, rows - 1u);
    let own = thread * TILE_LD;
    let root = sqrt(p.temperature * heat[row]);
    let seed = mix_bits((p.row0 + row) ^ p.key);
    var count = 0u;
    for (var j = 0u; j < p.width; j++) {
        var gradient = tile[own + j];
        for (var k = 0u; k < j; k++) {
            gradient += tile[own + k] * h_block[k * WIDTH + j];
        }
        let h_jj = h_block[j * WIDTH + j];
        let inverse = select(0.0, 1.0 / h_jj, h_jj > 0.0);
        let s = scale[row * p.n_group + (p.col0 + j) / p.group];
        let inverse_s = 1.0 / s;
        let at = row * p.ld + p.col0 + j;
        let q = f32(codes[at]);
        var noise = 0.0;
        if p.temperature > 0.0 {
            noise = normal(mix_bits(seed + p.col0 + j)) * root * sqrt(inverse) * inverse_s;
        }
        let x = noise - gradient * inverse * inverse_s;
        let n = step_of(q, x);
        // Threads past the last row repeat it and must not write.
        if n != 0.0 && thread < rows {
            codes[at] = u32(q + n);
            count++;
        }
        tile[own + j] = n * s;
    }
    if thread < rows {
        moves[row] += count;
    }
    workgroupBarrier();
    if thread % WIDTH < p.width {
        for (var i = half; i < rows; i += 2u) {
            change[(row0 + i) * p.ld_change + p.change_col + thread % WIDTH] = tile[i * TILE_LD + thread % WIDTH];
        }
    }
}
