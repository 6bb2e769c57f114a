// to[r, j] = source[r, order[j]] as f32: the working copy of a weight, its columns in the order in which they are quantized.
//
// One thread per element; writes are contiguous, reads are scattered within a row, which stays in cache. Memory bound.

struct GatherColumnsParams {
    rows: u32,
    cols: u32,
    ld_source: u32,
    ld_to: u32,
    row_source: u32,
    row_to: u32,
}

override SOURCE_DTYPE: u32;

@group(0) @binding(0) var<uniform> p: GatherColumnsParams;
@group(0) @binding(1) var<storage, read> order: array<u32>; // [cols], a permutation
@group(0) @binding(2) var<storage, read> source: array<u32>; // [.., ld_source] as stored, from row_source on
@group(0) @binding(3) var<storage, read_write> to: array<f32>; // [.., ld_to], from row_to on

// Element i of `source` as f32. SOURCE_DTYPE: 0 f32, 1 f16, 2 bf16; two values of a 2-byte type lie in one word, low half first.
fn stored(i: u32) -> f32 {
    if SOURCE_DTYPE == 0u {
        return bitcast<f32>(source[i]);
    }
    let pair = source[i / 2u];
    if SOURCE_DTYPE == 1u {
        let both = unpack2x16float(pair);
        return select(both.x, both.y, i % 2u == 1u);
    }
    return bitcast<f32>(select(pair << 16u, pair & 0xffff0000u, i % 2u == 1u));
}

@compute @workgroup_size(256)
fn gather_columns(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    let r = i / p.cols;
    let j = i % p.cols;
    if r >= p.rows {
        return;
    }
    // Columns come from data, so nothing has checked that they exist.
    let column = min(order[j], p.cols - 1u);
    to[(p.row_to + r) * p.ld_to + j] = stored((p.row_source + r) * p.ld_source + column);
}
