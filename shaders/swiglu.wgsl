// SwiGLU: out[i] = gate[i] / (1 + exp(−gate[i])) · up[i].
//
// One thread per element. Memory bound: reads gate and up and writes out once.

struct SwigluParams {
    n: u32,
}

@group(0) @binding(0) var<uniform> p: SwigluParams;
@group(0) @binding(1) var<storage, read> gate: array<f32>; // [n]
@group(0) @binding(2) var<storage, read> up: array<f32>; // [n]
@group(0) @binding(3) var<storage, read_write> out: array<Elem>; // [n]

@compute @workgroup_size(256)
fn swiglu(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    if i < p.n {
        let g = gate[i];
        // e^88 is finite; WGSL may assume that nothing else is.
        out[i] = Elem(g / (1.0 + exp(min(-g, 88.0))) * up[i]);
    }
}
