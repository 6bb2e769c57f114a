//! Elementary functions that the compiler can vectorise.

/// e^x for f32, relative error below 2e-7; 0 below −87, finite and huge above 88.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2; e^r by its Taylor polynomial of degree 7 (remainder below 2^-27), 2^n by exponent bits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    /// 1.5 · 2^23: adding it rounds to the nearest integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HI) - n * LN2_LO;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { p * power }
}

/// ln x for positive normal x, error below 2e-7 times the larger of |ln x| and 1. The exponent by bits, the mantissa m in [√½, √2) by
/// 2 artanh(t), t = (m − 1) / (m + 1), |t| < 0.172, whose series is cut where the rest is below 1e-9.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    const SQRT_HALF: u32 = 0x3f35_04f3;
    let shifted = x.to_bits().wrapping_sub(SQRT_HALF);
    let exponent = (shifted as i32 >> 23) as f32;
    let m = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(SQRT_HALF));
    let t = (m - 1.0) / (m + 1.0);
    let t2 = t * t;
    let mut p = 1.0 / 9.0;
    for c in [1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0] {
        p = p * t2 + c;
    }
    exponent * std::f32::consts::LN_2 + 2.0 * t * p
}

#[cfg(test)]
mod tests {
    use super::{exp, ln};

    #[test]
    fn ln_is_accurate_over_its_range() {
        let all = (-126..128).flat_map(|e| (0..1000).map(move |i| 2f32.powi(e) * (1.0 + i as f32 * 1e-3)));
        for x in all.chain((1..100_000).map(|i| i as f32 * 2e-5)) {
            let want = f64::from(x).ln();
            assert!((f64::from(ln(x)) - want).abs() <= 2e-7 * want.abs().max(1.0), "ln({x}) = {} instead of {want}", ln(x));
        }
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        // −87000 · 1e-3 rounds to below −87, where the result is 0.
        for i in -86_999..88_000 {
            let x = i as f32 * 1e-3;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() <= 2e-7 * want, "exp({x}) = {} instead of {want}", exp(x));
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(1000.0).is_finite());
    }
}
