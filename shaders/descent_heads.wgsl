// Coordinate descent inside a block of columns where the rows of a head are coupled: every weight in turn moves to its best code.
// With T = G E H, columns one after the other and inside a column rows one after the other, v = G δ over the rows done so far:
//   x = −(T_rj + v_r H_jj) / (G_rr H_jj s_r) + ε;  n = clamp(round(q + x), 0, max_code) − q, taken where 2 n x > (1 + 1e-4) n²;
//   v += G_:r s_r n;  after the column T_k += v H_jk for the later k of the block.
// ε = √(T heat_r / (G_rr H_jj)) / s_r · normal(hash(key, row, column)) anneals.
//
// t, codes [n_head d_head, cols]; g [n_head d_head, d_head], symmetric; h: the block's square of the metric at (h_row, h_col);
// change [rows, change_col + width]: v of every column of the block, since the product T += v H (matmul_nn) follows; moves [rows].
//
// One workgroup of 128 threads per head (d_head at most 128), a thread owns a row. All rows are judged at once; the first that moves is found
// (lib/first.wgsl), its row of G (neighbours in memory, as G is symmetric) is added to v, and the rows after it are judged again: three
// barriers per move and three per column, instead of one per weight; with subgroups it is one barrier, not three. T is staged as in descent_block (tile of 128 x 16, 10 KiB in
// all), a column's slot holds T until it is done and v afterwards.
//
// Cost: d_head width (width + 12) flops and 2 d_head a move, 12 bytes a weight, 2.3 flops a byte; the limit is the chain of barriers, some
// 100 cycles each: 16 columns with two moves each are about 15 thousand cycles a launch, a third of it with subgroups, heads in parallel. Compiled for navi21 (and
// gfx1100): 24 (36) VGPRs, no spills, 12 waves of 32 per SIMD.
// Expected share of memory bandwidth, not measured, for 32 heads of 128 rows, 0.8 MB, in 7 to 20 µs whatever the GPU: mobile and M series
// 40 to 60 %, RTX 4090 10 %, H100 3 %, three quarters of whose units have no head. Shares of peak f32 are below 5 % everywhere.

struct DescentHeadsParams {
    n_head: u32,
    d_head: u32,
    ld_g: u32,
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

@group(0) @binding(0) var<uniform> p: DescentHeadsParams;
@group(0) @binding(1) var<storage, read> g: array<f32>; // [n_head d_head, d_head], rows ld_g apart
@group(0) @binding(2) var<storage, read> h: array<f32>; // [h_row + width, h_col + width], rows ld_h apart
@group(0) @binding(3) var<storage, read> scale: array<f32>; // [n_head d_head, n_group]
@group(0) @binding(4) var<storage, read> heat: array<f32>; // [n_head d_head]
@group(0) @binding(5) var<storage, read> t: array<f32>; // [n_head d_head, cols], rows ld apart
@group(0) @binding(6) var<storage, read_write> codes: array<u32>; // [n_head d_head, cols], rows ld apart
@group(0) @binding(7) var<storage, read_write> change: array<f32>; // [n_head d_head, change_col + width], rows ld_change apart
@group(0) @binding(8) var<storage, read_write> moves: array<u32>; // [n_head d_head]

const THREADS = 128u;
const WIDTH = 16u;
const TILE_LD = 17u; // odd, so that a column of the tile lies in different banks
const MARGIN = 1e-4;

// T of the block, replaced column by column by v.
var<workgroup> tile: array<f32, 2176>; // [THREADS][TILE_LD]
var<workgroup> h_block: array<f32, 256>; // [WIDTH][WIDTH]
var<workgroup> scales: array<f32, 128>;

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

@compute @workgroup_size(128)
fn descent_heads(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    place: Place,
) {
    let thread = place.thread;
    let head = group.y * groups.x + group.x;
    if head >= p.n_head {
        return;
    }
    let row0 = head * p.d_head;
    let alive = thread < p.d_head;

    // When tensors move, a thread takes one column of every eighth row. What lies past the end repeats the last and is not stored.
    let column = min(thread % WIDTH, p.width - 1u);
    for (var i = thread / WIDTH; i < p.d_head; i += THREADS / WIDTH) {
        tile[i * TILE_LD + thread % WIDTH] = t[(row0 + i) * p.ld + p.col0 + column];
    }
    for (var i = thread / WIDTH; i < WIDTH; i += THREADS / WIDTH) {
        h_block[i * WIDTH + thread % WIDTH] = h[(p.h_row + min(i, p.width - 1u)) * p.ld_h + p.h_col + column];
    }
    clear_first(place);
    workgroupBarrier();

    let mine = min(thread, p.d_head - 1u);
    let row = row0 + mine;
    let own = thread * TILE_LD;
    let diagonal = g[row * p.ld_g + mine];
    let inverse_g = select(0.0, 1.0 / diagonal, diagonal > 0.0);
    let root = sqrt(p.temperature * heat[row] * inverse_g);
    let seed = mix_bits((p.row0 + row) ^ p.key);
    var count = 0u;
    var turn = 0u;
    for (var j = 0u; j < p.width; j++) {
        var gradient = tile[own + j];
        for (var k = 0u; k < j; k++) {
            gradient += tile[own + k] * h_block[k * WIDTH + j];
        }
        let h_jj = h_block[j * WIDTH + j];
        let inverse = select(0.0, 1.0 / h_jj, h_jj > 0.0);
        let s = scale[row * p.n_group + (p.col0 + j) / p.group];
        let inverse_s = 1.0 / s;
        scales[thread] = s;
        let at = row * p.ld + p.col0 + j;
        var q = f32(codes[at]);
        var noise = 0.0;
        if p.temperature > 0.0 {
            noise = normal(mix_bits(seed + p.col0 + j)) * root * sqrt(inverse) * inverse_s;
        }
        // x = still − pull v.
        let unit = inverse * inverse_g * inverse_s;
        let still = noise - gradient * unit;
        let pull = h_jj * unit;
        var v = 0.0;
        var start = 0u;
        loop {
            // The first row that moves, and its step.
            var key = NOBODY;
            let n = step_of(q, still - pull * v);
            if alive && thread >= start && n != 0.0 {
                key = (thread << 10u) | u32(n + 512.0);
            }
            let winner = least_of(place, key, turn);
            turn++;
            if winner == NOBODY {
                break;
            }
            let r = winner >> 10u;
            let step = f32(winner & 1023u) - 512.0;
            v += g[(row0 + r) * p.ld_g + mine] * (scales[r] * step);
            if thread == r {
                q += step;
                codes[at] = u32(q);
                count++;
            }
            start = r + 1u;
        }
        tile[own + j] = v;
    }
    if alive {
        moves[row] += count;
    }
    workgroupBarrier();
    if thread % WIDTH < p.width {
        for (var i = thread / WIDTH; i < p.d_head; i += THREADS / WIDTH) {
            change[(row0 + i) * p.ld_change + p.change_col + thread % WIDTH] = tile[i * TILE_LD + thread % WIDTH];
        }
    }
}
