use super::{Case, EPS, Io, Rng, TestElem, Want};
use aespa_gpu::engine::kernels::{self, matmul_nt::MatmulNtParams};
use aespa_gpu::engine::matrix::stride;
use aespa_gpu::tensor::Dtype;
use half::f16;

/// Where the elements of `batches` matrices [rows, cols] lie in one buffer.
#[derive(Clone, Copy, Debug, Default)]
pub struct View {
    pub rows: usize,
    pub cols: usize,
    pub ld: usize,
    pub offset: usize,
    pub batch: usize,
    pub batches: usize,
}

impl View {
    pub fn new(rows: usize, cols: usize) -> Self {
        Self { rows, cols, ld: stride(cols), offset: 0, batch: 0, batches: 1 }
    }

    /// The same inside a larger matrix.
    pub fn inside(self, offset: usize, extra: usize) -> Self {
        Self { offset, ld: self.ld + extra, ..self }
    }

    /// Batches one below the other.
    pub fn stacked(self, batches: usize) -> Self {
        Self { batches, batch: self.rows * self.ld, ..self }
    }

    /// Batches side by side, as groups of columns lie.
    pub fn beside(self, batches: usize) -> Self {
        Self { batches, batch: self.ld, ld: self.ld * batches, ..self }
    }

    pub fn at(&self, b: usize, i: usize, j: usize) -> usize {
        self.offset + b * self.batch + i * self.ld + j
    }

    /// Elements up to the end of the last row, which is padded like the others.
    pub fn len(&self) -> usize {
        if self.rows * self.cols == 0 { 0 } else { self.at(self.batches - 1, self.rows - 1, 0) + stride(self.cols) }
    }

    pub fn holds(&self, index: usize) -> Option<(usize, usize, usize)> {
        // Batches may interleave, so the element is looked for in each.
        (0..self.batches).find_map(|b| {
            let rest = index.checked_sub(self.offset + b * self.batch)?;
            let (i, j) = (rest / self.ld, rest % self.ld);
            (i < self.rows && j < self.cols).then_some((b, i, j))
        })
    }

    /// Random elements in (−1, 1), NaN between them.
    pub fn fill(&self, rng: &mut Rng) -> Vec<f32> {
        (0..self.len()).map(|index| if self.holds(index).is_some() { rng.value() } else { f32::NAN }).collect()
    }

    pub fn upload<E: TestElem>(&self, io: &mut Io) -> (aespa_gpu::engine::Buffer<E>, Vec<f64>) {
        let values: Vec<E> = self.fill(&mut io.rng).into_iter().map(E::from_f32).collect();
        (io.upload(values.clone()), values.into_iter().map(E::to_f64).collect())
    }
}

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // Around the tile of 128 x 64 and the step of 16.
    for (n, m, k) in
        [(1, 1, 1), (2, 3, 5), (127, 63, 15), (128, 64, 16), (129, 65, 17), (61, 67, 131), (3, 130, 64), (260, 5, 33), (0, 4, 4), (4, 4, 0)]
    {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            all.push(case::<f32>(dtype, View::new(n, k), View::new(m, k), View::new(n, m), 1.0, 0.0, false));
            all.push(case::<f16>(dtype, View::new(n, k), View::new(m, k), View::new(n, m), 1.0, 0.0, false));
        }
    }
    for dtype in [Dtype::F32, Dtype::Bf16] {
        // Views inside larger matrices: nothing around them may be read or written.
        let (a, w, c) = (View::new(70, 35).inside(16, 8), View::new(66, 35).inside(8, 24), View::new(70, 66).inside(24, 16));
        all.push(case::<f32>(dtype, a, w, c, -0.5, 1.0, true));
        all.push(case::<f16>(dtype, a, w, c, 2.0, 0.25, true));
        all.push(case::<f32>(dtype, a, w, c, 1.0, 0.0, true));
    }
    let (a, w, c) = (View::new(33, 24), View::new(24, 24), View::new(33, 24));
    all.push(case::<f32>(Dtype::F32, a.beside(5), w.stacked(5), c.beside(5), 1.0, 0.0, false));
    all.push(case::<f32>(Dtype::F32, a.stacked(3), w.stacked(3), c.stacked(3), 1.0, 1.0, false));
    all.push(case::<f32>(
        Dtype::F32,
        View::new(33, 21).beside(3),
        View::new(13, 21).stacked(3),
        View::new(33, 13).beside(3),
        1.0,
        0.0,
        false,
    ));
    all
}

/// A product of views.
pub fn params(a: &View, w: &View, c: &View) -> MatmulNtParams {
    MatmulNtParams {
        n: a.rows as u32,
        m: w.rows as u32,
        k: a.cols as u32,
        lda: a.ld as u32,
        ldw: w.ld as u32,
        ldc: c.ld as u32,
        a_offset: a.offset as u32,
        w_offset: w.offset as u32,
        c_offset: c.offset as u32,
        a_batch: a.batch as u32,
        w_batch: w.batch as u32,
        c_batch: c.batch as u32,
        batches: c.batches as u32,
        ..Default::default()
    }
}

fn case<E: TestElem>(dtype: Dtype, a: View, w: View, c: View, alpha: f32, beta: f32, has_bias: bool) -> Case {
    let name = format!("{dtype:?} A {a:?} W {w:?} C {c:?} alpha {alpha} beta {beta} bias {has_bias}");
    Case::of::<E>(name, move |io| {
        let (m, k) = (w.rows, a.cols);
        let (a_buffer, a_values) = a.upload::<E>(io);
        let w_values = w.fill(&mut io.rng);
        let (w_buffer, w_values) = io.stored(dtype, &w_values);
        let bias_offset = 3;
        let biases = io.rng.values(bias_offset + m);
        let bias = io.upload(biases.clone());
        let before = c.fill(&mut io.rng);
        let out = if beta == 0.0 { io.output("c", c.len()) } else { io.inout("c", before.clone()) };
        let p = MatmulNtParams { bias_offset: bias_offset as u32, has_bias: has_bias.into(), alpha, beta, ..params(&a, &w, &c) };
        kernels::matmul_nt(&mut io.rec, p, a_buffer, w_buffer, bias, out.buffer);
        io.expect(out, |index| {
            let Some((b, i, j)) = c.holds(index) else { return Want::Same };
            let terms = (0..k).map(|t| a_values[a.at(b, i, t)] * w_values[w.at(b, j, t)]);
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
            let bias = if has_bias { f64::from(biases[bias_offset + j]) } else { 0.0 };
            let old = if beta == 0.0 { 0.0 } else { f64::from(beta) * f64::from(before[index]) };
            let (alpha, k) = (f64::from(alpha), k as f64);
            Want::Near(alpha * sum + bias + old, EPS * (k + 3.0) * (alpha.abs() * size + bias.abs() + old.abs()))
        });
    })
}
