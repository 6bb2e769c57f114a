//! Asymmetric targets against f64 on random data of two streams: what they are, what they are good for, and how far to go; with and
//! without a residual stream.

mod common;

use aespa_gpu::calib::{Gram, Moments, Statistic};
use aespa_gpu::engine::{Engine, Mat, Recording, Weight, submit};
use aespa_gpu::method::{self, Inputs, Method, Settings, Solver, Strength, Targets, strength_of};
use aespa_gpu::metric::Heads;
use aespa_gpu::quant::Scheme;
use aespa_gpu::round::Rounding;
use aespa_gpu::scale::ScaleRule;
use aespa_gpu::tensor::{Dtype, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What H gets before it is inverted, for targets to stay sane in channels of next to no energy: this part of the median of its diagonal
/// on all of the diagonal, then this part of every diagonal entry.
const RIDGE: f64 = 0.3;

/// Row-major f64.
#[derive(Clone)]
struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn new(rows: usize, cols: usize, mut value: impl FnMut(usize, usize) -> f64) -> Self {
        Self { rows, cols, values: (0..rows * cols).map(|i| value(i / cols, i % cols)).collect() }
    }

    fn of_f32(rows: usize, cols: usize, values: &[f32]) -> Self {
        Self::new(rows, cols, |i, j| f64::from(values[i * cols + j]))
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.cols + j]
    }

    fn f32(&self) -> Vec<f32> {
        self.values.iter().map(|v| *v as f32).collect()
    }

    fn transposed(&self) -> Self {
        Self::new(self.cols, self.rows, |i, j| self.at(j, i))
    }

    fn times(&self, other: &Self) -> Self {
        assert_eq!(self.cols, other.rows);
        let mut out = Self::new(self.rows, other.cols, |_, _| 0.0);
        for i in 0..self.rows {
            for k in 0..self.cols {
                let (a, from) = (self.at(i, k), &other.values[k * other.cols..(k + 1) * other.cols]);
                out.values[i * other.cols..(i + 1) * other.cols].iter_mut().zip(from).for_each(|(o, b)| *o += a * b);
            }
        }
        out
    }

    fn plus(&self, factor: f64, other: &Self) -> Self {
        Self::new(self.rows, self.cols, |i, j| self.at(i, j) + factor * other.at(i, j))
    }

    fn rows(&self, range: std::ops::Range<usize>) -> Self {
        Self::new(range.len(), self.cols, |i, j| self.at(range.start + i, j))
    }

    fn squares(&self) -> f64 {
        self.values.iter().map(|v| v * v).sum()
    }

    /// Gauss-Jordan with pivots on the diagonal.
    fn inverse(&self) -> Self {
        let d = self.rows;
        let (mut a, mut inverse) = (self.clone(), Self::new(d, d, |i, j| f64::from(u8::from(i == j))));
        for p in 0..d {
            let pivot = a.at(p, p);
            for j in 0..d {
                a.values[p * d + j] /= pivot;
                inverse.values[p * d + j] /= pivot;
            }
            for i in (0..d).filter(|i| *i != p) {
                let factor = a.at(i, p);
                for j in 0..d {
                    a.values[i * d + j] -= factor * a.at(p, j);
                    inverse.values[i * d + j] -= factor * inverse.at(p, j);
                }
            }
        }
        inverse
    }
}

/// What the float stream has that the quantized one lacks, X̃ − X = `linear` X B + `noise` N.
#[derive(Clone, Copy)]
struct Missing {
    linear: f64,
    noise: f64,
}

/// Weights [rows, d], and tokens of both streams, [n, d]: correlated channels of very unequal size.
struct Streams {
    w: Matrix,
    x: Matrix,
    float: Matrix,
    /// R̃ − R [n, rows], where outputs are added to a residual stream.
    lacks: Option<Matrix>,
}

impl Streams {
    fn new(seed: u64, rows: usize, d: usize, n: usize, missing: Missing) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut random = || rng.random_range(-1.0f64..1.0);
        let w = Matrix::of_f32(rows, d, &Matrix::new(rows, d, |_, _| 0.1 * random()).f32());
        let size: Vec<f64> = (0..d).map(|j| 0.3 + 3.0 * (j * 7 % d) as f64 / d as f64).collect();
        let b = Matrix::new(d, d, |_, _| random() / (d as f64).sqrt());
        let mut x = Matrix::new(n, d, |_, j| random() * size[j]);
        for row in x.values.chunks_mut(d) {
            let common = random();
            row.iter_mut().for_each(|v| *v += common);
        }
        let noise = Matrix::new(n, d, |_, _| random());
        let float = x.plus(missing.linear, &x.times(&b)).plus(missing.noise, &noise);
        Self { w, x, float, lacks: None }
    }

    /// With a residual stream that lacks `missing.linear` X V + `missing.noise` N, V [d, rows].
    fn with_residual(self, missing: Missing) -> Self {
        let (rows, d, n) = (self.w.rows, self.w.cols, self.x.rows);
        let mut rng = ChaCha8Rng::seed_from_u64(rows as u64);
        let mut random = || rng.random_range(-1.0f64..1.0);
        let v = Matrix::new(d, rows, |_, _| random() / (d as f64).sqrt());
        let noise = Matrix::new(n, rows, |_, _| missing.noise * random());
        Self { lacks: Some(noise.plus(missing.linear, &self.x.times(&v))), ..self }
    }

    fn moments(&self, tokens: std::ops::Range<usize>) -> Moments {
        let n = tokens.len() as f64;
        let (x, float) = (self.x.rows(tokens.clone()), self.float.rows(tokens.clone()));
        let scaled = |m: Matrix| Matrix::new(m.rows, m.cols, |i, j| m.at(i, j) / n).f32();
        let gram = Gram { d: x.cols, n_tok: tokens.len(), h: scaled(x.transposed().times(&x)) };
        let residual = self.lacks.as_ref().map(|r| scaled(r.rows(tokens).transposed().times(&x)));
        Moments { gram, cross: Some(scaled(float.plus(-1.0, &x).transposed().times(&x))), residual }
    }

    /// ‖Q X − W X̃ − (R̃ − R)‖² per token.
    fn error(&self, q: &Matrix, tokens: std::ops::Range<usize>) -> f64 {
        let n = tokens.len() as f64;
        let own = self.x.rows(tokens.clone()).times(&q.transposed());
        let mut want = self.float.rows(tokens.clone()).times(&self.w.transposed());
        if let Some(lacks) = &self.lacks {
            want = want.plus(1.0, &lacks.rows(tokens));
        }
        own.plus(-1.0, &want).squares() / n
    }
}

/// (α W C + β D) H⁻¹ of the ridged H.
fn shift(w: &Matrix, moments: &Moments, strength: Strength) -> Matrix {
    let d = moments.gram.d;
    let h = h(moments);
    let mut diag: Vec<f64> = (0..d).map(|j| h.at(j, j)).collect();
    diag.sort_by(f64::total_cmp);
    let ridged = Matrix::new(d, d, |i, j| if i == j { h.at(i, i) + RIDGE * (h.at(i, i) + diag[d / 2]) } else { h.at(i, j) });
    let asked = Matrix::new(w.rows, d, |_, _| 0.0).plus(f64::from(strength.inputs), &w.times(&c(moments)));
    let residual = moments.residual.as_ref().map(|r| Matrix::of_f32(w.rows, d, r));
    let asked = residual.map_or_else(|| asked.clone(), |r| asked.plus(f64::from(strength.residual), &r));
    asked.times(&ridged.inverse())
}

/// α alone.
const fn inputs(alpha: f32) -> Strength {
    Strength { inputs: alpha, residual: 0.0 }
}

fn h(moments: &Moments) -> Matrix {
    Matrix::of_f32(moments.gram.d, moments.gram.d, &moments.gram.h)
}

fn c(moments: &Moments) -> Matrix {
    Matrix::of_f32(moments.gram.d, moments.gram.d, moments.cross.as_ref().unwrap())
}

/// tr(A Bᵀ).
fn inner(a: &Matrix, b: &Matrix) -> f64 {
    a.values.iter().zip(&b.values).map(|(a, b)| a * b).sum()
}

/// The least error that each half's shift leaves on the other half, over all rows of W.
fn split_half(w: &Matrix, halves: &[Moments; 2]) -> f64 {
    let shifts = halves.each_ref().map(|half| shift(w, half, inputs(1.0)));
    let sum = |of: &dyn Fn(&Matrix, &Moments) -> f64| of(&shifts[0], &halves[1]) + of(&shifts[1], &halves[0]);
    (sum(&|t, other| inner(t, &w.times(&c(other)))) / sum(&|t, other| inner(t, &t.times(&h(other))))).clamp(0.0, 1.0)
}

fn uploaded(engine: &mut dyn Engine, moments: &Moments, strength: Strength) -> Targets {
    let Moments { gram, cross, residual } = moments.clone();
    Targets::upload(engine, &gram, cross.unwrap(), residual, strength).unwrap()
}

fn moved(engine: &mut dyn Engine, w: &Matrix, moments: &Moments, strength: Strength) -> Vec<f32> {
    let targets = uploaded(engine, moments, strength);
    let mut rec = Recording::new();
    let weight = Mat::upload(&mut rec, "weight", w.rows, w.cols, w.f32());
    let target = targets.moved(&mut rec, weight, 0);
    let pending = target.download(&mut rec);
    weight.free(&mut rec);
    target.free(&mut rec);
    let values = pending.take(&mut engine.run(rec).unwrap()).unwrap();
    targets.free(engine).unwrap();
    assert_eq!(engine.profile().live_buffers(), 0, "buffers were left behind");
    values
}

/// The shift is what is compared: next to W it is small.
fn compare(engine: &mut dyn Engine, streams: &Streams, strength: Strength) {
    let (w, moments) = (&streams.w, streams.moments(0..streams.x.rows));
    let got = Matrix::of_f32(w.rows, w.cols, &moved(engine, w, &moments, strength));
    let want = w.plus(1.0, &shift(w, &moments, strength));
    let error = (got.plus(-1.0, &want).squares() / want.plus(-1.0, w).squares()).sqrt();
    println!("{}: [{}, {}], {strength:?}: {error:.1e}", engine.describe(), w.rows, w.cols);
    assert!(error <= 1e-3, "{}: the shift is off by {error:.1e}", engine.describe());
}

#[test]
fn targets_are_what_they_should_be() {
    for mut engine in common::engines::engines() {
        for (seed, rows, d, alpha) in [(1, 5, 7, 1.0), (2, 40, 64, 0.3), (3, 17, 131, 1.0), (4, 70, 288, 0.7)] {
            let missing = Missing { linear: 0.3, noise: 0.3 };
            compare(engine.as_mut(), &Streams::new(seed, rows, d, 4 * d, missing), inputs(alpha));
            let streams = Streams::new(seed, rows, d, 4 * d, missing).with_residual(missing);
            compare(engine.as_mut(), &streams, Strength { inputs: alpha, residual: 0.6 });
        }
        // Nothing is missing, or nothing of it is wanted: the weights themselves.
        for (linear, alpha) in [(0.0, 1.0), (0.3, 0.0)] {
            let streams = Streams::new(5, 12, 24, 100, Missing { linear, noise: 0.0 });
            assert_eq!(moved(engine.as_mut(), &streams.w, &streams.moments(0..100), inputs(alpha)), streams.w.f32());
        }
    }
}

/// C in panels.
#[test]
fn splitting_changes_nothing() {
    let streams = Streams::new(6, 48, 240, 960, Missing { linear: 0.3, noise: 0.3 });
    for mut engine in common::engines::engines_with_max_buffer(132 << 10) {
        compare(engine.as_mut(), &streams, inputs(0.8));
    }
}

/// One stream alone asks for nothing.
#[test]
fn without_a_second_stream_there_is_no_strength() {
    let streams = Streams::new(7, 8, 16, 64, Missing { linear: 0.3, noise: 0.0 });
    let gram = streams.moments(0..64).gram;
    for mut engine in common::engines::engines() {
        assert_eq!(strength(engine.as_mut(), &streams, &Statistic::of(gram.clone())), None);
    }
}

fn upload(engine: &mut dyn Engine, w: &Matrix) -> Weight {
    let tensor = Tensor::from_f32(Dtype::F32, vec![w.rows, w.cols], &w.f32()).unwrap();
    let limits = engine.limits();
    submit(engine, |rec| Weight::upload(rec, "weight", &tensor, limits)).unwrap()
}

fn quantized(engine: &mut dyn Engine, streams: &Streams, moments: &Moments, rounding: Rounding, strength: Option<Strength>) -> Matrix {
    let w = &streams.w;
    let inputs = if strength.is_some() { Inputs::Residual } else { Inputs::Sequential };
    let method = Method { scale: ScaleRule::Metric, rounding, inputs, ..method::find("gptq").unwrap() };
    let scheme = Scheme::new(3, -1, false).unwrap();
    let settings = Settings { method, act_order: true, alpha: None, seed: 0 };
    let weight = upload(engine, w);
    let targets = strength.map(|strength| uploaded(engine, moments, strength));
    let solver = Solver::new(engine, settings, w.cols, Some(moments.gram.clone()), targets).unwrap();
    assert_eq!(solver.alpha(), strength.map(|s| s.inputs));
    assert_eq!(solver.beta(), strength.filter(|_| streams.lacks.is_some()).map(|s| s.residual));
    let solved = solver.solve(engine, &weight, scheme.lattice(Dtype::F32), Heads::None).unwrap();
    solver.free(engine).unwrap();
    submit(engine, |rec| {
        weight.free(rec);
        solved.w_hat.free(rec);
    })
    .unwrap();
    assert_eq!(engine.profile().live_buffers(), 0, "buffers were left behind");
    Matrix::of_f32(w.rows, w.cols, &solved.packed.dequantize())
}

/// On tokens that were not calibrated on, with a difference that half follows from X and is half noise.
#[test]
fn moved_targets_bring_outputs_closer_to_the_float_models() {
    let (n, d) = (1200, 96);
    let streams = Streams::new(8, 64, d, 2 * n, Missing { linear: 0.3, noise: 0.3 });
    let moments = streams.moments(0..n);
    for mut engine in common::engines::engines() {
        for (name, rounding) in [("nearest", Rounding::NEAREST), ("gptq", Rounding::GPTQ), ("descent", Rounding::GPTQ_DESCENT)] {
            let [plain, moved] = [None, Some(inputs(1.0))].map(|alpha| {
                let q = quantized(engine.as_mut(), &streams, &moments, rounding, alpha);
                streams.error(&q, n..2 * n)
            });
            println!("{}: {name}: {plain:.4} without, {moved:.4} with asymmetric targets", engine.describe());
            assert!(moved < 0.8 * plain, "{}: {name}: {moved} is not well below {plain}", engine.describe());
        }
    }
}

fn strength(engine: &mut dyn Engine, streams: &Streams, statistic: &Statistic) -> Option<Strength> {
    let d = streams.w.cols;
    // Two linears that read the same input.
    let half = streams.w.rows / 2;
    let weights = [0..half, half..streams.w.rows].map(|rows| upload(engine, &streams.w.rows(rows)));
    let strength = strength_of(engine, statistic, &weights.each_ref(), d as u64).unwrap();
    submit(engine, |rec| weights.into_iter().for_each(|w| w.free(rec))).unwrap();
    assert_eq!(engine.profile().live_buffers(), 0, "buffers were left behind");
    strength
}

/// All of a difference that follows from X, nothing of noise; in between what a test of all rows would give, up to the sketch's noise.
#[test]
fn the_split_half_test_tells_signal_from_noise() {
    let (n, d) = (400, 96);
    for mut engine in common::engines::engines() {
        let mut found = Vec::new();
        for (linear, noise, n) in [(0.3, 0.0, n), (0.2, 1.0, 4 * n), (0.2, 1.0, n), (0.0, 0.5, n)] {
            let streams = Streams::new(9, 80, d, 2 * n, Missing { linear, noise });
            let halves = [0..n, n..2 * n].map(|tokens| streams.moments(tokens));
            let want = split_half(&streams.w, &halves);
            let statistic = Statistic::Halves(halves);
            let got = f64::from(strength(engine.as_mut(), &streams, &statistic).unwrap().inputs);
            println!("{}: linear {linear}, noise {noise}, {n} tokens: alpha {got:.3}, expected {want:.3}", engine.describe());
            assert!((got - want).abs() < 0.1, "{}: {got} instead of {want}", engine.describe());
            found.push(got);
        }
        assert!(found[0] > 0.98 && found[3] < 0.05, "{found:?}");
        assert!(found.is_sorted_by(|a, b| a > b), "{found:?}");
    }
}

/// A linear that knows what the stream lacks brings it closer to the float model's than one that aims at its own outputs only.
#[test]
fn targets_make_up_for_what_the_residual_stream_lacks() {
    let (n, d, missing) = (1200, 96, Missing { linear: 0.3, noise: 0.3 });
    let streams = Streams::new(8, 64, d, 2 * n, missing).with_residual(missing);
    let moments = streams.moments(0..n);
    for mut engine in common::engines::engines() {
        let [own, both] = [0.0, 1.0].map(|residual| {
            let strength = Strength { inputs: 1.0, residual };
            streams.error(&quantized(engine.as_mut(), &streams, &moments, Rounding::GPTQ_DESCENT, Some(strength)), n..2 * n)
        });
        println!("{}: {own:.4} for the linear's own output, {both:.4} with the stream's", engine.describe());
        assert!(both < 0.8 * own, "{}: {both} is not well below {own}", engine.describe());
    }
}

/// Each cause by itself: all of what follows from X, nothing of noise.
#[test]
fn the_split_half_test_tells_the_causes_apart() {
    let (n, d) = (400, 96);
    let (signal, noise) = (Missing { linear: 0.3, noise: 0.0 }, Missing { linear: 0.0, noise: 0.5 });
    for mut engine in common::engines::engines() {
        for (of_inputs, of_stream) in [(signal, signal), (signal, noise), (noise, signal), (noise, noise)] {
            let streams = Streams::new(9, 80, d, 2 * n, of_inputs).with_residual(of_stream);
            let halves = [0..n, n..2 * n].map(|tokens| streams.moments(tokens));
            let got = strength(engine.as_mut(), &streams, &Statistic::Halves(halves)).unwrap();
            println!("{}: {got:?}", engine.describe());
            for (missing, got) in [(of_inputs, got.inputs), (of_stream, got.residual)] {
                let fine = if missing.linear > 0.0 { got > 0.95 } else { got < 0.05 };
                assert!(fine, "{}: {got} for {} of signal", engine.describe(), missing.linear);
            }
        }
    }
}
