// What the shaders of GPTQ's column sweep with coupled rows share: parameters, bindings, and the way of a head's weights into workgroup memory
// and of its errors out of it.

struct GptqSweepHeadsParams {
    n_head: u32,
    d_head: u32,
    ld_v: u32,
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

@group(0) @binding(0) var<uniform> p: GptqSweepHeadsParams;
@group(0) @binding(1) var<storage, read> u: array<f32>; // [u_row + width, cols], rows ld_u apart
@group(0) @binding(2) var<storage, read> v: array<f32>; // [n_head d_head, d_head], rows ld_v apart
@group(0) @binding(3) var<storage, read> order: array<u32>; // [cols]
@group(0) @binding(4) var<storage, read> scale: array<f32>; // [n_head d_head, n_group]
@group(0) @binding(5) var<storage, read> zero: array<f32>; // [n_head d_head, n_group]
@group(0) @binding(6) var<storage, read_write> w: array<f32>; // [n_head d_head, cols] in quantization order, rows ld apart
@group(0) @binding(7) var<storage, read_write> err: array<f32>; // [n_head d_head, err_col + width], rows ld_err apart

const THREADS = 128u;
const WIDTH = 16u;
const TILE_LD = 17u; // odd, so that a column of the tile lies in different banks

// W of the block, replaced column by column by e.
var<workgroup> tile: array<f32, 2176>; // [THREADS][TILE_LD]
var<workgroup> u_block: array<f32, 256>; // [WIDTH][WIDTH]

// Brings the block's W and U into workgroup memory.
fn stage(thread: u32, row0: u32) {
    // When tensors move, a thread takes one column of every eighth row. What lies past the end repeats the last and is not stored.
    let position = p.col0 + min(thread % WIDTH, p.width - 1u);
    for (var i = thread / WIDTH; i < p.d_head; i += THREADS / WIDTH) {
        tile[i * TILE_LD + thread % WIDTH] = w[(row0 + i) * p.ld + position];
    }
    for (var i = thread / WIDTH; i < WIDTH; i += THREADS / WIDTH) {
        u_block[i * WIDTH + thread % WIDTH] = u[(p.u_row + min(i, p.width - 1u)) * p.ld_u + position];
    }
    workgroupBarrier();
}

// Column j of the row at `own`, errors of the columns before it compensated.
fn start_of(own: u32, j: u32) -> f32 {
    var start = tile[own + j];
    for (var k = 0u; k < j; k++) {
        start -= tile[own + k] * u_block[k * WIDTH + j];
    }
    return start;
}

// Writes the errors that the tile holds when all columns are done.
fn store_errors(thread: u32, row0: u32) {
    workgroupBarrier();
    if thread % WIDTH < p.width {
        for (var i = thread / WIDTH; i < p.d_head; i += THREADS / WIDTH) {
            err[(row0 + i) * p.ld_err + p.err_col + thread % WIDTH] = tile[i * TILE_LD + thread % WIDTH];
        }
    }
}
