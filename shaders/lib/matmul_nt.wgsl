// What the shaders of C = alpha A Wᵀ + bias + beta C share: parameters, bindings, weights as stored, and the bias.

override W_DTYPE: u32;

struct MatmulNtParams {
    n: u32,
    m: u32,
    k: u32,
    lda: u32,
    ldw: u32,
    ldc: u32,
    a_offset: u32,
    w_offset: u32,
    c_offset: u32,
    a_batch: u32,
    w_batch: u32,
    c_batch: u32,
    batches: u32,
    bias_offset: u32,
    has_bias: u32,
    alpha: f32,
    beta: f32,
}

@group(0) @binding(0) var<uniform> p: MatmulNtParams;
@group(0) @binding(1) var<storage, read> a: array<vec4<Elem>>; // [batches][n, k], rows lda apart
@group(0) @binding(2) var<storage, read> w: array<vec4<u32>>; // [batches][m, k] as stored, rows ldw apart
@group(0) @binding(3) var<storage, read> bias: array<f32>; // [bias_offset + m], or unused
@group(0) @binding(4) var<storage, read_write> c: array<vec4<f32>>; // [batches][n, m], rows ldc apart

// The words that hold four elements of a row of W; i counts groups of four elements.
fn words(i: u32) -> vec4<u32> {
    if W_DTYPE == 0u {
        return w[i];
    }
    return w[i / 2u];
}

// Four elements out of their words; of 16-bit floats the words hold eight.
fn widen(words: vec4<u32>, odd: bool) -> vec4<f32> {
    if W_DTYPE == 0u {
        return bitcast<vec4<f32>>(words);
    }
    let four = select(words.xy, words.zw, odd);
    if W_DTYPE == 1u {
        return vec4<f32>(unpack2x16float(four.x), unpack2x16float(four.y));
    }
    return bitcast<vec4<f32>>(vec4<u32>(four.x << 16u, four.x & 0xffff0000u, four.y << 16u, four.y & 0xffff0000u));
}

// Zero past the end of k: padding may hold NaN, so it is replaced rather than multiplied by zero.
fn keep(value: vec4<f32>, k: u32) -> vec4<f32> {
    return select(vec4<f32>(), value, vec4<u32>(k, k + 1u, k + 2u, k + 3u) < vec4<u32>(p.k));
}

fn bias_at(column: u32) -> vec4<f32> {
    var out = vec4<f32>();
    if p.has_bias != 0u {
        let last = p.m - 1u;
        let start = p.bias_offset;
        out = vec4<f32>(
            bias[start + min(column, last)], bias[start + min(column + 1u, last)],
            bias[start + min(column + 2u, last)], bias[start + min(column + 3u, last)],
        );
    }
    return out;
}
