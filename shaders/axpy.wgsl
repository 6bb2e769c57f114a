// y[i] += alpha x[i]: the residual add, and differences.
//
// One thread per element. Memory bound: reads x and y and writes y once, 12 bytes per 2 flops.

struct AxpyParams {
    n: u32,
    alpha: f32,
}

@group(0) @binding(0) var<uniform> p: AxpyParams;
@group(0) @binding(1) var<storage, read> x: array<f32>; // [n]
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [n]

@compute @workgroup_size(256)
fn axpy(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + thread;
    if i < p.n {
        y[i] += p.alpha * x[i];
    }
}
