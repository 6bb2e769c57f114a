//! Scales, minima and steps as files hold them: what `shaders/lib/stored.wgsl` is in shaders. Types by code: 0 f32, 1 f16, 2 bf16.

use crate::tensor::Dtype;

/// The smallest normal number of a type.
pub fn smallest(dtype: u32) -> f32 {
    if dtype == 1 { 6.103_515_6e-5 } else { f32::MIN_POSITIVE }
}

/// A positive scale as it is stored: none may vanish, so smaller ones are raised to the smallest normal number.
#[inline(always)]
pub fn stored_scale(x: f32, dtype: u32) -> f32 {
    Dtype::from_code(dtype).round(x).max(smallest(dtype))
}

/// A minimum as it is stored. Shaders have no subnormal numbers, so there are none but f16's.
#[inline(always)]
pub fn stored_minimum(x: f32, dtype: u32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 } else { Dtype::from_code(dtype).round(x) }
}

/// The nearest step that can be stored and is not 0.
#[inline(always)]
pub fn stored_step(x: f32, dtype: u32) -> f32 {
    let least = if dtype == 1 { 1.0 / 16_777_216.0 } else { f32::MIN_POSITIVE };
    Dtype::from_code(dtype).round(x).max(least)
}
