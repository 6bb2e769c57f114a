// x[i] = a x[i] + b, `steps` times: what a device can do in registers, which other kernels are compared with.
//
// A thread keeps 32 elements in eight vectors, 32 independent chains: four times what hides the latency of a multiply-add on any known GPU,
// and no more than 40 registers. Reads and writes are 8 bytes for 2 `steps` flops: with hundreds of steps nothing but arithmetic counts.

struct MultiplyAddParams {
    n: u32,
    steps: u32,
    a: f32,
    b: f32,
}

@group(0) @binding(0) var<uniform> p: MultiplyAddParams;
@group(0) @binding(1) var<storage, read_write> x: array<vec4<f32>>; // [n]

@compute @workgroup_size(256)
fn multiply_add(
    @builtin(workgroup_id) group: vec3u,
    @builtin(num_workgroups) groups: vec3u,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = ((group.y * groups.x + group.x) * 256u + thread) * 8u;
    if 4u * i >= p.n {
        return;
    }
    let a = vec4<f32>(p.a);
    let b = vec4<f32>(p.b);
    var x0 = x[i];
    var x1 = x[i + 1u];
    var x2 = x[i + 2u];
    var x3 = x[i + 3u];
    var x4 = x[i + 4u];
    var x5 = x[i + 5u];
    var x6 = x[i + 6u];
    var x7 = x[i + 7u];
    for (var step = 0u; step < p.steps; step++) {
        x0 = fma(x0, a, b);
        x1 = fma(x1, a, b);
        x2 = fma(x2, a, b);
        x3 = fma(x3, a, b);
        x4 = fma(x4, a, b);
        x5 = fma(x5, a, b);
        x6 = fma(x6, a, b);
        x7 = fma(x7, a, b);
    }
    x[i] = x0;
    x[i + 1u] = x1;
    x[i + 2u] = x2;
    x[i + 3u] = x3;
    x[i + 4u] = x4;
    x[i + 5u] = x5;
    x[i + 6u] = x6;
    x[i + 7u] = x7;
}
