// to[r, :] = source[r, :] where pick[r] ≠ 0: keeps the better of two results, row by row. Any 4-byte elements.
//
// One workgroup per row; rows that are not picked cost nothing. Memory bound.

struct SelectRowsParams {
    rows: u32,
    ld: u32,
}

@group(0) @binding(0) var<uniform> p: SelectRowsParams;
@group(0) @binding(1) var<storage, read> pick: array<u32>; // [rows]
@group(0) @binding(2) var<storage, read> source: array<u32>; // [rows, ld]
@group(0) @binding(3) var<storage, read_write> to: array<u32>; // [rows, ld]

@compute @workgroup_size(256)
fn select_rows(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let r = group.y * groups.x + group.x;
    if r >= p.rows || pick[r] == 0u {
        return;
    }
    for (var j = thread; j < p.ld; j += 256u) {
        to[r * p.ld + j] = source[r * p.ld + j];
    }
}
