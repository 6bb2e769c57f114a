//! Noise that is the same on every engine: a hash of integers turned into a nearly normal number by exact arithmetic.

/// A permutation of the 32-bit integers that leaves no visible trace of its argument (Wellons' lowbias32).
#[inline(always)]
pub(super) fn mix(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// 1 / standard deviation of the sum of four bytes, whose variance is 4 (256² − 1) / 12 = 21845.
const UNIT: f32 = 0.006_765_846;

/// The sum of four uniform bytes, less its mean 510, over its standard deviation: mean 0, variance 1, at most ±3.45, kurtosis 2.7.
/// The sum is exact, so engines differ by the rounding of one product.
#[inline(always)]
pub(super) fn normal(bits: u32) -> f32 {
    let sum = (bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24);
    (sum as i32 - 510) as f32 * UNIT
}

#[cfg(test)]
mod tests {
    use super::{mix, normal};

    #[test]
    fn it_has_the_moments_of_a_normal_and_neighbours_do_not_agree() {
        let n = 200_000u32;
        let all: Vec<f64> = (0..n).map(|i| f64::from(normal(mix(mix(i / 500).wrapping_add(i % 500))))).collect();
        let mean = |f: &dyn Fn(usize) -> f64| (0..all.len() - 501).map(f).sum::<f64>() / (all.len() - 501) as f64;
        assert!(mean(&|i| all[i]).abs() < 0.01, "mean {}", mean(&|i| all[i]));
        assert!((mean(&|i| all[i] * all[i]) - 1.0).abs() < 0.01);
        assert!((mean(&|i| all[i].powi(4)) - 2.7).abs() < 0.05, "kurtosis {}", mean(&|i| all[i].powi(4)));
        assert!(mean(&|i| all[i] * all[i + 1]).abs() < 0.01, "neighbours in a row");
        assert!(mean(&|i| all[i] * all[i + 500]).abs() < 0.01, "neighbours in a column");
    }
}
