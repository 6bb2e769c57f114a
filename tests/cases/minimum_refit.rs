use super::{AWKWARD, Case, EPS};
use aespa_gpu::engine::Buffer;
use aespa_gpu::engine::kernels::{self, minimum_refit::MinimumRefitParams};
use aespa_gpu::engine::matrix::stride;
use aespa_gpu::tensor::Dtype;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for cols in AWKWARD.into_iter().filter(|c| *c > 0) {
        all.push(case(5, cols, cols, 0, Dtype::F32));
        all.push(case(5, cols, cols, 0, Dtype::F16));
    }
    all.extend([case(131, 96, 32, 2, Dtype::F16), case(7, 256, 64, 1, Dtype::Bf16), case(3, 70, 64, 1, Dtype::F32)]);
    all.push(case(0, 8, 8, 0, Dtype::F16));
    // Whole steps, of super-blocks that end early too.
    all.extend([(9, 96, 16, 4, 2), (5, 112, 16, 6, 4), (67, 64, 32, 1, 2)].map(|(r, c, g, at, per)| any(r, c, g, at, Dtype::F32, per)));
    all
}

fn case(rows: usize, cols: usize, group: usize, at: usize, dtype: Dtype) -> Case {
    any(rows, cols, group, at, dtype, 0)
}

/// The largest count of steps.
const MOST: f32 = 31.0;

fn any(rows: usize, cols: usize, group: usize, at: usize, dtype: Dtype, per_super: usize) -> Case {
    Case::new(format!("{rows} x {cols}, group {at} of {group}, {dtype}, {per_super} to a super-block"), move |io| {
        let (ld, n_group) = (stride(cols), cols.div_ceil(group));
        let own = at * group..((at + 1) * group).min(cols);
        // Codes, and products with an H = I + 11ᵀ / 8, so that the quadratic is one.
        let mut qs = vec![f32::NAN; rows * ld];
        (0..rows * ld).filter(|i| i % ld < cols).for_each(|i| qs[i] = io.rng.below(8) as f32);
        let ones = own.len() as f32 / 8.0;
        let one_h: Vec<f32> = (0..cols).map(|j| f32::from(u8::from(own.contains(&j))) + ones).collect();
        let mut qhs = vec![f32::NAN; rows * ld];
        for r in 0..rows {
            let sum: f32 = own.clone().map(|j| qs[r * ld + j]).sum();
            (0..cols).for_each(|j| qhs[r * ld + j] = sum / 8.0 + if own.contains(&j) { qs[r * ld + j] } else { 0.0 });
        }
        let before: Vec<f32> = io.rng.padded(rows, cols, ld);
        let n_super = if per_super == 0 { 0 } else { n_group.div_ceil(per_super) };
        let steps: Vec<f32> = (0..rows * n_super * 2).map(|i| 0.0625 * (1.0 + 0.125 * (i % 5) as f32)).collect();
        let step = {
            let steps = steps.clone();
            move |i: usize, which: usize| {
                let block = (i % n_group).checked_div(per_super);
                block.map_or(0.0, |block| steps[2 * (i / n_group * n_super + block) + which])
            }
        };
        let stored_scale = {
            let step = step.clone();
            move |i: usize, s: f32| if per_super == 0 { dtype.round(s) } else { step(i, 0) * (s / step(i, 0)).round().clamp(1.0, MOST) }
        };
        let stored_minimum = {
            let step = step.clone();
            move |i: usize, m: f32| if per_super == 0 { dtype.round(m) } else { -step(i, 1) * (-m / step(i, 1)).round().clamp(0.0, MOST) }
        };
        let scales: Vec<f32> = (0..rows * n_group).map(|i| stored_scale(i, 1.0 + 0.2 * io.rng.value())).collect();
        let minima: Vec<f32> = (0..rows * n_group).map(|i| stored_minimum(i, -2.0 + io.rng.value())).collect();
        let steps = if per_super == 0 { Buffer::none() } else { io.upload(steps) };
        let zeros: Vec<f32> = scales.iter().zip(&minima).map(|(s, m)| -m / s).collect();
        let (q, qh, h) = (io.upload(qs.clone()), io.upload(qhs.clone()), io.upload(one_h.clone()));
        let (scale, zero, m) = (io.inout("scale", scales.clone()), io.inout("zero", zeros.clone()), io.inout("m", before.clone()));
        let p = MinimumRefitParams {
            rows: rows as u32,
            cols: cols as u32,
            ld: ld as u32,
            col0: own.start as u32,
            width: own.len() as u32,
            group: at as u32,
            n_group: n_group as u32,
            scale_dtype: dtype.code(),
            per_super: per_super as u32,
            count_high: MOST,
        };
        kernels::minimum_refit(&mut io.rec, p, q, qh, h, steps, scale.buffer, zero.buffer, m.buffer);
        io.expect_all(vec![scale, zero, m], move |got| {
            let mut wrong = Vec::new();
            for r in 0..rows {
                let grid = r * n_group + at;
                for g in (0..n_group).filter(|g| *g != at) {
                    let i = r * n_group + g;
                    if (got[0][i], got[1][i]) != (scales[i], zeros[i]) {
                        wrong.push(format!("row {r}: group {g} changed"));
                    }
                }
                let (s, minimum) = (got[0][grid], stored_minimum(grid, -got[0][grid] * got[1][grid]));
                let exact = dtype != Dtype::F32 || per_super > 0;
                if stored_scale(grid, s) != s || s <= 0.0 || (exact && -minimum / s != got[1][grid]) {
                    wrong.push(format!("row {r}: {s:e} and {:e} are not stored as {dtype}", got[1][grid]));
                }
                let wide = |x: f32| f64::from(x);
                let sum = |f: &dyn Fn(usize) -> f64| own.clone().map(f).sum::<f64>();
                let b = sum(&|j| wide(qs[r * ld + j]) * wide(before[r * ld + j]));
                let c = sum(&|j| wide(before[r * ld + j]));
                let a = sum(&|j| wide(qs[r * ld + j]) * wide(qhs[r * ld + j]));
                let (f, g) = (sum(&|j| wide(qhs[r * ld + j])), sum(&|j| wide(one_h[j])));
                let change = |ds: f64, dm: f64| 2.0 * (ds * b + dm * c) + ds * ds * a + 2.0 * ds * dm * f + dm * dm * g;
                let minimum_before = stored_minimum(grid, -scales[grid] * zeros[grid]);
                let (ds, dm) = (wide(s) - wide(scales[grid]), wide(minimum) - wide(minimum_before));
                // What rounding of scale and minimum may cost at the optimum, and f32's own errors.
                let det = a * g - f * f;
                let best = if det > 1e-6 * a * g { change((c * f - b * g) / det, (b * f - a * c) / det) } else { (-c * c / g).min(0.0) };
                let unit = match dtype {
                    Dtype::F32 => 1e-7,
                    Dtype::F16 => 1.0 / 2048.0,
                    Dtype::Bf16 => 1.0 / 256.0,
                };
                let (es, em) = (unit * wide(s) + 0.5 * wide(step(grid, 0)), 0.6 * unit * 4.0 + 0.6 * wide(step(grid, 1)));
                let slack = es * es * a + 2.0 * es * em * f + em * em * g + EPS * 64.0 * (b.abs() + c.abs() + a + g);
                let [to_scale, to_minimum] = [wide(scales[grid]) + (c * f - b * g) / det, wide(minimum_before) + (b * f - a * c) / det];
                // Counts end.
                let reached =
                    |x: f64, least: f64, which: usize| per_super == 0 || (least..=f64::from(MOST)).contains(&(x / wide(step(grid, which))));
                let positive = to_scale > 0.0 && reached(to_scale, 1.0, 0) && reached(-to_minimum, 0.0, 1);
                if change(ds, dm) > 1e-6 || (positive && change(ds, dm) > best + slack) {
                    wrong.push(format!("row {r}: the loss changes by {}, and could by {best} (slack {slack})", change(ds, dm)));
                }
                for (j, one_h) in one_h.iter().map(|h| wide(*h)).enumerate() {
                    let i = r * ld + j;
                    let want = wide(before[i]) + ds * wide(qhs[i]) + dm * one_h;
                    let terms = wide(before[i]).abs() + (ds * wide(qhs[i])).abs() + (dm * one_h).abs();
                    // In f32 the minimum before and after is known to its last bit only.
                    let off = 4.0 * EPS * terms + if !exact { 32.0 * EPS * one_h.abs() } else { 0.0 };
                    let error = (wide(got[2][i]) - want).abs();
                    if error.is_nan() || error > off {
                        wrong.push(format!("m[{r}, {j}] is {}, wanted {want} +- {off}", got[2][i]));
                    }
                }
            }
            wrong
        });
    })
}
