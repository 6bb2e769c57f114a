//! Coordinate descent against brute force and against losses computed in f64, on every engine.

mod common;

use aespa_gpu::calib::Gram;
use aespa_gpu::engine::{Engine, Mat, Recording, submit};
use aespa_gpu::metric::{ColumnMetric, Objective, RowMetric};
use aespa_gpu::quant::{Grid, GridShape, HostGrid, Lattice, Offset, Scheme, Steps};
use aespa_gpu::round::{Descent, DescentReport, Problem, Rounded, descend};
use aespa_gpu::scale::{self, ScaleRule};
use aespa_gpu::tensor::Dtype;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Rows to round, with correlated inputs of unequal size, and correlated rows where `d_head` is given.
struct Layer {
    rows: usize,
    d: usize,
    d_head: Option<usize>,
    w: Vec<f32>,
    gram: Gram,
    /// [rows, d_head]
    g: Vec<f32>,
}

/// Codes, scales and zero points on the host.
#[derive(Clone, Debug, PartialEq)]
struct Found {
    codes: Vec<u32>,
    scale: Vec<f32>,
    zero: Vec<f32>,
    /// Steps of super-blocks, of scales and of minima.
    steps: Vec<f32>,
}

fn gram(random: &mut impl FnMut() -> f32, d: usize, spread: f32) -> Vec<f32> {
    let n = 4 * d;
    let mut h = vec![0.0f32; d * d];
    for _ in 0..n {
        let common = random();
        let x: Vec<f32> = (0..d).map(|j| (random() + common) * (1.0 + spread * (j * 7 % d) as f32)).collect();
        for i in 0..d {
            for j in 0..d {
                h[i * d + j] += x[i] * x[j] / n as f32;
            }
        }
    }
    h
}

impl Layer {
    fn new(seed: u64, rows: usize, d: usize, d_head: Option<usize>) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut random = || rng.random_range(-1.0f32..1.0);
        let w = (0..rows * d).map(|_| random() * 0.1).collect();
        let h = gram(&mut random, d, 0.2);
        let g = d_head.map_or(Vec::new(), |d_head| (0..rows / d_head).flat_map(|_| gram(&mut random, d_head, 0.1)).collect());
        Self { rows, d, d_head, w, gram: Gram { d, n_tok: 4 * d, h }, g }
    }

    fn unit(&self) -> usize {
        self.d_head.unwrap_or(1)
    }

    /// tr(G E H Eᵀ) of each unit, in f64.
    fn losses(&self, found: &Found, lattice: Lattice) -> Vec<f64> {
        let (d, unit, group) = (self.d, self.unit(), lattice.group_width(self.d));
        let n_group = lattice.n_group(d);
        let error = |r: usize, j: usize| {
            let at = r * n_group + j / group;
            let value = f64::from(found.scale[at]) * (f64::from(found.codes[r * d + j]) - f64::from(found.zero[at]));
            value - f64::from(self.w[r * d + j])
        };
        (0..self.rows / unit)
            .map(|u| {
                let e: Vec<Vec<f64>> = (0..unit).map(|i| (0..d).map(|j| error(u * unit + i, j)).collect()).collect();
                let product = |row: &[f64]| -> Vec<f64> {
                    (0..d).map(|k| (0..d).map(|j| row[j] * f64::from(self.gram.h[j * d + k])).sum()).collect()
                };
                let eh: Vec<Vec<f64>> = e.iter().map(|row| product(row)).collect();
                let metric = |a: usize, b: usize| if unit == 1 { 1.0 } else { f64::from(self.g[(u * unit + a) * unit + b]) };
                let mut sum = 0.0;
                for (a, eh) in eh.iter().enumerate() {
                    for (b, e) in e.iter().enumerate() {
                        sum += metric(a, b) * eh.iter().zip(e).map(|(x, y)| x * y).sum::<f64>();
                    }
                }
                sum
            })
            .collect()
    }

    /// Nearest codes on the min/max grid, then descent: what there was before and after.
    fn descend(&self, engine: &mut dyn Engine, lattice: Lattice, options: &Descent) -> (Found, Found, DescentReport) {
        let limits = engine.limits();
        let shape = GridShape { lattice, rows: self.rows, cols: self.d };
        let mut rec = Recording::new();
        let columns = ColumnMetric::layer(&mut rec, self.gram.clone(), 0.0, limits);
        let rows = self.d_head.map(|d_head| RowMetric::upload(&mut rec, d_head, &self.g));
        let target = Mat::upload(&mut rec, "target", self.rows, self.d, self.w.as_slice());
        engine.run(rec).unwrap();
        let grid = scale::search(engine, ScaleRule::MinMax, &shape, target, &columns).unwrap();
        let (codes, w_hat) = submit(engine, |rec| grid.nearest(rec, &shape, target)).unwrap();
        submit(engine, |rec| w_hat.free(rec)).unwrap();
        let mut state = Rounded { codes, grid };
        let before = download(engine, &state);
        let objective = Objective { columns: &columns, rows: rows.as_ref() };
        let report = descend(engine, &Problem { shape, target, objective }, &mut state, options).unwrap();
        let after = download(engine, &state);
        submit(engine, |rec| {
            state.free(rec);
            target.free(rec);
            columns.free(rec);
            if let Some(rows) = rows {
                rows.free(rec);
            }
        })
        .unwrap();
        assert_eq!(engine.profile().live_buffers(), 0, "buffers were left behind");
        (before, after, report)
    }
}

fn download(engine: &mut dyn Engine, state: &Rounded) -> Found {
    let mut rec = Recording::new();
    let (codes, grid) = (state.codes.download(&mut rec), state.grid.download(&mut rec));
    let mut back = engine.run(rec).unwrap();
    let HostGrid { scale, zero, steps } = grid.take(&mut back).unwrap();
    Found { codes: codes.take(&mut back).unwrap(), scale, zero, steps }
}

fn near(a: f64, b: f64, relative: f64) -> bool {
    (a - b).abs() <= relative * a.abs().max(b.abs())
}

/// What every descent must have done; returns loss after / loss before.
fn judge(layer: &Layer, lattice: Lattice, (before, after, report): &(Found, Found, DescentReport), what: &str) -> f64 {
    let (start, end) = (layer.losses(before, lattice), layer.losses(after, lattice));
    for (unit, (start, end)) in start.iter().zip(&end).enumerate() {
        assert!(*end <= start * (1.0 + 1e-5), "{what}: unit {unit} rose from {start} to {end}");
    }
    let (start, end): (f64, f64) = (start.iter().sum(), end.iter().sum());
    assert!(near(report.loss_start, start, 1e-4), "{what}: reported {} but it was {start}", report.loss_start);
    assert!(near(report.loss_end, end, 1e-4), "{what}: reported {} but it is {end}", report.loss_end);
    assert_eq!(report.units, layer.rows / layer.unit());
    let dtype = lattice.parameter_dtype();
    let signed = lattice.offset == Offset::Signed;
    if lattice.steps.is_some() {
        let (per_super, counts) = (lattice.groups_per_super(layer.d), lattice.counts());
        let (n_group, n_super) = (lattice.n_group(layer.d), lattice.n_super(layer.d));
        assert_eq!(before.steps, after.steps, "{what}: steps moved");
        for (at, (s, z)) in after.scale.iter().zip(&after.zero).enumerate() {
            let steps = &after.steps[2 * (at / n_group * n_super + at % n_group / per_super)..][..2];
            let count = s / steps[0];
            assert!(count.fract() == 0.0 && counts.contains(&(count as i32)), "{what}: scale {s} is {count} steps");
            if lattice.offset == Offset::Minimum {
                let count = (s * z / steps[1]).round();
                assert!(counts.contains(&(count as i32)) && count * steps[1] / s == *z, "{what}: minimum {count}");
            }
        }
    }
    let stored = |s: &f32| (*s > 0.0 || signed && *s < 0.0) && dtype.round(*s) == *s;
    assert!(after.scale.iter().all(stored), "{what}: a scale that cannot be stored");
    assert!(!signed || after.scale.iter().any(|s| *s < 0.0), "{what}: no scale is negative");
    if lattice.offset == Offset::Minimum {
        let stored = |(s, z): (&f32, &f32)| dtype == Dtype::F32 || -dtype.round(-s * z) / s == *z;
        assert!(after.scale.iter().zip(&after.zero).all(stored), "{what}: a minimum that cannot be stored");
    } else {
        assert!(report.zero_steps > 0 || before.zero == after.zero, "{what}: zero points moved");
        let whole = |z: &f32| z.fract() == 0.0 || before.zero == after.zero;
        assert!(after.zero.iter().all(|z| whole(z) && lattice.zeros().contains(&(*z as u32))), "{what}: a wrong zero point");
    }
    assert!(after.codes.iter().all(|c| *c <= lattice.max_code()));
    end / start
}

/// On tiny problems all roundings can be tried: descent never ends above its start or below the best, and greedy or annealed it finds
/// the best in most.
#[test]
fn brute_force_brackets_descent() {
    let lattice = Scheme::new(2, -1, false).unwrap().lattice(Dtype::F32);
    for mut engine in common::engines::engines() {
        // (rows of a unit, columns): 4^6 and 4^6 roundings of a unit.
        for (d_head, d) in [(None, 6), (Some(2), 3)] {
            let (mut greedy_optimal, mut annealed_optimal, mut units) = (0, 0, 0);
            for seed in 0..12 {
                let layer = Layer::new(seed, 6, d, d_head);
                let greedy = Descent { temperature: 0.0, refit: false, ..Default::default() };
                let annealed = Descent { temperature: 0.3, refit: false, sweeps: 60, seed, ..Default::default() };
                let first = layer.descend(engine.as_mut(), lattice, &greedy);
                let second = layer.descend(engine.as_mut(), lattice, &annealed);
                judge(&layer, lattice, &first, "greedy");
                judge(&layer, lattice, &second, "annealed");
                let best = best_of_all(&layer, &first.0, lattice);
                let (greedy, annealed) = (layer.losses(&first.1, lattice), layer.losses(&second.1, lattice));
                for unit in 0..best.len() {
                    let (best, greedy, annealed) = (best[unit], greedy[unit], annealed[unit]);
                    assert!(best <= greedy * (1.0 + 1e-6) && best <= annealed * (1.0 + 1e-6), "{best} {greedy} {annealed}");
                    greedy_optimal += usize::from(greedy <= best * (1.0 + 1e-6));
                    annealed_optimal += usize::from(annealed <= best * (1.0 + 1e-6));
                }
                units += best.len();
            }
            let what = format!("{}, units of {} x {d}", engine.describe(), d_head.unwrap_or(1));
            println!("{what}: the best of all in {greedy_optimal} (greedy) and {annealed_optimal} (annealed) of {units}");
            assert!(greedy_optimal * 2 >= units, "{what}: greedy finds the best in {greedy_optimal} of {units}");
            assert!(annealed_optimal * 10 >= 7 * units, "{what}: annealed finds the best in {annealed_optimal} of {units}");
        }
    }
}

/// The least loss of each unit over all codes on the given grid.
fn best_of_all(layer: &Layer, grid: &Found, lattice: Lattice) -> Vec<f64> {
    let (unit, n) = (layer.unit(), layer.unit() * layer.d);
    let mut best = vec![f64::INFINITY; layer.rows / unit];
    for choice in 0..4usize.pow(n as u32) {
        // The same choice in every unit.
        let codes = (0..layer.rows * layer.d).map(|i| (choice >> (2 * (i % n)) & 3) as u32).collect();
        let losses = layer.losses(&Found { codes, ..grid.clone() }, lattice);
        best.iter_mut().zip(losses).for_each(|(best, loss)| *best = best.min(loss));
    }
    best
}

/// Rows alone and coupled, one scale and groups, all stored types: no unit rises, reported losses are true, and scale refits help.
#[test]
fn descent_never_raises_the_loss() {
    for mut engine in common::engines::engines() {
        for (seed, rows, d, d_head, bits, group, dtype) in [
            (1, 33, 96, None, 2, -1, Dtype::F16),
            (2, 70, 288, None, 3, 32, Dtype::F16),
            (3, 16, 131, None, 4, -1, Dtype::F32),
            (4, 40, 160, None, 2, 64, Dtype::Bf16),
            (5, 34, 96, Some(17), 2, -1, Dtype::F16),
            (6, 64, 160, Some(32), 3, 32, Dtype::F16),
            (7, 128, 40, Some(128), 2, -1, Dtype::F32),
            (8, 9, 5, Some(3), 8, -1, Dtype::F16),
            // Stored minima.
            (9, 33, 96, None, 2, 32, Dtype::F16),
            (10, 70, 160, None, 3, 64, Dtype::Bf16),
            (11, 34, 96, Some(17), 2, 32, Dtype::F16),
            // Scales of either sign.
            (12, 33, 96, None, 3, 32, Dtype::F16),
            (13, 34, 96, Some(17), 3, 32, Dtype::F16),
            // The same in whole steps.
            (14, 33, 128, None, 3, 32, Dtype::F16),
            (15, 34, 128, Some(17), 3, 32, Dtype::F16),
            (16, 33, 128, None, 2, 32, Dtype::F16),
            (17, 34, 128, Some(17), 2, 32, Dtype::F16),
        ] {
            let layer = Layer::new(seed, rows, d, d_head);
            let mut lattice = Scheme::new(bits, group, seed == 4).unwrap().lattice(dtype);
            if seed > 8 {
                lattice.offset = if (12..16).contains(&seed) { Offset::Signed } else { Offset::Minimum };
            }
            if seed > 13 {
                lattice.steps = Some(Steps { columns: 64, bits: if seed > 15 { 4 } else { 6 } });
            }
            let mut ratios = Vec::new();
            for (temperature, refit) in [(0.0, false), (0.0, true), (0.3, false), (0.3, true)] {
                let options = Descent { temperature, refit, ..Default::default() };
                let done = layer.descend(engine.as_mut(), lattice, &options);
                let what = format!("{} rows {rows} d {d} heads {d_head:?} W{bits} g{group} {options:?}", engine.describe());
                ratios.push(judge(&layer, lattice, &done, &what));
                assert!(done.2.sweeps() <= 30);
                assert!(refit || done.0.scale == done.1.scale, "{what}: scales moved");
            }
            println!("{}: rows {rows} d {d} heads {d_head:?} W{bits} g{group}: {ratios:.3?}", engine.describe());
            assert!(ratios[0] < 0.9, "{ratios:?}");
            assert!(ratios[1] <= ratios[0] * 1.02, "refits do harm: {ratios:?}");
        }
    }
}

/// Steps of zero points: no unit rises, greedy or annealed, and layers end lower than without. Coupled rows and symmetric grids keep theirs.
#[test]
fn zero_steps_pay() {
    for mut engine in common::engines::engines() {
        for (rows, d, d_head, bits, group, symmetric) in [
            (96, 96, None, 2, -1, false),
            (64, 160, None, 2, 32, false),
            (64, 131, None, 3, -1, false),
            (16, 96, Some(8), 2, -1, false),
            (16, 96, None, 2, 32, true),
        ] {
            let lattice = Scheme::new(bits, group, symmetric).unwrap().lattice(Dtype::F16);
            let fixed = symmetric || d_head.is_some();
            for temperature in [0.0, 0.1] {
                let (mut sums, mut steps) = ([0.0, 0.0], 0);
                for seed in 20..24 {
                    let mut layer = Layer::new(seed, rows, d, d_head);
                    // Skewed, so that the min/max grid spends codes on a thin tail.
                    layer.w.iter_mut().for_each(|w| *w = *w * w.abs() * if *w > 0.0 { 20.0 } else { 5.0 });
                    for (sum, refit_zero) in sums.iter_mut().zip([false, true]) {
                        let options = Descent { temperature, refit_zero, seed, ..Default::default() };
                        let done = layer.descend(engine.as_mut(), lattice, &options);
                        let what = format!("{} rows {rows} d {d} heads {d_head:?} W{bits} g{group} {options:?}", engine.describe());
                        judge(&layer, lattice, &done, &what);
                        assert!((refit_zero && !fixed) || done.2.zero_steps == 0, "{what}: {:?}", done.2);
                        *sum += done.2.loss_end;
                        steps += done.2.zero_steps;
                    }
                }
                let what = format!("{}: rows {rows} d {d} W{bits} g{group} T {temperature}", engine.describe());
                println!("{what}: {:.4} of the loss without, {steps} steps", sums[1] / sums[0]);
                assert!(if fixed { sums[1] == sums[0] } else { sums[1] < sums[0] && steps > 0 }, "{what}: {sums:?}, {steps} steps");
            }
        }
    }
}

/// Noise depends on seed, sweep, row and column only, and rows that are independent do not see each other: the second half solved alone
/// ends where it ends in the whole, and so does a metric that is split over buffers.
#[test]
fn splitting_changes_nothing() {
    let lattice = Scheme::new(3, -1, false).unwrap().lattice(Dtype::F32);
    let layer = Layer::new(9, 96, 256, None);
    let half = Layer { rows: 48, w: layer.w[48 * 256..].to_vec(), gram: layer.gram.clone(), g: vec![], ..layer };
    let options = Descent { temperature: 0.2, seed: 5, sweeps: 12, refit: false, refit_zero: false, row0: 0 };
    for (mut engine, mut small) in common::engines::engines().into_iter().zip(common::engines::engines_with_max_buffer(132 << 10)) {
        let (_, whole, _) = layer.descend(engine.as_mut(), lattice, &options);
        let (_, alone, _) = half.descend(engine.as_mut(), lattice, &Descent { row0: 48, ..options });
        let (_, split, _) = layer.descend(small.as_mut(), lattice, &options);
        let (_, other, _) = layer.descend(engine.as_mut(), lattice, &Descent { seed: 6, ..options });
        let different = |a: &[u32], b: &[u32]| a.chunks(256).zip(b.chunks(256)).filter(|(a, b)| a != b).count();
        // Sums of different lengths round differently, which may turn a close decision.
        let (by_rows, by_metric) = (different(&whole.codes[48 * 256..], &alone.codes), different(&whole.codes, &split.codes));
        assert!(by_rows <= 2 && by_metric <= 4, "{}: {by_rows} and {by_metric} rows differ", engine.describe());
        assert!(different(&whole.codes, &other.codes) > 10, "the seed does not matter");
    }
}

/// Heat without time to cool leaves units above their start: they are put back, codes and scales.
#[test]
fn what_got_worse_is_put_back() {
    let lattice = Scheme::new(4, 32, false).unwrap().lattice(Dtype::F16);
    for (d_head, units) in [(None, 32), (Some(16), 2)] {
        let layer = Layer::new(11, 32, 96, d_head);
        for mut engine in common::engines::engines() {
            // One hot sweep and one to cool.
            let hot = Descent { temperature: 1e6, sweeps: 2, refit: true, ..Default::default() };
            let done = layer.descend(engine.as_mut(), lattice, &hot);
            judge(&layer, lattice, &done, "too hot");
            assert!(done.2.units_kept_at_start > 0, "{:?}", done.2);
            if done.2.units_kept_at_start == units {
                assert_eq!(done.0, done.1);
            }
        }
    }
}

/// Inputs that are always zero, and rows that do not count, leave codes as they are.
#[test]
fn what_does_not_matter_stays() {
    let lattice = Scheme::new(2, -1, false).unwrap().lattice(Dtype::F16);
    for d_head in [None, Some(4)] {
        let mut layer = Layer::new(12, 8, 40, d_head);
        for j in 0..40 {
            layer.gram.h[3 * 40 + j] = 0.0;
            layer.gram.h[j * 40 + 3] = 0.0;
        }
        if let Some(d_head) = d_head {
            for i in 0..d_head {
                layer.g[d_head + i] = 0.0;
                layer.g[i * d_head + 1] = 0.0;
            }
        }
        for mut engine in common::engines::engines() {
            let done = layer.descend(engine.as_mut(), lattice, &Descent::default());
            judge(&layer, lattice, &done, "dead inputs");
            for r in 0..8 {
                assert_eq!(done.0.codes[r * 40 + 3], done.1.codes[r * 40 + 3], "row {r}");
            }
            if d_head.is_some() {
                assert_eq!(done.0.codes[40..80], done.1.codes[40..80]);
                assert_eq!(done.0.scale[1], done.1.scale[1]);
            }
        }
    }
}

/// Without a column metric the best codes are the nearest: nothing moves. Rows coupled by G still do.
#[test]
fn the_identity_is_a_metric_too() {
    let lattice = Scheme::new(3, 32, false).unwrap().lattice(Dtype::F32);
    let layer = Layer::new(13, 16, 64, Some(8));
    for mut engine in common::engines::engines() {
        let shape = GridShape { lattice, rows: 16, cols: 64 };
        let mut rec = Recording::new();
        let columns = ColumnMetric::identity(&mut rec, 64);
        let rows = RowMetric::upload(&mut rec, 8, &layer.g);
        let target = Mat::upload(&mut rec, "target", 16, 64, layer.w.as_slice());
        engine.run(rec).unwrap();
        for with_rows in [false, true] {
            let grid: Grid = scale::search(engine.as_mut(), ScaleRule::MinMax, &shape, target, &columns).unwrap();
            let (codes, w_hat) = submit(engine.as_mut(), |rec| grid.nearest(rec, &shape, target)).unwrap();
            let mut state = Rounded { codes, grid };
            let objective = Objective { columns: &columns, rows: with_rows.then_some(&rows) };
            let options = Descent { temperature: 0.0, refit: false, ..Default::default() };
            let report = descend(engine.as_mut(), &Problem { shape, target, objective }, &mut state, &options).unwrap();
            assert_eq!(report.moves.iter().sum::<u64>() > 0, with_rows, "{report:?}");
            assert_eq!(report.loss_end < report.loss_start, with_rows, "{report:?}");
            submit(engine.as_mut(), |rec| {
                state.free(rec);
                w_hat.free(rec);
            })
            .unwrap();
        }
    }
}
