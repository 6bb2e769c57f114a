//! The same linears of the demo model, solved by the native engine and by GPU engines from the same statistics, get the same codes but
//! where two are equally good to within f32. Whole runs cannot be compared code by code: statistics differ in their last bits, and what
//! is calibrated after the first other code is calibrated on other inputs.

mod common;

use aespa_gpu::calib::{Collector, DeviceBlock, Forward, Gram, HiddenStates, Moments, Statistic, Streaming, Tier, Walk};
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::{Engine, submit};
use aespa_gpu::method::{self, Damping, Inputs, Method, Settings, Solved, Solver, Strength, Targets};
use aespa_gpu::metric::Heads;
use aespa_gpu::model::{Block, Checkpoint, Input, Role, Weights, unpack_demo};
use aespa_gpu::quant::{Lattice, Scheme};
use aespa_gpu::round::ties::TOLERANCE;
use aespa_gpu::text::{Corpus, Tokenizer};
use std::time::Instant;

const WINDOWS: usize = 8;
const LENGTH: usize = 128;
const BLOCKS: usize = 2;
/// How far asymmetric targets are moved.
const ALPHA: f32 = 0.5;
/// λ of a method that would choose one by a test.
const DAMPING: f64 = 0.1;

/// A block, and what its inputs are calibrated on.
struct Calibrated<'m> {
    block: &'m Block,
    inputs: Vec<(Input, Statistic)>,
}

/// The demo model.
struct Place {
    checkpoint: Checkpoint,
    _dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        unpack_demo(dir.path()).unwrap();
        Self { checkpoint: Checkpoint::open(dir.path()).unwrap(), _dir: dir }
    }

    /// Statistics of the first blocks by the native engine: each input as the linears before it, quantized by the default method, give
    /// it, with its difference to the float model's.
    fn calibrate(&self) -> Vec<Calibrated<'_>> {
        let spec = self.checkpoint.spec();
        let tokenizer = Tokenizer::open(self.checkpoint.dir()).unwrap();
        let windows = Corpus::built_in().sample(&tokenizer, spec.n_vocab, WINDOWS, LENGTH, 0).unwrap();
        let engine = &mut CpuEngine::new();
        let limits = engine.limits();
        let settings = self.settings("aespa", 3, 128);
        let mut quantized = HiddenStates::embed(engine, &self.checkpoint, &windows, &Streaming::default()).unwrap();
        let mut float = quantized.duplicate(engine, Tier::Memory).unwrap();
        let forward: Forward<'_, f32> = submit(engine, |rec| Forward::new(rec, spec, LENGTH, limits)).unwrap();
        let mut all = Vec::new();
        for block in spec.blocks.iter().take(BLOCKS) {
            let mut device = self.load(engine, block);
            let original = submit(engine, |rec| device.copy(rec)).unwrap();
            let (mut walk, mut float) = (Walk::new(&mut quantized).unwrap(), Walk::new(&mut float).unwrap());
            let mut inputs = Vec::new();
            let collector = Collector { forward: &forward, block, weights: None, residual: true };
            for input in block.inputs() {
                let streams = (&mut walk, &device);
                let statistic = collector.collect(engine, input, streams, Some((&mut float, &original))).unwrap();
                for (role, solved) in solve(engine, &device, block, input, &statistic, settings) {
                    device.replace(engine, role, solved.w_hat).unwrap();
                }
                inputs.push((input, statistic));
            }
            walk.finish(engine, &forward, &device).unwrap();
            submit(engine, |rec| {
                device.free(rec);
                original.free(rec);
            })
            .unwrap();
            all.push(Calibrated { block, inputs });
        }
        submit(engine, |rec| forward.free(rec)).unwrap();
        all
    }

    fn settings(&self, method: &str, bits: u32, group: i64) -> (Settings, Lattice) {
        let mut method = method::find(method).unwrap();
        if method.damping == Damping::SplitHalf {
            method.damping = Damping::Fixed(DAMPING);
        }
        let scheme = Scheme::new(bits, group, false).unwrap();
        let settings = Settings { method, act_order: true, alpha: Some(ALPHA), seed: 0 };
        (settings, scheme.lattice(self.checkpoint.spec().dtype))
    }

    fn load(&self, engine: &mut dyn Engine, block: &Block) -> DeviceBlock {
        DeviceBlock::load(engine, &self.checkpoint, block).unwrap()
    }

    /// Every linear of a block.
    fn solve(&self, engine: &mut dyn Engine, calibrated: &Calibrated<'_>, settings: (Settings, Lattice)) -> Vec<Solved> {
        let device = self.load(engine, calibrated.block);
        let mut all = Vec::new();
        for (input, statistic) in &calibrated.inputs {
            all.extend(solve(engine, &device, calibrated.block, *input, statistic, settings).into_iter().map(|(_, solved)| solved));
        }
        submit(engine, |rec| device.free(rec)).unwrap();
        all
    }
}

/// The linears that read one input.
fn solve(
    engine: &mut dyn Engine,
    device: &DeviceBlock,
    block: &Block,
    input: Input,
    statistic: &Statistic,
    (settings, lattice): (Settings, Lattice),
) -> Vec<(Role, Solved)> {
    let strength = Strength { inputs: ALPHA, residual: ALPHA };
    let Moments { gram, cross, residual } = statistic.clone().into_whole();
    let cross = cross.filter(|_| settings.method.inputs.two_streams());
    let targets = cross.map(|cross| Targets::upload(engine, &gram, cross, residual, strength).unwrap());
    let solver = Solver::new(engine, settings, block.width(input), Some(gram), targets).unwrap();
    let mut solve = |role: Role| {
        let linear = submit(engine, |rec| device.enter(rec, role)).unwrap().unwrap();
        let solved = solver.solve(engine, &linear.weight, lattice, Heads::None).unwrap();
        submit(engine, |rec| device.leave(rec, linear)).unwrap();
        (role, solved)
    };
    let all = block.readers(input).map(|linear| solve(linear.role)).collect();
    solver.free(engine).unwrap();
    all
}

/// What two engines made of the same linears.
#[derive(Debug, Default)]
struct Agreement {
    weights: usize,
    codes_that_differ: usize,
    rows: usize,
    rows_that_differ: usize,
    scales_that_differ: usize,
    /// Near ties by the native engine and by the other.
    ties: [usize; 2],
    seconds: [f64; 2],
}

/// The native engine under the first settings, and another under the second.
fn compare(place: &Place, calibrated: &[Calibrated<'_>], other: &mut dyn Engine, settings: [(Settings, Lattice); 2]) -> Agreement {
    let mut found = Agreement::default();
    for block in calibrated {
        let mut timed = |engine: &mut dyn Engine, i: usize| {
            let start = Instant::now();
            let solved = place.solve(engine, block, settings[i]);
            found.seconds[i] += start.elapsed().as_secs_f64();
            found.ties[i] += solved.iter().map(|s| s.record.ties).sum::<usize>();
            submit(engine, |rec| solved.iter().for_each(|s| s.w_hat.clone().free(rec))).unwrap();
            solved.into_iter().map(|s| s.packed).collect::<Vec<_>>()
        };
        let (own, other) = (timed(&mut CpuEngine::new(), 0), timed(other, 1));
        for (own, other) in own.iter().zip(&other) {
            let (a, b) = (own.codes(), other.codes());
            found.weights += a.len();
            found.codes_that_differ += a.iter().zip(&b).filter(|(a, b)| a != b).count();
            found.rows += own.d_out;
            found.rows_that_differ += a.chunks(own.d_in).zip(b.chunks(own.d_in)).filter(|(a, b)| a != b).count();
            found.scales_that_differ += own.scales.iter().zip(&other.scales).filter(|(a, b)| a != b).count();
        }
    }
    let (Settings { method, .. }, Lattice { bits, group, .. }) = settings[0];
    println!("{}, {bits} bits, groups {group:?}: {found:?}", method.name);
    found
}

/// At most one code in a thousand differs. For GPTQ a row differs from where a tie broke differently, so there are at least as many ties;
/// annealing takes many decisions that leave no trace in the codes it ends with.
fn check(cases: &[(&str, u32, i64)]) {
    let place = Place::new();
    let calibrated = place.calibrate();
    for gpu in &mut common::engines::gpus() {
        for (method, bits, group) in cases {
            let found = compare(&place, &calibrated, gpu, [place.settings(method, *bits, *group); 2]);
            assert!(found.codes_that_differ * 1000 <= found.weights, "{found:?}");
            assert!(found.ties.iter().all(|ties| ties * 1000 <= found.weights), "{found:?}");
            assert!(*method != "gptq" || found.rows_that_differ <= found.ties[0], "{found:?}");
        }
    }
}

#[test]
fn equal_statistics_give_equal_codes() {
    check(&[("gptq", 3, -1), ("gptq", 2, 128), ("aespa", 3, 128), ("aespa", 2, -1)]);
}

#[test]
#[ignore = "every scheme: minutes"]
fn equal_statistics_give_equal_codes_in_every_scheme() {
    let all = ["gptq", "aespa"].map(|method| [(3, -1), (3, 128), (2, -1), (2, 128)].map(|(bits, group)| (method, bits, group)));
    check(&all.concat());
}

/// What the test above looks for is there to be found: another seed is another way through the codes.
#[test]
fn other_codes_are_noticed() {
    let place = Place::new();
    let calibrated = place.calibrate();
    let settings = place.settings("aespa", 3, 128);
    let found = compare(&place, &calibrated[..1], &mut CpuEngine::new(), [settings, (Settings { seed: 1, ..settings.0 }, settings.1)]);
    assert!(found.codes_that_differ * 100 > found.weights && found.rows_that_differ * 10 > found.rows, "{found:?}");
}

/// The near ties that are reported after a descent, against f64 sums.
#[test]
fn ties_are_what_they_are_called() {
    let place = Place::new();
    let calibrated = &place.calibrate()[0];
    let mut settings = place.settings("aespa", 3, -1);
    settings.0.method = Method { inputs: Inputs::Block, ..settings.0.method };
    if let Some(descent) = &mut settings.0.method.rounding.descent {
        // One sweep leaves many weights that are not at their best, and ties among them.
        (descent.sweeps, descent.temperature) = (1, 0.0);
    }
    let engine = &mut CpuEngine::new();
    let device = place.load(engine, calibrated.block);
    let (mut at_least, mut got, mut at_most) = (0, 0, 0);
    for (input, statistic) in &calibrated.inputs {
        let Gram { d, h, .. } = statistic.clone().into_whole().gram;
        for (role, solved) in solve(engine, &device, calibrated.block, *input, statistic, settings) {
            assert_eq!(solved.record.rows_from_rtn, 0);
            let linear = calibrated.block.linears.iter().find(|l| l.role == role).unwrap();
            let w = place.checkpoint.linear(linear).unwrap().to_f32();
            let (w_hat, codes) = (solved.packed.dequantize(), solved.packed.codes());
            for (r, codes) in codes.chunks(d).enumerate() {
                let e: Vec<f64> = (0..d).map(|j| f64::from(w_hat[r * d + j]) - f64::from(w[r * d + j])).collect();
                for j in 0..d {
                    let diagonal = f64::from(h[j * d + j]) * (1.0 + DAMPING);
                    let off: f64 = (0..d).filter(|k| *k != j).map(|k| e[k] * f64::from(h[j * d + k])).sum();
                    let y = f64::from(codes[j]) - (off + e[j] * diagonal) / (diagonal * f64::from(solved.packed.scales[r]));
                    let inside = y >= 0.0 && y < f64::from(settings.1.max_code());
                    let distance = (y - y.floor() - 0.5).abs() / f64::from(TOLERANCE);
                    at_least += usize::from(inside && distance < 0.8);
                    at_most += usize::from(inside && distance < 1.2);
                }
            }
            got += solved.record.ties;
            submit(engine, |rec| solved.w_hat.free(rec)).unwrap();
        }
    }
    println!("{got} ties, by f64 {at_least} to {at_most}");
    assert!(at_least >= 10 && at_least <= got && got <= at_most, "{got} ties, by f64 {at_least} to {at_most}");
}
