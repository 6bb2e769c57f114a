//! Hidden states that wait on disk in bf16, against those in memory, and what is left of them when a block is not finished; those that wait on
//! the device are those in memory, bit by bit, and so is what comes of weights that are on the device linear by linear.

mod common;

use aespa_gpu::calib::{Collector, DeviceBlock, Forward, HiddenStates, Place, Residency, Streaming, Tier, Walk};
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::{DeviceChoice, Engine, submit};
use aespa_gpu::model::{Block, Checkpoint};
use aespa_gpu::pipeline::{self, Quiet};
use aespa_gpu::plan::{EvalRequest, Plan, Request, TextSource};
use aespa_gpu::quant::Scheme;
use aespa_gpu::tensor::Dtype;
use aespa_gpu::{export, method};
use common::tiny_model::TinyLlama;
use std::path::Path;

const WINDOWS: usize = 8;
const LENGTH: usize = 64;

fn stories() -> Checkpoint {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/stories260k")).unwrap()
}

fn windows() -> Vec<Vec<u32>> {
    (0..WINDOWS).map(|w| (0..LENGTH).map(|t| ((w * 131 + t * t * 7) % 512) as u32).collect()).collect()
}

fn values(engine: &mut dyn Engine, states: &HiddenStates) -> Vec<f32> {
    (0..states.batches()).flat_map(|i| states.read(engine, i).unwrap().into_owned()).collect()
}

/// ‖got − want‖ / ‖want‖.
fn off(got: &[f32], want: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    assert_eq!(got.len(), want.len());
    (square(&mut got.iter().zip(want).map(|(g, w)| g - w)) / square(&mut want.iter().copied())).sqrt()
}

/// Brings a stream to the last input of a block, and through it where `finish` is set.
fn walk(engine: &mut dyn Engine, forward: &Forward<'_, f32>, block: &Block, device: &DeviceBlock, states: &mut HiddenStates, finish: bool) {
    let mut walk = Walk::new(states).unwrap();
    let collector = Collector { forward, block, weights: None, residual: false };
    for input in block.inputs() {
        collector.collect(engine, input, (&mut walk, device), None).unwrap();
    }
    if finish {
        walk.finish(engine, forward, device).unwrap();
    }
}

#[test]
fn on_disk_they_are_what_they_are_in_memory_to_the_accuracy_of_bf16() {
    let (model, folder) = (stories(), tempfile::tempdir().unwrap());
    let mut engine = CpuEngine::new();
    let (spec, limits) = (model.spec(), engine.limits());
    let place = |name: &str| Tier::Disk(Place { folder: folder.path().to_owned(), name: name.to_owned() });
    // Two windows at a time, so that there are several batches.
    let how = Streaming { batch_tokens: 2 * LENGTH, ..Streaming::default() };
    let forward = submit(&mut engine, |rec| Forward::<f32>::new(rec, spec, LENGTH, limits)).unwrap();
    let mut memory = HiddenStates::embed(&mut engine, &model, &windows(), &how).unwrap();
    let (mut disk, mut plain) =
        (memory.duplicate(&mut engine, place("walk")).unwrap(), memory.duplicate(&mut engine, place("plain")).unwrap());
    assert!(memory.batches() == WINDOWS / 2 && disk.batches() == memory.batches());
    for block in &spec.blocks {
        let device = DeviceBlock::load(&mut engine, &model, block).unwrap();
        for states in [&mut memory, &mut disk] {
            walk(&mut engine, &forward, block, &device, states, true);
        }
        plain.advance(&mut engine, &forward, &device).unwrap();
        let want = values(&mut engine, &memory);
        // A rounding of 2⁻⁹ twice a block, and what the blocks make of it.
        for got in [&disk, &plain] {
            let error = off(&values(&mut engine, got), &want);
            assert!(error > 0.0 && error < 1e-2, "block {}: off by {error:.1e}", block.index);
        }
        submit(&mut engine, |rec| device.free(rec)).unwrap();
    }
}

#[test]
fn a_block_that_is_not_finished_leaves_its_inputs() {
    let (model, folder) = (stories(), tempfile::tempdir().unwrap());
    let mut engine = CpuEngine::new();
    let (spec, limits) = (model.spec(), engine.limits());
    let forward = submit(&mut engine, |rec| Forward::<f32>::new(rec, spec, LENGTH, limits)).unwrap();
    let place = |name: &str| Place { folder: folder.path().to_owned(), name: name.to_owned() };
    for tier in [Tier::Memory, Tier::Device, Tier::Disk(place("disk"))] {
        let (how, place) = (Streaming { batch_tokens: 2 * LENGTH, tier: tier.clone(), ..Streaming::default() }, place(tier.name()));
        let mut states = HiddenStates::embed(&mut engine, &model, &windows(), &how).unwrap();
        for block in &spec.blocks {
            let device = DeviceBlock::load(&mut engine, &model, block).unwrap();
            let front = states.save(&mut engine, &place).unwrap();
            let before = values(&mut engine, &states);
            walk(&mut engine, &forward, block, &device, &mut states, false);
            assert_ne!(values(&mut engine, &states), before, "the attention has been added");
            submit(&mut engine, |rec| states.free(rec)).unwrap();
            states = HiddenStates::restore(&mut engine, spec, [WINDOWS, LENGTH], &how, &place, front).unwrap();
            assert_eq!(values(&mut engine, &states), before, "block {}, {tier:?}", block.index);
            walk(&mut engine, &forward, block, &device, &mut states, true);
            submit(&mut engine, |rec| device.free(rec)).unwrap();
        }
    }
}

/// The weights that a run writes with states and weights where `how` says, and its peak of device memory.
fn written(adapter: usize, method: &str, how: Streaming, place: &Place) -> (Vec<u8>, u64) {
    let request = Request {
        calibration: Some(place.folder.join("text.txt")),
        samples: Some(160),
        sequence_length: Some(32),
        device: DeviceChoice::GpuIndex(adapter),
        eval: Some(EvalRequest { text: TextSource::File(place.folder.join("text.txt")), window: Some(32), windows: Some(4) }),
        restart: true,
        // A record after every block, which reads the states back.
        journal_seconds: 0.0,
        ..Request::new(
            place.folder.join("model"),
            place.folder.join(&place.name),
            method::find(method).unwrap(),
            Scheme::new(3, -1, false).unwrap(),
            vec![export::find("compressed-tensors").unwrap()],
        )
    };
    let out = request.out.clone();
    let mut plan = Plan::new(request).unwrap();
    plan.streaming = how;
    let report = pipeline::run(plan, &mut Quiet).unwrap().remove(0);
    assert_eq!(report.kernels.live_buffers(), 0, "buffers were left behind");
    (std::fs::read(out.join("model.safetensors")).unwrap(), report.memory.peak_device_bytes)
}

/// A model whose rows have padding, and a text, in a folder.
fn padded(dtype: Dtype) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let shape = TinyLlama { d_model: 36, d_ff: 44, n_head: 3, n_kv: 1, d_head: 14, n_vocab: 256, ..TinyLlama::default() };
    TinyLlama { tokenizer: true, attention_bias: true, dtype, ..shape }.write(&folder.path().join("model"));
    std::fs::write(folder.path().join("text.txt"), (0..3000).map(|i| format!("{} of {} ", i * i % 977, i)).collect::<String>()).unwrap();
    folder
}

/// In two batches; methods with one stream that goes through a block at once, and with two that walk.
#[test]
fn on_the_device_they_are_what_they_are_in_memory() {
    let folder = padded(Dtype::F32);
    for adapter in common::engines::gpu_indices() {
        for method in ["gptq", "aespa"] {
            let run = |tier: Tier| {
                let place = Place { folder: folder.path().to_owned(), name: format!("{adapter}-{method}-{}", tier.name()) };
                written(adapter, method, Streaming { tier, ..Streaming::default() }, &place)
            };
            let [(device, with), (memory, without)] = [Tier::Device, Tier::Memory].map(run);
            assert!(device == memory, "{method}: other bytes");
            assert!(with > without, "{method}: {with} bytes on the device, {without} where states wait in memory");
        }
    }
}

/// Weights of two bytes, which come from a copy on the host for every use, also where folds rewrite them.
#[test]
fn linear_by_linear_a_block_is_what_it_is_as_a_whole() {
    let folder = padded(Dtype::Bf16);
    for adapter in common::engines::gpu_indices() {
        for method in ["gptq", "aespa", "aespa-2024"] {
            let run = |weights: Residency| {
                let place = Place { folder: folder.path().to_owned(), name: format!("{adapter}-{method}-{weights:?}") };
                written(adapter, method, Streaming { weights, ..Streaming::default() }, &place)
            };
            let [(whole, with), (single, without)] = [Residency::Block, Residency::Linear].map(run);
            assert!(whole == single, "{method}: other bytes");
            assert!(without < with, "{method}: {without} bytes on the device linear by linear, {with} as a whole");
        }
    }
}
