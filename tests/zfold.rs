//! Folds keep the function of a block, its statistics follow, and the loss falls.

mod common;

use aespa_gpu::calib::{DeviceBlock, Forward, Gram, HiddenStates, Streaming};
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::{Engine, submit};
use aespa_gpu::export::Writer;
use aespa_gpu::model::{Block, Checkpoint, Input, unpack_demo};
use aespa_gpu::quant::Scheme;
use aespa_gpu::scale::ScaleRule;
use aespa_gpu::tensor::Dtype;
use aespa_gpu::text::{Corpus, Tokenizer, eval_windows};
use aespa_gpu::transform::{FoldRecord, FoldedBlock, GridChoice, Statistics, ZetaRule, ZfoldOptions, fold_block};
use common::tiny_model::TinyLlama;
use std::path::Path;

const SEQ_LEN: usize = 48;
const WEIGHTED: ZfoldOptions = ZfoldOptions { rule: ZetaRule::Weighted, iterations: 8 };
const PLAIN: ZfoldOptions = ZfoldOptions { rule: ZetaRule::Plain, iterations: 8 };

/// A model with the hidden states in front of one of its blocks.
struct Walk<'m> {
    checkpoint: &'m Checkpoint,
    hidden: HiddenStates,
    forward: Forward<'m, f32>,
}

impl<'m> Walk<'m> {
    fn new(engine: &mut dyn Engine, checkpoint: &'m Checkpoint, windows: &[Vec<u32>]) -> Self {
        let hidden = HiddenStates::embed(engine, checkpoint, windows, &Streaming::default()).unwrap();
        let limits = engine.limits();
        let forward = submit(engine, |rec| Forward::new(rec, checkpoint.spec(), windows[0].len(), limits)).unwrap();
        Self { checkpoint, hidden, forward }
    }

    fn load(&self, engine: &mut dyn Engine, block: &Block) -> DeviceBlock {
        DeviceBlock::load(engine, self.checkpoint, block).unwrap()
    }

    fn statistics(&self, engine: &mut dyn Engine, block: &Block, device: &DeviceBlock) -> Vec<(Input, Gram)> {
        self.hidden.collect(engine, &self.forward, block, device, None).unwrap()
    }

    /// The block's outputs, hidden states staying as they are.
    fn outputs(&self, engine: &mut dyn Engine, device: &DeviceBlock) -> Vec<f32> {
        let mut all = Vec::new();
        for index in 0..self.hidden.batches() {
            let mut rec = aespa_gpu::engine::Recording::new();
            let x = self.hidden.upload(&mut rec, index).unwrap();
            self.forward.block(&mut rec, device, x, self.hidden.batch(index), &mut (), None).unwrap();
            let pending = x.download(&mut rec);
            x.free(&mut rec);
            all.extend(pending.take(&mut engine.run(rec).unwrap()).unwrap());
        }
        all
    }

    fn advance(&mut self, engine: &mut dyn Engine, device: &DeviceBlock) {
        self.hidden.advance(engine, &self.forward, device).unwrap();
    }

    fn fold(
        &self,
        engine: &mut dyn Engine,
        options: &ZfoldOptions,
        block: &Block,
        device: &mut DeviceBlock,
        mut stats: Statistics<'_>,
        bits: u32,
    ) -> FoldedBlock {
        let scheme = Scheme::new(bits, -1, false).unwrap();
        let grid = GridChoice { lattice: &|_| Ok(scheme.lattice(self.checkpoint.spec().dtype)), rule: ScaleRule::Metric };
        fold_block(engine, options, self.checkpoint, block, device, &mut stats, &grid).unwrap()
    }

    fn free(self, engine: &mut dyn Engine) {
        submit(engine, |rec| self.forward.free(rec)).unwrap();
        assert_eq!(engine.profile().live_buffers(), 0, "buffers were left behind");
    }
}

fn windows(n_vocab: usize, n: usize) -> Vec<Vec<u32>> {
    let mut state = 7u32;
    let mut id = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % n_vocab as u32
    };
    (0..n).map(|_| (0..SEQ_LEN).map(|_| id()).collect()).collect()
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m, v| m.max(v.abs()))
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m, (a, b)| if (a - b).is_nan() { f32::INFINITY } else { m.max((a - b).abs()) })
}

/// Folds every block; returns the records.
fn check(engine: &mut dyn Engine, dir: &Path, options: &ZfoldOptions, bias_error: f32) -> Vec<FoldRecord> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let spec = checkpoint.spec();
    let windows = windows(spec.n_vocab, 12);
    let mut walk = Walk::new(engine, &checkpoint, &windows);
    let mut records = Vec::new();
    for block in &spec.blocks {
        let (original, mut folded) = (walk.load(engine, block), walk.load(engine, block));
        let mut grams = walk.statistics(engine, block, &folded);
        let attention = grams.iter().find(|(i, _)| *i == Input::AttnNorm).unwrap().1.clone();
        let mut values = vec![attention; spec.n_kv];
        let result = walk.fold(engine, options, block, &mut folded, Statistics { inputs: &mut grams, values: &mut values }, 3);

        let (want, got) = (walk.outputs(engine, &original), walk.outputs(engine, &folded));
        let error = distance(&want, &got) / largest(&want);
        println!("{} block {}: outputs differ by {error:.1e}", engine.describe(), block.index);
        assert!(error < 1e-5 + bias_error, "block {}: {error}", block.index);

        for (input, after) in walk.statistics(engine, block, &folded) {
            let rescaled = &grams.iter().find(|(i, _)| *i == input).unwrap().1.h;
            let error = distance(&after.h, rescaled) / largest(&after.h);
            assert!(error < 1e-4 + 10.0 * bias_error, "block {} {input}: statistics differ by {error}", block.index);
            if input == Input::AttnNorm {
                assert!(values.iter().all(|v| v.h == *rescaled));
            }
        }
        for fold in &result.folds {
            assert!(fold.loss_after <= fold.loss_before, "{fold:?}");
            assert!(fold.zeta_min > 0.12 && fold.zeta_max < 8.1, "{fold:?}");
        }
        // What is to be stored is what the device computes with.
        for tensor in &result.tensors {
            let old = checkpoint.tensor(&tensor.name).unwrap();
            assert_eq!((old.dtype, &old.shape), (tensor.tensor.dtype, &tensor.tensor.shape));
        }
        records.extend(result.folds);
        walk.advance(engine, &original);
        submit(engine, |rec| [original, folded].into_iter().for_each(|b| b.free(rec))).unwrap();
    }
    walk.free(engine);
    records
}

#[test]
fn a_folded_block_computes_the_same() {
    let stories = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/stories260k");
    for mut engine in common::engines::engines() {
        for options in [WEIGHTED, PLAIN] {
            let records = check(engine.as_mut(), &stories, &options, 0.0);
            assert_eq!(records.len(), 5 * 4);
            assert!(records.iter().filter(|r| r.loss_after < 0.98 * r.loss_before).count() > 10, "{records:#?}");
        }
    }
}

/// Grouped queries, one head per key, one key head for all; gains and biases of every type. Biases are rounded to the type that they are
/// stored in, which is the only thing that may be lost.
#[test]
fn every_shape_of_block_folds() {
    let models = [
        TinyLlama { n_kv: 2, ..TinyLlama::default() },
        TinyLlama { n_kv: 4, dtype: Dtype::F16, ..TinyLlama::default() },
        TinyLlama { n_kv: 1, dtype: Dtype::Bf16, ..TinyLlama::default() },
        TinyLlama { attention_bias: true, mlp_bias: true, ..TinyLlama::default() },
        TinyLlama { attention_bias: true, mlp_bias: true, n_kv: 4, dtype: Dtype::F16, ..TinyLlama::default() },
    ];
    for mut engine in common::engines::engines() {
        for model in &models {
            let dir = tempfile::tempdir().unwrap();
            model.write(dir.path());
            let bias_error = if model.attention_bias && model.dtype != Dtype::F32 { 1e-3 } else { 0.0 };
            check(engine.as_mut(), dir.path(), &WEIGHTED, bias_error);
        }
    }
}

/// Row panels of weights and of metrics change nothing.
#[test]
fn splitting_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    TinyLlama { d_model: 160, d_ff: 256, n_head: 20, n_kv: 10, d_head: 8, n_layer: 1, ..TinyLlama::default() }.write(dir.path());
    let whole = check(&mut CpuEngine::new(), dir.path(), &WEIGHTED, 0.0);
    // Panels of a metric have 128 rows: one of the hidden units just fits, and the linears before it do not.
    for mut engine in common::engines::engines_with_max_buffer(132 << 10) {
        let split = check(engine.as_mut(), dir.path(), &WEIGHTED, 0.0);
        for (a, b) in whole.iter().zip(&split) {
            assert!((a.loss_after - b.loss_after).abs() <= 0.02 * a.loss_after, "{a:?} {b:?}");
        }
    }
}

/// A writer takes the folded tensors in the place of the checkpoint's.
#[test]
fn folded_tensors_can_be_written() {
    let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    TinyLlama { attention_bias: true, mlp_bias: true, dtype: Dtype::F16, ..TinyLlama::default() }.write(dir.path());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let engine: &mut dyn Engine = &mut CpuEngine::new();
    let walk = Walk::new(engine, &checkpoint, &windows(checkpoint.spec().n_vocab, 4));
    let block = &checkpoint.spec().blocks[0];
    let mut device = walk.load(engine, block);
    let mut grams = walk.statistics(engine, block, &device);
    let folded = walk.fold(engine, &WEIGHTED, block, &mut device, Statistics { inputs: &mut grams, values: &mut [] }, 2);
    // Two gains; the biases of v and up.
    assert_eq!(folded.tensors.len(), 4);
    let format = aespa_gpu::export::FORMATS[0];
    let scheme = Scheme::new(4, -1, false).unwrap();
    let mut writer = Writer::create(&out.path().join("out"), false, format, &checkpoint, scheme).unwrap();
    folded.tensors.iter().for_each(|t| writer.put_tensor(checkpoint.spec(), &t.name, &t.tensor).unwrap());
    submit(engine, |rec| device.free(rec)).unwrap();
    walk.free(engine);
}

/// Both rules on the demo model: the weighted one ends lower.
#[test]
fn the_weighted_rule_beats_the_plain_one() {
    let dir = tempfile::tempdir().unwrap();
    unpack_demo(dir.path()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let tokens = Corpus::built_in_heldout().tokens(&Tokenizer::open(dir.path()).unwrap(), checkpoint.spec().n_vocab).unwrap();
    let text: Vec<Vec<u32>> = eval_windows(&tokens, 256, Some(32)).unwrap().iter().map(|w| w.to_vec()).collect();
    let engine: &mut dyn Engine = &mut CpuEngine::new();
    for bits in [2, 3] {
        let mut walk = Walk::new(engine, &checkpoint, &text);
        let mut totals = Vec::<(f64, [f64; 2])>::new();
        for block in &checkpoint.spec().blocks {
            let original = walk.load(engine, block);
            let grams = walk.statistics(engine, block, &original);
            for (which, options) in [PLAIN, WEIGHTED].into_iter().enumerate() {
                let (mut device, mut grams) = (walk.load(engine, block), grams.clone());
                let folded = walk.fold(engine, &options, block, &mut device, Statistics { inputs: &mut grams, values: &mut [] }, bits);
                totals.resize(folded.folds.len(), (0.0, [0.0; 2]));
                for (total, fold) in totals.iter_mut().zip(&folded.folds) {
                    println!(
                        "W{bits} block {} {:10} {:?}: {:.4} in {} turns, zeta {:.3}..{:.3}",
                        block.index,
                        fold.source,
                        options.rule,
                        fold.loss_after / fold.loss_before,
                        fold.iterations,
                        fold.zeta_min,
                        fold.zeta_max
                    );
                    total.0 += (1 - which) as f64;
                    total.1[which] += (fold.loss_after / fold.loss_before).ln();
                }
                submit(engine, |rec| device.free(rec)).unwrap();
            }
            walk.advance(engine, &original);
            submit(engine, |rec| original.free(rec)).unwrap();
        }
        walk.free(engine);
        let mut sum = [0.0; 2];
        for (n, [plain, weighted]) in totals {
            println!("W{bits} geometric mean of loss ratios: plain {:.4}, weighted {:.4}", (plain / n).exp(), (weighted / n).exp());
            assert!(plain < 0.0 && weighted < 0.0);
            sum = [sum[0] + plain, sum[1] + weighted];
        }
        assert!(sum[1] < sum[0], "W{bits}: {sum:?}");
    }
}
