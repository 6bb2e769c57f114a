use super::{AWKWARD, Case, EPS, Want};
use aespa_gpu::engine::kernels;
use aespa_gpu::engine::kernels::adaround_step::{AdaroundStepParams, BEGIN, CHANGE, END, ERROR, STEP};
use aespa_gpu::engine::matrix::stride;
use std::ops::Range;
use std::rc::Rc;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for phase in [BEGIN, STEP, CHANGE, END] {
        for cols in AWKWARD.into_iter().filter(|c| *c > 0) {
            all.push(case(phase, 3, cols, 32, 7, 1.5));
        }
        all.extend([case(phase, 0, 8, 8, 15, 1.5), case(phase, 67, 40, 16, 255, 0.0), case(phase, 5, 100, 100, 3, 1.5)]);
    }
    for phase in [STEP, CHANGE, END, ERROR] {
        // The columns of a block, in `e` by themselves or where they belong.
        for (columns, ld_e, e_col) in [(0..8, 8, 0), (8..72, 64, 0), (64..99, 40, 0), (64..99, 104, 64), (32..96, 104, 16)] {
            all.push(block(phase, 3, 99, 32, columns, ld_e, e_col));
        }
    }
    all.extend([gradient(4, 6, 3), gradient(6, 3, 15)]);
    all
}

fn sigmoid(v: f64) -> f64 {
    1.0 / (1.0 + (-v).exp())
}

/// h(v)
fn h(v: f64) -> f64 {
    (1.2 * sigmoid(v) - 0.1).clamp(0.0, 1.0)
}

/// The share of a step by which a weight at `steps` lies above its lower neighbour; none where f32 may see another neighbour.
fn share(steps: f64) -> Option<f64> {
    let share = steps - steps.floor();
    ((1e-3..1.0 - 1e-3).contains(&share)).then_some(share)
}

/// Everything about one element, in f64.
#[derive(Clone, Copy)]
struct Element {
    start: f64,
    wanted: f64,
    s: f64,
    z: f64,
    v: f64,
    moment: f64,
    square: f64,
    m: f64,
}

impl Element {
    fn soft(&self, h: f64, most: f64) -> f64 {
        self.s * (((self.start / self.s + self.z).floor() + h).clamp(0.0, most) - self.z)
    }

    /// Values of v, moment, square and e after a launch, each with what f32 may be off; none where it may decide differently.
    fn after(&self, p: &AdaroundStepParams) -> Option<[(f64, f64); 4]> {
        let most = f64::from(p.max_code);
        // The size of the codes that are subtracted from each other.
        let size = self.s * (2.0 * most + (self.start / self.s).abs()) + self.wanted.abs();
        let share = share(self.start / self.s + self.z - self.z.round_ties_even())?;
        match p.phase {
            BEGIN => {
                let v = ((share + 0.1) / (1.1 - share)).ln();
                // start / s is off by 3 units in the last place, and so is the share.
                let off = 4.0 * EPS * (self.start / self.s).abs().max(1.0);
                Some([
                    (v, 12.0 * off + 8.0 * EPS),
                    (0.0, 0.0),
                    (0.0, 0.0),
                    (self.soft(share, most) - self.wanted, 16.0 * EPS * size + 2.0 * off * self.s),
                ])
            }
            END => {
                let w = self.soft(if self.v >= 0.0 { 1.0 } else { 0.0 }, most);
                Some([(self.v, 0.0), (self.moment, 0.0), (self.square, 0.0), (w, 4.0 * EPS * size)])
            }
            ERROR => {
                // The sigmoid is good to about 8 units.
                let e = self.soft(h(self.v), most) - self.wanted;
                Some([(self.v, 0.0), (self.moment, 0.0), (self.square, 0.0), (e, 16.0 * EPS * size)])
            }
            _ => {
                let sig = sigmoid(self.v);
                let stretched = 1.2 * sig - 0.1;
                let code = (self.start / self.s + self.z).floor() + stretched;
                let edges = [stretched, 1.0 - stretched, code, code - most];
                if edges.iter().any(|d| d.abs() < 1e-5 * (1.0 + most)) {
                    return None;
                }
                let (lambda, beta) = (f64::from(p.lambda), f64::from(p.beta));
                let off = 2.0 * stretched - 1.0;
                let power = off.abs().powf(beta - 1.0);
                let slope = if stretched > 0.0 && stretched < 1.0 { 1.2 * sig * (1.0 - sig) } else { 0.0 };
                let quadratic = if code > 0.0 && code < most { f64::from(p.quadratic) * self.m * self.s } else { 0.0 };
                let regular = 2.0 * lambda * beta * off.signum() * power;
                let g = (quadratic - regular) * slope;
                // The sigmoid is good to about 8 units; its error enters the power's base absolutely, the power's exponent times
                // the logarithm relatively.
                let power_error =
                    (beta - 1.0) * (off.abs().powf(beta - 2.0) * 20.0 * EPS + power * 8.0 * EPS * (1.0 + off.abs().ln().abs()));
                let g_error = slope * (16.0 * EPS * (quadratic.abs() + regular.abs()) + 2.0 * lambda * beta * power_error)
                    + 1e-30
                    + 1.2 * 16.0 * EPS * (quadratic.abs() + regular.abs()) * sig;
                let from = if p.phase == CHANGE { self.soft(h(self.v), most) } else { self.wanted };
                if slope == 0.0 && self.moment == 0.0 {
                    // At rest.
                    let e = self.soft(h(self.v), most) - from;
                    return Some([(self.v, 0.0), (0.0, 0.0), (self.square, 0.0), (e, if e == 0.0 { 0.0 } else { 16.0 * EPS * size })]);
                }
                let mut moment = 0.9 * self.moment + 0.1 * g;
                let square = 0.999 * self.square + 0.001 * g * g;
                let moment_error = 0.1 * g_error + 4.0 * EPS * (self.moment.abs() + g.abs());
                let square_error = 0.002 * g.abs() * g_error + 8.0 * EPS * square;
                let root = f64::from(p.root) * square.sqrt() + 1e-8;
                let step = f64::from(p.rate) * moment / root;
                let v = self.v - step;
                let v_error =
                    f64::from(p.rate) * moment_error / root + step.abs() * (square_error / square + 16.0 * EPS) + 2.0 * EPS * v.abs();
                let e = self.soft(h(v), most) - from;
                if slope == 0.0 {
                    // Too little to change v, and the last of it; close to what does, f32 may decide differently.
                    match step.abs() / (EPS * self.v.abs()) {
                        ..0.1 => moment = 0.0,
                        ..4.0 => return None,
                        _ => (),
                    }
                }
                Some([(v, v_error), (moment, moment_error), (square, square_error), (e, 16.0 * EPS * size + self.s * v_error)])
            }
        }
    }
}

/// Makes some moments 0 and some too small to change anything: where h is at an end those weights rest, or come to rest. Of every 96 in a row
/// the last 48 all rest, as nearly all do soon.
fn come_to_rest(v: &mut [f32], moments: &mut [f32]) {
    for (i, (v, moment)) in v.iter_mut().zip(moments).enumerate() {
        match i % 5 {
            _ if i % 96 >= 48 => (*v, *moment) = (3.0f32.copysign(*v), 0.0),
            0 | 2 => *moment = 0.0,
            1 => *moment *= 1e-8,
            _ => (),
        }
    }
}

fn case(phase: u32, rows: usize, cols: usize, group: usize, max_code: u32, lambda: f32) -> Case {
    Case::new(format!("phase {phase}, {rows} x {cols} group {group} codes to {max_code}, lambda {lambda}"), move |io| {
        let (ld, n_group) = (stride(cols), cols.div_ceil(group));
        let ((start, starts), (wanted, wanteds)) = (io.matrix::<f32>(rows, cols, ld), io.matrix::<f32>(rows, cols, ld));
        let scales: Vec<f32> = (0..rows * n_group).map(|_| (1.5 + 0.2 * io.rng.value()) / max_code as f32).collect();
        let zeros: Vec<f32> = scales.iter().map(|_| io.rng.zero_point(max_code)).collect();
        let (scale, zero) = (io.upload(scales.clone()), io.upload(zeros.clone()));
        let mut state =
            |spread: f32, center: f32| -> Vec<f32> { io.rng.padded(rows, cols, ld).into_iter().map(|v| center + spread * v).collect() };
        let (mut vs, mut moments, squares, ms) = (state(4.0, 0.0), state(0.1, 0.0), state(0.4, 0.5), state(2.0, 0.0));
        come_to_rest(&mut vs, &mut moments);
        let (v, moment, square, e) = if phase == BEGIN {
            let n = rows * ld;
            (io.output("v", n), io.output("moment", n), io.output("square", n), io.output("e", n))
        } else {
            let inputs = (vs.clone(), moments.clone(), squares.clone(), ms.clone());
            (io.inout("v", inputs.0), io.inout("moment", inputs.1), io.inout("square", inputs.2), io.inout("e", inputs.3))
        };
        let p = AdaroundStepParams {
            rows: rows as u32,
            col0: 0,
            cols: cols as u32,
            ld: ld as u32,
            ld_e: ld as u32,
            e_col: 0,
            group: group as u32,
            n_group: n_group as u32,
            max_code,
            phase,
            quadratic: 4.0,
            lambda,
            beta: 7.3,
            rate: 0.05,
            root: 1.3,
        };
        kernels::adaround_step(&mut io.rec, p, start, wanted, scale, zero, v.buffer, moment.buffer, square.buffer, e.buffer);
        let after = Rc::new(move |r: usize, j: usize| {
            let at = r * ld + j;
            let grid = r * n_group + j / group;
            let element = Element {
                start: starts[at],
                wanted: wanteds[at],
                s: scales[grid].into(),
                z: zeros[grid].into(),
                v: vs[at].into(),
                moment: moments[at].into(),
                square: squares[at].into(),
                m: ms[at].into(),
            };
            element.after(&p)
        });
        for (which, output) in [v, moment, square, e].into_iter().enumerate() {
            let after = after.clone();
            io.expect_matrix(output, cols, ld, move |r, j| {
                after(r, j).map_or(Want::Anything, |all| Want::Near(all[which].0, all[which].1))
            });
        }
    })
}

/// A launch on some columns: nothing else changes.
fn block(phase: u32, rows: usize, cols: usize, group: usize, columns: Range<usize>, ld_e: usize, e_col: usize) -> Case {
    Case::new(format!("phase {phase}, columns {columns:?} of {rows} x {cols} group {group} at {e_col} of {ld_e}"), move |io| {
        let (ld, n_group, max_code) = (stride(cols), cols.div_ceil(group), 7);
        let ((start, starts), (wanted, wanteds)) = (io.matrix::<f32>(rows, cols, ld), io.matrix::<f32>(rows, cols, ld));
        let scales: Vec<f32> = (0..rows * n_group).map(|_| (1.5 + 0.2 * io.rng.value()) / max_code as f32).collect();
        let zeros: Vec<f32> = scales.iter().map(|_| io.rng.zero_point(max_code)).collect();
        let (scale, zero) = (io.upload(scales.clone()), io.upload(zeros.clone()));
        let mut values =
            |n: usize, spread: f32, center: f32| -> Vec<f32> { io.rng.values(n).into_iter().map(|v| center + spread * v).collect() };
        let (n, n_e) = (rows * ld, rows * ld_e);
        let (mut vs, mut moments, squares, ms) = (values(n, 4.0, 0.0), values(n, 0.1, 0.0), values(n, 0.4, 0.5), values(n_e, 2.0, 0.0));
        come_to_rest(&mut vs, &mut moments);
        let (v, moment) = (io.inout("v", vs.clone()), io.inout("moment", moments.clone()));
        let (square, e) = (io.inout("square", squares.clone()), io.inout("e", ms.clone()));
        let p = AdaroundStepParams {
            rows: rows as u32,
            col0: columns.start as u32,
            cols: columns.len() as u32,
            ld: ld as u32,
            ld_e: ld_e as u32,
            e_col: e_col as u32,
            group: group as u32,
            n_group: n_group as u32,
            max_code,
            phase,
            quadratic: 4.0,
            lambda: 1.5,
            beta: 7.3,
            rate: 0.05,
            root: 1.3,
        };
        kernels::adaround_step(&mut io.rec, p, start, wanted, scale, zero, v.buffer, moment.buffer, square.buffer, e.buffer);
        let after = Rc::new(move |r: usize, j: usize, which: usize| {
            let (at, grid) = (r * ld + j, r * n_group + j / group);
            let element = Element {
                start: starts[at],
                wanted: wanteds[at],
                s: scales[grid].into(),
                z: zeros[grid].into(),
                v: vs[at].into(),
                moment: moments[at].into(),
                square: squares[at].into(),
                m: ms[r * ld_e + e_col + j - columns.start].into(),
            };
            element.after(&p).map_or(Want::Anything, |all| Want::Near(all[which].0, all[which].1))
        });
        let (first, last) = (p.col0 as usize, (p.col0 + p.cols) as usize);
        for (which, output) in [v, moment, square].into_iter().enumerate() {
            let after = after.clone();
            let inside = move |j: usize| [STEP, CHANGE].contains(&phase) && (first..last).contains(&j);
            io.expect(output, move |i| if inside(i % ld) { after(i / ld, i % ld, which) } else { Want::Same });
        }
        let inside = move |j: usize| (e_col..e_col + last - first).contains(&j);
        io.expect(e, move |i| if inside(i % ld_e) { after(i / ld_e, first + i % ld_e - e_col, 3) } else { Want::Same });
    })
}

/// The gradient against central differences of the loss weight · tr(G E H Eᵀ) + lambda Σ (1 − |2h − 1|^beta) with respect to v: after a
/// step from moments of zero, `moment` is a tenth of it. Some codes lie outside the grid.
fn gradient(rows: usize, cols: usize, max_code: u32) -> Case {
    Case::new(format!("gradient, {rows} x {cols} codes to {max_code}"), move |io| {
        let (ld, most) = (stride(cols), f64::from(max_code));
        let ((start, starts), (wanted, wanteds)) = (io.matrix::<f32>(rows, cols, ld), io.matrix::<f32>(rows, cols, ld));
        let scales: Vec<f32> = (0..rows).map(|_| (1.5 + 0.2 * io.rng.value()) / max_code as f32).collect();
        let zeros = vec![(max_code / 2) as f32; rows];
        let (scale, zero) = (io.upload(scales.clone()), io.upload(zeros.clone()));
        let vs: Vec<f32> = io.rng.padded(rows, cols, ld).into_iter().map(|v| 2.0 * v).collect();
        let mut positive = |d: usize| -> Vec<f64> {
            let x = io.rng.values(2 * d * d);
            let sum = |i: usize, j: usize| (0..2 * d).map(|t| f64::from(x[t * d + i]) * f64::from(x[t * d + j])).sum::<f64>();
            (0..d * d).map(|ij| sum(ij / d, ij % d)).collect()
        };
        let (g, hessian) = (positive(rows), positive(cols));
        let (weight, lambda, beta) = (2.0f64, 1.5f64, 4.0f64);
        let error = move |v: &[f64]| -> Vec<f64> {
            let soft = |at: usize| {
                let (r, s) = (at / ld, f64::from(scales[at / ld]));
                let z = f64::from(zeros[r]);
                s * (((starts[at] / s).floor() + h(v[at]) + z).clamp(0.0, most) - z) - wanteds[at]
            };
            (0..rows * ld).map(|at| if at % ld < cols { soft(at) } else { 0.0 }).collect()
        };
        let times = move |e: &[f64]| -> Vec<f64> {
            let eh = |r: usize, j: usize| (0..cols).map(|k| e[r * ld + k] * hessian[k * cols + j]).sum::<f64>();
            let m = |r: usize, j: usize| (0..rows).map(|q| g[r * rows + q] * eh(q, j)).sum::<f64>();
            (0..rows * ld).map(|at| if at % ld < cols { m(at / ld, at % ld) } else { 0.0 }).collect()
        };
        let v64: Vec<f64> = vs.iter().map(|v| f64::from(*v)).collect();
        let m: Vec<f32> = times(&error(&v64)).iter().map(|m| *m as f32).collect();
        let loss = move |v: &[f64]| {
            let e = error(v);
            let quadratic: f64 = times(&e).iter().zip(&e).map(|(m, e)| m * e).sum();
            let regular = |at: usize| if at % ld < cols { 1.0 - (2.0 * h(v[at]) - 1.0).abs().powf(beta) } else { 0.0 };
            weight * quadratic + lambda * (0..rows * ld).map(regular).sum::<f64>()
        };
        let (v, moment) = (io.upload(vs.clone()), io.inout("moment", vec![0.0; rows * ld]));
        let (square, e) = (io.upload(vec![0.0; rows * ld]), io.upload(m));
        let p = AdaroundStepParams {
            rows: rows as u32,
            col0: 0,
            cols: cols as u32,
            ld: ld as u32,
            ld_e: ld as u32,
            e_col: 0,
            group: cols as u32,
            n_group: 1,
            max_code,
            phase: STEP,
            quadratic: 2.0 * weight as f32,
            lambda: lambda as f32,
            beta: beta as f32,
            rate: 0.05,
            root: 1.0,
        };
        kernels::adaround_step(&mut io.rec, p, start, wanted, scale, zero, v, moment.buffer, square, e);
        let terms = loss(&v64).abs();
        io.expect_matrix(moment, cols, ld, move |r, j| {
            let at = r * ld + j;
            let moved = |by: f64| {
                let mut v = v64.clone();
                v[at] += by;
                loss(&v)
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            // Differences of 1e-5 lose eleven of sixteen digits of the loss.
            Want::Near(0.1 * slope, 1e-5 * slope.abs() + 1e-7 * terms)
        });
    })
}
