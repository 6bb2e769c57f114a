// Embedding gather: out[t, :] = table[ids[t], :] for the ids in rows row0..row0 + rows of the whole table; other tokens are
// left alone, so a table in several buffers is gathered by several launches.
//
// One workgroup per token. Memory bound: reads and writes one row per token.

struct EmbedParams {
    n_tok: u32,
    d: u32,
    ld_table: u32,
    ld_out: u32,
    row0: u32,
    rows: u32,
}

override TABLE_DTYPE: u32;

@group(0) @binding(0) var<uniform> p: EmbedParams;
@group(0) @binding(1) var<storage, read> ids: array<u32>; // [n_tok]
@group(0) @binding(2) var<storage, read> table: array<u32>; // [rows, ld_table] as stored
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // [n_tok, ld_out]

// Element i of `table` as f32. TABLE_DTYPE: 0 f32, 1 f16, 2 bf16; two values of a 2-byte type lie in one word, low half first.
fn stored(i: u32) -> f32 {
    if TABLE_DTYPE == 0u {
        return bitcast<f32>(table[i]);
    }
    let pair = table[i / 2u];
    if TABLE_DTYPE == 1u {
        let both = unpack2x16float(pair);
        return select(both.x, both.y, i % 2u == 1u);
    }
    return bitcast<f32>(select(pair << 16u, pair & 0xffff0000u, i % 2u == 1u));
}

@compute @workgroup_size(256)
fn embed(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let t = group.y * groups.x + group.x;
    if t >= p.n_tok {
        return;
    }
    let id = ids[t];
    if id < p.row0 || id - p.row0 >= p.rows {
        return;
    }
    for (var j = thread; j < p.d; j += 256u) {
        out[t * p.ld_out + j] = stored((id - p.row0) * p.ld_table + j);
    }
}
