//! Hidden states that wait on disk in bf16, against those in memory, and what is left of them when a block is not finished.

use aespa_gpu::calib::{Collector, DeviceBlock, Forward, HiddenStates, Place, Streaming, Walk};
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::{Engine, submit};
use aespa_gpu::model::{Block, Checkpoint};
use std::path::Path;

const WINDOWS: usize = 8;
const LENGTH: usize = 64;

fn stories() -> Checkpoint {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models/stories260k")).unwrap()
}

fn windows() -> Vec<Vec<u32>> {
    (0..WINDOWS).map(|w| (0..LENGTH).map(|t| ((w * 131 + t * t * 7) % 512) as u32).collect()).collect()
}

fn values(states: &HiddenStates) -> Vec<f32> {
    (0..states.batches()).flat_map(|i| states.values(i).unwrap().into_owned()).collect()
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
    let place = |name: &str| Place { folder: folder.path().to_owned(), name: name.to_owned() };
    // Two windows at a time, so that there are several batches.
    let how = Streaming { batch_tokens: 2 * LENGTH, place: None };
    let forward = submit(&mut engine, |rec| Forward::<f32>::new(rec, spec, LENGTH, limits)).unwrap();
    let mut memory = HiddenStates::embed(&engine, &model, &windows(), &how).unwrap();
    let (mut disk, mut plain) = (memory.duplicate(Some(place("walk"))).unwrap(), memory.duplicate(Some(place("plain"))).unwrap());
    assert!(memory.batches() == WINDOWS / 2 && disk.batches() == memory.batches());
    for block in &spec.blocks {
        let device = DeviceBlock::load(&mut engine, &model, block).unwrap();
        for states in [&mut memory, &mut disk] {
            walk(&mut engine, &forward, block, &device, states, true);
        }
        plain.advance(&mut engine, &forward, &device).unwrap();
        let want = values(&memory);
        // A rounding of 2⁻⁹ twice a block, and what the blocks make of it.
        for got in [&disk, &plain] {
            let error = off(&values(got), &want);
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
    for on_disk in [false, true] {
        let place = Place { folder: folder.path().to_owned(), name: format!("stream-{on_disk}") };
        let how = Streaming { batch_tokens: 2 * LENGTH, place: on_disk.then(|| place.clone()) };
        let mut states = HiddenStates::embed(&engine, &model, &windows(), &how).unwrap();
        for block in &spec.blocks {
            let device = DeviceBlock::load(&mut engine, &model, block).unwrap();
            let front = states.save(&place).unwrap();
            let before = values(&states);
            walk(&mut engine, &forward, block, &device, &mut states, false);
            assert_ne!(values(&states), before, "the attention has been added");
            drop(states);
            states = HiddenStates::restore(&engine, spec, [WINDOWS, LENGTH], &how, &place, front).unwrap();
            assert_eq!(values(&states), before, "block {}, on disk: {on_disk}", block.index);
            walk(&mut engine, &forward, block, &device, &mut states, true);
            submit(&mut engine, |rec| device.free(rec)).unwrap();
        }
    }
}
