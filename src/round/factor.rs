//! The triangular factor that GPTQ's error feedback needs: H⁻¹ = Uᵀ U, U upper triangular, columns in quantization order.
//!
//! 1. Dead inputs (H_jj = 0) are cut off: unit diagonal, no coupling, so their weights are rounded by themselves.
//! 2. Equilibrate: Ĥ = D^-½ H D^-½ has unit diagonal; adding λ I then damps every channel alike, whatever its scale.
//! 3. Reverse rows and columns, factor (Ĥ + λ I) = L Lᵀ, invert L, reverse back: Û = P L⁻¹ P is upper triangular with
//!    Ûᵀ Û = (Ĥ + λ I)⁻¹. One factorisation, no explicit inverse. U = Û D^-½.
//! 4. Where the factorisation fails, λ is raised tenfold and the final value recorded.
//!
//! Everything happens in one buffer: in f64 up to 4096 channels, above that in f32, which halves memory and time and, on a damped
//! matrix with unit diagonal, leaves errors far below those of H itself, an estimate from a few thousand tokens.
//!
//! Cost: d³/3 flops for the factorisation and d³/3 for the triangular inverse, on the host; besides H 8 d² bytes and 4 d² for U in f64, 4 d²
//! in all in f32.

use crate::{Error, Result};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltParams, LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::traits::RealField;
use faer::{Mat, MatMut, Par, Spec};

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
    /// Does it stand for one that is not known?
    pub blank: bool,
}

impl Factor {
    /// The name of making one of `d` channels among the host's work.
    pub fn what(d: usize) -> &'static str {
        Precision::of(d).what()
    }

    /// Floating-point operations of making one: a factorisation and a triangular inverse.
    pub fn flops(d: usize) -> f64 {
        2.0 / 3.0 * (d as f64).powi(3)
    }

    /// Stands for that of a matrix that is not known: takes the memory that its making takes.
    pub fn blank(d: usize) -> Self {
        let order = (0..d as u32).collect();
        let _work = (Precision::of(d) == Precision::F64).then(|| vec![0.0f64; d * d]);
        let u = vec![0.0; d * d];
        Self { d, order, u, damping: 0.0, raised: 0, dead: 0, blank: true }
    }
}

/// λ above which a matrix is called hopeless: its off-diagonal part would be scaled down to nothing.
const MAX_DAMPING: f64 = 1e3;

/// What a factorisation is made in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F32,
    F64,
}

impl Precision {
    /// That of a matrix of `d` channels.
    pub fn of(d: usize) -> Self {
        if d > 4096 { Self::F32 } else { Self::F64 }
    }

    /// The name of factorisations in it: they have rates of their own.
    pub fn what(self) -> &'static str {
        match self {
            Self::F32 => "factor in f32",
            Self::F64 => "factor in f64",
        }
    }
}

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
    factor_with(Precision::of(d), order, h, d, damping)
}

/// As [`factor_in`], in a precision of the caller's choice.
///
/// # Errors
/// As [`factor`].
pub fn factor_with(precision: Precision, order: Vec<u32>, h: &[f32], d: usize, damping: f64) -> Result<Factor> {
    let metric = Equilibrated::new(h, d, &order);
    let mut lambda = damping;
    for raised in 0.. {
        let u = match precision {
            Precision::F32 => metric.upper::<f32>(lambda),
            Precision::F64 => metric.upper::<f64>(lambda),
        };
        if let Some(u) = u {
            let dead = metric.dead;
            return Ok(Factor { d, order, u, damping: lambda, raised, dead, blank: false });
        }
        lambda = (lambda * 10.0).max(1e-4);
        if lambda > MAX_DAMPING {
            break;
        }
    }
    Err(Error::numeric("Cholesky factorisation", format!("failed up to damping {MAX_DAMPING}: the metric is not positive")))
}

/// H with unit diagonal, rows and columns in the reverse of an order.
struct Equilibrated<'h> {
    h: &'h [f32],
    d: usize,
    order: &'h [u32],
    /// 1 / √H_jj by original column, 1 where that is 0.
    inv_sqrt: Vec<f64>,
    dead: usize,
}

/// What a factorisation can be made in.
trait Real: RealField + Copy {
    fn from_f64(value: f64) -> Self;
    /// The values as f32, in the same memory where they are that already.
    fn into_f32(values: Vec<Self>) -> Vec<f32>;
}

impl Real for f64 {
    fn from_f64(value: f64) -> Self {
        value
    }

    fn into_f32(values: Vec<Self>) -> Vec<f32> {
        values.into_iter().map(|v| v as f32).collect()
    }
}

impl Real for f32 {
    fn from_f64(value: f64) -> Self {
        value as f32
    }

    fn into_f32(values: Vec<Self>) -> Vec<f32> {
        values
    }
}

impl<'h> Equilibrated<'h> {
    fn new(h: &'h [f32], d: usize, order: &'h [u32]) -> Self {
        let diag = |j: usize| f64::from(h[j * d + j]);
        let inv_sqrt = (0..d).map(|j| if diag(j) > 0.0 { diag(j).sqrt().recip() } else { 1.0 }).collect();
        Self { h, d, order, inv_sqrt, dead: (0..d).filter(|j| diag(*j) <= 0.0).count() }
    }

    /// U for Ĥ + λ I, [d, d] row-major; `None` where that is not positive.
    fn upper<T: Real>(&self, lambda: f64) -> Option<Vec<f32>> {
        let d = self.d;
        // Position i of the reversed matrix is position d − 1 − i of the quantization order. Column-major, of which the factorisation reads
        // the lower triangle.
        let column = |i: usize| self.order[d - 1 - i] as usize;
        let mut a = vec![T::from_f64(0.0); d * d];
        for (j, out) in a.chunks_mut(d.max(1)).enumerate() {
            let row = &self.h[column(j) * d..][..d];
            out[j] = T::from_f64(1.0 + lambda);
            for i in j + 1..d {
                out[i] = T::from_f64(f64::from(row[column(i)]) * self.inv_sqrt[column(i)] * self.inv_sqrt[column(j)]);
            }
        }
        if !inverse_root(MatMut::from_column_major_slice_mut(&mut a, d, d)) {
            return None;
        }
        anti_transpose(&mut a, d);
        let mut u = T::into_f32(a);
        for (i, row) in u.chunks_mut(d.max(1)).enumerate() {
            row[..i].fill(0.0);
            for (value, column) in row[i..].iter_mut().zip(&self.order[i..]) {
                *value = (f64::from(*value) * self.inv_sqrt[*column as usize]) as f32;
            }
        }
        u.iter().all(|v| v.is_finite()).then_some(u)
    }
}

/// Puts L⁻¹ of A = L Lᵀ in the place of the lower triangle of A; false where A is not positive.
fn inverse_root<T: RealField>(mut a: MatMut<'_, T>) -> bool {
    let (d, par, params) = (a.nrows(), Par::rayon(0), Spec::<LltParams, T>::default());
    let mut workspace = MemBuffer::new(cholesky_in_place_scratch::<T>(d, par, params));
    let stack = MemStack::new(&mut workspace);
    let done = cholesky_in_place(a.as_mut(), LltRegularization::default(), par, stack, params).is_ok();
    if done {
        invert_lower(a, par);
    }
    done
}

/// Inverts a lower triangle in its own place: ((A, 0), (B, C))⁻¹ = ((A⁻¹, 0), (−C⁻¹ B A⁻¹, C⁻¹)).
fn invert_lower<T: RealField>(a: MatMut<'_, T>, par: Par) {
    /// Below this a copy costs nothing.
    const SMALL: usize = 128;
    let d = a.nrows();
    if d <= SMALL {
        let copy = a.as_ref().to_owned();
        let mut inverse = Mat::zeros(d, d);
        invert_lower_triangular(inverse.as_mut(), copy.as_ref(), par);
        let mut a = a;
        a.copy_from_triangular_lower(inverse);
        return;
    }
    let half = d / 2;
    let (mut top, _, mut below, mut corner) = a.split_at_mut(half, half);
    solve_lower_triangular_in_place(corner.as_ref(), below.as_mut(), par);
    solve_upper_triangular_in_place(top.as_ref().transpose(), below.as_mut().transpose_mut(), par);
    below.as_mut().col_iter_mut().for_each(|column| column.iter_mut().for_each(|v| *v = -v.clone()));
    invert_lower(top.as_mut(), par);
    invert_lower(corner.as_mut(), par);
}

/// Turns L column-major into P L P row-major, P the reversal: element (i, j) of the array changes places with (d − 1 − j, d − 1 − i).
fn anti_transpose<T: Copy>(a: &mut [T], d: usize) {
    /// Tiles of both places stay in the cache.
    const TILE: usize = 32;
    for rows in (0..d).step_by(TILE) {
        for columns in (0..d).step_by(TILE) {
            for i in rows..(rows + TILE).min(d) {
                for j in columns..(columns + TILE).min(d - 1 - i.min(d - 1)) {
                    a.swap(i * d + j, (d - 1 - j) * d + d - 1 - i);
                }
            }
        }
    }
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
