use super::matmul_nt::View;
use super::{Case, EPS, TestElem, Want};
use aespa_gpu::engine::kernels::{self, matmul_nn::MatmulNnParams};
use half::f16;

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // Around the tile of 128 x 64 and the step of 16.
    for (n, m, k) in
        [(1, 1, 1), (3, 2, 5), (127, 63, 15), (128, 64, 16), (129, 65, 17), (61, 67, 131), (260, 130, 32), (0, 4, 4), (4, 4, 0)]
    {
        all.push(case::<f32>(View::new(n, k), View::new(k, m), View::new(n, m), 1.0, 0.0));
        all.push(case::<f32>(View::new(n, k), View::new(k, m), View::new(n, m), -1.0, 1.0));
        all.push(case::<f16>(View::new(n, k), View::new(k, m), View::new(n, m), 1.0, 0.0));
    }
    // Views inside larger matrices: nothing around them may be read or written.
    all.push(case::<f32>(View::new(70, 35).inside(16, 8), View::new(35, 66).inside(8, 24), View::new(70, 66).inside(24, 16), -0.5, 0.25));
    all.push(case::<f32>(View::new(5, 32).inside(0, 96), View::new(32, 13).inside(40, 88), View::new(5, 13).inside(8, 8), -1.0, 1.0));
    // Left operands of mostly zeros, whose zeros an engine may skip: some rows empty, some parts of the rows dense, more columns than one piece.
    let (a, b, c) = (View::new(230, 40).inside(8, 16), View::new(40, 4200).inside(16, 8), View::new(230, 4200).inside(24, 16));
    for density in [0.0, 0.03, 0.19, 0.21] {
        all.push(sparse_case::<f32>(a, b, c, -0.5, 1.0, density));
        all.push(sparse_case::<f16>(a, b, c, 1.0, 1.0, density));
        all.push(sparse_case::<f32>(a, b, c, 1.0, 0.5, density));
    }
    all
}

fn case<E: TestElem>(a: View, b: View, c: View, alpha: f32, beta: f32) -> Case {
    sparse_case::<E>(a, b, c, alpha, beta, 1.0)
}

/// About `density` of A is not zero.
fn sparse_case<E: TestElem>(a: View, b: View, c: View, alpha: f32, beta: f32, density: f32) -> Case {
    Case::of::<E>(format!("A {a:?} B {b:?} C {c:?} alpha {alpha} beta {beta} density {density}"), move |io| {
        let (n, m, k) = (a.rows, b.cols, a.cols);
        let mut sparse = a.fill(&mut io.rng);
        for value in sparse.iter_mut().filter(|v| !v.is_nan()) {
            if io.rng.value().abs() > density {
                *value = 0.0;
            }
        }
        let (a_buffer, a_values) = (io.upload(sparse.clone()), sparse.into_iter().map(f64::from).collect::<Vec<_>>());
        let (b_buffer, b_values) = b.upload::<E>(io);
        let before = c.fill(&mut io.rng);
        let out = if beta == 0.0 { io.output("c", c.len()) } else { io.inout("c", before.clone()) };
        let p = MatmulNnParams {
            n: n as u32,
            m: m as u32,
            k: k as u32,
            lda: a.ld as u32,
            ldb: b.ld as u32,
            ldc: c.ld as u32,
            a_offset: a.offset as u32,
            b_offset: b.offset as u32,
            c_offset: c.offset as u32,
            alpha,
            beta,
        };
        kernels::matmul_nn(&mut io.rec, p, a_buffer, b_buffer, out.buffer);
        io.expect(out, |index| {
            let Some((_, i, j)) = c.holds(index) else { return Want::Same };
            let terms = (0..k).map(|t| a_values[a.at(0, i, t)] * b_values[b.at(0, t, j)]);
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
            let old = if beta == 0.0 { 0.0 } else { f64::from(beta) * f64::from(before[index]) };
            let (alpha, k) = (f64::from(alpha), k as f64);
            Want::Near(alpha * sum + old, EPS * (k + 3.0) * (alpha.abs() * size + old.abs()))
        });
    })
}
