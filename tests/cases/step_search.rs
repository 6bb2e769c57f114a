use super::{Case, EPS};
use aespa_gpu::engine::kernels::{self, step_search::StepSearchParams};
use aespa_gpu::engine::matrix::stride;
use aespa_gpu::tensor::Dtype;

pub fn cases() -> Vec<Case> {
    let minima = StepSearchParams {
        max_code: 3,
        minima: 1,
        n_try: 16,
        step_dtype: 1,
        count_low: 0.0,
        count_high: 15.0,
        spread: 0.15,
        ..Default::default()
    };
    let signed = StepSearchParams { max_code: 7, minima: 0, count_low: -32.0, count_high: 31.0, ..minima };
    let mut all = Vec::new();
    for p in [minima, signed] {
        // The shapes of files, super-blocks and groups that end early, and one group by itself.
        for (rows, cols, group, per_super) in
            [(5, 512, 16, 16), (67, 256, 32, 8), (3, 700, 32, 8), (2, 131, 63, 3), (3, 1, 1, 1), (0, 8, 8, 1)]
        {
            all.push(case(rows, cols, group, per_super, p, 1.0, false));
        }
        for n_try in [1, 2, 15] {
            all.push(case(4, 512, 16, 16, StepSearchParams { n_try, max_code: 15, ..p }, 1.0, false));
        }
        // Steps that are subnormal numbers of f16, and other types.
        all.push(case(4, 256, 16, 16, p, 1e-4, false));
        all.push(case(4, 256, 32, 8, StepSearchParams { step_dtype: 2, ..p }, 1.0, false));
        all.push(case(4, 256, 32, 8, StepSearchParams { step_dtype: 0, ..p }, 1.0, false));
        // Groups of nothing but zeros, whose scale says nothing.
        all.push(case(4, 512, 16, 16, p, 0.01, true));
    }
    all
}

fn case(rows: usize, cols: usize, group: usize, per_super: usize, p: StepSearchParams, size: f32, blanks: bool) -> Case {
    let (ld, n_group) = (stride(cols), cols.div_ceil(group));
    let n_super = n_group.div_ceil(per_super);
    let p = StepSearchParams {
        rows: rows as u32,
        cols: cols as u32,
        ld: ld as u32,
        group: group as u32,
        n_group: n_group as u32,
        per_super: per_super as u32,
        ..p
    };
    Case::new(format!("{p:?}, weights of {size}{}", if blanks { ", some groups of zeros" } else { "" }), move |io| {
        // Every third group, and a whole super-block.
        let blank = |g: usize| blanks && (g % 3 == 1 || g / per_super == 1);
        let mut ws: Vec<f32> = io.rng.padded(rows, cols, ld).into_iter().map(|w| size * w).collect();
        ws.chunks_mut(ld.max(1))
            .for_each(|row| row[..cols].iter_mut().enumerate().filter(|(j, _)| blank(j / group)).for_each(|(_, w)| *w = 0.0));
        let hs: Vec<f32> = (0..cols).map(|j| if j == cols / 2 { 0.0 } else { io.rng.value().abs() }).collect();
        // Grids of the free search, more or less; every fifth group has no minimum.
        let max = p.max_code as f32;
        let scales: Vec<f32> = (0..rows * n_group)
            .map(|i| {
                let s = if blank(i % n_group) { 1.0 } else { size * (2.0 + 0.8 * io.rng.value()) / max };
                if p.minima == 0 && i % 3 == 2 { -s } else { s }
            })
            .collect();
        let zero = |(i, s): (usize, &f32)| match p.minima {
            0 => f32::midpoint(max, 1.0),
            _ if i % 5 == 4 => 0.0,
            _ => size * (1.0 + 0.01 * (i % 7) as f32) / s,
        };
        let zeros: Vec<f32> = scales.iter().enumerate().map(zero).collect();
        let (w, weight) = (io.upload(ws.clone()), io.upload(hs.clone()));
        let (scale, zero) = (io.inout("scale", scales.clone()), io.inout("zero", zeros.clone()));
        let steps = io.output::<f32>("steps", rows * n_super * 2);
        kernels::step_search(&mut io.rec, p, w, weight, scale.buffer, zero.buffer, steps.buffer);
        io.expect_all(vec![scale, zero, steps], move |got| {
            let mut wrong = Vec::new();
            for at in 0..rows * n_super {
                let (r, block) = (at / n_super, at % n_super);
                let groups = r * n_group + block * per_super..r * n_group + ((block + 1) * per_super).min(n_group);
                let columns = block * per_super * group..((block + 1) * per_super * group).min(cols);
                let data = Block { w: &ws[r * ld..][columns.clone()], h: &hs[columns], p };
                let free = data.free(&scales[groups.clone()], &zeros[groups.clone()]);
                let found = Found { scale: &got[0][groups.clone()], zero: &got[1][groups], steps: [got[2][2 * at], got[2][2 * at + 1]] };
                wrong.extend(data.judge(&free, &found).into_iter().map(|what| format!("row {r} super-block {block}: {what}")));
            }
            wrong
        });
    })
}

/// Scale and minimum of each group.
type Grids = Vec<(f64, f64)>;

struct Found<'a> {
    scale: &'a [f32],
    zero: &'a [f32],
    steps: [f32; 2],
}

struct Block<'a> {
    w: &'a [f32],
    h: &'a [f32],
    p: StepSearchParams,
}

impl Block<'_> {
    fn free(&self, scale: &[f32], zero: &[f32]) -> Grids {
        scale.iter().zip(zero).map(|(s, z)| (f64::from(*s), -f64::from(*s) * f64::from(*z))).collect()
    }

    fn judge(&self, free: &Grids, found: &Found<'_>) -> Vec<String> {
        let mut wrong = Vec::new();
        let dtype = Dtype::from_code(self.p.step_dtype);
        if found.steps[0] <= 0.0 || found.steps.iter().any(|s| dtype.round(*s) != *s) || (self.p.minima == 0) != (found.steps[1] == 0.0) {
            wrong.push(format!("{:?} are no steps of {dtype}", found.steps));
        }
        let mut grids = Vec::new();
        for (s, z) in found.scale.iter().zip(found.zero) {
            let count = (s / found.steps[0]).round();
            if count == 0.0 || !(self.p.count_low..=self.p.count_high).contains(&count) || found.steps[0] * count != *s {
                wrong.push(format!("scale {s:e} is {count} steps of {:e}", found.steps[0]));
            }
            if self.p.minima == 0 {
                grids.push((f64::from(*s), -f64::from(*s) * f64::from(self.p.max_code + 1) / 2.0));
                continue;
            }
            let count = (s * z / found.steps[1]).round();
            // Devices need not round quotients as we do.
            if !(0.0..=self.p.count_high).contains(&count) || (found.steps[1] * count / s - z).abs() > 3.0 * f32::EPSILON * z.abs() {
                wrong.push(format!("zero {z} does not come from {count} steps of {:e}", found.steps[1]));
            }
            grids.push((f64::from(*s), -f64::from(found.steps[1] * count)));
        }
        let (loss, error) = self.loss(&grids);
        let best = self.loss(&self.search(free, dtype)).0;
        // Where a count falls to the other side of a tie, the result differs a little.
        if !(0.97 * best - error..=1.03 * best + error).contains(&loss) {
            wrong.push(format!("the loss is {loss} and should be about {best} +- {error}"));
        }
        wrong
    }

    fn groups(&self) -> impl Iterator<Item = (&[f32], &[f32])> {
        let width = self.p.group as usize;
        self.w.chunks(width).zip(self.h.chunks(width))
    }

    fn code(&self, w: f32, (s, m): (f64, f64)) -> f64 {
        ((f64::from(w) - m) / s).round_ties_even().clamp(0.0, f64::from(self.p.max_code))
    }

    /// The loss, and how far f32 may be off.
    fn loss(&self, grids: &Grids) -> (f64, f64) {
        let (mut sum, mut error) = (0.0, 0.0);
        for ((w, h), grid) in self.groups().zip(grids) {
            for (w, h) in w.iter().zip(h) {
                let e = grid.0 * self.code(*w, *grid) + grid.1 - f64::from(*w);
                let off = EPS * 10.0 * (f64::from(w.abs()) + grid.1.abs() + grid.0.abs());
                sum += f64::from(*h) * e * e;
                error += f64::from(*h) * (2.0 * e.abs() + off) * off;
            }
        }
        (sum, error + EPS * (self.w.len() as f64 + 4.0) * sum)
    }

    /// The definition in f64.
    fn search(&self, free: &Grids, dtype: Dtype) -> Grids {
        let p = &self.p;
        let half = f64::from(p.n_try / 2);
        let least = if p.step_dtype == 1 { 2f64.powi(-24) } else { f64::from(f32::MIN_POSITIVE) };
        let step = |base: f64, t: u32| {
            let factor = if half == 0.0 { 1.0 } else { 1.0 + f64::from(p.spread) * (f64::from(t) - half) / half };
            f64::from(dtype.round((base * factor) as f32)).max(least)
        };
        let high = f64::from(p.count_high);
        let scaled = |s: f64, step: f64| {
            let most = if s > 0.0 { high } else { -f64::from(p.count_low) };
            s.signum() * step * (s.abs() / step).round_ties_even().clamp(1.0, most)
        };
        let zeros = |w: &[f32]| w.iter().all(|w| *w == 0.0);
        let base =
            free.iter().zip(self.groups()).fold(0.0f64, |most, ((s, _), (w, _))| if zeros(w) { most } else { most.max(s.abs()) }) / high;
        let with_scales = |t: u32| -> Grids {
            let step = step(base, t);
            let fit = |(s, m): &(f64, f64), w: &[f32], h: &[f32]| {
                let s = scaled(*s, step);
                if p.minima == 0 {
                    return (s, -s * f64::from(p.max_code + 1) / 2.0);
                }
                let [mut sum_h, mut hq, mut hw] = [0.0; 3];
                for (w, h) in w.iter().zip(h) {
                    let h = f64::from(*h);
                    (sum_h, hq, hw) = (sum_h + h, hq + h * self.code(*w, (s, *m)), hw + h * f64::from(*w));
                }
                (s, if p.n_try > 1 && sum_h > 0.0 { ((hw - s * hq) / sum_h).min(0.0) } else { *m })
            };
            free.iter().zip(self.groups()).map(|(grid, (w, h))| fit(grid, w, h)).collect()
        };
        let best = |of: &dyn Fn(u32) -> Grids| (0..p.n_try).map(of).min_by(|a, b| self.loss(a).0.total_cmp(&self.loss(b).0)).unwrap();
        let grids = best(&with_scales);
        if p.minima == 0 {
            return grids;
        }
        let base = grids.iter().fold(0.0f64, |most, (_, m)| most.max(-m)) / high;
        best(&|t| {
            let step = step(base, t);
            grids.iter().map(|(s, m)| (*s, -step * (-m / step).round_ties_even().clamp(0.0, high))).collect()
        })
    }
}
