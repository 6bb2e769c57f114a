use super::{Case, EPS};
use aespa_gpu::engine::kernels::{self, minimum_search::MinimumSearchParams};
use aespa_gpu::engine::matrix::stride;
use aespa_gpu::tensor::Dtype;

pub fn cases() -> Vec<Case> {
    let base = MinimumSearchParams { max_code: 15, n_clip: 8, n_keep: 6, clip: 0.03, ..Default::default() };
    let mut all = Vec::new();
    // Around 64 threads and up to the longest group; the last group is shorter.
    for (rows, cols, group) in [(1, 1, 1), (5, 67, 16), (3, 128, 128), (2, 131, 63), (3, 512, 256), (67, 64, 32), (0, 8, 8)] {
        for scale_dtype in [0, 1, 2] {
            all.push(case(rows, cols, group, MinimumSearchParams { scale_dtype, ..base }, 0.0));
        }
    }
    for (n_clip, n_keep, max_code) in [(1, 1, 3), (2, 4, 7), (3, 8, 3), (8, 1, 255), (8, 8, 1)] {
        all.push(case(4, 100, 32, MinimumSearchParams { n_clip, n_keep, max_code, scale_dtype: 1, ..base }, 0.0));
    }
    // Groups far from zero, and so narrow that the floor of the scale counts.
    all.push(case(4, 100, 32, MinimumSearchParams { scale_dtype: 1, ..base }, 3.0));
    all.push(case(4, 100, 32, MinimumSearchParams { scale_dtype: 2, ..base }, -2e5));
    // Minima that may not be above zero, of groups around it and of groups on either side.
    all.extend([0.0, 3.0, -3.0].map(|offset| case(4, 100, 32, MinimumSearchParams { below_zero: 1, ..base }, offset)));
    all
}

fn case(rows: usize, cols: usize, group: usize, p: MinimumSearchParams, offset: f32) -> Case {
    let (ld, n_group) = (stride(cols), cols.div_ceil(group));
    let p = MinimumSearchParams { rows: rows as u32, cols: cols as u32, ld: ld as u32, group: group as u32, n_group: n_group as u32, ..p };
    Case::new(format!("{p:?}, weights around {offset}"), move |io| {
        let mut ws: Vec<f32> = io.rng.padded(rows, cols, ld).into_iter().map(|w| offset + w).collect();
        // One group of equal weights, and one input that never counts.
        for r in 0..rows {
            for j in (0..cols).filter(|j| n_group > 1 && r == rows / 2 && j / group == 1) {
                ws[r * ld + j] = 0.5;
            }
        }
        let hs: Vec<f32> = (0..cols).map(|j| if j == cols / 2 { 0.0 } else { io.rng.value().abs() }).collect();
        let (w, weight) = (io.upload(ws.clone()), io.upload(hs.clone()));
        let (kept, len) = (p.n_keep as usize, rows * n_group);
        let [scale, zero, loss] = ["scale", "zero", "loss"].map(|name| io.output::<f32>(name, kept * len));
        kernels::minimum_search(&mut io.rec, p, w, weight, scale.buffer, zero.buffer, loss.buffer);
        // By the loss that they stand for: near-ties may fall either way.
        io.expect_all(vec![scale, zero, loss], move |got| {
            let mut wrong = Vec::new();
            for at in 0..len {
                let (r, g) = (at / n_group, at % n_group);
                let columns = g * group..((g + 1) * group).min(cols);
                let data = Group { w: &ws[r * ld..][columns.clone()], h: &hs[columns], p };
                let found: Vec<[f32; 3]> = (0..kept).map(|k| [0, 1, 2].map(|i| got[i][k * len + at])).collect();
                wrong.extend(data.judge(&found).into_iter().map(|what| format!("row {r} group {g}: {what}, found {found:?}")));
            }
            wrong
        });
    })
}

struct Group<'a> {
    w: &'a [f32],
    h: &'a [f32],
    p: MinimumSearchParams,
}

impl Group<'_> {
    fn judge(&self, found: &[[f32; 3]]) -> Vec<String> {
        let (mut wrong, dtype) = (Vec::new(), Dtype::from_code(self.p.scale_dtype));
        let least = self.least(dtype);
        for (k, [scale, zero, loss]) in found.iter().enumerate() {
            if dtype.round(*scale) != *scale || *scale <= 0.0 {
                wrong.push(format!("scale {k} is not a positive {dtype}"));
            }
            if self.p.below_zero != 0 && *zero < 0.0 {
                wrong.push(format!("minimum {k} is above zero"));
            }
            // The minimum that the file will hold, which z gives back exactly.
            let minimum = dtype.round(-scale * zero);
            // Devices need not round quotients as we do.
            if dtype != Dtype::F32 && (-minimum / scale - zero).abs() > 3.0 * f32::EPSILON * zero.abs() {
                wrong.push(format!("zero {k} does not come from a {dtype}"));
            }
            let (want, error) = self.loss(f64::from(*scale), f64::from(minimum));
            let loss = f64::from(*loss);
            // NaN lies in no range.
            if !(want - error..=want + error).contains(&loss) {
                wrong.push(format!("loss {k} should be {want} +- {error}"));
            }
            // A code that falls to the other side changes a candidate a little.
            if !(0.97 * least[k] - error..=1.03 * least[k] + error).contains(&loss) {
                wrong.push(format!("loss {k} should be about {} +- {error}", least[k]));
            }
            if k > 0 && found[k - 1][2] > found[k][2] {
                wrong.push(format!("loss {k} is better than the one before"));
            }
        }
        wrong
    }

    fn code(&self, w: f64, s: f64, m: f64) -> f64 {
        ((w - m) / s).round_ties_even().clamp(0.0, f64::from(self.p.max_code))
    }

    /// The loss of a grid, and how far f32 may be off: (w − m) / s is off by a few eps of w / s, which matters next to a tie only, where
    /// the two choices are equally good.
    fn loss(&self, s: f64, m: f64) -> (f64, f64) {
        let (mut sum, mut error) = (0.0, 0.0);
        for (w, h) in self.w.iter().zip(self.h) {
            let (w, h) = (f64::from(*w), f64::from(*h));
            let e = s * self.code(w, s, m) + m - w;
            let off = EPS * (10.0 * (w.abs() + m.abs()) + s);
            sum += h * e * e;
            error += h * (2.0 * e.abs() + off) * off;
        }
        (sum, error + EPS * (self.w.len() as f64 + 4.0) * sum)
    }

    /// The losses of all candidates, least first.
    fn least(&self, dtype: Dtype) -> Vec<f64> {
        let p = &self.p;
        let stored = |x: f64| f64::from(dtype.round(x as f32));
        let (lo, hi) = self.w.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), w| (l.min(f64::from(*w)), h.max(f64::from(*w))));
        let ceiling = if p.below_zero == 0 { f64::INFINITY } else { 0.0 };
        let lo = lo.min(ceiling);
        let smallest = if p.scale_dtype == 1 { 2f64.powi(-14) } else { f64::from(f32::MIN_POSITIVE) };
        let least = (lo.abs().max(hi.abs()) / 16384.0).max(smallest);
        let mut all = Vec::new();
        for index in 0..p.n_clip * p.n_clip {
            let unit = f64::from(p.clip) * (hi - lo);
            let (low, high) = (lo + f64::from(index / p.n_clip) * unit, hi - f64::from(index % p.n_clip) * unit);
            let (mut s, mut m) = (((high - low) / f64::from(p.max_code)).max(least), low);
            if p.n_clip > 1 {
                let [mut h1, mut hq, mut hqq, mut hw, mut hqw] = [0.0; 5];
                for (w, h) in self.w.iter().zip(self.h) {
                    let (w, h) = (f64::from(*w), f64::from(*h));
                    let q = self.code(w, s, m);
                    (h1, hq, hqq, hw, hqw) = (h1 + h, hq + h * q, hqq + h * q * q, hw + h * w, hqw + h * q * w);
                }
                let (det, slope) = (h1 * hqq - hq * hq, h1 * hqw - hq * hw);
                if det > 1e-6 * h1 * hqq && slope > 0.0 {
                    s = (slope / det).max(least);
                }
                s = stored(s).max(smallest);
                if h1 > 0.0 {
                    m = (hw - s * hq) / h1;
                }
            } else {
                s = stored(s).max(smallest);
            }
            all.push(self.loss(s, stored(m.min(ceiling))).0);
        }
        all.sort_by(f64::total_cmp);
        all
    }
}
