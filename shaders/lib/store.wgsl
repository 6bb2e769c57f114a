// Four columns of one row of the product's result C: sum + beta C[at]; with beta 0 the old C is not read.

fn blend(sum: vec4<f32>, at: u32) -> vec4<f32> {
    if p.beta == 0.0 {
        return sum;
    }
    return fma(vec4<f32>(p.beta), c[at], sum);
}

// At the right edge only those columns that exist, since a view may continue behind them.
fn store(at: u32, column: u32, sum: vec4<f32>) {
    if column >= p.m {
        return;
    }
    let out = blend(sum, at);
    if column + 4u <= p.m {
        c[at] = out;
        return;
    }
    c[at].x = out.x;
    if column + 1u < p.m { c[at].y = out.y; }
    if column + 2u < p.m { c[at].z = out.z; }
}
