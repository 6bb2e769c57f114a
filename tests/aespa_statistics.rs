//! Statistics of attention against f64 values that PyTorch computed from the definitions (tests/golden, see tests/README.md).

mod common;

use aespa_gpu::calib::{AttentionMoments, AttentionStats, DeviceBlock, Forward, Gram, GramSet, HiddenStates, RopeAverage, Streaming};
use aespa_gpu::engine::{Engine, Mat, Recording, submit};
use aespa_gpu::metric::{ColumnMetric, Objective, RowMetric};
use aespa_gpu::model::{Checkpoint, Input};
use common::attention::{self, Attention};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

/// Relative Frobenius errors: f32 sums over 512 tokens behind a few blocks of f32.
const TOLERANCE: f64 = 1e-5;

/// Of `tests/models/stories260k`.
const D_MODEL: usize = 64;
const D_HEAD: usize = 8;

fn stories() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/stories260k")
}

struct Golden(Vec<u8>);

impl Golden {
    fn read(block: usize) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/aespa-stories260k-block{block}.safetensors"));
        Self(std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let data = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data().to_vec();
        data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let data = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data().to_vec();
        data.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// [windows][length].
    fn windows(&self) -> Vec<Vec<u32>> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let ids = tensors.tensor("input_ids").unwrap();
        let all: Vec<u32> = ids.data().chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
        all.chunks(ids.shape()[1]).map(<[u32]>::to_vec).collect()
    }
}

/// ‖got − want‖ / ‖want‖.
fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (difference, size) = got.iter().zip(want).fold((0.0, 0.0), |(d, s), (g, w)| (d + (f64::from(*g) - w).powi(2), s + w * w));
    (difference / size).sqrt()
}

/// Everything that is collected at one block of the float model.
fn collect(
    engine: &mut dyn Engine,
    windows: &[Vec<u32>],
    block: usize,
    step: usize,
) -> (Vec<(Input, Gram)>, AttentionMoments, RopeAverage) {
    let model = Checkpoint::open(&stories()).unwrap();
    let spec = model.spec();
    let limits = engine.limits();
    let seq_len = windows[0].len();
    let mut states = HiddenStates::embed(engine, &model, windows, &Streaming::default()).unwrap();
    let forward = submit(engine, |rec| Forward::<f32>::new(rec, spec, seq_len, limits)).unwrap();
    for before in &spec.blocks[..block] {
        let device = DeviceBlock::load(engine, &model, before).unwrap();
        states.advance(engine, &forward, &device).unwrap();
        submit(engine, |rec| device.free(rec)).unwrap();
    }
    let device = DeviceBlock::load(engine, &model, &spec.blocks[block]).unwrap();
    let (mut grams, mut attention) =
        submit(engine, |rec| (GramSet::new(rec, &spec.blocks[block], None, limits), AttentionStats::new(rec, spec, step, limits))).unwrap();
    states.observe(engine, &forward, &device, 0..states.batches(), &mut (&mut grams, &mut attention), Input::Hidden).unwrap();
    let mut rec = Recording::new();
    let (grams, attention) = (grams.download(&mut rec), attention.download(&mut rec));
    device.free(&mut rec);
    forward.free(&mut rec);
    let mut downloads = engine.run(rec).unwrap();
    assert_eq!(engine.profile().live_buffers(), 0, "buffers were left behind");
    let rope = RopeAverage::new(&spec.rope, spec.d_head, seq_len);
    (grams.take(&mut downloads).unwrap(), attention.take(&mut downloads).unwrap(), rope)
}

fn compare(engine: &mut dyn Engine, block: usize) {
    let golden = Golden::read(block);
    let (grams, attention, rope) = collect(engine, &golden.windows(), block, 1);
    let metric = attention.row_metric(Some(&rope));
    let h = |input: Input| grams.iter().find(|(i, _)| *i == input).expect("collected").1.h.clone();
    let all = [
        ("h_qkv", h(Input::AttnNorm)),
        ("h_o", h(Input::Context)),
        ("h_gate_up", h(Input::MlpNorm)),
        ("h_down", h(Input::Hidden)),
        ("h_v", attention.h_v.iter().flat_map(|gram| gram.h.iter().copied()).collect()),
        ("c_q", attention.c_q),
        ("c_k", attention.c_k),
        ("g_q", metric.g_q),
        ("g_k", metric.g_k),
    ];
    for (name, got) in all {
        let error = error(&got, &golden.f64(name));
        println!("{}: block {block}, {name}: {error:.1e}", engine.describe());
        assert!(error <= TOLERANCE, "{}: {name} of block {block} is off by {error:.1e}", engine.describe());
    }
}

#[test]
fn every_statistic_on_every_engine() {
    for mut engine in common::engines::engines() {
        compare(engine.as_mut(), 0);
        compare(engine.as_mut(), 2);
    }
}

/// The same with weights, Gram matrices and attention in pieces: a buffer holds 75 rows of attention weights and 150 of inputs.
#[test]
fn splitting_changes_nothing() {
    for mut engine in common::engines::engines_with_max_buffer(38400) {
        compare(engine.as_mut(), 2);
    }
}

/// A step-th of the rows estimates the same mean: exactly where the step takes all rows in turn.
#[test]
fn rows_can_be_thinned_out() {
    let golden = Golden::read(2);
    for mut engine in common::engines::engines() {
        let (_, attention, _) = collect(engine.as_mut(), &golden.windows(), 2, 3);
        let h_v: Vec<f32> = attention.h_v.iter().flat_map(|gram| gram.h.iter().copied()).collect();
        let rows: usize = attention.h_v.iter().map(|gram| gram.n_tok).sum();
        // 4 windows of 128 tokens, 8 heads: 43, 43 or 42 rows each.
        assert!(rows.abs_diff(4 * 8 * 128 / 3) <= 4 * 8, "{rows} rows");
        let error = error(&h_v, &golden.f64("h_v"));
        println!("{}: step 3: {error:.1e}", engine.describe());
        assert!((1e-4..0.2).contains(&error), "{}: {error}", engine.describe());
    }
}

/// A linear, the metric of its columns, one per head or one for all, and of its rows.
type Named = (&'static str, &'static str, Option<&'static str>);

const LINEARS: [Named; 7] = [
    ("q", "h_qkv", Some("g_q")),
    ("k", "h_qkv", Some("g_k")),
    ("v", "h_v", None),
    ("o", "h_o", None),
    ("gate", "h_gate_up", None),
    ("up", "h_gate_up", None),
    ("down", "h_down", None),
];

/// tr(G E H Eᵀ) and its gradient 2 G E H by the kernels that the solvers use, on the reference's own statistics and errors.
#[test]
fn losses_and_gradients_on_every_engine() {
    for mut engine in common::engines::engines() {
        for block in [0, 2] {
            let golden = Golden::read(block);
            for linear @ (name, ..) in LINEARS {
                let (loss, gradient) = loss_and_gradient(engine.as_mut(), &golden, linear, &golden.f32(&format!("e_{name}")));
                let want = golden.f64(&format!("loss_{name}"))[0];
                let (off, of_gradient) = ((loss / want - 1.0).abs(), error(&gradient, &golden.f64(&format!("grad_{name}"))));
                println!("{}: block {block}, {name}: loss {off:.1e}, gradient {of_gradient:.1e}", engine.describe());
                assert!(off <= TOLERANCE && of_gradient <= TOLERANCE, "{}: {name} of block {block}", engine.describe());
            }
        }
    }
}

/// Of `e`, the error of the whole linear [d_out, d_in].
fn loss_and_gradient(engine: &mut dyn Engine, golden: &Golden, (name, columns, rows): Named, e: &[f32]) -> (f64, Vec<f32>) {
    let narrow = |name: &str| golden.f64(name).iter().map(|v| *v as f32).collect::<Vec<f32>>();
    let all = narrow(columns);
    // h_v has a matrix per key/value head of 8 rows; the others have one.
    let d = if name == "down" { 172 } else { D_MODEL };
    let slices = all.len() / (d * d);
    let limits = engine.limits();
    let (mut loss, mut gradient) = (0.0, Vec::new());
    for (h, e) in all.chunks(d * d).zip(e.chunks(e.len() / slices)) {
        let gram = Gram { d, n_tok: 1, h: h.to_vec() };
        let mut rec = Recording::new();
        let columns = ColumnMetric::layer(&mut rec, gram, 0.0, limits);
        let g = rows.map(narrow);
        let rows = g.as_ref().map(|g| RowMetric::upload(&mut rec, D_HEAD, g));
        let e = Mat::upload(&mut rec, "error", e.len() / d, d, e);
        let losses = Objective { columns: &columns, rows: rows.as_ref() }.losses(&mut rec, e);
        let eh = columns.times(&mut rec, e);
        let geh = rows.map_or(eh, |rows| rows.times(&mut rec, eh));
        let (pending, pending_gradient) = (rec.download(losses), geh.download(&mut rec));
        let mut back = engine.run(rec).unwrap();
        loss += back.take(pending).unwrap().iter().map(|l| f64::from(*l)).sum::<f64>();
        gradient.extend(pending_gradient.take(&mut back).unwrap().iter().map(|v| 2.0 * v));
    }
    (loss, gradient)
}

/// The attention of the first block in f64.
fn first_attention(golden: &Golden) -> Attention {
    let bytes = std::fs::read(stories().join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let get =
        |name: &str| tensors.tensor(name).ok().map(|t| t.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect());
    Attention::new(Checkpoint::open(&stories()).unwrap().spec(), &golden.windows(), get)
}

/// What `see` makes of the attention's windows, with `e` added to a weight; the mean squared change over tokens.
fn change(attention: &mut Attention, which: usize, e: &[f32], see: impl Fn(&Attention, usize) -> Vec<f64>) -> f64 {
    let windows = 0..attention.x.len();
    let before: Vec<Vec<f64>> = windows.clone().map(|window| see(attention, window)).collect();
    let weight = attention.w[which].clone();
    attention.w[which].iter_mut().zip(e).for_each(|(w, e)| *w += f64::from(*e));
    let after = windows.flat_map(|window| see(attention, window));
    let squares = before.iter().flatten().zip(after).map(|(a, b)| (a - b).powi(2));
    let sum: f64 = squares.sum();
    attention.w[which] = weight;
    sum / attention.n_tok() as f64
}

/// The loss of V is what its error does to the attention's output, head by head.
#[test]
fn the_loss_of_v_is_the_error_of_the_attention() {
    let golden = Golden::read(0);
    let mut attention = first_attention(&golden);
    let e = golden.f32("e_v");
    // H_V is a mean over the query heads of a group.
    let want = change(&mut attention, attention::V, &e, Attention::context) / (attention.n_head / attention.n_kv) as f64;
    for mut engine in common::engines::engines() {
        let (loss, _) = loss_and_gradient(engine.as_mut(), &golden, LINEARS[2], &e);
        println!("{}: v: {:.1e}", engine.describe(), loss / want - 1.0);
        assert!((loss / want - 1.0).abs() <= TOLERANCE, "{}: {loss}, {want}", engine.describe());
    }
}

/// The losses of Q and K leave the softmax's derivative out. Of rounding errors that are equally large altogether, but not row by row, they
/// still tell which change the attention weights most.
#[test]
fn the_losses_of_q_and_k_go_with_the_error_of_the_attention() {
    const DRAWS: usize = 48;
    let golden = Golden::read(0);
    let mut attention = first_attention(&golden);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let map = |attention: &Attention, window: usize| {
        let (q, k) = (attention.queries(window), attention.keys(window));
        (0..attention.n_head).flat_map(|head| attention.weights(&q, &k, head)).collect()
    };
    let size = |e: &[f32]| e.iter().map(|e| e * e).sum::<f32>().sqrt();
    for (which, linear) in [(attention::Q, LINEARS[0]), (attention::K, LINEARS[1])] {
        let rounding = golden.f32(&format!("e_{}", linear.0));
        let mut draw = || -> Vec<f32> {
            let mut e = rounding.clone();
            for row in e.chunks_mut(D_MODEL) {
                // Between exp(−2) and exp(2).
                let factor = (4.0 * (rng.next_u32() as f32 / u32::MAX as f32) - 2.0).exp();
                row.iter_mut().for_each(|e| *e *= factor);
            }
            let factor = size(&rounding) / size(&e);
            e.iter().map(|e| e * factor).collect()
        };
        let errors: Vec<Vec<f32>> = (0..DRAWS).map(|_| draw()).collect();
        let changes: Vec<f64> = errors.iter().map(|e| change(&mut attention, which, e, map).ln()).collect();
        for mut engine in common::engines::engines() {
            let mut correlation = |linear: Named| {
                let losses: Vec<f64> = errors.iter().map(|e| loss_and_gradient(engine.as_mut(), &golden, linear, e).0.ln()).collect();
                correlation(&losses, &changes)
            };
            let (with, without) = (correlation(linear), correlation((linear.0, linear.1, None)));
            println!("{}: {}: correlation {with:.3}, {without:.3} without G", engine.describe(), linear.0);
            assert!(with > 0.8 && with > 2.0 * without, "{}: {with}, {without}", linear.0);
        }
    }
}

/// Pearson's.
fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let centred = |v: &[f64]| -> Vec<f64> {
        let mean = v.iter().sum::<f64>() / v.len() as f64;
        v.iter().map(|x| x - mean).collect()
    };
    let (a, b) = (centred(a), centred(b));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
}
