use super::{Case, EPS, Want};
use aespa_gpu::engine::kernels::{self, descent_block::DescentBlockParams};
use aespa_gpu::engine::matrix::stride;
use std::rc::Rc;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // (rows, cols, col0, width): around 64 rows and blocks of 32 columns.
    for (rows, cols, col0, width) in
        [(1, 1, 0, 1), (5, 40, 32, 8), (63, 64, 0, 32), (64, 64, 32, 32), (65, 67, 64, 3), (131, 100, 32, 31), (0, 8, 0, 8)]
    {
        for temperature in [0.0, 0.7] {
            all.push(case(rows, cols, col0, width, 16, 15, temperature));
            all.push(case(rows, cols, col0, width, cols, 3, temperature));
        }
    }
    all.push(case(70, 32, 0, 32, 32, 255, 0.7));
    all
}

/// How near to the middle between two codes f32 and f64 may decide differently.
pub const UNSURE: f64 = 1e-3;

/// Wellons' lowbias32.
pub fn mix(x: u32) -> u32 {
    let y = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let y = (y ^ (y >> 15)).wrapping_mul(0x846c_a68b);
    y ^ (y >> 16)
}

/// Noise of a weight, as the definition has it.
pub fn normal(key: u32, row: usize, column: usize) -> f64 {
    let bytes = mix(mix(row as u32 ^ key).wrapping_add(column as u32)).to_le_bytes();
    (bytes.iter().map(|b| f64::from(*b)).sum::<f64>() - 510.0) / 21845f64.sqrt()
}

/// Steps from `q` to the best code at distance `x`, and is that certain?
pub fn step(q: f64, x: f64, max_code: f64) -> (f64, bool) {
    let n = (q + x).round_ties_even().clamp(0.0, max_code) - q;
    let other = |slack: f64| (q + x + slack).round_ties_even().clamp(0.0, max_code) - q;
    (n, other(UNSURE) == n && other(-UNSURE) == n)
}

/// One row: steps, changes, and from which column on nothing is certain.
type Walked = (Vec<f64>, Vec<f64>, usize);

fn case(rows: usize, cols: usize, col0: usize, width: usize, group: usize, max_code: u32, temperature: f32) -> Case {
    let name = format!("{rows} x {cols}, columns {col0} + {width}, group {group}, codes to {max_code}, temperature {temperature}");
    Case::new(name, move |io| {
        let (ld, n_group, h_row, change_col) = (stride(cols), cols.div_ceil(group), 3, 5);
        let (ld_h, ld_change) = (ld + 8, stride(change_col + width));
        let (row0, key) = (977u32, 0x1234_5678u32);
        // A diagonal of about one, once zero: a dead input, which couples to nothing.
        let dead = if width > 4 { 2 } else { width };
        let hs: Vec<f32> = (0..(h_row + width) * ld_h)
            .map(|i| match (i / ld_h, i % ld_h) {
                (r, c) if r < h_row || c < col0 || c >= col0 + width => f32::NAN,
                (r, c) if r - h_row == dead || c - col0 == dead => 0.0,
                (r, c) if c - col0 == r - h_row => 1.0 + 0.3 * io.rng.value(),
                _ => 0.2 * io.rng.value(),
            })
            .collect();
        // The upper triangle decides; the metric is symmetric.
        let mut symmetric = hs.clone();
        for i in 0..width {
            for j in 0..i {
                symmetric[(h_row + i) * ld_h + col0 + j] = hs[(h_row + j) * ld_h + col0 + i];
            }
        }
        let scales: Vec<f32> = (0..rows * n_group).map(|_| (1.7 + 0.2 * io.rng.value()) / max_code as f32).collect();
        let heats: Vec<f32> = (0..rows).map(|_| 0.02 + 0.01 * io.rng.value()).collect();
        let before: Vec<u32> = (0..rows * ld).map(|_| io.rng.below(max_code as usize + 1) as u32).collect();
        let counts: Vec<u32> = (0..rows).map(|_| io.rng.below(9) as u32).collect();
        let (h, scale, heat) = (io.upload(symmetric.clone()), io.upload(scales.clone()), io.upload(heats.clone()));
        let (m, ms) = io.matrix::<f32>(rows, cols, ld);
        let (codes, change) = (io.inout("codes", before.clone()), io.output::<f32>("change", rows * ld_change));
        let moves = io.inout("moves", counts.clone());
        let p = DescentBlockParams {
            rows: rows as u32,
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
        kernels::descent_block(&mut io.rec, p, h, scale, heat, m, codes.buffer, change.buffer, moves.buffer);
        let walked: Rc<Vec<Walked>> = Rc::new(
            (0..rows)
                .map(|r| {
                    let mut m: Vec<f64> = ms[r * ld + col0..][..width].to_vec();
                    let (mut steps, mut changes, mut certain) = (vec![], vec![], width);
                    for j in 0..width {
                        let h = |k: usize| f64::from(symmetric[(h_row + j) * ld_h + col0 + k]);
                        let s = f64::from(scales[r * n_group + (col0 + j) / group]);
                        let q = f64::from(before[r * ld + col0 + j]);
                        let (mut n, mut sure) = (0.0, true);
                        if h(j) > 0.0 {
                            let noise =
                                (f64::from(temperature) * f64::from(heats[r]) / h(j)).sqrt() * normal(key, row0 as usize + r, col0 + j);
                            (n, sure) = step(q, (noise - m[j] / h(j)) / s, f64::from(max_code));
                        }
                        if !sure {
                            certain = certain.min(j);
                        }
                        steps.push(n);
                        changes.push(s * n);
                        (j + 1..width).for_each(|k| m[k] += s * n * h(k));
                    }
                    (steps, changes, certain)
                })
                .collect(),
        );
        let block = move |j: usize| (col0..col0 + width).contains(&j).then(|| j - col0);
        let rows = Rc::clone(&walked);
        io.expect(codes, move |i| match block(i % ld) {
            Some(j) if j < rows[i / ld].2 => Want::Bits((f64::from(before[i]) + rows[i / ld].0[j]) as u32),
            Some(_) => Want::Anything,
            None => Want::Same,
        });
        let rows = Rc::clone(&walked);
        io.expect(change, move |i| match (i % ld_change).checked_sub(change_col) {
            Some(j) if j < rows[i / ld_change].2 => Want::Near(rows[i / ld_change].1[j], EPS * rows[i / ld_change].1[j].abs()),
            Some(j) if j < width => Want::Anything,
            _ => Want::Same,
        });
        io.expect(moves, move |r| {
            let (steps, _, certain) = &walked[r];
            let moved = steps.iter().filter(|n| **n != 0.0).count() as u32;
            if *certain == width { Want::Bits(counts[r] + moved) } else { Want::Anything }
        });
    })
}
