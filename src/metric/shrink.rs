//! How far to trust an estimate: shrinkage towards a simpler one, by a split-half test.
//!
//! A₁, A₂ are estimates from two halves of the windows, T₁, T₂ simpler ones (fewer parameters, less noise, more bias). The shrunk half
//! (1 − r) A + r T comes closest to the other half's A, over both directions, at
//!   r = Σ_k ⟨A_k − T_k, A_k − A_l⟩ / Σ_k ‖A_k − T_k‖²,  l the other half,
//! which is the part of A's distance to T that does not repeat: the sampling noise (as in Ledoit and Wolf 2004, with the noise measured
//! instead of modelled), N / (S + N) of a distance S that is real. The mean of both halves has half the noise and is shrunk by
//!   ρ = (N / 2) / (S + N / 2) = r / (2 − r).
//! r is clamped to [0, 1].

/// ρ for the mean of two halves, matrices as flat slices of equal length.
pub fn shrinkage(a: [&[f32]; 2], t: [&[f32]; 2]) -> f32 {
    let (mut noise, mut distance) = (0.0f64, 0.0f64);
    for (own, other) in [(0, 1), (1, 0)] {
        for ((a, t), b) in a[own].iter().zip(t[own]).zip(a[other]) {
            let d = f64::from(a - t);
            noise += d * f64::from(a - b);
            distance += d * d;
        }
    }
    let half = if distance > 0.0 { (noise / distance).clamp(0.0, 1.0) } else { 1.0 };
    (half / (2.0 - half)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    #[test]
    fn noise_is_shrunk_away_and_signal_kept() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.next_u32() as f32 / 2f32.powi(31) - 1.0).collect() };
        let (signal, noise) = (random(10_000), [random(10_000), random(10_000)]);
        let zero = vec![0.0; 10_000];
        for (s, n) in [(1.0f32, 0.0f32), (1.0, 0.5), (1.0, 1.0), (0.0, 1.0)] {
            let half = |k: usize| signal.iter().zip(&noise[k]).map(|(a, b)| s * a + n * b).collect::<Vec<_>>();
            let rho = shrinkage([&half(0), &half(1)], [&zero, &zero]);
            let want = n * n / (2.0 * s * s + n * n);
            assert!((rho - want).abs() < 0.03, "{s} {n}: {rho}, not {want}");
        }
        assert_eq!(shrinkage([&zero, &zero], [&zero, &zero]), 1.0);
    }
}
