use super::{AWKWARD, Case, EPS};
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
    all
}

fn case(rows: usize, cols: usize, group: usize, at: usize, dtype: Dtype) -> Case {
    Case::new(format!("{rows} x {cols}, group {at} of {group}, {dtype}"), move |io| {
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
        let scales: Vec<f32> = (0..rows * n_group).map(|_| dtype.round(1.0 + 0.2 * io.rng.value())).collect();
        let minima: Vec<f32> = scales.iter().map(|_| dtype.round(-2.0 + io.rng.value())).collect();
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
        };
        kernels::minimum_refit(&mut io.rec, p, q, qh, h, scale.buffer, zero.buffer, m.buffer);
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
                let (s, minimum) = (got[0][grid], dtype.round(-got[0][grid] * got[1][grid]));
                if dtype.round(s) != s || s <= 0.0 || (dtype != Dtype::F32 && -minimum / s != got[1][grid]) {
                    wrong.push(format!("row {r}: {s:e} and {:e} are not stored as {dtype}", got[1][grid]));
                }
                let wide = |x: f32| f64::from(x);
                let sum = |f: &dyn Fn(usize) -> f64| own.clone().map(f).sum::<f64>();
                let b = sum(&|j| wide(qs[r * ld + j]) * wide(before[r * ld + j]));
                let c = sum(&|j| wide(before[r * ld + j]));
                let a = sum(&|j| wide(qs[r * ld + j]) * wide(qhs[r * ld + j]));
                let (f, g) = (sum(&|j| wide(qhs[r * ld + j])), sum(&|j| wide(one_h[j])));
                let change = |ds: f64, dm: f64| 2.0 * (ds * b + dm * c) + ds * ds * a + 2.0 * ds * dm * f + dm * dm * g;
                let minimum_before = dtype.round(-scales[grid] * zeros[grid]);
                let (ds, dm) = (wide(s) - wide(scales[grid]), wide(minimum) - wide(minimum_before));
                // What rounding of scale and minimum may cost at the optimum, and f32's own errors.
                let det = a * g - f * f;
                let best = if det > 1e-6 * a * g { change((c * f - b * g) / det, (b * f - a * c) / det) } else { (-c * c / g).min(0.0) };
                let unit = match dtype {
                    Dtype::F32 => 1e-7,
                    Dtype::F16 => 1.0 / 2048.0,
                    Dtype::Bf16 => 1.0 / 256.0,
                };
                let (es, em) = (unit * wide(s), 0.6 * unit * 4.0);
                let slack = es * es * a + 2.0 * es * em * f + em * em * g + EPS * 64.0 * (b.abs() + c.abs() + a + g);
                let positive = wide(scales[grid]) + (c * f - b * g) / det > 0.0;
                if change(ds, dm) > 1e-6 || (positive && change(ds, dm) > best + slack) {
                    wrong.push(format!("row {r}: the loss changes by {}, and could by {best} (slack {slack})", change(ds, dm)));
                }
                for (j, one_h) in one_h.iter().map(|h| wide(*h)).enumerate() {
                    let i = r * ld + j;
                    let want = wide(before[i]) + ds * wide(qhs[i]) + dm * one_h;
                    let terms = wide(before[i]).abs() + (ds * wide(qhs[i])).abs() + (dm * one_h).abs();
                    // In f32 the minimum before and after is known to its last bit only.
                    let off = 4.0 * EPS * terms + if dtype == Dtype::F32 { 32.0 * EPS * one_h.abs() } else { 0.0 };
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
