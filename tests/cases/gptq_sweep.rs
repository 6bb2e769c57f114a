use super::{Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, gptq_sweep::GptqSweepParams};
use aespa_gpu::engine::matrix::stride;
use std::rc::Rc;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // (rows, cols, col0, width): around 64 rows and blocks of 32 columns.
    for (rows, cols, col0, width) in
        [(1, 1, 0, 1), (5, 40, 32, 8), (63, 64, 0, 32), (64, 64, 32, 32), (65, 67, 64, 3), (131, 100, 37, 31), (0, 8, 0, 8)]
    {
        for shuffled in [false, true] {
            all.push(case(rows, cols, col0, width, 16, 15, shuffled));
            all.push(case(rows, cols, col0, width, cols, 255, shuffled));
        }
    }
    all
}

fn case(rows: usize, cols: usize, col0: usize, width: usize, group: usize, max_code: u32, shuffled: bool) -> Case {
    let name = format!("{rows} x {cols}, columns {col0} + {width}, group {group}, codes to {max_code}, shuffled {shuffled}");
    Case::new(name, move |io| {
        let (ld, n_group, u_row, err_col) = (stride(cols), cols.div_ceil(group), 3, 5);
        let (ld_u, ld_err) = (ld + 8, stride(err_col + width));
        // The upper triangle with a diagonal of about one; what lies below it is not part of the factor.
        let us: Vec<f32> = (0..(u_row + width) * ld_u)
            .map(|i| match (i / ld_u, i % ld_u) {
                (r, c) if r < u_row || c >= cols || c < col0 + r - u_row => f32::NAN,
                (r, c) if c == col0 + r - u_row => 1.0 + 0.3 * io.rng.value(),
                _ => 0.2 * io.rng.value(),
            })
            .collect();
        let order: Vec<u32> = if shuffled { io.rng.permutation(cols) } else { (0..cols as u32).collect() };
        let scales: Vec<f32> = (0..rows * n_group).map(|_| (1.7 + 0.2 * io.rng.value()) / max_code as f32).collect();
        let zeros: Vec<f32> = scales.iter().map(|_| io.rng.zero_point(max_code)).collect();
        let before = io.rng.padded(rows, cols, ld);
        let (u, at, scale, zero) = (io.upload(us.clone()), io.upload(order.clone()), io.upload(scales.clone()), io.upload(zeros.clone()));
        let w = io.inout("w", before.clone());
        let err = io.output::<f32>("err", rows * ld_err);
        let p = GptqSweepParams {
            rows: rows as u32,
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
        kernels::gptq_sweep(&mut io.rec, p, u, at, scale, zero, w.buffer, err.buffer);
        let swept: Rc<Vec<Vec<Step>>> = Rc::new(
            (0..rows)
                .map(|r| {
                    let grid = |j: usize| {
                        let i = r * n_group + order[col0 + j] as usize / group;
                        (f64::from(scales[i]), f64::from(zeros[i]))
                    };
                    let row: Vec<f64> = before[r * ld + col0..][..width].iter().map(|w| f64::from(*w)).collect();
                    sweep(row, |i, j| f64::from(us[(u_row + i) * ld_u + col0 + j]), grid, f64::from(max_code))
                })
                .collect(),
        );
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

/// One column of one row: values, and bounds on their f32 errors.
struct Step {
    w: f64,
    w_error: f64,
    err: f64,
    err_error: f64,
}

fn sweep(mut w: Vec<f64>, u: impl Fn(usize, usize) -> f64, grid: impl Fn(usize) -> (f64, f64), max_code: f64) -> Vec<Step> {
    let mut bound = vec![0.0f64; w.len()];
    let mut steps = Vec::new();
    for j in 0..w.len() {
        let ((s, z), x) = (grid(j), w[j] / grid(j).0);
        // Division is off by 2.5 units in the last place at most. Where f32 may round either way, nothing after it is known.
        let slack = bound[j] / s + 3.0 * EPS * x.abs();
        let low = (x + z - slack).round_ties_even().clamp(0.0, max_code);
        let high = (x + z + slack).round_ties_even().clamp(0.0, max_code);
        let certain = low == high;
        let code = (x + z).round_ties_even().clamp(0.0, max_code);
        let value = s * (code - z);
        let err = (w[j] - value) / u(j, j);
        let rounding = bound[j] + EPS * (value.abs() + (w[j] - value).abs());
        let err_error = if certain { (rounding / u(j, j)).abs() + 3.0 * EPS * err.abs() } else { f64::INFINITY };
        for k in j + 1..w.len() {
            let change = err * u(j, k);
            w[k] -= change;
            bound[k] += err_error * u(j, k).abs() + EPS * (change.abs() + w[k].abs());
        }
        steps.push(Step { w: w[j], w_error: bound[j], err, err_error });
    }
    steps
}
