// One iteration of AdaRound (Nagel et al., ICML 2020) on a quadratic loss whose gradient is known:
//   soft weight  ŵ = s (clamp(b + h(v) + z, 0, max_code) − z),  b = floor(start / s),  h(v) = clamp(1.2 sigmoid(v) − 0.1, 0, 1)
//   gradient     g = [quadratic · M · s · 1(0 ≤ b + h + z ≤ max_code) − 2 lambda beta sign(2h − 1) |2h − 1|^(beta − 1)] h'(v)
//   Adam         moment = 0.9 moment + 0.1 g, square = 0.999 square + 0.001 g², v −= rate · moment / (root · sqrt(square) + 1e-8)
// with M = (G) E H in `e` before and E = ŵ − wanted in `e` after, so that a product and this launch are one iteration.
// phase 0 begins: h(v) = start / s − b, moments 0, E written, M not read. Phase 1 is an iteration. Phase 2 ends: `e` becomes ŵ with
// h = 1 where v ≥ 0 and 0 elsewhere. Phase 3 writes E as v has it and changes nothing else. Phase 4 is an iteration that leaves the change of E.
// A launch works on the columns col0..col0 + cols; in `e` they are e_col..e_col + cols, so that it may hold just those.
//
// Where h is 0 or 1, g is 0. Once what is left of the moment no longer changes v, it is set to 0, and the weight is at rest: v, moment and square
// stay as they are, which alters no v.
//
// One thread per element, neighbours side by side. Memory bound: 6 floats in, 4 out (40 bytes) per about 50 flops, four of them
// transcendental; of weights at rest, which soon are nearly all, phase 4 reads two floats and writes one. Grids are shared by `group`
// neighbours and come from cache. 8 storage bindings, which every WebGPU device has: that is why M and E share one.

struct AdaroundStepParams {
    rows: u32,
    col0: u32,
    cols: u32,
    ld: u32,
    ld_e: u32,
    e_col: u32,
    group: u32,
    n_group: u32,
    max_code: u32,
    phase: u32,
    quadratic: f32,
    lambda: f32,
    beta: f32,
    rate: f32,
    root: f32,
}

@group(0) @binding(0) var<uniform> p: AdaroundStepParams;
@group(0) @binding(1) var<storage, read> start: array<f32>; // [rows, ld]
@group(0) @binding(2) var<storage, read> wanted: array<f32>; // [rows, ld]
@group(0) @binding(3) var<storage, read> scale: array<f32>; // [rows, n_group]
@group(0) @binding(4) var<storage, read> zero: array<f32>; // [rows, n_group]
@group(0) @binding(5) var<storage, read_write> v: array<f32>; // [rows, ld]
@group(0) @binding(6) var<storage, read_write> moment: array<f32>; // [rows, ld]
@group(0) @binding(7) var<storage, read_write> square: array<f32>; // [rows, ld]
@group(0) @binding(8) var<storage, read_write> e: array<f32>; // [rows, ld_e]

// From here on h(v) is 1, from its negative on 0: a little more than ln 11.
const END_OF_H = 2.398;

fn sigmoid(x: f32) -> f32 {
    // e^88 is finite; WGSL may assume that nothing else is.
    return 1.0 / (1.0 + exp(min(-x, 88.0)));
}

// h before it is clamped, of a sigmoid.
fn stretch(sig: f32) -> f32 {
    return 1.2 * sig - 0.1;
}

// The softly rounded weight.
fn soft(value: f32, below: f32, s: f32, z: f32, most: f32) -> f32 {
    let h = clamp(stretch(sigmoid(value)), 0.0, 1.0);
    return s * (clamp(below + h, 0.0, most) - z);
}

// What Adam is given: the gradient with respect to v.
fn gradient(value: f32, m: f32, below: f32, s: f32, most: f32) -> f32 {
    let sig = sigmoid(value);
    let stretched = stretch(sig);
    if stretched <= 0.0 || stretched >= 1.0 {
        return 0.0;
    }
    let slope = 1.2 * sig * (1.0 - sig);
    let code = below + stretched;
    let inside = select(0.0, 1.0, code >= 0.0 && code <= most);
    var sum = p.quadratic * m * s * inside;
    if p.lambda != 0.0 {
        let off = 2.0 * stretched - 1.0;
        // 0 to any power is 0; a logarithm needs more than that.
        sum -= 2.0 * p.lambda * p.beta * sign(off) * pow(max(abs(off), 1e-30), p.beta - 1.0);
    }
    return sum * slope;
}

@compute @workgroup_size(256)
fn adaround_step(
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
    let at = r * p.ld + p.col0 + j;
    let at_e = r * p.ld_e + p.e_col + j;
    if p.phase == 4u && moment[at] == 0.0 && abs(v[at]) >= END_OF_H {
        e[at_e] = 0.0;
        return;
    }
    let grid = r * p.n_group + (p.col0 + j) / p.group;
    let s = scale[grid];
    let z = zero[grid];
    let most = f32(p.max_code);
    let steps = start[at] / s + (z - round(z));
    let whole = floor(steps);
    let below = whole + round(z);

    if p.phase == 2u {
        let h = select(0.0, 1.0, v[at] >= 0.0);
        e[at_e] = s * (clamp(below + h, 0.0, most) - z);
        return;
    }
    var value = v[at];
    var reference = wanted[at];
    if p.phase == 4u {
        reference = soft(value, below, s, z, most);
    }
    if p.phase == 0u {
        // The inverse of h: between ln(1 / 11) and ln 11.
        let share = steps - whole;
        value = log((share + 0.1) / (1.1 - share));
        moment[at] = 0.0;
        square[at] = 0.0;
        v[at] = value;
    } else if p.phase == 1u || p.phase == 4u {
        let stretched = stretch(sigmoid(value));
        let ended = stretched <= 0.0 || stretched >= 1.0;
        let g = gradient(value, e[at_e], below, s, most);
        let before = moment[at];
        let first = 0.9 * before + 0.1 * g;
        var second = square[at];
        if !(ended && before == 0.0) {
            second = 0.999 * second + 0.001 * g * g;
        }
        let next = value - p.rate * first / (p.root * sqrt(second) + 1e-8);
        moment[at] = select(first, 0.0, ended && next == value);
        square[at] = second;
        value = next;
        v[at] = value;
    }
    e[at_e] = soft(value, below, s, z, most) - reference;
}
