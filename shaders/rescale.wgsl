// out[r, j] = source[row0 + r, j] · row[r] · column[j] as f32: a weight whose inputs or outputs take factors, or a part of its rows.
//
// One thread per element. Memory bound: 2 or 4 bytes in and 4 out per 2 flops; factors come from cache.

struct RescaleParams {
    rows: u32,
    cols: u32,
    row0: u32,
    ld_source: u32,
    ld_out: u32,
}

override SOURCE_DTYPE: u32;

@group(0) @binding(0) var<uniform> p: RescaleParams;
@group(0) @binding(1) var<storage, read> row: array<f32>; // [rows]
@group(0) @binding(2) var<storage, read> column: array<f32>; // [cols]
@group(0) @binding(3) var<storage, read> source: array<u32>; // [row0 + rows, ld_source] as stored
@group(0) @binding(4) var<storage, read_write> out: array<f32>; // [rows, ld_out]

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
fn rescale(
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
    out[r * p.ld_out + j] = stored((p.row0 + r) * p.ld_source + j) * row[r] * column[j];
}
