//! GPTQ in several column orders: each order rounds all rows, and each row keeps the codes that cost it least.
//!
//! Error feedback is greedy: a column sends its error to those that follow, and the last ones keep theirs, so the order decides what is
//! left, L(E) = tr(G E H Eᵀ). By decreasing diag(H) is good on average, but hardly ever best for a row: with K orders row r (or head, where
//! rows are coupled by G) ends at min_k L_r(E_k). The first order is the caller's; the others are drawn column by column with probability
//! proportional to H_jj^(1 / T) among those that are left, which is a sort by ln H_jj + T · Gumbel noise.
//!
//! Shapes: codes and compensated weights [rows, d] of two orders at a time; U [d, d] f32 on the device for each order, kept for all linears
//! of an input. Cost: an order is a factorisation per input (2 d³ / 3 flops on the host) and rows · 2 d² multiply-adds per linear, half of
//! them for its losses.

use super::gptq::{DeviceFactor, RoundedGptq, RowFactor};
use super::problem::{Problem, Rounded};
use crate::engine::kernels::{self, select_rows};
use crate::engine::{Engine, submit};
use crate::quant::Grid;
use crate::{Result, interrupt};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// T of the drawn orders. On the demo model (2 and 3 bits per channel, 8 orders) 0.2 leaves 0.930 and 0.945 of one order's loss, 0.1 and 0.4
/// up to 0.006 more, 1 (proportional to H_jj) 0.013 more, orders without preference 0.018.
const SPREAD: f64 = 0.2;

/// The order number `index` (the caller's own being 0) of the columns of H [d, d].
pub fn drawn(h: &[f32], d: usize, seed: u64, index: u32) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(u64::from(index));
    let mut keys: Vec<(f64, u32)> = (0..d)
        .map(|j| {
            // Inside (0, 1), so that both logarithms are finite.
            let uniform = (f64::from(rng.next_u32()) + 0.5) / 2f64.powi(32);
            (f64::from(h[j * d + j].max(0.0)).ln() - SPREAD * (-uniform.ln()).ln(), j as u32)
        })
        .collect();
    keys.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    keys.into_iter().map(|(_, j)| j).collect()
}

/// The best of all orders.
#[derive(Debug)]
pub struct BestOrder {
    pub rounded: RoundedGptq,
    /// Rows that came from another order than the first.
    pub rows_from_others: usize,
}

/// Rounds the target of `problem` on `grid` in the order of each of `factors`; no unit ends above what the first order gives it.
///
/// # Errors
/// `Kind::Numeric` when a loss is not finite; what the engine returns.
pub fn round(
    engine: &mut dyn Engine,
    problem: &Problem<'_>,
    grid: Grid,
    factors: &[DeviceFactor],
    rows: Option<&RowFactor>,
) -> Result<BestOrder> {
    let Some((first, others)) = factors.split_first() else { return Err(crate::Error::internal("column orders", "there are none")) };
    let (shape, unit) = (problem.shape, problem.objective.unit().max(1));
    let in_order = |engine: &mut dyn Engine, factor: &DeviceFactor| {
        interrupt::check()?;
        submit(engine, |rec| factor.round(rec, &shape, problem.target, grid, rows))
    };
    let best = in_order(engine, first)?;
    if others.is_empty() {
        return Ok(BestOrder { rounded: best, rows_from_others: 0 });
    }
    let unit_losses = |engine: &mut dyn Engine, rounded: &RoundedGptq| -> Result<Vec<f64>> {
        let rows = problem.losses(engine, &Rounded { codes: rounded.codes, grid })?;
        Ok(rows.chunks(unit).map(|rows| rows.iter().map(|l| f64::from(*l)).sum()).collect())
    };
    let mut losses = unit_losses(engine, &best)?;
    let mut moved = vec![false; losses.len()];
    for factor in others {
        let other = in_order(engine, factor)?;
        let after = unit_losses(engine, &other)?;
        let better: Vec<bool> = losses.iter().zip(&after).map(|(best, other)| other < best).collect();
        for (i, _) in better.iter().enumerate().filter(|(_, better)| **better) {
            (losses[i], moved[i]) = (after[i], true);
        }
        submit(engine, |rec| {
            if better.contains(&true) {
                let pick = rec.upload("pick", (0..shape.rows).map(|r| u32::from(better[r / unit])).collect::<Vec<_>>());
                let p = select_rows::SelectRowsParams { rows: shape.rows as u32, ld: best.codes.ld as u32 };
                kernels::select_rows(rec, p, pick, other.codes.buffer, best.codes.buffer);
                kernels::select_rows(rec, p, pick, other.compensated.buffer.as_words(), best.compensated.buffer.as_words());
                rec.free(pick);
            }
            other.into_codes(rec).free(rec);
        })?;
    }
    Ok(BestOrder { rounded: best, rows_from_others: unit * moved.iter().filter(|moved| **moved).count() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every order is a permutation, differs with seed and index, and large columns tend to stand first.
    #[test]
    fn orders_are_permutations_that_prefer_large_columns() {
        let d = 64;
        let h: Vec<f32> = (0..d * d).map(|i| if i / d == i % d { (i % d) as f32 } else { 0.0 }).collect();
        let orders: Vec<Vec<u32>> = [(0, 1), (0, 2), (1, 1)].map(|(seed, index)| drawn(&h, d, seed, index)).into();
        for order in &orders {
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(sorted.iter().copied().eq(0..d as u32));
            // The dead column is last.
            assert_eq!(order[d - 1], 0);
            assert!(order[..d / 2].iter().sum::<u32>() > order[d / 2..].iter().sum::<u32>());
        }
        assert!(orders[0] != orders[1] && orders[0] != orders[2]);
        assert_eq!(drawn(&h, d, 0, 1), orders[0]);
    }
}
