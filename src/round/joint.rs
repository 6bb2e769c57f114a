//! Scales, and minima, of all rows of a head together, for fixed codes and one group of columns at a time, where a row metric G couples the rows.
//!
//! Objective: with E = s (q − z) − target, or s q + m − target, and T = G E H, changes ds and dm of the group's parameters change the loss by
//!   2 (dsᵀ b + dmᵀ c) + dsᵀ A ds + 2 dsᵀ F dm + dmᵀ M dm,
//!   b = rowsum(U ∘ T), c = rowsum(T), A = G ∘ (U H Uᵀ), F = diag(U H 1) G, M = G (1ᵀ H 1),
//! over the columns of the group, with u = q − z, or q where there are minima. The minimum is found by Cholesky's method in f64 on the host; scales
//! are rounded to stored ones, minima found anew for them and rounded too. The step is taken where it lowers this quadratic, with the change of
//! the scales halved up to three times, else dropped: T += G (diag(ds) U H + dm 1ᵀ H).
//!
//! Cost per head and group: d_head³ / 3, with minima 3 d_head³, and 2 d_head² d multiply-adds for T.

use super::descent::replace;
use super::problem::{Problem, Rounded};
use super::refit::columns_of;
use crate::Result;
use crate::engine::kernels::minimum_refit::Stored;
use crate::engine::kernels::scale_refit::StoredScale;
use crate::engine::kernels::{self, matmul_nn, matmul_nt, row_dot};
use crate::engine::matrix::PendingMat;
use crate::engine::{Buffer, Engine, Mat, Pending, Recording};
use crate::quant::{GridShape, HostGrid};
use faer::prelude::Solve;
use faer::{Mat as Dense, Side};

/// Far below what f32 statistics tell, so that a factorisation exists.
const RIDGE: f64 = 1e-6;

/// One group of all heads.
pub(super) struct Joint<'j> {
    pub problem: &'j Problem<'j>,
    pub state: &'j Rounded,
    /// G on the host, [rows, d_head].
    pub g: &'j [f32],
    pub gradient: Mat<f32>,
    pub group: usize,
}

impl Joint<'_> {
    fn d_head(&self) -> usize {
        self.problem.objective.unit()
    }

    /// Scales. `x` is u_g H_g:.
    pub fn scales(&self, engine: &mut dyn Engine, u: Mat<f32>, x: Mat<f32>) -> Result<()> {
        let (shape, n) = (&self.problem.shape, self.d_head());
        let mut rec = Recording::new();
        let (uhu, b) = (self.squares(&mut rec, x, u), self.slopes(&mut rec, u));
        let grid = self.state.grid.download(&mut rec);
        let mut back = engine.run(rec)?;
        let (uhu, b, HostGrid { mut scale, steps, .. }): (Vec<f32>, Vec<f32>, _) =
            (uhu.take(&mut back)?, back.take(b)?, grid.take(&mut back)?);
        let stored = self.stored(&steps);

        let mut moved = self.g.to_vec();
        for (head, moved) in moved.chunks_mut(n * n).enumerate() {
            let rows = head * n..(head + 1) * n;
            let a = Dense::from_fn(n, n, |i, j| self.product(&uhu, head, i, j));
            let slope: Vec<f64> = rows.clone().map(|r| f64::from(b[self.at(r)])).collect();
            let before: Vec<f32> = rows.clone().map(|r| scale[self.at(r)]).collect();
            let after = best_scales(&a, &slope, &before, &stored[rows.clone()]).unwrap_or_else(|| before.clone());
            rows.zip(&after).for_each(|(r, after)| scale[self.at(r)] = *after);
            let ds: Vec<f32> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
            times_columns(moved, &ds);
        }
        let mut rec = Recording::new();
        replace(&mut rec, self.state.grid.scale, scale);
        let moved = Mat::upload(&mut rec, "row metric times change", shape.rows, n, moved);
        self.spread(&mut rec, moved, x);
        moved.free(&mut rec);
        engine.run(rec)?;
        Ok(())
    }

    /// Scales and minima. `q` are codes and q_g H_g:, `ones` a row of ones and 1_g H_g:.
    pub fn minima(&self, engine: &mut dyn Engine, [q, qh]: [Mat<f32>; 2], [ones, h]: [Mat<f32>; 2]) -> Result<()> {
        let (shape, n) = (&self.problem.shape, self.d_head());
        let mut rec = Recording::new();
        let (qhq, b) = (self.squares(&mut rec, qh, q), self.slopes(&mut rec, q));
        let [c, f, m] = [self.gradient, qh, h].map(|mat| self.sums(&mut rec, mat, ones));
        let grid = self.state.grid.download(&mut rec);
        let mut back = engine.run(rec)?;
        let (qhq, b): (Vec<f32>, Vec<f32>) = (qhq.take(&mut back)?, back.take(b)?);
        let [c, f, m] = [c, f, m].map(|sums| sums.take(&mut back));
        let (c, f, m) = (c?, f?, f64::from(m?[0]));
        let HostGrid { mut scale, mut zero, steps } = grid.take(&mut back)?;
        let stored = self.stored(&steps);

        let mut moved = self.g.to_vec();
        let mut lowered = vec![0.0f32; shape.rows];
        for (head, moved) in moved.chunks_mut(n * n).enumerate() {
            let first = head * n;
            let g = |i: usize, j: usize| f64::from(self.g[(first + i) * n + j]);
            let quadratic = WithMinima {
                a: Dense::from_fn(n, n, |i, j| self.product(&qhq, head, i, j)),
                f: Dense::from_fn(n, n, |i, j| f64::from(f[first + i]) * g(i, j)),
                m: Dense::from_fn(n, n, |i, j| m * g(i, j)),
                b: (0..n).map(|i| f64::from(b[self.at(first + i)])).collect(),
                c: (0..n).map(|i| f64::from(c[first + i])).collect(),
            };
            let own = &stored[first..first + n];
            let before: Vec<[f32; 2]> = (0..n)
                .map(|i| {
                    let at = self.at(first + i);
                    [scale[at], own[i].minimum(-scale[at] * zero[at])]
                })
                .collect();
            let after = quadratic.best(&before, own).unwrap_or_else(|| before.clone());
            let mut dm = vec![0.0; n];
            let mut ds = vec![0.0; n];
            for (i, ([s, lower], [s_before, lower_before])) in after.iter().zip(&before).enumerate() {
                (ds[i], dm[i]) = (s - s_before, lower - lower_before);
                if ds[i] != 0.0 || dm[i] != 0.0 {
                    let at = self.at(first + i);
                    (scale[at], zero[at]) = (*s, -lower / s);
                }
            }
            for (i, lowered) in lowered[first..first + n].iter_mut().enumerate() {
                *lowered = (0..n).map(|j| g(i, j) * f64::from(dm[j])).sum::<f64>() as f32;
            }
            times_columns(moved, &ds);
        }
        let mut rec = Recording::new();
        replace(&mut rec, self.state.grid.scale, scale);
        replace(&mut rec, self.state.grid.zero, zero);
        let moved = Mat::upload(&mut rec, "row metric times change", shape.rows, n, moved);
        let lowered = Mat::upload(&mut rec, "row metric times change of minima", shape.rows, 1, lowered);
        self.spread(&mut rec, moved, qh);
        self.add_product(&mut rec, [lowered, h], 0..shape.rows, 0, 1);
        moved.free(&mut rec);
        lowered.free(&mut rec);
        engine.run(rec)?;
        Ok(())
    }

    /// Where the group's parameters of a row are.
    fn at(&self, row: usize) -> usize {
        row * self.problem.shape.n_group() + self.group
    }

    /// G ∘ `squares`, of a head.
    fn product(&self, squares: &[f32], head: usize, i: usize, j: usize) -> f64 {
        let n = self.d_head();
        let at = (head * n + i) * n + j;
        f64::from(self.g[at]) * f64::from(squares[at])
    }

    /// How the group's parameters of every row are stored.
    fn stored(&self, steps: &[f32]) -> Vec<Stored> {
        let shape = &self.problem.shape;
        (0..shape.rows).map(|row| stored(shape, steps, row, self.group)).collect()
    }

    /// Records rowsum(u ∘ T) of every group, and its read-back.
    fn slopes(&self, rec: &mut Recording<'_>, u: Mat<f32>) -> Pending<f32> {
        let shape = &self.problem.shape;
        let slopes = rec.alloc("u T", shape.scales());
        let p = row_dot::RowDotParams {
            rows: shape.rows as u32,
            cols: shape.cols as u32,
            ld: u.ld as u32,
            group: shape.group() as u32,
            n_group: shape.n_group() as u32,
        };
        kernels::row_dot(rec, p, u.buffer, self.gradient.buffer, slopes);
        let pending = rec.download(slopes);
        rec.free(slopes);
        pending
    }

    /// Records x uᵀ over the group's columns, head by head, and its read-back: [rows, d_head].
    fn squares(&self, rec: &mut Recording<'_>, x: Mat<f32>, u: Mat<f32>) -> PendingMat<f32> {
        let n = self.d_head();
        self.products(rec, [x, u], [n, n, self.problem.shape.rows / n])
    }

    /// Records the sums of the rows of a matrix over the group's columns, and their read-back.
    fn sums(&self, rec: &mut Recording<'_>, mat: Mat<f32>, ones: Mat<f32>) -> PendingMat<f32> {
        self.products(rec, [mat, ones], [mat.rows, 1, 1])
    }

    /// Records products of `n` rows of x by `m` rows of w over the group's columns, of `batches` of them one below the other.
    fn products(&self, rec: &mut Recording<'_>, [x, w]: [Mat<f32>; 2], [n, m, batches]: [usize; 3]) -> PendingMat<f32> {
        let columns = columns_of(self.problem, self.group);
        let out = Mat::alloc(rec, "products over a group", n * batches, m);
        let p = matmul_nt::MatmulNtParams {
            n: n as u32,
            m: m as u32,
            k: columns.len() as u32,
            lda: x.ld as u32,
            ldw: w.ld as u32,
            ldc: out.ld as u32,
            a_offset: columns.start as u32,
            w_offset: columns.start as u32,
            a_batch: (n * x.ld) as u32,
            w_batch: (m * w.ld) as u32,
            c_batch: (n * out.ld) as u32,
            batches: batches as u32,
            alpha: 1.0,
            ..Default::default()
        };
        kernels::matmul_nt(rec, p, x.buffer, w.buffer.as_stored(), Buffer::none(), out.buffer);
        let pending = out.download(rec);
        out.free(rec);
        pending
    }

    /// Records T += `moved` · `x`, head by head.
    fn spread(&self, rec: &mut Recording<'_>, moved: Mat<f32>, x: Mat<f32>) {
        let n = self.d_head();
        for row0 in (0..self.problem.shape.rows).step_by(n) {
            self.add_product(rec, [moved, x], row0..row0 + n, row0, n);
        }
    }

    /// Records T[rows] += a[rows] · x[row0.., :], over `k` rows of x.
    fn add_product(&self, rec: &mut Recording<'_>, [a, x]: [Mat<f32>; 2], rows: std::ops::Range<usize>, row0: usize, k: usize) {
        let to = self.gradient;
        let p = matmul_nn::MatmulNnParams {
            n: rows.len() as u32,
            m: self.problem.shape.cols as u32,
            k: k as u32,
            lda: a.ld as u32,
            ldb: x.ld as u32,
            ldc: to.ld as u32,
            a_offset: (rows.start * a.ld) as u32,
            b_offset: (row0 * x.ld) as u32,
            c_offset: (rows.start * to.ld) as u32,
            alpha: 1.0,
            beta: 1.0,
        };
        kernels::matmul_nn(rec, p, a.buffer, x.buffer, to.buffer);
    }
}

/// G diag(d), in place of G.
fn times_columns(g: &mut [f32], d: &[f32]) {
    for row in g.chunks_mut(d.len()) {
        row.iter_mut().zip(d).for_each(|(g, d)| *g *= d);
    }
}

/// How scale and minimum of a group of a row are stored. `steps` are those of all rows.
fn stored(shape: &GridShape, steps: &[f32], row: usize, group: usize) -> Stored {
    let (lattice, counts) = (shape.lattice, shape.lattice.counts());
    let [step, step_minimum] = match lattice.groups_per_super(shape.cols) {
        0 => [0.0; 2],
        per_super => {
            let at = (row * lattice.n_super(shape.cols) + group / per_super) * 2;
            [steps[at], steps[at + 1]]
        }
    };
    let [low, high] = [*counts.start() as f32, *counts.end() as f32];
    Stored { scale: StoredScale { dtype: lattice.parameter_dtype().code(), step, low, high }, step_minimum }
}

/// A positive semidefinite matrix that a solution exists for; rows that do not count get a unit of their own.
fn raised(a: &Dense<f64>) -> Dense<f64> {
    let dead = |i: usize| a[(i, i)] <= 0.0;
    Dense::from_fn(a.nrows(), a.ncols(), |i, j| match i == j {
        true if dead(i) => 1.0,
        true => a[(i, j)] * (1.0 + RIDGE),
        false if dead(i) || dead(j) => 0.0,
        false => a[(i, j)],
    })
}

/// −a⁻¹ b, 0 where rows do not count.
fn minimum(a: &Dense<f64>, b: &[f64]) -> Option<Vec<f64>> {
    let rhs = Dense::from_fn(b.len(), 1, |i, _| if a[(i, i)] <= 0.0 { 0.0 } else { -b[i] });
    let solved = raised(a).llt(Side::Lower).ok()?.solve(&rhs);
    Some((0..b.len()).map(|i| solved[(i, 0)]).collect())
}

/// Scales a part of the way along `full`, as they are stored; `None` where one would change its sign or is not finite.
fn stepped(scale: impl Iterator<Item = f32>, full: &[f64], part: f64, stored: &[Stored]) -> Option<Vec<f32>> {
    let after = scale.zip(full).zip(stored).map(|((s, full), stored)| {
        // Rows that do not count stay.
        if *full == 0.0 {
            return Some(s);
        }
        let exact = (f64::from(s) + part * full) as f32;
        let after = stored.scale.nearest(exact);
        (exact * s.signum() > 0.0 && after.is_finite()).then_some(after)
    });
    after.collect()
}

const PARTS: [f64; 4] = [1.0, 0.5, 0.25, 0.125];

/// Scales that lower 2 dsᵀ b + dsᵀ A ds, all of one head; `None` where no step along the solution of A ds = −b does.
fn best_scales(a: &Dense<f64>, b: &[f64], scale: &[f32], stored: &[Stored]) -> Option<Vec<f32>> {
    let n = b.len();
    let full = minimum(a, b)?;
    PARTS.into_iter().find_map(|part| {
        let after = stepped(scale.iter().copied(), &full, part, stored)?;
        let ds: Vec<f64> = after.iter().zip(scale).map(|(after, before)| f64::from(*after) - f64::from(*before)).collect();
        let change: f64 = (0..n).map(|i| ds[i] * (2.0 * b[i] + (0..n).map(|j| a[(i, j)] * ds[j]).sum::<f64>())).sum();
        (change < 0.0).then_some(after)
    })
}

/// The quadratic of a head's scales and minima.
struct WithMinima {
    a: Dense<f64>,
    f: Dense<f64>,
    m: Dense<f64>,
    b: Vec<f64>,
    c: Vec<f64>,
}

impl WithMinima {
    /// Stored scales and minima that lower it, if a step does.
    fn best(&self, before: &[[f32; 2]], stored: &[Stored]) -> Option<Vec<[f32; 2]>> {
        let n = before.len();
        let all = Dense::from_fn(2 * n, 2 * n, |i, j| match (i < n, j < n) {
            (true, true) => self.a[(i, j)],
            (true, false) => self.f[(i, j - n)],
            (false, true) => self.f[(j, i - n)],
            (false, false) => self.m[(i - n, j - n)],
        });
        let slopes: Vec<f64> = self.b.iter().chain(&self.c).copied().collect();
        let full = minimum(&all, &slopes)?;
        PARTS.into_iter().find_map(|part| {
            let scales = stepped(before.iter().map(|[s, _]| *s), &full[..n], part, stored)?;
            let ds: Vec<f64> = scales.iter().zip(before).map(|(s, [before, _])| f64::from(*s) - f64::from(*before)).collect();
            // The best minima for the scales as they are stored.
            let slopes: Vec<f64> = (0..n).map(|j| self.c[j] + (0..n).map(|i| self.f[(i, j)] * ds[i]).sum::<f64>()).collect();
            let lower = minimum(&self.m, &slopes)?;
            let after: Vec<[f32; 2]> = (0..n)
                .map(|i| {
                    let exact = (f64::from(before[i][1]) + lower[i]) as f32;
                    [scales[i], if lower[i] == 0.0 { before[i][1] } else { stored[i].minimum(exact) }]
                })
                .collect();
            let dm: Vec<f64> = after.iter().zip(before).map(|(after, before)| f64::from(after[1]) - f64::from(before[1])).collect();
            let fine = after.iter().flatten().all(|v| v.is_finite());
            (fine && self.change(&ds, &dm) < 0.0).then_some(after)
        })
    }

    fn change(&self, ds: &[f64], dm: &[f64]) -> f64 {
        let n = ds.len();
        let times = |matrix: &Dense<f64>, i: usize, v: &[f64]| (0..n).map(|j| matrix[(i, j)] * v[j]).sum::<f64>();
        let of_scale = |i: usize| ds[i] * (2.0 * self.b[i] + times(&self.a, i, ds) + 2.0 * times(&self.f, i, dm));
        let of_minimum = |i: usize| dm[i] * (2.0 * self.c[i] + times(&self.m, i, dm));
        (0..n).map(|i| of_scale(i) + of_minimum(i)).sum()
    }
}
