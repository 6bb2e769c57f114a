// Dense bit packing along a row: code k of `bits` bits occupies bits [k · bits, (k + 1) · bits) of a stream of 32-bit
// little-endian words. Codes may straddle words.
//
// One thread per word, which gathers the up to 32 / bits + 2 codes that reach into it. Memory bound: reads one word per code.

struct PackBitsParams {
    rows: u32,
    cols: u32,
    ld: u32,
    bits: u32,
    words: u32,
}

@group(0) @binding(0) var<uniform> p: PackBitsParams;
@group(0) @binding(1) var<storage, read> codes: array<u32>; // [rows, ld], each below 2^bits
@group(0) @binding(2) var<storage, read_write> packed: array<u32>; // [rows, words], words = ceil(cols · bits / 32)

@compute @workgroup_size(256)
fn pack_bits(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    let r = i / p.words;
    if r >= p.rows {
        return;
    }
    let start = i % p.words * 32u;
    var word = 0u;
    for (var k = start / p.bits; k < p.cols && k * p.bits < start + 32u; k++) {
        let code = codes[r * p.ld + k];
        let at = k * p.bits;
        if at < start {
            word |= code >> (start - at);
        } else {
            word |= code << (at - start);
        }
    }
    packed[i] = word;
}
