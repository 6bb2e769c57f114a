use super::{Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, gptq_sweep_heads::GptqSweepHeadsParams};
use aespa_gpu::engine::matrix::stride;
use std::rc::Rc;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // (n_head, d_head, cols, col0, width): around the vectors and workgroups of a head, and blocks of 16 columns.
    for (n_head, d_head, cols, col0, width) in [
        (1, 1, 1, 0, 1),
        (2, 5, 40, 32, 8),
        (1, 16, 19, 16, 3),
        (3, 17, 32, 0, 15),
        (2, 64, 48, 16, 16),
        (2, 127, 16, 0, 16),
        (1, 128, 33, 16, 16),
        (0, 64, 8, 0, 8),
    ] {
        for shuffled in [false, true] {
            all.push(case(n_head, d_head, cols, col0, width, 16, 15, shuffled));
            all.push(case(n_head, d_head, cols, col0, width, cols, 255, shuffled));
        }
    }
    all
}

#[allow(clippy::too_many_arguments, reason = "the dimensions of a case")]
fn case(n_head: usize, d_head: usize, cols: usize, col0: usize, width: usize, group: usize, max_code: u32, shuffled: bool) -> Case {
    let name =
        format!("{n_head} heads of {d_head} x {cols}, columns {col0} + {width}, group {group}, codes to {max_code}, shuffled {shuffled}");
    Case::new(name, move |io| {
        let rows = n_head * d_head;
        let (ld, n_group, u_row, err_col) = (stride(cols), cols.div_ceil(group), 3, 5);
        let (ld_v, ld_u, ld_err) = (stride(d_head), ld + 8, stride(err_col + width));
        // Upper triangles with a diagonal of about one. Below, U is not part of the factor, V is zero.
        let us: Vec<f32> = (0..(u_row + width) * ld_u)
            .map(|i| match (i / ld_u, i % ld_u) {
                (r, c) if r < u_row || c >= cols || c < col0 + r - u_row => f32::NAN,
                (r, c) if c == col0 + r - u_row => 1.0 + 0.3 * io.rng.value(),
                _ => 0.2 * io.rng.value(),
            })
            .collect();
        let vs: Vec<f32> = (0..rows * ld_v)
            .map(|i| match (i / ld_v % d_head, i % ld_v) {
                (_, c) if c >= d_head => f32::NAN,
                (r, c) if c < r => 0.0,
                (r, c) if c == r => 1.0 + 0.3 * io.rng.value(),
                _ => 0.5 * io.rng.value() / (d_head as f32).sqrt(),
            })
            .collect();
        let order: Vec<u32> = if shuffled { io.rng.permutation(cols) } else { (0..cols as u32).collect() };
        let scales: Vec<f32> = (0..rows * n_group).map(|_| (1.7 + 0.2 * io.rng.value()) / max_code as f32).collect();
        let zeros: Vec<f32> = scales.iter().map(|_| io.rng.zero_point(max_code)).collect();
        let before = io.rng.padded(rows, cols, ld);
        let (u, v, at) = (io.upload(us.clone()), io.upload(vs.clone()), io.upload(order.clone()));
        let (scale, zero) = (io.upload(scales.clone()), io.upload(zeros.clone()));
        let w = io.inout("w", before.clone());
        let err = io.output::<f32>("err", rows * ld_err);
        let p = GptqSweepHeadsParams {
            n_head: n_head as u32,
            d_head: d_head as u32,
            ld_v: ld_v as u32,
            cols: cols as u32,
            ld: ld as u32,
            col0: col0 as u32,
            width: width as u32,
            u_row: u_row as u32,
            ld_u: ld_u as u32,
            ld_err: ld_err as u32,
            err_col: err_col as u32,
            group: group as u32,
            n_group: n_group as u32,
            max_code,
        };
        kernels::gptq_sweep_heads(&mut io.rec, p, u, v, at, scale, zero, w.buffer, err.buffer);
        let sweep = |head: usize| {
            let row = |r: usize| head * d_head + r;
            let weights = (0..d_head).map(|r| before[row(r) * ld + col0..][..width].iter().map(|w| f64::from(*w)).collect()).collect();
            let u = |i: usize, j: usize| f64::from(us[(u_row + i) * ld_u + col0 + j]);
            let v = |i: usize, j: usize| f64::from(vs[row(i) * ld_v + j]);
            let grid = |r: usize, j: usize| {
                let i = row(r) * n_group + order[col0 + j] as usize / group;
                (f64::from(scales[i]), f64::from(zeros[i]))
            };
            sweep(weights, width, u, v, grid, f64::from(max_code))
        };
        // Steps of a row: [rows][width].
        let swept: Rc<Vec<Vec<Step>>> = Rc::new((0..n_head).flat_map(sweep).collect());
        let block = move |j: usize| (col0..col0 + width).contains(&j).then(|| j - col0);
        let near = |value: f64, error: f64| if error.is_finite() { Want::Near(value, error) } else { Want::Anything };
        let steps = Rc::clone(&swept);
        io.expect(w, move |i| block(i % ld).map_or(Want::Same, |j| near(steps[i / ld][j].w, steps[i / ld][j].w_error)));
        io.expect(err, move |i| match (i % ld_err).checked_sub(err_col) {
            Some(j) if j < width => near(swept[i / ld_err][j].err, swept[i / ld_err][j].err_error),
            _ => Want::Same,
        });
    })
}

/// One weight: values, and bounds on their f32 errors.
struct Step {
    w: f64,
    w_error: f64,
    err: f64,
    err_error: f64,
}

/// Sweeps the rows of a head, `w` [d_head][width].
fn sweep(
    mut w: Vec<Vec<f64>>,
    width: usize,
    u: impl Fn(usize, usize) -> f64,
    v: impl Fn(usize, usize) -> f64,
    grid: impl Fn(usize, usize) -> (f64, f64),
    max_code: f64,
) -> Vec<Vec<Step>> {
    let d_head = w.len();
    let mut bound = vec![vec![0.0f64; width]; d_head];
    let mut steps: Vec<Vec<Step>> = w.iter().map(|_| Vec::new()).collect();
    for j in 0..width {
        // Of this column, feedback from the rows above included.
        let mut now: Vec<f64> = w.iter().map(|row| row[j]).collect();
        let mut now_bound: Vec<f64> = bound.iter().map(|row| row[j]).collect();
        for r in 0..d_head {
            let ((s, z), x) = (grid(r, j), now[r] / grid(r, j).0);
            // Division is off by 2.5 units in the last place at most. Where f32 may round either way, nothing after it is known.
            let slack = now_bound[r] / s + 3.0 * EPS * x.abs();
            let low = (x + z - slack).round_ties_even().clamp(0.0, max_code);
            let high = (x + z + slack).round_ties_even().clamp(0.0, max_code);
            let certain = low == high;
            let code = (x + z).round_ties_even().clamp(0.0, max_code);
            let value = s * (code - z);
            let unknown = if certain { 0.0 } else { f64::INFINITY };
            let rounding = |w: f64, bound: f64| bound + EPS * (value.abs() + (w - value).abs()) + unknown;
            let feedback = (now[r] - value) / v(r, r);
            let feedback_error = rounding(now[r], now_bound[r]) / v(r, r).abs() + 3.0 * EPS * feedback.abs();
            for other in r + 1..d_head {
                let change = feedback * v(r, other);
                now[other] -= change;
                now_bound[other] += feedback_error * v(r, other).abs() + EPS * (change.abs() + now[other].abs());
            }
            let err = (w[r][j] - value) / u(j, j);
            let err_error = rounding(w[r][j], bound[r][j]) / u(j, j).abs() + 3.0 * EPS * err.abs();
            for k in j + 1..width {
                let change = err * u(j, k);
                w[r][k] -= change;
                bound[r][k] += err_error * u(j, k).abs() + EPS * (change.abs() + w[r][k].abs());
            }
            steps[r].push(Step { w: now[r], w_error: now_bound[r], err, err_error });
        }
    }
    steps
}
