//! The triangular factor that GPTQ's error feedback needs: H⁻¹ = Uᵀ U, U upper triangular, columns in quantization order.
//!
//! 1. Dead inputs (H_jj = 0) are cut off: unit diagonal, no coupling, so their weights are rounded by themselves.
//! 2. Equilibrate: Ĥ = D^-½ H D^-½ has unit diagonal; adding λ I then damps every channel alike, whatever its scale.
//! 3. Reverse rows and columns, factor (Ĥ + λ I) = L Lᵀ in f64, invert L, reverse back: Û = P L⁻¹ P is upper triangular with
//!    Ûᵀ Û = (Ĥ + λ I)⁻¹. One factorisation, no explicit inverse. U = Û D^-½.
//! 4. Where the factorisation fails, λ is raised tenfold and the final value recorded.
//!
//! Cost: d³/3 flops for the factorisation and d³/3 for the triangular inverse, in f64 on the host; 16 d² bytes.

use crate::{Error, Result};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Mat, Par, Side};

/// U and how it was made.
#[derive(Clone, Debug)]
pub struct Factor {
    pub d: usize,
    /// Original column of each position.
    pub order: Vec<u32>,
    /// [d, d], upper triangular, rows and columns in `order`.
    pub u: Vec<f32>,
    /// λ that was used, relative to the unit diagonal.
    pub damping: f64,
    /// How often it had to be raised.
    pub raised: u32,
    /// Inputs that are zero on all calibration tokens.
    pub dead: usize,
}

/// λ above which a matrix is called hopeless: its off-diagonal part would be scaled down to nothing.
const MAX_DAMPING: f64 = 1e3;

/// Factors H [d, d]. With `act_order` columns stand by decreasing diag(H), ties by index, else as they are.
///
/// # Errors
/// `Kind::Numeric` when even strong damping does not help: H is not a Gram matrix.
pub fn factor(h: &[f32], d: usize, act_order: bool, damping: f64) -> Result<Factor> {
    let mut order: Vec<u32> = (0..d as u32).collect();
    if act_order {
        let diag = |j: u32| h[j as usize * d + j as usize];
        order.sort_by(|a, b| diag(*b).total_cmp(&diag(*a)));
    }
    factor_in(order, h, d, damping)
}

/// Factors H [d, d] with columns in `order`.
///
/// # Errors
/// As [`factor`].
pub fn factor_in(order: Vec<u32>, h: &[f32], d: usize, damping: f64) -> Result<Factor> {
    let diag = |j: usize| f64::from(h[j * d + j]);
    let dead = (0..d).filter(|j| diag(*j) <= 0.0).count();
    let inv_sqrt: Vec<f64> = (0..d).map(|j| if diag(j) > 0.0 { diag(j).sqrt().recip() } else { 1.0 }).collect();
    // Position i of the reversed matrix is position d − 1 − i of the quantization order.
    let column = |i: usize| order[d - 1 - i] as usize;

    let mut lambda = damping;
    for raised in 0.. {
        let a = Mat::from_fn(d, d, |i, j| {
            let (ci, cj) = (column(i), column(j));
            if i == j { 1.0 + lambda } else { f64::from(h[ci * d + cj]) * inv_sqrt[ci] * inv_sqrt[cj] }
        });
        if let Ok(llt) = a.llt(Side::Lower) {
            let mut inverse = Mat::<f64>::zeros(d, d);
            invert_lower_triangular(inverse.as_mut(), llt.L(), Par::rayon(0));
            let mut u = vec![0.0f32; d * d];
            for i in 0..d {
                for j in i..d {
                    u[i * d + j] = (inverse[(d - 1 - i, d - 1 - j)] * inv_sqrt[order[j] as usize]) as f32;
                }
            }
            if u.iter().all(|v| v.is_finite()) {
                return Ok(Factor { d, order, u, damping: lambda, raised, dead });
            }
        }
        lambda = (lambda * 10.0).max(1e-4);
        if lambda > MAX_DAMPING {
            break;
        }
    }
    Err(Error::numeric("Cholesky factorisation", format!("failed up to damping {MAX_DAMPING}: the metric is not positive")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Xᵀ X / n of seeded pseudo-random rows, with some structure.
    fn gram(d: usize, n: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / 8388608.0 - 1.0
        };
        let x: Vec<f32> = (0..n * d).map(|i| random() * (1.0 + (i % d) as f32)).collect();
        let mut h = vec![0.0; d * d];
        for i in 0..d {
            for j in 0..d {
                h[i * d + j] = (0..n).map(|t| x[t * d + i] * x[t * d + j]).sum::<f32>() / n as f32;
            }
        }
        h
    }

    #[test]
    fn u_is_the_factor_of_the_damped_inverse_in_order() {
        let (d, damping) = (7, 0.01);
        let h = gram(d, 40);
        for act_order in [false, true] {
            let f = factor(&h, d, act_order, damping).unwrap();
            // (Uᵀ U) · H_damped = I, everything in quantization order.
            for i in 0..d {
                for j in 0..d {
                    let mut sum = 0.0f64;
                    for k in 0..d {
                        let inverse: f64 = (0..d).map(|m| f64::from(f.u[m * d + i]) * f64::from(f.u[m * d + k])).sum();
                        let (ck, cj) = (f.order[k] as usize, f.order[j] as usize);
                        let damp = if ck == cj { 1.0 + damping } else { 1.0 };
                        sum += inverse * f64::from(h[ck * d + cj]) * damp;
                    }
                    let want = if i == j { 1.0 } else { 0.0 };
                    assert!((sum - want).abs() < 1e-4, "{act_order} ({i}, {j}): {sum}");
                }
            }
            for i in 0..d {
                assert!((0..i).all(|j| f.u[i * d + j] == 0.0));
            }
            let diag = |j: u32| h[j as usize * d + j as usize];
            assert!(!act_order || f.order.windows(2).all(|w| diag(w[0]) >= diag(w[1])));
        }
    }

    #[test]
    fn a_singular_matrix_raises_the_damping_and_says_so() {
        // Rank one with an indefinite twist that 1 % damping does not cure.
        let d = 4;
        let h: Vec<f32> = (0..d * d).map(|i| if i / d == i % d { 1.0 } else { 1.2 }).collect();
        let f = factor(&h, d, true, 0.01).unwrap();
        assert!(f.raised >= 1 && f.damping > 0.01, "{f:?}");
        assert!(f.u.iter().all(|v| v.is_finite()));
    }

    #[test]
    fn dead_inputs_do_not_couple() {
        let d = 5;
        let mut h = gram(d, 30);
        for j in 0..d {
            h[2 * d + j] = 0.0;
            h[j * d + 2] = 0.0;
        }
        let f = factor(&h, d, true, 0.01).unwrap();
        assert_eq!(f.dead, 1);
        let at = f.order.iter().position(|c| *c == 2).unwrap();
        for k in 0..d {
            assert!(k == at || (f.u[at * d + k] == 0.0 && f.u[k * d + at] == 0.0));
        }
    }
}
