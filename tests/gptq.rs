//! GPTQ against an independent f64 reference and against brute force, on every engine.

mod common;

use aespa_gpu::calib::Gram;
use aespa_gpu::engine::{Engine, Mat, Recording, Weight};
use aespa_gpu::method::{self, Damping, Method, Settings, Solved, Solver};
use aespa_gpu::metric::{ColumnMetric, Heads, Objective, RowMetric};
use aespa_gpu::quant::{GridShape, Lattice, Offset, Offsets, Scheme, Steps, subtract};
use aespa_gpu::round::Rounding;
use aespa_gpu::round::factor::factor;
use aespa_gpu::round::gptq::{DeviceFactor, RoundedGptq, RowFactor};
use aespa_gpu::scale::{self, ScaleRule};
use aespa_gpu::tensor::{Dtype, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Relative to the diagonal of H, in the objective as in the factorisation.
const DAMPING: f64 = 0.01;

/// A layer: weights [d_out, d_in], and inputs with correlated, very unequal columns.
struct Problem {
    d_out: usize,
    d_in: usize,
    w: Vec<f32>,
    gram: Gram,
}

impl Problem {
    fn new(seed: u64, d_out: usize, d_in: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut random = || rng.random_range(-1.0f32..1.0);
        let w = (0..d_out * d_in).map(|_| random() * 0.1).collect();
        let n_tok = 4 * d_in;
        let mut h = vec![0.0f32; d_in * d_in];
        for _ in 0..n_tok {
            let common = random();
            let x: Vec<f32> = (0..d_in).map(|j| (random() + common) * (1.0 + (j * 7 % d_in) as f32)).collect();
            for i in 0..d_in {
                for j in 0..d_in {
                    h[i * d_in + j] += x[i] * x[j] / n_tok as f32;
                }
            }
        }
        Self { d_out, d_in, w, gram: Gram { d: d_in, n_tok, h } }
    }

    /// H + damping · diag(H), the metric of the objective.
    fn h(&self, i: usize, j: usize) -> f64 {
        f64::from(self.gram.h[i * self.d_in + j]) * if i == j { 1.0 + DAMPING } else { 1.0 }
    }

    /// e H eᵀ of one row.
    fn loss(&self, row: usize, w_hat: &[f64]) -> f64 {
        let e: Vec<f64> = (0..self.d_in).map(|j| w_hat[j] - f64::from(self.w[row * self.d_in + j])).collect();
        (0..self.d_in).map(|i| (0..self.d_in).map(|j| e[i] * self.h(i, j) * e[j]).sum::<f64>()).sum()
    }

    fn solve(&self, engine: &mut dyn Engine, rounding: Rounding, scale: ScaleRule, lattice: Lattice) -> Solved {
        self.solve_heads(engine, rounding, scale, lattice, Heads::None)
    }

    fn solve_heads(&self, engine: &mut dyn Engine, rounding: Rounding, scale: ScaleRule, lattice: Lattice, heads: Heads<'_>) -> Solved {
        let method = Method { scale, rounding, damping: Damping::Fixed(DAMPING), ..method::find("gptq").unwrap() };
        let settings = Settings { method, act_order: true, alpha: None, seed: 0 };
        let tensor = Tensor::from_f32(Dtype::F32, vec![self.d_out, self.d_in], &self.w).unwrap();
        let mut rec = Recording::new();
        let weight = Weight::upload(&mut rec, "weight", &tensor, engine.limits());
        engine.run(rec).unwrap();
        let solver = Solver::new(engine, settings, self.d_in, Some(self.gram.clone()), None).unwrap();
        let solved = solver.solve(engine, &weight, lattice, heads).unwrap();
        solver.free(engine).unwrap();
        let mut rec = Recording::new();
        weight.free(&mut rec);
        solved.w_hat.clone().free(&mut rec);
        engine.run(rec).unwrap();
        assert_eq!(engine.profile().live_buffers(), 0, "buffers were left behind");
        solved
    }

    /// The codes that optimal brain surgery gives, one column after the other, with the explicit inverse of the damped matrix:
    /// Frantar et al. 2023, equations 2 and 3, without Cholesky, blocks or lazy updates.
    fn reference(&self, row: usize, lattice: Lattice, scale: &[f64], zero: &[f64]) -> (Vec<u32>, Vec<f64>) {
        let d = self.d_in;
        let mut order: Vec<usize> = (0..d).collect();
        order.sort_by(|a, b| self.h(*b, *b).total_cmp(&self.h(*a, *a)));
        let damped: Vec<f64> = (0..d * d).map(|i| self.h(i / d, i % d)).collect();
        let mut inverse = invert(damped, d);
        let mut w: Vec<f64> = (0..d).map(|j| f64::from(self.w[row * d + j])).collect();
        let (mut codes, mut w_hat) = (vec![0; d], vec![0.0; d]);
        for j in order {
            let group = j / lattice.group_width(d);
            let q = ((w[j] / scale[group]).round_ties_even() + zero[group]).clamp(0.0, f64::from(lattice.max_code()));
            codes[j] = q as u32;
            w_hat[j] = scale[group] * (q - zero[group]);
            let error = (w[j] - w_hat[j]) / inverse[j * d + j];
            let column: Vec<f64> = (0..d).map(|k| inverse[k * d + j]).collect();
            for k in 0..d {
                w[k] -= error * column[k];
            }
            let pivot = column[j];
            for i in 0..d {
                for k in 0..d {
                    inverse[i * d + k] -= column[i] * column[k] / pivot;
                }
            }
        }
        (codes, w_hat)
    }
}

/// Gauss-Jordan with pivots on the diagonal: enough for a damped Gram matrix.
fn invert(mut a: Vec<f64>, d: usize) -> Vec<f64> {
    let mut inverse: Vec<f64> = (0..d * d).map(|i| f64::from(u8::from(i / d == i % d))).collect();
    for p in 0..d {
        let pivot = a[p * d + p];
        for j in 0..d {
            a[p * d + j] /= pivot;
            inverse[p * d + j] /= pivot;
        }
        for i in (0..d).filter(|i| *i != p) {
            let factor = a[i * d + p];
            for j in 0..d {
                a[i * d + j] -= factor * a[p * d + j];
                inverse[i * d + j] -= factor * inverse[p * d + j];
            }
        }
    }
    inverse
}

fn grids(solved: &Solved, row: usize) -> (Vec<f64>, Vec<f64>) {
    let n = solved.packed.scales.len() / solved.packed.d_out;
    let zero = |i: usize| match &solved.packed.offsets {
        Offsets::Zeros(zeros) => f64::from(zeros[i]),
        _ => f64::from(solved.packed.lattice.centre()),
    };
    let of = |i: usize| (f64::from(solved.packed.scales[i]), zero(i));
    (row * n..(row + 1) * n).map(of).unzip()
}

/// Codes equal the f64 reference's in every row whose reference beats round-to-nearest; rows where f32 and f64 break a tie
/// differently are counted, and must be rare.
#[test]
fn codes_equal_an_f64_reference() {
    for mut engine in common::engines::engines() {
        let (mut compared, mut different) = (0, 0);
        for (seed, d_out, d_in, bits, group, symmetric) in [
            (1, 17, 64, 4, -1, false),
            (2, 33, 160, 3, 32, false),
            (3, 16, 131, 2, -1, true),
            (4, 70, 288, 4, 32, true),
            (5, 5, 7, 3, -1, false),
        ] {
            let problem = Problem::new(seed, d_out, d_in);
            let lattice = Scheme::new(bits, group, symmetric).unwrap().lattice(Dtype::F32);
            let rtn = problem.solve(engine.as_mut(), Rounding::NEAREST, ScaleRule::MinMax, lattice);
            let solved = problem.solve(engine.as_mut(), Rounding::GPTQ, ScaleRule::MinMax, lattice);
            // Both use the min/max grid, so scales agree whichever row was taken.
            assert_eq!(rtn.packed.scales, solved.packed.scales);
            let (codes, rtn_codes) = (solved.packed.codes(), rtn.packed.codes());
            for row in 0..d_out {
                let (scale, zero) = grids(&solved, row);
                let (reference, w_hat) = problem.reference(row, lattice, &scale, &zero);
                let nearest: Vec<f64> = rtn.packed.dequantize()[row * d_in..(row + 1) * d_in].iter().map(|v| f64::from(*v)).collect();
                let own = &codes[row * d_in..(row + 1) * d_in];
                let better = problem.loss(row, &w_hat) < problem.loss(row, &nearest);
                let want: Vec<u8> =
                    if better { reference.iter().map(|c| *c as u8).collect() } else { rtn_codes[row * d_in..(row + 1) * d_in].to_vec() };
                compared += 1;
                different += usize::from(own != want);
            }
        }
        println!("{}: {different} of {compared} rows differ from the f64 reference", engine.describe());
        assert!(different * 50 <= compared, "{}: {different} of {compared} rows differ", engine.describe());
    }
}

/// On tiny problems: optimum ≤ GPTQ ≤ RTN for every row, the reported losses are the true ones, and with uncorrelated inputs all
/// three coincide.
#[test]
fn brute_force_brackets_gptq() {
    let lattice = Scheme::new(2, -1, false).unwrap().lattice(Dtype::F32);
    for mut engine in common::engines::engines() {
        let mut optimal = 0;
        for seed in 0..12 {
            let mut problem = Problem::new(seed, 3, 5);
            if seed % 4 == 3 {
                (0..25).filter(|i| i / 5 != i % 5).for_each(|i| problem.gram.h[i] = 0.0);
            }
            let rtn = problem.solve(engine.as_mut(), Rounding::NEAREST, ScaleRule::MinMax, lattice);
            let solved = problem.solve(engine.as_mut(), Rounding::GPTQ, ScaleRule::MinMax, lattice);
            let row_loss = |s: &Solved, row: usize| {
                let w_hat: Vec<f64> = s.packed.dequantize()[row * 5..(row + 1) * 5].iter().map(|v| f64::from(*v)).collect();
                problem.loss(row, &w_hat)
            };
            let total: f64 = (0..3).map(|r| row_loss(&solved, r)).sum();
            let total_rtn: f64 = (0..3).map(|r| row_loss(&rtn, r)).sum();
            assert!((solved.record.loss - total).abs() <= 1e-4 * total, "reported {} but it is {total}", solved.record.loss);
            assert!(
                (solved.record.loss_rtn - total_rtn).abs() <= 1e-4 * total_rtn,
                "reported {} but it is {total_rtn}",
                solved.record.loss_rtn
            );
            for row in 0..3 {
                let (scale, zero) = grids(&solved, row);
                let best = (0..4usize.pow(5))
                    .map(|n| {
                        let w_hat: Vec<f64> = (0..5).map(|j| scale[0] * ((n / 4usize.pow(j) % 4) as f64 - zero[0])).collect();
                        problem.loss(row, &w_hat)
                    })
                    .fold(f64::INFINITY, f64::min);
                let (gptq, nearest) = (row_loss(&solved, row), row_loss(&rtn, row));
                assert!(best <= gptq * (1.0 + 1e-6) && gptq <= nearest * (1.0 + 1e-6), "seed {seed} row {row}: {best} {gptq} {nearest}");
                if seed % 4 == 3 {
                    assert!((gptq - best).abs() <= 1e-6 * best && (nearest - best).abs() <= 1e-6 * best);
                }
                optimal += usize::from(gptq <= best * (1.0 + 1e-6));
            }
        }
        println!("{}: GPTQ is optimal in {optimal} of 36 rows", engine.describe());
        assert!(optimal >= 18, "{optimal} of 36");
    }
}

/// Every width and kind of lattice works with every scale rule, and nothing ends above round-to-nearest; with nearest rounding, for
/// which it scores its candidates, the metric search beats the plain range where codes are few.
#[test]
fn searches_do_not_raise_the_loss() {
    for mut engine in common::engines::engines() {
        let mut lower = 0;
        for bits in 2..=8 {
            let integer = |group, symmetric| Scheme::new(bits, group, symmetric).unwrap().lattice(Dtype::F32);
            let grouped = Lattice { dtype: Dtype::F16, ..integer(32, false) };
            let (not_zero, minimum) = (Offset::Zero { lowest: 1 }, Offset::Minimum);
            for lattice in [
                integer(-1, false),
                integer(-1, true),
                integer(32, false),
                integer(64, true),
                Lattice { offset: not_zero, ..grouped },
                Lattice { offset: minimum, ..grouped },
                Lattice { offset: Offset::Signed, ..grouped },
                Lattice { offset: minimum, group: Some(64), dtype: Dtype::Bf16, ..grouped },
                Lattice { offset: minimum, group: Some(16), steps: Some(Steps { columns: 64, bits: 4 }), ..grouped },
                Lattice { offset: Offset::Signed, group: Some(32), steps: Some(Steps { columns: 128, bits: 6 }), ..grouped },
            ] {
                let problem = Problem::new(u64::from(bits), 24, 128);
                for rule in [ScaleRule::MinMax, ScaleRule::Mse, ScaleRule::Metric, ScaleRule::MetricTwoSided] {
                    let solved = problem.solve(engine.as_mut(), Rounding::GPTQ, rule, lattice);
                    assert!(
                        solved.record.loss <= solved.record.loss_rtn,
                        "{lattice:?} {rule:?}: {} > {}",
                        solved.record.loss,
                        solved.record.loss_rtn
                    );
                }
                let nearest = problem.solve(engine.as_mut(), Rounding::NEAREST, ScaleRule::Metric, lattice);
                assert!(
                    bits > 3 || nearest.record.loss < nearest.record.loss_rtn,
                    "{lattice:?}: {} >= {}",
                    nearest.record.loss,
                    nearest.record.loss_rtn
                );
                // Whole rows are scored by the very loss that nearest rounding ends with, and the candidates include those of `metric`.
                let two_sided = problem.solve(engine.as_mut(), Rounding::NEAREST, ScaleRule::MetricTwoSided, lattice);
                let (one, two) = (nearest.record.loss, two_sided.record.loss);
                assert!(lattice.group.is_some() || two <= one * (1.0 + 1e-6), "{lattice:?}: {two} > {one}");
                let whole = matches!(lattice.offset, Offset::Zero { .. });
                assert!(whole || two == one, "{lattice:?}: only whole zero points move: {two} and {one}");
                lower += usize::from(two < one);
            }
        }
        assert!(lower > 0, "{}: the two-sided search finds nothing", engine.describe());
    }
}

/// No row ends above what the first order alone gives it, and some end below; the same with coupled rows, head by head.
#[test]
fn more_orders_are_never_worse() {
    let lattice = Scheme::new(3, -1, false).unwrap().lattice(Dtype::F32);
    for mut engine in common::engines::engines() {
        let problem = Problem::new(11, 32, 96);
        let g: Vec<f32> = (0..4).flat_map(|head| Problem::new(20 + head, 1, 8).gram.h).collect();
        let mut last: Option<Vec<f64>> = None;
        for orders in [1, 2, 6] {
            let solved = problem.solve(engine.as_mut(), Rounding { orders, ..Rounding::GPTQ }, ScaleRule::MinMax, lattice);
            let w_hat: Vec<f64> = solved.packed.dequantize().into_iter().map(f64::from).collect();
            let losses: Vec<f64> = (0..32).map(|r| problem.loss(r, &w_hat[r * 96..(r + 1) * 96])).collect();
            assert_eq!(solved.record.rows_from_orders.is_some(), orders > 1);
            if let Some(before) = last {
                assert!(losses.iter().zip(&before).all(|(now, before)| *now <= before * (1.0 + 1e-5)), "{losses:?} {before:?}");
                let lower = losses.iter().zip(&before).filter(|(now, before)| **now < *before * (1.0 - 1e-3)).count();
                println!("{}: {orders} orders, {lower} rows lower, {:?}", engine.describe(), solved.record.rows_from_orders);
                assert!(lower > 4 && solved.record.rows_from_orders.is_some_and(|n| n >= lower), "{lower} rows");
            }
            last = Some(losses);
        }
        let heads = Heads::Rows { d_head: 8, g: &g };
        let [one, six] = [1, 6]
            .map(|orders| problem.solve_heads(engine.as_mut(), Rounding { orders, ..Rounding::GPTQ }, ScaleRule::MinMax, lattice, heads));
        assert!(six.record.loss < one.record.loss, "{:?} {:?}", six.record, one.record);
        assert!(six.record.rows_from_orders.is_some_and(|n| n > 0 && n.is_multiple_of(8)));
    }
}

/// Rows are solved panel by panel, the metric is split too, and nothing changes.
#[test]
fn splitting_changes_nothing() {
    let problem = Problem::new(9, 96, 256);
    let lattice = Scheme::new(3, 64, false).unwrap().lattice(Dtype::F32);
    for (mut whole, mut split) in common::engines::engines().into_iter().zip(common::engines::engines_with_max_buffer(132 << 10)) {
        let a = problem.solve(whole.as_mut(), Rounding::GPTQ, ScaleRule::Metric, lattice);
        let b = problem.solve(split.as_mut(), Rounding::GPTQ, ScaleRule::Metric, lattice);
        let different = a.packed.codes().iter().zip(b.packed.codes()).filter(|(a, b)| **a != *b).count();
        assert!(different * 1000 <= 96 * 256, "{different} codes differ");
        assert!((a.record.loss - b.record.loss).abs() <= 1e-3 * a.record.loss, "{} {}", a.record.loss, b.record.loss);
    }
}

/// The codes of BoA (Kim et al. 2025) as it is written: row after row; each row by GPTQ's column sweep with the explicit inverse of the
/// damped H, then the rows below take over its change by the damped G⁻¹ = Vᵀ V: W_r' −= (V_rr' / V_rr) (W_r − Ŵ_r).
fn row_by_row(problem: &Problem, d_head: usize, g: &[f32], grid: &[(f64, f64)], max_code: f64) -> Vec<u32> {
    let d = problem.d_in;
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|a, b| problem.h(*b, *b).total_cmp(&problem.h(*a, *a)));
    let damped: Vec<f64> = (0..d * d).map(|i| problem.h(i / d, i % d)).collect();
    let mut w: Vec<f64> = problem.w.iter().map(|w| f64::from(*w)).collect();
    let mut codes = vec![0; w.len()];
    for first in (0..problem.d_out).step_by(d_head) {
        let g = &g[first * d_head..(first + d_head) * d_head];
        let g = (0..d_head * d_head).map(|i| f64::from(g[i]) * if i / d_head == i % d_head { 1.0 + DAMPING } else { 1.0 }).collect();
        let mut g_inverse = invert(g, d_head);
        for r in 0..d_head {
            let row = first + r;
            let start = w[row * d..(row + 1) * d].to_vec();
            let (mut now, mut inverse) = (start.clone(), invert(damped.clone(), d));
            let mut change = vec![0.0; d];
            for j in order.iter().copied() {
                let (s, z) = grid[row];
                let q = ((now[j] / s).round_ties_even() + z).clamp(0.0, max_code);
                codes[row * d + j] = q as u32;
                change[j] = start[j] - s * (q - z);
                let error = (now[j] - s * (q - z)) / inverse[j * d + j];
                let column: Vec<f64> = (0..d).map(|k| inverse[k * d + j]).collect();
                for k in 0..d {
                    now[k] -= error * column[k];
                    for i in 0..d {
                        inverse[i * d + k] -= column[i] * column[k] / column[j];
                    }
                }
            }
            // Row r of V is row r of the inverse of what is left of G, up to a factor.
            let column: Vec<f64> = (0..d_head).map(|k| g_inverse[k * d_head + r]).collect();
            for below in r + 1..d_head {
                for j in 0..d {
                    w[(first + below) * d + j] -= column[below] / column[r] * change[j];
                }
            }
            for i in 0..d_head {
                for k in 0..d_head {
                    g_inverse[i * d_head + k] -= column[i] * column[k] / column[r];
                }
            }
        }
    }
    codes
}

/// Going column by column visits the codes of BoA's row-by-row order, and lowers the loss that couples rows; the compensated weights are
/// those whose nearest codes were taken.
#[test]
fn coupled_rows_round_as_row_by_row() {
    for mut engine in common::engines::engines() {
        let (mut compared, mut different) = (0, 0);
        let (mut coupled, mut alone) = (0.0, 0.0);
        for (seed, n_head, d_head, d, bits) in
            [(1, 2, 8, 40, 2), (2, 3, 5, 67, 3), (3, 1, 32, 150, 4), (4, 1, 128, 24, 2), (5, 4, 1, 33, 3)]
        {
            let problem = Problem::new(seed, n_head * d_head, d);
            let g: Vec<f32> = (0..n_head).flat_map(|head| Problem::new(seed + 10 * head as u64, 1, d_head).gram.h).collect();
            let lattice = Scheme::new(bits, -1, false).unwrap().lattice(Dtype::F32);
            let shape = GridShape { lattice, rows: problem.d_out, cols: d };
            let (host, v) = (factor(&problem.gram.h, d, true, DAMPING).unwrap(), RowFactor::host(&g, d_head, DAMPING).unwrap());
            let limits = engine.limits();
            let mut rec = Recording::new();
            let metric = ColumnMetric::layer(&mut rec, problem.gram.clone(), DAMPING as f32, limits);
            let row_metric = RowMetric::upload(&mut rec, d_head, &g);
            let (columns, rows) = (DeviceFactor::upload(&mut rec, host), RowFactor::upload(&mut rec, d_head, &v));
            let target = Mat::upload(&mut rec, "target", problem.d_out, d, problem.w.as_slice());
            engine.run(rec).unwrap();
            let grid = scale::search(engine.as_mut(), ScaleRule::MinMax, &shape, target, &metric).unwrap();
            let mut rec = Recording::new();
            let mut losses = Vec::new();
            let objective = Objective { columns: &metric, rows: Some(&row_metric) };
            let rounded = columns.round(&mut rec, &shape, target, grid, Some(&rows));
            let plain = columns.round(&mut rec, &shape, target, grid, None);
            for RoundedGptq { codes, .. } in [rounded, plain] {
                let w_hat = grid.dequantize(&mut rec, &shape, codes);
                let error = subtract(&mut rec, w_hat, target);
                let loss = objective.losses(&mut rec, error);
                losses.push(rec.download(loss));
                error.free(&mut rec);
                rec.free(loss);
            }
            let (nearest, values) = grid.nearest(&mut rec, &shape, rounded.compensated);
            let (codes, nearest_codes) = (rounded.codes.download(&mut rec), nearest.download(&mut rec));
            let (scale, zero) = (rec.download(grid.scale), rec.download(grid.zero));
            nearest.free(&mut rec);
            values.free(&mut rec);
            for rounded in [rounded, plain] {
                rounded.into_codes(&mut rec).free(&mut rec);
            }
            grid.free(&mut rec);
            target.free(&mut rec);
            metric.free(&mut rec);
            row_metric.free(&mut rec);
            columns.free(&mut rec);
            rows.free(&mut rec);
            let mut back = engine.run(rec).unwrap();
            assert_eq!(engine.profile().live_buffers(), 0, "buffers were left behind");
            let codes = codes.take(&mut back).unwrap();
            assert_eq!(codes, nearest_codes.take(&mut back).unwrap(), "codes are not the nearest of the compensated weights");
            let scale = back.take(scale).unwrap();
            let grid: Vec<(f64, f64)> =
                scale.into_iter().zip(back.take(zero).unwrap()).map(|(s, z)| (f64::from(s), f64::from(z))).collect();
            let want = row_by_row(&problem, d_head, &g, &grid, f64::from(lattice.max_code()));
            // A tie that f32 and f64 break differently spreads over all that follows in its head.
            compared += n_head;
            different += codes.chunks(d_head * d).zip(want.chunks(d_head * d)).filter(|(a, b)| a != b).count();
            let mut sums = losses.into_iter().map(|l| back.take(l).unwrap().into_iter().map(f64::from).sum::<f64>());
            let (own, without) = (sums.next().unwrap(), sums.next().unwrap());
            println!(
                "{}: heads of {d_head} x {d} at {bits} bits: {:.3} of the loss without row feedback",
                engine.describe(),
                own / without
            );
            (coupled, alone) = (coupled + own / without, alone + 1.0);
        }
        println!("{}: {different} of {compared} heads differ from the row-by-row reference", engine.describe());
        assert!(different <= 1, "{}: {different} of {compared} heads differ", engine.describe());
        assert!(coupled < 0.8 * alone, "row feedback leaves {coupled} of {alone}");
    }
}
