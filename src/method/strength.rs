//! How far asymmetric targets move: what one half of the windows asks for, tested on the other half.
//!
//! With the moments of `targets.rs`, half 1 asks for the shifts A₁ = W C₁ H₁⁻¹ and B₁ = D₁ H₁⁻¹. On half 2 they leave the error
//!   ‖(α A₁ + β B₁) X − W (X̃ − X) − (R̃ − R)‖² = ‖(α A₁ + β B₁) X‖² − 2 tr((α A₁ + β B₁) (W C₂ + D₂)ᵀ) + const,
//! a quadratic in α and β; the sum over both ways round is least at the solution of two linear equations (of one, without D).
//! The traces are taken over `SKETCH` random combinations of the rows of W and D, which leaves their expectation as it is.
//!
//! Cost: four products of SKETCH d² and two factorisations of d³ per input, on the host.

use super::targets::ridged;
use crate::Result;
use crate::calib::{Moments, Statistic};
use crate::engine::kernels::{self, matmul_nn};
use crate::engine::{Engine, Mat, Recording, Weight, on_host};
use crate::round::factor::{Factor, factor};
use faer::MatRef;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Row combinations that the split-half test looks at.
const SKETCH: usize = 64;

/// Part of the test's α that a run takes. The test knows text of one kind only, and other texts confirm less of a shift, while half of
/// it has three quarters of the gain at home. Perplexity at home and abroad with 1, ½ and 0, without D: the demo model, 3 bits, three
/// seeds, per channel 39.85, 45.05; 39.81, 45.04; 39.89, 44.92, in groups of 128 39.73, 45.11; 39.80, 45.01; 39.82, 44.92 (spreads ± .05
/// to .12); SmolLM2-135M, 3 bits per channel, 16 windows: 43.6, 74.6; 43.2, 75.0; 46.7, 75.4. At 2 bits per channel the demo model
/// prefers all of it at home: 42.50, 47.08 against 42.72, 47.31 with half; with D (two seeds, a prototype of the same mathematics) 42.21,
/// 47.04 against 42.42, 46.78.
const CAUTION: f32 = 0.5;

/// How far targets move, each 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Strength {
    /// α, for what the inputs lack.
    pub inputs: f32,
    /// β, for what the residual stream lacks.
    pub residual: f32,
}

impl Strength {
    /// Where there is too little text for a test.
    pub const UNTESTED: Self = Self { inputs: 0.5, residual: 0.5 };

    /// What a run takes of the test's result.
    pub fn cautious(self) -> Self {
        Self { inputs: CAUTION * self.inputs, ..self }
    }
}

/// The split-half test for the linears `weights` of one input; `None` without two halves or a second stream.
///
/// # Errors
/// `Kind::Numeric` when a half's H cannot be factored.
pub fn strength_of(engine: &mut dyn Engine, statistic: &Statistic, weights: &[&Weight], seed: u64) -> Result<Option<Strength>> {
    let Some(halves) = statistic.halves() else { return Ok(None) };
    let d = halves[0].gram.d;
    let (Some(c0), Some(c1)) = (&halves[0].cross, &halves[1].cross) else { return Ok(None) };
    let rows = weights.iter().map(|w| w.rows).sum();
    if halves[0].gram.is_blank() {
        let _work = on_host(engine, WHAT, flops(rows, d), || (vec![0.0f32; d * d], Factor::blank(d)));
        return Ok(Some(Strength::UNTESTED));
    }
    let signs = Signs::draw(rows, seed);
    let sums = signs.of_weights(engine, weights, d)?;
    on_host(engine, WHAT, flops(rows, d), || tested(halves, [c0, c1], &signs, &sums)).map(Some)
}

/// The name of the test among the host's work.
const WHAT: &str = "strength of targets";

/// Of a test over `rows` rows of weights.
fn flops(rows: usize, d: usize) -> f64 {
    let (rows, d) = (rows as f64, d as f64);
    2.0 * Factor::flops(d as usize) + SKETCH as f64 * (28.0 * d * d + 4.0 * rows * d)
}

/// The test, with the combinations `sums` [SKETCH, d] of the rows of W.
fn tested(halves: &[Moments; 2], [c0, c1]: [&Vec<f32>; 2], signs: &Signs, sums: &[f32]) -> Result<Strength> {
    let d = halves[0].gram.d;
    let square = |values| MatRef::from_row_major_slice(values, d, d);
    let sums = MatRef::from_row_major_slice(sums, SKETCH, d);
    // What each half lacks, by its causes.
    let mut missing = vec![[c0, c1].map(|c| sums * square(c))];
    if let [Some(r0), Some(r1)] = [&halves[0].residual, &halves[1].residual] {
        missing.push([r0, r1].map(|r| signs.matrix() * MatRef::from_row_major_slice(r, signs.rows, d)));
    }
    let (mut gain, mut cost) = ([0.0f64; 2], [[0.0f64; 2]; 2]);
    for (own, other) in [(0, 1), (1, 0)] {
        let own_factor = factor(&ridged(&halves[own].gram), d, false, 0.0)?;
        let u = MatRef::from_row_major_slice(&own_factor.u, d, d);
        let shifts: Vec<_> = missing.iter().map(|m| &m[own] * u.transpose() * u).collect();
        for (i, shift) in shifts.iter().enumerate() {
            let seen = shift * square(&halves[other].gram.h);
            gain[i] += missing.iter().map(|m| inner(shift, &m[other])).sum::<f64>();
            shifts.iter().zip(&mut cost[i]).for_each(|(shift, cost)| *cost += inner(shift, &seen));
        }
    }
    // Each by itself: the least of all α and β from 0 to 1 differs where one ends at a bound, as α often does, and is no better. The demo model,
    // home and abroad: 3 bits in groups of 128, three seeds, +.13 (all three worse), .00, with β best for half of α +.10, +.09; 2 bits per
    // channel +.01, +.09, with half of α +.01, +.01.
    let [inputs, residual] = least(gain, cost).map(|v| v.clamp(0.0, 1.0) as f32);
    Ok(Strength { inputs, residual })
}

fn inner(a: &faer::Mat<f32>, b: &faer::Mat<f32>) -> f64 {
    a.col_iter().zip(b.col_iter()).flat_map(|(a, b)| a.iter().zip(b.iter())).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Where vᵀ cost v − 2 gainᵀ v is least; 0 for directions that cost nothing.
fn least(gain: [f64; 2], cost: [[f64; 2]; 2]) -> [f64; 2] {
    let [[aa, ab], [ba, bb]] = cost;
    let det = aa * bb - ab * ba;
    // Far from singular, or the two shifts are the same one.
    if det > 1e-6 * aa * bb {
        return [(gain[0] * bb - ab * gain[1]) / det, (aa * gain[1] - gain[0] * ba) / det];
    }
    match (aa > 0.0, bb > 0.0) {
        (true, _) => [gain[0] / aa, 0.0],
        (false, true) => [0.0, gain[1] / bb],
        _ => [0.0; 2],
    }
}

/// Random signs [SKETCH, rows], column by column: sums and differences of rows.
struct Signs {
    rows: usize,
    values: Vec<f32>,
}

impl Signs {
    fn draw(rows: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let values = (0..SKETCH * rows).map(|_| if rng.next_u32() & 1 == 0 { 1.0 } else { -1.0 }).collect();
        Self { rows, values }
    }

    fn matrix(&self) -> MatRef<'_, f32> {
        MatRef::from_column_major_slice(&self.values, SKETCH, self.rows)
    }

    /// The combinations of the rows of all `weights`, one after the other, [SKETCH, d].
    fn of_weights(&self, engine: &mut dyn Engine, weights: &[&Weight], d: usize) -> Result<Vec<f32>> {
        let mut rec = Recording::new();
        let natural = rec.upload("order", (0..d as u32).collect::<Vec<_>>());
        let out = Mat::zeros(&mut rec, "sketch", SKETCH, d);
        let mut first = 0;
        for weight in weights {
            for panel in &weight.panels {
                let w = super::pieces::gather_rows(&mut rec, weight, panel.start..panel.start + panel.rows, natural);
                let signs: Vec<f32> =
                    (0..SKETCH).flat_map(|i| (first..first + panel.rows).map(move |r| self.values[r * SKETCH + i])).collect();
                first += panel.rows;
                let signs = Mat::upload(&mut rec, "signs", SKETCH, panel.rows, signs);
                let p = matmul_nn::MatmulNnParams {
                    n: SKETCH as u32,
                    m: d as u32,
                    k: panel.rows as u32,
                    lda: signs.ld as u32,
                    ldb: w.ld as u32,
                    ldc: out.ld as u32,
                    alpha: 1.0,
                    beta: 1.0,
                    ..Default::default()
                };
                kernels::matmul_nn(&mut rec, p, signs.buffer, w.buffer, out.buffer);
                signs.free(&mut rec);
                w.free(&mut rec);
            }
        }
        let pending = out.download(&mut rec);
        out.free(&mut rec);
        rec.free(natural);
        pending.take(&mut engine.run(rec)?)
    }
}
