use super::{Case, EPS};
use aespa_gpu::engine::kernels::{self, scale_search::ScaleSearchParams};
use aespa_gpu::engine::matrix::stride;
use aespa_gpu::tensor::Dtype;

pub fn cases() -> Vec<Case> {
    let base = ScaleSearchParams { max_code: 15, n_ratio: 40, n_keep: 3, min_ratio: 0.4, ..Default::default() };
    let mut all = Vec::new();
    // Around 64 threads, pairs of elements, chunks of 1024; the last group is shorter.
    for (rows, cols, group) in [(1, 1, 1), (5, 67, 16), (3, 128, 128), (2, 131, 63), (1, 2501, 2501), (3, 1024, 1024), (0, 8, 8)] {
        for symmetric in [0, 1] {
            for scale_dtype in [0, 1, 2] {
                all.push(case(rows, cols, group, ScaleSearchParams { symmetric, scale_dtype, ..base }));
            }
        }
    }
    // Plain min/max; candidates around those that one, two and four per thread can hold.
    for (n_ratio, symmetric, n_keep) in
        [(1, 0, 1), (1, 1, 1), (2, 1, 2), (3, 1, 3), (64, 1, 8), (65, 1, 8), (64, 0, 8), (100, 0, 8), (128, 0, 8), (128, 1, 1)]
    {
        all.push(case(4, 100, 32, ScaleSearchParams { n_ratio, symmetric, n_keep, max_code: 7, scale_dtype: 1, ..base }));
    }
    // Ends clipped by unequal ratios: zero points that stay codes, that clamping joins, and that leave the codes altogether.
    for (zero_shift, max_code, n_ratio) in [(-2.0, 15, 40), (2.0, 15, 40), (2.0, 3, 80), (-20.0, 7, 20), (2.0, 7, 1)] {
        for symmetric in [0, 1] {
            let n_keep = 3.min(n_ratio);
            all.push(case(3, 100, 32, ScaleSearchParams { zero_shift, max_code, symmetric, n_ratio, n_keep, scale_dtype: 1, ..base }));
        }
    }
    for zero_low in [1.0, 15.0] {
        all.push(case(3, 100, 32, ScaleSearchParams { zero_low, scale_dtype: 1, ..base }));
    }
    for n_ratio in [1, 40, 100] {
        all.push(case(5, 67, 16, ScaleSearchParams { symmetric: 1, signed: 1, n_ratio, n_keep: 2, scale_dtype: 1, ..base }));
    }
    all.push(case(2, 64, 32, ScaleSearchParams { max_code: 255, ..base }));
    all.push(case(2, 64, 32, ScaleSearchParams { max_code: 1, ..base }));
    all
}

fn case(rows: usize, cols: usize, group: usize, p: ScaleSearchParams) -> Case {
    let (ld, n_group) = (stride(cols), cols.div_ceil(group));
    let p = ScaleSearchParams { rows: rows as u32, cols: cols as u32, ld: ld as u32, group: group as u32, n_group: n_group as u32, ..p };
    Case::new(format!("{p:?}"), move |io| {
        let mut ws = io.rng.padded(rows, cols, ld);
        // One group of zeros: all candidates tie, and the first must be kept.
        let zeros = |r: usize, g: usize| n_group > 1 && r == rows / 2 && g == 1;
        for r in 0..rows {
            for j in (0..cols).filter(|j| zeros(r, j / group)) {
                ws[r * ld + j] = 0.0;
            }
        }
        let hs: Vec<f32> = (0..cols).map(|_| io.rng.value().abs()).collect();
        let (w, weight) = (io.upload(ws.clone()), io.upload(hs.clone()));
        let (kept, len) = (p.n_keep as usize, rows * n_group);
        let [scale, zero, loss] = ["scale", "zero", "loss"].map(|name| io.output::<f32>(name, kept * len));
        kernels::scale_search(&mut io.rec, p, w, weight, scale.buffer, zero.buffer, loss.buffer);
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
    p: ScaleSearchParams,
}

impl Group<'_> {
    fn judge(&self, found: &[[f32; 3]]) -> Vec<String> {
        let mut wrong = Vec::new();
        let least = self.least();
        if self.w.iter().all(|w| *w == 0.0) {
            let n_zero = if self.p.symmetric != 0 || self.p.n_ratio == 1 { 1 } else { 2 };
            let sign = |k: usize| if self.p.signed != 0 && k % 2 == 1 { -1.0 } else { 1.0 };
            let middle = (self.p.max_code as f32 + 1.0) / 2.0;
            let zero = |k: usize| ((k % n_zero) as f32 + self.p.zero_shift).clamp(self.p.zero_low, self.p.max_code as f32);
            let wanted: Vec<[f32; 3]> =
                (0..found.len()).map(|k| [sign(k), if self.p.symmetric != 0 { middle } else { zero(k) }, 0.0]).collect();
            return if found == wanted { Vec::new() } else { vec![format!("zeros want {wanted:?}")] };
        }
        for (k, [scale, zero, loss]) in found.iter().enumerate() {
            if self.dtype().round(*scale) != *scale || *scale == 0.0 || (*scale < 0.0 && self.p.signed == 0) {
                wrong.push(format!("scale {k} is not a positive {:?}", self.dtype()));
            }
            if *zero < self.p.zero_low || *zero > self.p.max_code as f32 || (*zero * 2.0).fract() != 0.0 {
                wrong.push(format!("zero {k} is no code"));
            }
            let (true_loss, error) = self.loss(f64::from(*scale), f64::from(*zero));
            let loss = f64::from(*loss);
            // NaN lies in no range.
            if !(true_loss - error..=true_loss + error).contains(&loss) {
                wrong.push(format!("loss {k} should be {true_loss} +- {error}"));
            }
            let (low, high) = least[k];
            if !(low - error..=high + error).contains(&loss) {
                wrong.push(format!("loss {k} should lie in {low}..{high} +- {error}"));
            }
            if k > 0 && found[k - 1][2] > found[k][2] {
                wrong.push(format!("loss {k} is better than the one before"));
            }
        }
        wrong
    }

    fn dtype(&self) -> Dtype {
        [Dtype::F32, Dtype::F16, Dtype::Bf16][self.p.scale_dtype as usize]
    }

    /// The loss of a grid, and how far f32 may be off: x = w / s is off by a few eps, which matters next to a tie only, where the
    /// two choices are equally good; s (q − z) − w is off by eps |w|.
    fn loss(&self, s: f64, z: f64) -> (f64, f64) {
        let (mut sum, mut error) = (0.0, 0.0);
        for (w, h) in self.w.iter().zip(self.h) {
            let (w, h) = (f64::from(*w), f64::from(*h));
            let e = s * (((w / s).round_ties_even() + z).clamp(0.0, f64::from(self.p.max_code)) - z) - w;
            let off = EPS * (10.0 * w.abs() + s);
            sum += h * e * e;
            error += h * (2.0 * e.abs() + off) * off;
        }
        (sum, error + EPS * (self.w.len() as f64 + 4.0) * sum)
    }

    /// Bounds of the least loss, of the second least, and so on. A candidate's scale is computed in f32 before it is rounded, and
    /// its zero point before its fraction is cut off: where either could fall to two sides, its loss is known to a range only.
    fn least(&self) -> Vec<(f64, f64)> {
        let p = &self.p;
        let (low, high) = self.w.iter().fold((0.0f64, 0.0f64), |(l, h), w| (l.min(f64::from(*w)), h.max(f64::from(*w))));
        let most = f64::from(p.max_code);
        let range = if p.symmetric != 0 { 2.0 * high.max(-low) } else { high - low };
        let smallest = if p.scale_dtype == 1 { 2f64.powi(-14) } else { f64::from(f32::MIN_POSITIVE) };
        let both = if p.symmetric != 0 { 1 + p.signed } else { 2.min(p.n_ratio) };
        let (mut lower, mut upper) = (Vec::new(), Vec::new());
        for i in 0..p.n_ratio {
            let step = if p.n_ratio > 1 { (1.0 - f64::from(p.min_ratio)) / f64::from(p.n_ratio - 1) } else { 0.0 };
            let ratio = 1.0 - f64::from(i) * step;
            for which in 0..both {
                let mut losses = Vec::new();
                for off in [-8.0 * EPS, 0.0, 8.0 * EPS] {
                    let s = f64::from(self.dtype().round((ratio * range / most * (1.0 + off)) as f32)).max(smallest);
                    let s = if p.signed != 0 && which == 1 { -s } else { s };
                    for off in [-8.0 * EPS, 8.0 * EPS] {
                        let exact = -ratio * low / s * (1.0 + off);
                        let z = match (p.symmetric != 0, both) {
                            (true, _) => (most + 1.0) / 2.0,
                            (_, 1) => (exact.round_ties_even() + f64::from(p.zero_shift)).clamp(f64::from(p.zero_low), most),
                            _ => (exact.floor() + f64::from(which) + f64::from(p.zero_shift)).clamp(f64::from(p.zero_low), most),
                        };
                        losses.push(self.loss(s, z).0);
                    }
                }
                lower.push(losses.iter().copied().fold(f64::INFINITY, f64::min));
                upper.push(losses.iter().copied().fold(0.0, f64::max));
            }
        }
        lower.sort_by(f64::total_cmp);
        upper.sort_by(f64::total_cmp);
        lower.into_iter().zip(upper).collect()
    }
}
