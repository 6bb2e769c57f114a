// The reverse of pack_bits: code k of a row is bits [k · bits, (k + 1) · bits) of its stream of 32-bit little-endian words.
//
// One thread per code, which reads the one or two words that hold it. Memory bound: writes one word per code.

struct UnpackBitsParams {
    rows: u32,
    cols: u32,
    ld: u32,
    bits: u32,
    words: u32,
}

@group(0) @binding(0) var<uniform> p: UnpackBitsParams;
@group(0) @binding(1) var<storage, read> packed: array<u32>; // [rows, words], words = ceil(cols · bits / 32)
@group(0) @binding(2) var<storage, read_write> codes: array<u32>; // [rows, ld]

@compute @workgroup_size(256)
fn unpack_bits(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    let r = i / p.cols;
    let k = i % p.cols;
    if r >= p.rows {
        return;
    }
    let word = r * p.words + k * p.bits / 32u;
    let shift = k * p.bits % 32u;
    var code = packed[word] >> shift;
    if shift + p.bits > 32u {
        code |= packed[word + 1u] << (32u - shift);
    }
    codes[r * p.ld + k] = code & ((1u << p.bits) - 1u);
}
