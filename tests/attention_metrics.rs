//! Attention statistics and probes against an f64 attention written from the definitions, its derivatives by differences of its values.
//!
//! A random model of awkward shape: heads of 6, two query heads per key/value head, biases, a rotary embedding with YaRN's factor. Where
//! matrices are split heads are of 8, since four heads of 6 fill whole strides together only.

mod common;

use aespa_gpu::calib::{AttentionStats, DeviceBlock, Forward, HiddenStates, Observer, Probe, QueryKeyMetric, Streaming, probe_signs};
use aespa_gpu::engine::{Elem, Engine, Recording, submit};
use aespa_gpu::model::{Checkpoint, Input, Role};
use common::tiny_model::{Tensors, TinyLlama};
use half::f16;
use serde_json::json;

const LENGTH: usize = 11;
const WINDOWS: usize = 3;
const PROBES: usize = 2;
const SEED: u64 = 7;

fn shape(d_head: usize) -> TinyLlama {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.25});
    let config = [("rope_scaling".to_owned(), yarn)].into_iter().collect();
    TinyLlama { d_head, attention_bias: true, n_layer: 1, config, ..TinyLlama::default() }
}

fn windows() -> Vec<Vec<u32>> {
    (0..WINDOWS).map(|w| (0..LENGTH).map(|t| ((w * 17 + t * t * 5 + 3) % 33) as u32).collect()).collect()
}

/// The first block's attention in f64, row-major matrices.
struct Attention {
    shape: TinyLlama,
    cos: Vec<f64>,
    sin: Vec<f64>,
    /// Per window [LENGTH, d_model]: the normed input.
    x: Vec<Vec<f64>>,
    /// [d_out, d_in] and [d_out].
    w: [Vec<f64>; 4],
    b: [Vec<f64>; 4],
}

impl Attention {
    fn new(shape: TinyLlama, tensors: &Tensors, model: &Checkpoint) -> Self {
        let spec = model.spec();
        let get = |name: &str| -> Vec<f64> { tensors[name].1.iter().map(|v| f64::from(*v)).collect() };
        let (table, gain) = (get("model.embed_tokens.weight"), get("model.layers.0.input_layernorm.weight"));
        let normed = |id: u32| -> Vec<f64> {
            let row = &table[id as usize * shape.d_model..][..shape.d_model];
            let mean = row.iter().map(|v| v * v).sum::<f64>() / shape.d_model as f64;
            row.iter().zip(&gain).map(|(v, g)| v / (mean + f64::from(spec.norm_eps)).sqrt() * g).collect()
        };
        let factor = spec.rope.attention_factor();
        let inv_freq = spec.rope.inv_freq(shape.d_head, LENGTH);
        let angles = (0..LENGTH).flat_map(|l| inv_freq.iter().map(move |f| l as f64 * f));
        let (cos, sin) = angles.map(|a| (a.cos() * factor, a.sin() * factor)).unzip();
        let x = windows().iter().map(|ids| ids.iter().flat_map(|id| normed(*id)).collect()).collect();
        let part = |suffix: &str| ["q", "k", "v", "o"].map(|p| get(&format!("model.layers.0.self_attn.{p}_proj.{suffix}")));
        Self { cos, sin, x, w: part("weight"), b: part("bias"), shape }
    }

    /// x Wᵀ + b.
    fn linear(&self, x: &[f64], which: usize) -> Vec<f64> {
        let d_in = self.w[which].len() / self.b[which].len();
        let row = |x: &[f64]| -> Vec<f64> {
            self.w[which].chunks(d_in).zip(&self.b[which]).map(|(w, b)| b + w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()).collect()
        };
        x.chunks(d_in).flat_map(row).collect()
    }

    fn rotated(&self, mut rows: Vec<f64>, heads: usize) -> Vec<f64> {
        let (d, half) = (self.shape.d_head, self.shape.d_head / 2);
        for (t, row) in rows.chunks_mut(heads * d).enumerate() {
            for head in row.chunks_mut(d) {
                for j in 0..half {
                    let (a, b, c, s) = (head[j], head[j + half], self.cos[t * half + j], self.sin[t * half + j]);
                    (head[j], head[j + half]) = (a * c - b * s, b * c + a * s);
                }
            }
        }
        rows
    }

    fn queries(&self, window: usize) -> Vec<f64> {
        self.rotated(self.linear(&self.x[window], 0), self.shape.n_head)
    }

    fn keys(&self, window: usize) -> Vec<f64> {
        self.rotated(self.linear(&self.x[window], 1), self.shape.n_kv)
    }

    /// Causal softmax weights of a head, [LENGTH, LENGTH].
    fn weights(&self, q: &[f64], k: &[f64], head: usize) -> Vec<f64> {
        let TinyLlama { d_head: d, n_head, n_kv, .. } = self.shape;
        let kv = head * n_kv / n_head;
        let mut a = vec![0.0; LENGTH * LENGTH];
        for i in 0..LENGTH {
            for j in 0..=i {
                let score: f64 = (0..d).map(|e| q[(i * n_head + head) * d + e] * k[(j * n_kv + kv) * d + e]).sum();
                a[i * LENGTH + j] = (score / (d as f64).sqrt()).exp();
            }
            let norm: f64 = a[i * LENGTH..][..LENGTH].iter().sum();
            a[i * LENGTH..][..LENGTH].iter_mut().for_each(|v| *v /= norm);
        }
        a
    }

    /// Σ_i ⟨z_i, O_i⟩.
    fn probed(&self, window: usize, z: &[f64]) -> f64 {
        let TinyLlama { d_head: d, n_head, n_kv, .. } = self.shape;
        let (q, k, v) = (self.queries(window), self.keys(window), self.linear(&self.x[window], 2));
        let mut context = vec![0.0; LENGTH * n_head * d];
        for head in 0..n_head {
            let a = self.weights(&q, &k, head);
            for (i, e) in (0..LENGTH * d).map(|at| (at / d, at % d)) {
                context[(i * n_head + head) * d + e] =
                    (0..=i).map(|j| a[i * LENGTH + j] * v[(j * n_kv + head * n_kv / n_head) * d + e]).sum();
            }
        }
        self.linear(&context, 3).iter().zip(z).map(|(o, z)| o * z).sum()
    }

    /// The derivative of `probed` with respect to W_Q (0) or W_K (1), by central differences.
    fn derivative(&mut self, which: usize, window: usize, z: &[f64]) -> Vec<f64> {
        const H: f64 = 1e-4;
        let len = self.w[which].len();
        let mut at = |i: usize, by: f64| {
            let old = self.w[which][i];
            self.w[which][i] = old + by;
            let value = self.probed(window, z);
            self.w[which][i] = old;
            value
        };
        (0..len).map(|i| (at(i, H) - at(i, -H)) / (2.0 * H)).collect()
    }

    /// mean of Σ D_h D_hᵀ / n_tok over the probes.
    fn metric(&mut self, which: usize) -> Vec<f64> {
        let (d, d_model) = (self.shape.d_head, self.shape.d_model);
        let mut g = vec![0.0; self.b[which].len() * d];
        for (probe, window) in (0..PROBES * WINDOWS).map(|i| (i / WINDOWS, i % WINDOWS)) {
            let mut z = vec![0.0f32; LENGTH * d_model];
            z.chunks_mut(d_model).enumerate().for_each(|(t, z)| probe_signs(SEED, probe, window, t, z));
            let z: Vec<f64> = z.into_iter().map(f64::from).collect();
            let derivative = self.derivative(which, window, &z);
            for (row, column) in (0..g.len()).map(|at| (at / d, at % d)) {
                let other = row / d * d + column;
                let product: f64 = (0..d_model).map(|c| derivative[row * d_model + c] * derivative[other * d_model + c]).sum();
                g[row * d + column] += product / (WINDOWS * LENGTH * PROBES) as f64;
            }
        }
        g
    }
}

/// ‖got − want‖ / ‖want‖.
fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let squares = got.iter().zip(want).map(|(g, w)| ((f64::from(*g) - w).powi(2), w * w));
    let (difference, size) = squares.fold((0.0, 0.0), |(d, s), (x, y)| (d + x, s + y));
    (difference / size).sqrt()
}

struct Model {
    dir: tempfile::TempDir,
    attention: Attention,
}

impl Model {
    fn new(d_head: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shape = shape(d_head);
        shape.write(dir.path());
        let attention = Attention::new(shape.clone(), &shape.tensors(), &Checkpoint::open(dir.path()).unwrap());
        Self { dir, attention }
    }

    /// Runs the first block and lets `observe` watch.
    fn run<E: Elem, O: Observer<E>, T>(
        &self,
        engine: &mut dyn Engine,
        observer: impl FnOnce(&mut Recording<'_>, &DeviceBlock, &Checkpoint) -> O,
        finish: impl FnOnce(O, &mut dyn Engine) -> T,
    ) -> T {
        let model = Checkpoint::open(self.dir.path()).unwrap();
        let (spec, limits) = (model.spec(), engine.limits());
        let states = HiddenStates::embed(engine, &model, &windows(), &Streaming::default()).unwrap();
        let forward = submit(engine, |rec| Forward::<E>::new(rec, spec, LENGTH, limits)).unwrap();
        let device = DeviceBlock::load(engine, &model, &spec.blocks[0]).unwrap();
        let mut observer = submit(engine, |rec| observer(rec, &device, &model)).unwrap();
        states.observe(engine, &forward, &device, 0..states.batches(), &mut observer, Input::Context).unwrap();
        let out = finish(observer, engine);
        submit(engine, |rec| (device.free(rec), forward.free(rec))).unwrap();
        assert_eq!(engine.profile().live_buffers(), 0, "buffers were left behind");
        out
    }

    fn probe(&self, engine: &mut dyn Engine) -> QueryKeyMetric {
        let limits = engine.limits();
        self.run::<f32, _, _>(
            engine,
            |rec, device, model| {
                let w_o = device.enter(rec, Role::O).unwrap();
                let probe = Probe::new(rec, model.spec(), &w_o.weight, LENGTH, PROBES, SEED, limits);
                device.leave(rec, w_o);
                probe
            },
            |probe, engine| {
                let mut rec = Recording::new();
                let pending = probe.download(&mut rec);
                pending.take(&mut engine.run(rec).unwrap()).unwrap()
            },
        )
    }
}

fn compare_probe(model: &mut Model, engine: &mut dyn Engine) {
    let got = model.probe(engine);
    for (name, which, got) in [("g_q", 0, got.g_q), ("g_k", 1, got.g_k)] {
        let error = error(&got, &model.attention.metric(which));
        println!("{}: {name}: {error:.1e}", engine.describe());
        // Differences of f64 values leave 1e-8; f32 through the whole attention the rest.
        assert!(error <= 1e-5, "{}: {name} is off by {error:.1e}", engine.describe());
    }
}

#[test]
fn probes_are_derivatives_of_the_attention_output() {
    let mut model = Model::new(6);
    for mut engine in common::engines::engines() {
        compare_probe(&mut model, engine.as_mut());
    }
}

/// One window per batch, W_O and the probes of the weights in panels.
#[test]
fn probes_do_not_depend_on_splitting() {
    let mut model = Model::new(8);
    for mut engine in common::engines::engines_with_max_buffer(1536) {
        compare_probe(&mut model, engine.as_mut());
    }
}

fn compare_statistics<E: Elem>(model: &Model, engine: &mut dyn Engine, tolerance: f64) {
    let (attention, limits) = (&model.attention, engine.limits());
    let got = model.run::<E, _, _>(
        engine,
        |rec, _, model| AttentionStats::new(rec, model.spec(), 1, limits),
        |stats, engine| {
            let mut rec = Recording::new();
            let pending = stats.download(&mut rec);
            pending.take(&mut engine.run(rec).unwrap()).unwrap()
        },
    );
    let TinyLlama { d_model, d_head, n_head, n_kv, .. } = attention.shape;
    let n_tok = (WINDOWS * LENGTH) as f64;
    let mut h_v = vec![0.0; n_kv * d_model * d_model];
    let [mut c_q, mut c_k] = [n_head, n_kv].map(|heads| vec![0.0; heads * d_head * d_head]);
    for window in 0..WINDOWS {
        let (q, k, x) = (attention.queries(window), attention.keys(window), &attention.x[window]);
        for head in 0..n_head {
            let a = attention.weights(&q, &k, head);
            let y: Vec<f64> = (0..LENGTH * d_model)
                .map(|at| (at / d_model, at % d_model))
                .map(|(i, c)| (0..LENGTH).map(|j| a[i * LENGTH + j] * x[j * d_model + c]).sum())
                .collect();
            let h = &mut h_v[head * n_kv / n_head * d_model * d_model..][..d_model * d_model];
            for (at, h) in h.iter_mut().enumerate() {
                let products = y.chunks(d_model).map(|row| row[at / d_model] * row[at % d_model]);
                *h += products.sum::<f64>() / n_tok / (n_head / n_kv) as f64;
            }
        }
        for (rows, heads, c) in [(&q, n_head, &mut c_q), (&k, n_kv, &mut c_k)] {
            for (at, c) in c.iter_mut().enumerate() {
                let (head, i, j) = (at / d_head / d_head, at / d_head % d_head, at % d_head);
                let row = |row: &[f64]| row[head * d_head + i] * row[head * d_head + j];
                *c += rows.chunks(heads * d_head).map(row).sum::<f64>() / n_tok;
            }
        }
    }
    let got_h_v: Vec<f32> = got.h_v.iter().flat_map(|gram| gram.h.iter().copied()).collect();
    for (name, got, want) in [("h_v", got_h_v, h_v), ("c_q", got.c_q, c_q), ("c_k", got.c_k, c_k)] {
        let error = error(&got, &want);
        println!("{}: {name}: {error:.1e}", engine.describe());
        assert!(error <= tolerance, "{}: {name} is off by {error:.1e}", engine.describe());
    }
}

#[test]
fn statistics_of_heads_that_do_not_fill_strides() {
    let model = Model::new(6);
    for mut engine in common::engines::engines() {
        compare_statistics::<f32>(&model, engine.as_mut(), 1e-5);
        if engine.limits().f16_operands {
            compare_statistics::<f16>(&model, engine.as_mut(), 3e-3);
        }
    }
}

#[test]
fn statistics_do_not_depend_on_splitting() {
    let model = Model::new(8);
    for mut engine in common::engines::engines_with_max_buffer(1536) {
        compare_statistics::<f32>(&model, engine.as_mut(), 1e-5);
    }
}
