//! Walks through a block against the plain forward pass, and the moments of two streams against f64 sums over their activations.

mod common;

use aespa_gpu::calib::{Collector, DeviceBlock, Forward, HiddenStates, Moments, Observer, Statistic, Streaming, Tier, TokenWeights, Walk};
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::matrix::PendingMat;
use aespa_gpu::engine::{Elem, Engine, Mat, Recording, Weight, submit};
use aespa_gpu::model::{Block, Checkpoint, Input, Linear, Weights};
use aespa_gpu::quant::Scheme;
use aespa_gpu::tensor::{Dtype, Tensor};
use common::rtn;
use half::f16;
use std::path::Path;

const LENGTH: usize = 64;

fn stories() -> Checkpoint {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/stories260k")).unwrap()
}

fn windows(n_vocab: usize, n: usize) -> Vec<Vec<u32>> {
    let mut state = 3u32;
    let mut id = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % n_vocab as u32
    };
    (0..n).map(|_| (0..LENGTH).map(|_| id()).collect()).collect()
}

fn load(engine: &mut dyn Engine, model: &Checkpoint, block: &Block) -> DeviceBlock {
    DeviceBlock::load(engine, model, block).unwrap()
}

/// Puts a linear's weight rounded to 3 bits in its place.
fn quantize(engine: &mut dyn Engine, model: &Checkpoint, device: &mut DeviceBlock, linear: &Linear) {
    let w = Weights::linear(model, linear).unwrap().to_f32();
    let packed = rtn::quantize(&w, linear.d_out, linear.d_in, Scheme::new(3, -1, false).unwrap().lattice(Dtype::F32)).unwrap();
    let tensor = Tensor::from_f32(Dtype::F32, vec![linear.d_out, linear.d_in], &packed.dequantize()).unwrap();
    let limits = engine.limits();
    let weight = submit(engine, |rec| Weight::upload(rec, "weight", &tensor, limits)).unwrap();
    device.replace(engine, linear.role, weight).unwrap();
}

/// ‖got − want‖.
fn difference(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// Downloads everything that linears read, and the stream that the output projection and Down add to.
struct Watch<E> {
    inputs: Vec<(Input, PendingMat<E>)>,
    residuals: Vec<PendingMat<f32>>,
}

impl<E: Elem> Observer<E> for Watch<E> {
    fn input(&mut self, rec: &mut Recording<'_>, input: Input, x: Mat<E>) {
        self.inputs.push((input, x.download(rec)));
    }

    fn residual(&mut self, rec: &mut Recording<'_>, x: Mat<f32>) {
        self.residuals.push(x.download(rec));
    }
}

/// What a plain forward pass makes, batch after batch.
struct Activations {
    /// Rows of every input.
    inputs: Vec<(Input, Vec<f64>)>,
    /// Rows of the residual stream before the outputs of the context's and of the hidden units' linear are added.
    residuals: [Vec<f64>; 2],
}

impl Activations {
    fn residual(&self, input: Input) -> Option<&[f64]> {
        match input {
            Input::Context => Some(&self.residuals[0]),
            Input::Hidden => Some(&self.residuals[1]),
            _ => None,
        }
    }
}

fn activations<E: Elem>(engine: &mut dyn Engine, states: &HiddenStates, forward: &Forward<'_, E>, device: &DeviceBlock) -> Activations {
    let mut all: Vec<(Input, Vec<f64>)> = Vec::new();
    let mut residuals = [Vec::new(), Vec::new()];
    for index in 0..states.batches() {
        let mut rec = Recording::new();
        let x = states.upload(&mut rec, index).unwrap();
        let mut watch = Watch::<E> { inputs: Vec::new(), residuals: Vec::new() };
        forward.block(&mut rec, device, x, states.batch(index), &mut watch, Some(Input::Hidden)).unwrap();
        x.free(&mut rec);
        let mut downloads = engine.run(rec).unwrap();
        assert_eq!(watch.residuals.len(), 2);
        for (all, pending) in residuals.iter_mut().zip(watch.residuals) {
            all.extend(wide(&pending.take(&mut downloads).unwrap()));
        }
        for (input, pending) in watch.inputs {
            let rows = pending.take(&mut downloads).unwrap();
            let at = all.iter().position(|(i, _)| *i == input).unwrap_or_else(|| {
                all.push((input, Vec::new()));
                all.len() - 1
            });
            all[at].1.extend(rows.into_iter().map(|v| f64::from(v.to_f32())));
        }
    }
    Activations { inputs: all, residuals }
}

/// Aᵀ B / n for A [n, d_a] and B [n, d].
fn product(a: &[f64], b: &[f64], d: usize) -> Vec<f64> {
    let n = b.len() / d;
    let d_a = a.len() / n;
    let mut sum = vec![0.0; d_a * d];
    for (left, right) in a.chunks(d_a).zip(b.chunks(d)) {
        for (sum, left) in sum.chunks_mut(d).zip(left) {
            sum.iter_mut().zip(right).for_each(|(s, v)| *s += left * v / n as f64);
        }
    }
    sum
}

fn minus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// √w of every token, w = (1 / rms) / mean(1 / rms) of the rows of x.
fn roots(x: &[f32], d: usize, eps: f64) -> Vec<f64> {
    let square = |row: &[f32]| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / d as f64;
    let weights: Vec<f64> = x.chunks(d).map(|row| (square(row) + eps).sqrt().recip()).collect();
    let mean = weights.iter().sum::<f64>() / weights.len() as f64;
    weights.iter().map(|w| (w / mean).sqrt()).collect()
}

fn scale_rows(x: &mut [f64], factors: &[f64]) {
    let d = x.len() / factors.len();
    x.chunks_mut(d).zip(factors).for_each(|(row, f)| row.iter_mut().for_each(|v| *v *= f));
}

/// The halves are the whole, token by token.
fn check_halves(statistic: &Statistic, tokens: usize, batches: usize) {
    let whole = statistic.clone().into_whole();
    assert_eq!(whole.gram.n_tok, tokens);
    assert_eq!(statistic.halves().is_some(), batches > 1);
    let Some(halves) = statistic.halves() else { return };
    assert_eq!(halves[0].gram.n_tok + halves[1].gram.n_tok, tokens);
    let mixed = |part: fn(&Moments) -> &[f32]| -> Vec<f64> {
        let [a, b] = halves.each_ref().map(|half| (half.gram.n_tok as f64 / tokens as f64, part(half)));
        a.1.iter().zip(b.1).map(|(x, y)| a.0 * f64::from(*x) + b.0 * f64::from(*y)).collect()
    };
    let h = mixed(|m| &m.gram.h);
    assert!(difference(&whole.gram.h, &h) <= 1e-6 * norm(&h));
    let Some(cross) = &whole.cross else { return };
    let c = mixed(|m| m.cross.as_deref().unwrap());
    assert!(difference(cross, &c) <= 1e-6 * norm(&c));
    // They are not the same half twice.
    assert!(difference(&halves[0].gram.h, &wide(&halves[1].gram.h)) > 1e-3 * norm(&h));
}

/// Hidden states of every batch.
fn values(states: &HiddenStates) -> Vec<f32> {
    (0..states.batches()).flat_map(|i| states.values(i).unwrap().into_owned()).collect()
}

fn equal(got: &HiddenStates, want: &HiddenStates) {
    let want = wide(&values(want));
    assert!(difference(&values(got), &want) <= 1e-6 * norm(&want));
}

/// Every block, the same weights in both streams: what the plain forward pass gives, and no difference.
fn same_weights(engine: &mut dyn Engine, n_window: usize) {
    let model = stories();
    let (spec, limits) = (model.spec(), engine.limits());
    let mut plain = HiddenStates::embed(engine, &model, &windows(spec.n_vocab, n_window), &Streaming::default()).unwrap();
    let [mut quantized, mut float, mut alone] = [
        plain.duplicate(engine, Tier::Memory).unwrap(),
        plain.duplicate(engine, Tier::Memory).unwrap(),
        plain.duplicate(engine, Tier::Memory).unwrap(),
    ];
    let forward = submit(engine, |rec| Forward::<f32>::new(rec, spec, LENGTH, limits)).unwrap();
    let mut worst = 0.0f64;
    for block in &spec.blocks {
        let device = load(engine, &model, block);
        let grams = plain.collect(engine, &forward, block, &device, None).unwrap();
        let (mut walk, mut float_walk, mut alone_walk) =
            (Walk::new(&mut quantized).unwrap(), Walk::new(&mut float).unwrap(), Walk::new(&mut alone).unwrap());
        let both = Collector { forward: &forward, block, weights: None, residual: true };
        let one = Collector { residual: false, ..both };
        for (input, gram) in &grams {
            let statistic = both.collect(engine, *input, (&mut walk, &device), Some((&mut float_walk, &device)));
            let statistic = statistic.unwrap();
            let single = one.collect(engine, *input, (&mut alone_walk, &device), None).unwrap();
            let (whole, alone) = (statistic.clone().into_whole(), single.clone().into_whole());
            let want = wide(&gram.h);
            let error = difference(&whole.gram.h, &want) / norm(&want);
            assert!(error <= 1e-5, "{}: block {}, {input}: H is off by {error:.1e}", engine.describe(), block.index);
            assert_eq!(whole.gram.h, alone.gram.h);
            assert!(alone.cross.is_none() && alone.residual.is_none());
            let cross = wide(whole.cross.as_ref().unwrap());
            assert!(norm(&cross) <= 1e-6 * norm(&want), "{}: {input}: C is {:.1e}", engine.describe(), norm(&cross));
            assert_eq!(whole.residual.is_some(), matches!(input, Input::Context | Input::Hidden));
            assert!(whole.residual.as_ref().is_none_or(|d| d.iter().all(|v| *v == 0.0)), "{input}: nothing is missing");
            check_halves(&statistic, n_window * LENGTH, plain.batches());
            check_halves(&single, n_window * LENGTH, plain.batches());
            worst = worst.max(error);
        }
        walk.finish(engine, &forward, &device).unwrap();
        alone_walk.finish(engine, &forward, &device).unwrap();
        plain.advance(engine, &forward, &device).unwrap();
        // The float stream is through with its last input.
        for stream in [&quantized, &float, &alone] {
            equal(stream, &plain);
        }
        submit(engine, |rec| device.free(rec)).unwrap();
    }
    submit(engine, |rec| forward.free(rec)).unwrap();
    assert_eq!(engine.profile().live_buffers(), 0, "buffers were left behind");
    println!("{}: H differs by {worst:.1e} at most", engine.describe());
}

#[test]
fn the_same_weights_give_the_plain_statistics_and_no_difference() {
    for mut engine in common::engines::engines() {
        same_weights(engine.as_mut(), 6);
    }
}

/// More windows than fit a batch: halves of unequal size.
#[test]
fn halves_make_the_whole() {
    same_weights(&mut CpuEngine::poisoned(), 80);
    moments::<f32>(&mut CpuEngine::poisoned(), 80, 1e-5, true);
}

/// Weights, moments, hidden units and, two at a time, windows in pieces.
#[test]
fn splitting_changes_nothing() {
    for mut engine in common::engines::engines_with_max_buffer(38400) {
        same_weights(engine.as_mut(), 7);
        moments::<f32>(engine.as_mut(), 7, 1e-5, true);
    }
}

/// Two blocks, quantized linear by linear while the streams walk: moments against f64 sums over the activations of the plain forward
/// pass through the float blocks and through the quantized ones. With `weighted`, tokens count by the residual stream.
fn moments<E: Elem>(engine: &mut dyn Engine, n_window: usize, tolerance: f64, weighted: bool) {
    let model = stories();
    let (spec, limits) = (model.spec(), engine.limits());
    let embedded = HiddenStates::embed(engine, &model, &windows(spec.n_vocab, n_window), &Streaming::default()).unwrap();
    let [mut quantized, mut float] = [embedded.duplicate(engine, Tier::Memory).unwrap(), embedded.duplicate(engine, Tier::Memory).unwrap()];
    let [mut plain_quantized, mut plain_float] = [embedded.duplicate(engine, Tier::Memory).unwrap(), embedded];
    let forward = submit(engine, |rec| Forward::<E>::new(rec, spec, LENGTH, limits)).unwrap();
    for block in &spec.blocks[..2] {
        let original = load(engine, &model, block);
        let mut complete = load(engine, &model, block);
        block.linears.iter().for_each(|linear| quantize(engine, &model, &mut complete, linear));
        let mut own = activations(engine, &plain_quantized, &forward, &complete);
        let mut others = activations(engine, &plain_float, &forward, &original);
        let weights = weighted.then(|| TokenWeights::of_residual(engine, &forward, &float, &original).unwrap());
        if weighted {
            let mut after = plain_float.duplicate(engine, Tier::Memory).unwrap();
            after.advance(engine, &forward, &original).unwrap();
            let roots = roots(&values(&after), spec.d_model, f64::from(spec.norm_eps));
            for activations in [&mut own, &mut others] {
                let inputs = activations.inputs.iter_mut().map(|(_, x)| x);
                inputs.chain(&mut activations.residuals).for_each(|x| scale_rows(x, &roots));
            }
            let grams = quantized.collect(engine, &forward, block, &complete, weights.as_ref()).unwrap();
            for ((input, x), (_, gram)) in own.inputs.iter().zip(&grams) {
                let h = product(x, x, gram.d);
                assert!(difference(&gram.h, &h) <= tolerance * norm(&h), "{}: {input}, in one pass", engine.describe());
            }
        }

        let mut device = submit(engine, |rec| original.copy(rec)).unwrap();
        let (mut walk, mut float_walk) = (Walk::new(&mut quantized).unwrap(), Walk::new(&mut float).unwrap());
        let collector = Collector { forward: &forward, block, weights: weights.as_ref(), residual: true };
        for ((input, x), (other, x_float)) in own.inputs.iter().zip(&others.inputs) {
            assert_eq!(input, other);
            let (streams, float_stream) = ((&mut walk, &device), Some((&mut float_walk, &original)));
            let statistic = collector.collect(engine, *input, streams, float_stream).unwrap();
            let whole = statistic.clone().into_whole();
            let d = block.width(*input);
            let (h, c) = (product(x, x, d), product(&minus(x_float, x), x, d));
            let (h_error, c_error) = (difference(&whole.gram.h, &h) / norm(&h), difference(whole.cross.as_ref().unwrap(), &c) / norm(&h));
            let share = norm(&c) / norm(&h);
            println!(
                "{}: block {}, {input}: H {h_error:.1e}, C {c_error:.1e} where it is {share:.1e} of H",
                engine.describe(),
                block.index
            );
            assert!(h_error <= tolerance && c_error <= tolerance * share.max(0.1), "{}: {input}", engine.describe());
            assert_eq!(share > 0.0, block.index > 0 || *input != Input::AttnNorm, "the streams differ from the first linear on");
            let residuals = own.residual(*input).zip(others.residual(*input));
            assert_eq!(residuals.is_some(), whole.residual.is_some());
            if let (Some((r, r_float)), Some(got)) = (residuals, &whole.residual) {
                let want = product(&minus(r_float, r), x, d);
                // As far as the streams themselves agree.
                let scale = norm(&product(r, x, d));
                let error = difference(got, &want) / scale;
                println!("{}: {input}: D {error:.1e} where it is {:.1e}", engine.describe(), norm(&want) / scale);
                assert!(error <= tolerance, "{}: {input}", engine.describe());
                assert_eq!(norm(&want) > 1e-3 * scale, block.index > 0 || *input == Input::Hidden, "{input}: what is missing");
            }
            check_halves(&statistic, n_window * LENGTH, plain_float.batches());
            for linear in block.readers(*input) {
                quantize(engine, &model, &mut device, linear);
            }
        }
        walk.finish(engine, &forward, &device).unwrap();
        plain_quantized.advance(engine, &forward, &complete).unwrap();
        plain_float.advance(engine, &forward, &original).unwrap();
        equal(&quantized, &plain_quantized);
        equal(&float, &plain_float);
        submit(engine, |rec| [original, complete, device].into_iter().for_each(|b| b.free(rec))).unwrap();
    }
    submit(engine, |rec| forward.free(rec)).unwrap();
    assert_eq!(engine.profile().live_buffers(), 0, "buffers were left behind");
}

#[test]
fn moments_of_two_streams_are_those_of_their_activations() {
    for mut engine in common::engines::engines() {
        moments::<f32>(engine.as_mut(), 12, 1e-5, false);
        moments::<f32>(engine.as_mut(), 6, 1e-5, true);
        if engine.limits().f16_operands {
            // The same rounded activations on both sides, products of f16 in f32.
            moments::<f16>(engine.as_mut(), 6, 1e-5, false);
        }
    }
}
