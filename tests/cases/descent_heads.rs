use super::descent_block::{normal, step};
use super::{Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, descent_heads::DescentHeadsParams};
use aespa_gpu::engine::matrix::stride;
use std::rc::Rc;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // (n_head, d_head, cols, col0, width): around the vectors and workgroups of a head, and blocks of 16 columns.
    for (n_head, d_head, cols, col0, width) in [
        (1, 1, 1, 0, 1),
        (2, 5, 40, 32, 8),
        (1, 16, 19, 16, 3),
        (2, 17, 32, 0, 15),
        (3, 64, 48, 16, 16),
        (2, 127, 16, 0, 16),
        (1, 128, 33, 16, 16),
        (0, 64, 8, 0, 8),
    ] {
        for temperature in [0.0, 0.7] {
            all.push(case(n_head, d_head, cols, col0, width, 16, 15, temperature));
            all.push(case(n_head, d_head, cols, col0, width, cols, 3, temperature));
        }
    }
    all.push(case(2, 64, 16, 0, 16, 16, 255, 0.0));
    all
}

/// One head: steps and v, column after column, and from which column on nothing is certain.
struct Walked {
    steps: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
    /// Σ |G δ|, what the error of v is measured by.
    size: Vec<Vec<f64>>,
    certain: usize,
}

#[allow(clippy::too_many_arguments, reason = "the dimensions of a case")]
fn case(n_head: usize, d_head: usize, cols: usize, col0: usize, width: usize, group: usize, max_code: u32, temperature: f32) -> Case {
    let name = format!(
        "{n_head} heads of {d_head} x {cols}, columns {col0} + {width}, group {group}, codes to {max_code}, temperature {temperature}"
    );
    Case::new(name, move |io| {
        let rows = n_head * d_head;
        let (ld, n_group, h_row, change_col) = (stride(cols), cols.div_ceil(group), 3, 5);
        let (ld_g, ld_h, ld_change) = (stride(d_head), ld + 8, stride(change_col + width));
        let (row0, key) = (977u32, 0x1234_5678u32);
        let dead = if width > 4 { 2 } else { width };
        let mut hs = vec![f32::NAN; (h_row + width) * ld_h];
        for i in 0..width {
            for j in 0..=i {
                let value = if i == j { 1.0 + 0.3 * io.rng.value() } else { 0.2 * io.rng.value() };
                let value = if i == dead || j == dead { 0.0 } else { value };
                hs[(h_row + i) * ld_h + col0 + j] = value;
                hs[(h_row + j) * ld_h + col0 + i] = value;
            }
        }
        // Symmetric, a diagonal of about one; the last of several rows counts for nothing.
        let mut gs = vec![f32::NAN; rows * ld_g];
        for head in 0..n_head {
            for i in 0..d_head {
                for j in 0..=i {
                    let value = if i == j { 1.0 + 0.3 * io.rng.value() } else { io.rng.value() / (d_head as f32).sqrt() };
                    let value = if d_head > 2 && i == d_head - 1 { 0.0 } else { value };
                    gs[(head * d_head + i) * ld_g + j] = value;
                    gs[(head * d_head + j) * ld_g + i] = value;
                }
            }
        }
        let scales: Vec<f32> = (0..rows * n_group).map(|_| (1.7 + 0.2 * io.rng.value()) / max_code as f32).collect();
        let heats: Vec<f32> = (0..rows).map(|_| 0.02 + 0.01 * io.rng.value()).collect();
        let before: Vec<u32> = (0..rows * ld).map(|_| io.rng.below(max_code as usize + 1) as u32).collect();
        let counts: Vec<u32> = (0..rows).map(|_| io.rng.below(9) as u32).collect();
        let (g, h) = (io.upload(gs.clone()), io.upload(hs.clone()));
        let (scale, heat) = (io.upload(scales.clone()), io.upload(heats.clone()));
        let (t, ts) = io.matrix::<f32>(rows, cols, ld);
        let (codes, change) = (io.inout("codes", before.clone()), io.output::<f32>("change", rows * ld_change));
        let moves = io.inout("moves", counts.clone());
        let p = DescentHeadsParams {
            n_head: n_head as u32,
            d_head: d_head as u32,
            ld_g: ld_g as u32,
            cols: cols as u32,
            ld: ld as u32,
            col0: col0 as u32,
            width: width as u32,
            h_row: h_row as u32,
            h_col: col0 as u32,
            ld_h: ld_h as u32,
            ld_change: ld_change as u32,
            change_col: change_col as u32,
            group: group as u32,
            n_group: n_group as u32,
            max_code,
            row0,
            key,
            temperature,
        };
        kernels::descent_heads(&mut io.rec, p, g, h, scale, heat, t, codes.buffer, change.buffer, moves.buffer);
        let walk = |head: usize| {
            let row = |r: usize| head * d_head + r;
            let mut t: Vec<Vec<f64>> = (0..d_head).map(|r| ts[row(r) * ld + col0..][..width].to_vec()).collect();
            let mut out = Walked { steps: vec![], v: vec![], size: vec![], certain: width };
            for j in 0..width {
                let h = |k: usize| f64::from(hs[(h_row + j) * ld_h + col0 + k]);
                let (mut steps, mut v, mut size) = (vec![0.0; d_head], vec![0.0; d_head], vec![0.0f64; d_head]);
                for r in 0..d_head {
                    let g = |other: usize| f64::from(gs[row(r) * ld_g + other]);
                    let s = f64::from(scales[row(r) * n_group + (col0 + j) / group]);
                    if g(r) <= 0.0 || h(j) <= 0.0 {
                        continue;
                    }
                    let curve = g(r) * h(j);
                    let noise = (f64::from(temperature) * f64::from(heats[row(r)]) / curve).sqrt();
                    let x = (noise * normal(key, row0 as usize + row(r), col0 + j) - (t[r][j] + v[r] * h(j)) / curve) / s;
                    let (n, sure) = step(f64::from(before[row(r) * ld + col0 + j]), x, f64::from(max_code));
                    if !sure {
                        out.certain = out.certain.min(j);
                    }
                    steps[r] = n;
                    for other in 0..d_head {
                        v[other] += g(other) * s * n;
                        size[other] += (g(other) * s * n).abs();
                    }
                }
                for (t, v) in t.iter_mut().zip(&v) {
                    (j + 1..width).for_each(|k| t[k] += v * h(k));
                }
                out.steps.push(steps);
                out.v.push(v);
                out.size.push(size);
            }
            out
        };
        let walked: Rc<Vec<Walked>> = Rc::new((0..n_head).map(walk).collect());
        let block = move |j: usize| (col0..col0 + width).contains(&j).then(|| j - col0);
        let heads = Rc::clone(&walked);
        io.expect(codes, move |i| {
            let (head, r) = (i / ld / d_head, i / ld % d_head);
            match block(i % ld) {
                Some(j) if j < heads[head].certain => Want::Bits((f64::from(before[i]) + heads[head].steps[j][r]) as u32),
                Some(_) => Want::Anything,
                None => Want::Same,
            }
        });
        let heads = Rc::clone(&walked);
        io.expect(change, move |i| {
            let (head, r) = (i / ld_change / d_head, i / ld_change % d_head);
            match (i % ld_change).checked_sub(change_col) {
                Some(j) if j < heads[head].certain => Want::Near(heads[head].v[j][r], EPS * (d_head + 2) as f64 * heads[head].size[j][r]),
                Some(j) if j < width => Want::Anything,
                _ => Want::Same,
            }
        });
        io.expect(moves, move |i| {
            let head = &walked[i / d_head];
            let moved = head.steps.iter().filter(|steps| steps[i % d_head] != 0.0).count() as u32;
            if head.certain == width { Want::Bits(counts[i] + moved) } else { Want::Anything }
        });
    })
}
