//! Attention statistics and probes against an f64 attention written from the definitions, its derivatives by differences of its values.
//!
//! A random model of awkward shape: heads of 6, two query heads per key/value head, biases, a rotary embedding with YaRN's factor. Where
//! matrices are split heads are of 8, since four heads of 6 fill whole strides together only.

mod common;

use aespa_gpu::calib::{AttentionStats, DeviceBlock, Forward, HiddenStates, Observer, Probe, QueryKeyMetric, Streaming, probe_signs};
use aespa_gpu::engine::{Elem, Engine, Recording, submit};
use aespa_gpu::model::{Checkpoint, Input, Role};
use common::attention::{self, Attention};
use common::tiny_model::TinyLlama;
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

/// Σ_i ⟨z_i, O_i⟩.
fn probed(attention: &Attention, window: usize, z: &[f64]) -> f64 {
    attention.output(window).iter().zip(z).map(|(o, z)| o * z).sum()
}

/// The derivative of `probed` with respect to W_Q or W_K, by central differences.
fn derivative(attention: &mut Attention, which: usize, window: usize, z: &[f64]) -> Vec<f64> {
    const H: f64 = 1e-4;
    let len = attention.w[which].len();
    let mut at = |i: usize, by: f64| {
        let old = attention.w[which][i];
        attention.w[which][i] = old + by;
        let value = probed(attention, window, z);
        attention.w[which][i] = old;
        value
    };
    (0..len).map(|i| (at(i, H) - at(i, -H)) / (2.0 * H)).collect()
}

/// mean of Σ D_h D_hᵀ / n_tok over the probes.
fn probe_metric(attention: &mut Attention, which: usize) -> Vec<f64> {
    let Attention { d_head: d, d_model, .. } = *attention;
    let mut g = vec![0.0; attention.w[which].len() / d_model * d];
    for (probe, window) in (0..PROBES * WINDOWS).map(|i| (i / WINDOWS, i % WINDOWS)) {
        let mut z = vec![0.0f32; LENGTH * d_model];
        z.chunks_mut(d_model).enumerate().for_each(|(t, z)| probe_signs(SEED, probe, window, t, z));
        let z: Vec<f64> = z.into_iter().map(f64::from).collect();
        let derivative = derivative(attention, which, window, &z);
        for (row, column) in (0..g.len()).map(|at| (at / d, at % d)) {
            let other = row / d * d + column;
            let product: f64 = (0..d_model).map(|c| derivative[row * d_model + c] * derivative[other * d_model + c]).sum();
            g[row * d + column] += product / (WINDOWS * LENGTH * PROBES) as f64;
        }
    }
    g
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
        let tensors = shape.tensors();
        let get = |name: &str| tensors.get(name).map(|(_, values)| values.clone());
        let attention = Attention::new(Checkpoint::open(dir.path()).unwrap().spec(), &windows(), get);
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
    for (name, which, got) in [("g_q", attention::Q, got.g_q), ("g_k", attention::K, got.g_k)] {
        let error = error(&got, &probe_metric(&mut model.attention, which));
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
    let Attention { d_model, d_head, n_head, n_kv, .. } = *attention;
    let n_tok = attention.n_tok() as f64;
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
