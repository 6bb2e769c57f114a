use super::{AWKWARD, Case, EPS, TestElem, Want};
use aespa_gpu::engine::kernels::{self, swiglu::SwigluParams};
use half::f16;

pub fn cases() -> Vec<Case> {
    AWKWARD.into_iter().chain([70_001]).flat_map(|n| [case::<f32>(n), case::<f16>(n)]).collect()
}

fn case<E: TestElem>(n: usize) -> Case {
    Case::of::<E>(format!("n {n}"), move |io| {
        // Up to ±120: e^120 is past the range of f32.
        let gates: Vec<f32> = (0..n).map(|i| io.rng.value() * if i % 5 == 0 { 120.0 } else { 4.0 }).collect();
        let gate = io.upload(gates.clone());
        let (up, ups) = io.matrix::<f32>(1, n, n.max(1));
        let out = io.output::<E>("out", n);
        kernels::swiglu(&mut io.rec, SwigluParams { n: n as u32 }, gate, up, out.buffer);
        io.expect(out, |i| {
            let g = f64::from(gates[i]);
            let value = g / (1.0 + (-g).exp()) * ups[i];
            // WGSL's exp is good to 3 + 2 |x| units in the last place; below 1e-36 (f16: 1e-7) numbers lose digits or vanish.
            let lost = if E::EPS > EPS { 1e-7 } else { 1e-36 };
            Want::Near(value, value.abs() * (EPS * (8.0 + 2.0 * g.abs()) + E::EPS) + lost)
        });
    })
}
