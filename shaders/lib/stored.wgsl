// Scales, minima and steps as files hold them: f32 (dtype 0), f16 (1) or bf16 (2), to nearest, ties to even. Shaders have no subnormal
// numbers, so there are none but f16's, which are normal in f32.

// The smallest normal number.
fn smallest(dtype: u32) -> f32 {
    return select(1.17549435e-38, 6.103515625e-5, dtype == 1u);
}

fn largest(dtype: u32) -> f32 {
    return select(select(3.40282347e38, 65504.0, dtype == 1u), 3.38953139e38, dtype == 2u);
}

// A positive number to the bits that the type's mantissa has: the nearest one of the type between the smallest and the largest.
fn with_mantissa(x: f32, dtype: u32) -> f32 {
    let dropped = select(select(0u, 13u, dtype == 1u), 16u, dtype == 2u);
    let bits = bitcast<u32>(x);
    let unit = 1u << dropped;
    return bitcast<f32>((bits + (unit - 1u) / 2u + ((bits >> dropped) & u32(dropped > 0u))) & ~(unit - 1u));
}

// To a whole number of f16's smallest one.
fn subnormal(x: f32) -> f32 {
    return round(x * 16777216.0) / 16777216.0;
}

// A positive scale: none may vanish, so smaller ones are raised to the smallest normal number.
fn stored_scale(x: f32, dtype: u32) -> f32 {
    return max(with_mantissa(x, dtype), smallest(dtype));
}

// A minimum of either sign.
fn stored_minimum(x: f32, dtype: u32) -> f32 {
    if abs(x) < smallest(dtype) {
        return select(0.0, subnormal(x), dtype == 1u);
    }
    return select(1.0, -1.0, x < 0.0) * with_mantissa(abs(x), dtype);
}

// A step, which is positive and may be smaller than a scale may be.
fn stored_step(x: f32, dtype: u32) -> f32 {
    if dtype == 1u && x < smallest(dtype) {
        return max(subnormal(x), 1.0 / 16777216.0);
    }
    return max(with_mantissa(x, dtype), 1.17549435e-38);
}
