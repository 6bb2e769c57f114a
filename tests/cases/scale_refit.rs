use super::{AWKWARD, Case, EPS, Want};
use aespa_gpu::engine::Buffer;
use aespa_gpu::engine::kernels::{self, scale_refit::ScaleRefitParams};
use aespa_gpu::engine::matrix::stride;
use aespa_gpu::tensor::Dtype;
use std::rc::Rc;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for cols in AWKWARD.into_iter().filter(|c| *c > 0) {
        all.push(case(5, cols, cols, 0, Dtype::F32, true));
        all.push(case(5, cols, cols, 0, Dtype::F16, false));
    }
    all.extend([case(131, 96, 32, 2, Dtype::F16, false), case(7, 256, 64, 1, Dtype::Bf16, false), case(3, 70, 64, 1, Dtype::F32, false)]);
    all.push(case(0, 8, 8, 0, Dtype::F16, true));
    // Whole steps, of super-blocks that end early too.
    all.extend([(9, 96, 16, 4, 2), (5, 112, 16, 6, 4), (67, 64, 32, 1, 2)].map(|(r, c, g, at, per)| stepped(r, c, g, at, per)));
    all
}

fn case(rows: usize, cols: usize, group: usize, at: usize, dtype: Dtype, folded: bool) -> Case {
    any(rows, cols, group, at, dtype, folded, 0)
}

fn stepped(rows: usize, cols: usize, group: usize, at: usize, per_super: usize) -> Case {
    any(rows, cols, group, at, Dtype::F32, false, per_super)
}

/// Counts of steps that a scale may have.
const COUNTS: [f32; 2] = [-32.0, 18.0];

fn any(rows: usize, cols: usize, group: usize, at: usize, dtype: Dtype, folded: bool, per_super: usize) -> Case {
    Case::new(format!("{rows} x {cols}, group {at} of {group}, {dtype}, folded {folded}, {per_super} to a super-block"), move |io| {
        let (ld, n_group) = (stride(cols), cols.div_ceil(group));
        let columns = at * group..((at + 1) * group).min(cols);
        let (u, us) = io.matrix::<f32>(rows, cols, ld);
        // u H as if H were positive: mostly along u, so that the curvature is positive, except in every seventh row. Folded it is w H
        // with a scale of about one.
        let sign = |r: usize| if r % 7 == 6 { -1.0 } else { 1.0 };
        let mut uhs = io.rng.padded(rows, cols, ld);
        for (i, uh) in uhs.iter_mut().enumerate() {
            *uh = 0.1 * *uh + sign(i / ld) * us[i] as f32;
        }
        let before: Vec<f32> = io.rng.padded(rows, cols, ld).iter().map(|m| 0.2 * m).collect();
        // Scales may be negative: every third row's are.
        let side = |i: usize| if i / n_group % 3 == 2 && !folded { -1.0 } else { 1.0 };
        let n_super = if per_super == 0 { 0 } else { n_group.div_ceil(per_super) };
        let steps: Vec<f32> = (0..rows * n_super * 2).map(|i| 0.0625 * (1.0 + 0.125 * (i % 5) as f32)).collect();
        let step = {
            let steps = steps.clone();
            move |i: usize| {
                let block = (i % n_group).checked_div(per_super);
                block.map_or(0.0, |block| steps[2 * (i / n_group * n_super + block)])
            }
        };
        let stored = {
            let step = step.clone();
            move |i: usize, x: f32| match step(i) {
                0.0 => dtype.round(x),
                step => {
                    let most = if x > 0.0 { COUNTS[1] } else { -COUNTS[0] };
                    x.signum() * step * (x.abs() / step).round_ties_even().clamp(1.0, most)
                }
            }
        };
        let scales: Vec<f32> = (0..rows * n_group).map(|i| stored(i, side(i) * (1.0 + 0.2 * io.rng.value()))).collect();
        let steps = if per_super == 0 { Buffer::none() } else { io.upload(steps) };
        let (uh, scale, m) = (io.upload(uhs.clone()), io.inout("scale", scales.clone()), io.inout("m", before.clone()));
        let p = ScaleRefitParams {
            rows: rows as u32,
            cols: cols as u32,
            ld: ld as u32,
            col0: columns.start as u32,
            width: columns.len() as u32,
            group: at as u32,
            n_group: n_group as u32,
            scale_dtype: [Dtype::F32, Dtype::F16, Dtype::Bf16].iter().position(|d| *d == dtype).unwrap() as u32,
            folded: u32::from(folded),
            per_super: per_super as u32,
            count_low: COUNTS[0],
            count_high: COUNTS[1],
        };
        kernels::scale_refit(&mut io.rec, p, u, uh, steps, scale.buffer, m.buffer);
        // The scale of each row, how far off f32 may be, and is it certain that it moves at all?
        let refit: Rc<Vec<(f64, f64, bool)>> = Rc::new(
            (0..rows)
                .map(|r| {
                    let s = f64::from(scales[r * n_group + at]);
                    let (mut b, mut c, mut size) = (0.0f64, 0.0f64, 0.0f64);
                    for j in columns.clone() {
                        let (u, m, uh) = (us[r * ld + j], f64::from(before[r * ld + j]), f64::from(uhs[r * ld + j]));
                        b += u * m;
                        c += u * uh;
                        size += (u * m).abs() + (u * uh).abs();
                    }
                    let a = if folded { (b + c) / s } else { c };
                    let slack = 4.0 * EPS * columns.len() as f64 * size * (1.0 + (b / a).abs()) / a.abs() + 4.0 * EPS * s.abs();
                    let exact = s - b / a;
                    if a <= 0.0 || exact * s <= 0.0 {
                        return (s, slack, a < -1e-3 * size);
                    }
                    // One unit in the last place of the stored type where the exact value may lie on either side of a tie.
                    let unit = match dtype {
                        Dtype::F32 => 0.0,
                        Dtype::F16 => 1.0 / 1024.0,
                        Dtype::Bf16 => 1.0 / 128.0,
                    };
                    let grid = r * n_group + at;
                    let [low, after, high] = [exact - slack, exact, exact + slack].map(|x| stored(grid, x as f32));
                    // Written so that the loss rises: the best count may lie further off than the present one where counts end.
                    let rises = |ds: f64| 2.0 * ds * b + ds * ds * a >= 0.0;
                    if per_super > 0 && low == high && rises(f64::from(after) - s) {
                        return (s, 0.0, (exact - s).abs() > 2.0 * slack);
                    }
                    // A move of less than the slack may or may not be taken.
                    let moves = (exact - s).abs() > slack + unit * s.abs() + f64::from(step(grid));
                    (f64::from(after), slack + f64::from(high - low), moves && (dtype == Dtype::F32 && per_super == 0 || low == high))
                })
                .collect(),
        );
        let scales_before = scales.clone();
        let found = Rc::clone(&refit);
        io.expect(scale, move |i| match (i % n_group == at, found[i / n_group]) {
            (false, _) => Want::Same,
            (true, (after, slack, true)) => Want::Near(after, if dtype == Dtype::F32 && per_super == 0 { slack } else { 0.0 }),
            (true, _) => Want::Anything,
        });
        io.expect_matrix(m, cols, ld, move |r, j| {
            let (after, slack, certain) = refit[r];
            let s = f64::from(scales_before[r * n_group + at]);
            let (m, uh) = (f64::from(before[r * ld + j]), f64::from(uhs[r * ld + j]));
            let change = if folded { (m + uh) / s } else { uh };
            let ds = after - s;
            let bound = slack * change.abs() + 4.0 * EPS * (m.abs() + (ds * change).abs());
            if certain { Want::Near(m + ds * change, bound) } else { Want::Anything }
        });
    })
}
