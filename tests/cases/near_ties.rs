use super::{AWKWARD, Case, Want};
use aespa_gpu::engine::kernels::{self, near_ties::NearTiesParams};
use aespa_gpu::engine::matrix::stride;

/// Above the rounding of y in f32: 255 eps.
const TOLERANCE: f64 = 1e-3;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for cols in AWKWARD.into_iter().filter(|c| *c > 0) {
        all.extend([case(5, cols, cols, 15), case(3, cols, 32, 7)]);
    }
    all.extend([case(0, 8, 8, 15), case(1, 1, 1, 1), case(67, 40, 16, 255), case(2, 1000, 128, 3)]);
    all
}

fn case(rows: usize, cols: usize, group: usize, max_code: u32) -> Case {
    Case::new(format!("{rows} x {cols} group {group} codes to {max_code}"), move |io| {
        let (ld, n_group) = (stride(cols), cols.div_ceil(group));
        let scales: Vec<f32> = (0..rows * n_group).map(|_| 0.1 + 0.05 * io.rng.value()).collect();
        let zeros: Vec<f32> = scales.iter().map(|_| io.rng.below(max_code as usize + 1) as f32).collect();
        let mut value = vec![f32::NAN; rows * ld];
        let mut ties = vec![0u32; rows];
        for (r, ties) in ties.iter_mut().enumerate() {
            for j in 0..cols {
                let grid = r * n_group + j / group;
                // From one step below the grid to one above it; every second weight a tie, none where engines may disagree.
                let below = io.rng.below(max_code as usize + 3) as f64 - 1.0;
                let near = io.rng.below(2) == 0;
                let distance = f64::from(io.rng.value());
                let off = if near { 0.5 * TOLERANCE * distance } else { (2.0 * TOLERANCE + 0.4 * distance.abs()) * distance.signum() };
                let y = below + 0.5 + off;
                value[r * ld + j] = ((y - f64::from(zeros[grid])) * f64::from(scales[grid])) as f32;
                *ties += u32::from(near && below >= 0.0 && below < f64::from(max_code));
            }
        }
        let (value, scale, zero) = (io.upload(value), io.upload(scales), io.upload(zeros));
        let out = io.output::<u32>("ties", rows);
        let p = NearTiesParams {
            rows: rows as u32,
            cols: cols as u32,
            ld: ld as u32,
            group: group as u32,
            n_group: n_group as u32,
            max_code,
            tolerance: TOLERANCE as f32,
        };
        kernels::near_ties(&mut io.rec, p, value, scale, zero, out.buffer);
        io.expect(out, |r| Want::Bits(ties[r]));
    })
}
