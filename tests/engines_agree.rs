//! Linears of the demo model solved by the native engine and by GPU engines from the same statistics.

mod common;

use aespa_gpu::calib::{DeviceBlock, Forward, Gram, HiddenStates, HostBlock};
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::kernels::{self, matmul_nn::MatmulNnParams, matmul_nt::MatmulNtParams};
use aespa_gpu::engine::{Buffer, Engine, Mat, Recording, submit};
use aespa_gpu::method::{self, Inputs, Method, Settings, Solver};
use aespa_gpu::metric::Heads;
use aespa_gpu::model::{Block, Checkpoint, Input, unpack_demo};
use aespa_gpu::quant::{PackedLinear, Scheme};
use aespa_gpu::text::{Corpus, Tokenizer};

const WINDOWS: usize = 8;
const LENGTH: usize = 128;

type Statistics = Vec<Vec<(Input, Gram)>>;

fn statistics(checkpoint: &Checkpoint, dir: &std::path::Path, blocks: &[&Block]) -> Statistics {
    let spec = checkpoint.spec();
    let tokenizer = Tokenizer::open(dir).unwrap();
    let windows = Corpus::built_in().sample(&tokenizer, spec.n_vocab, WINDOWS, LENGTH, 0).unwrap();
    let engine = &mut CpuEngine::new();
    let limits = engine.limits();
    let mut hidden = HiddenStates::embed(engine, checkpoint, &windows).unwrap();
    let forward: Forward<'_, f32> = submit(engine, |rec| Forward::new(rec, spec, LENGTH, limits)).unwrap();
    let mut all = Vec::new();
    for block in blocks {
        let device = load(engine, checkpoint, block);
        all.push(hidden.collect(engine, &forward, block, &device).unwrap());
        hidden.advance(engine, &forward, &device).unwrap();
        submit(engine, |rec| device.free(rec)).unwrap();
    }
    submit(engine, |rec| forward.free(rec)).unwrap();
    all
}

fn load(engine: &mut dyn Engine, checkpoint: &Checkpoint, block: &Block) -> DeviceBlock {
    let host = HostBlock::read(checkpoint, block).unwrap();
    let limits = engine.limits();
    submit(engine, |rec| host.upload(rec, limits)).unwrap()
}

fn solve(engine: &mut dyn Engine, checkpoint: &Checkpoint, block: &Block, grams: &[(Input, Gram)], settings: Settings) -> Vec<(String, PackedLinear, usize)> {
    let device = load(engine, checkpoint, block);
    let mut all = Vec::new();
    for (input, gram) in grams {
        let solver = Solver::new(engine, settings, block.width(*input), Some(gram), None).unwrap();
        for linear in block.readers(*input) {
            let weight = &device.linear(linear.role).unwrap().weight;
            let solved = solver.solve(engine, weight, Heads::None).unwrap();
            submit(engine, |rec| solved.w_hat.free(rec)).unwrap();
            all.push((linear.module.clone(), solved.packed, solved.record.ties));
        }
        solver.free(engine).unwrap();
    }
    submit(engine, |rec| device.free(rec)).unwrap();
    all
}

#[test]
fn measure() {
    let dir = tempfile::tempdir().unwrap();
    unpack_demo(dir.path()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let blocks: Vec<&Block> = checkpoint.spec().blocks.iter().take(2).collect();
    let statistics = statistics(&checkpoint, dir.path(), &blocks);
    let mut gpus = common::engines::gpus();
    for sweeps in [u32::MAX, 0, 30] {
        for (bits, group) in [(3, -1), (3, 128), (2, -1), (2, 128)] {
            let mut method = Method { inputs: Inputs::Block, ..method::find(if sweeps == u32::MAX { "gptq" } else { "aespa" }).unwrap() };
            if sweeps == 0 {
                method.rounding.descent.as_mut().unwrap().temperature = 0.0;
            }
            let scheme = Scheme::new(bits, group, false).unwrap();
            let scale_dtype = checkpoint.spec().dtype;
            let settings = Settings { method, scheme, scale_dtype, act_order: true, damping: method.damping, alpha: None, seed: 0 };
            for gpu in &mut gpus {
                let (mut codes, mut all, mut rows, mut all_rows, mut scales, mut all_ties) = (0, 0, 0, 0, 0, 0);
                let mut seconds = [0.0; 2];
                for (block, grams) in blocks.iter().zip(&statistics) {
                    let t = std::time::Instant::now();
                    let a = solve(&mut CpuEngine::new(), &checkpoint, block, grams, settings);
                    seconds[0] += t.elapsed().as_secs_f64();
                    let t = std::time::Instant::now();
                    let b = solve(gpu, &checkpoint, block, grams, settings);
                    seconds[1] += t.elapsed().as_secs_f64();
                    for ((name, a, ties), (_, b, _)) in a.iter().zip(&b) {
                        let (ca, cb) = (a.codes(), b.codes());
                        let differ = ca.iter().zip(&cb).filter(|(a, b)| a != b).count();
                        let r = ca.chunks(a.d_in).zip(cb.chunks(a.d_in)).filter(|(a, b)| a != b).count();
                        if differ > 0 {
                            println!("   {name}: {differ} of {} codes, {r} of {} rows", ca.len(), a.d_out);
                        }
                        all_ties += ties;
                        scales += a.scales.iter().zip(&b.scales).filter(|(a, b)| a != b).count();
                        (codes, all, rows, all_rows) = (codes + differ, all + ca.len(), rows + r, all_rows + a.d_out);
                    }
                }
                let share = 100.0 * codes as f64 / all as f64;
                println!("{} sweeps {sweeps} bits {bits} group {group}: {codes} of {all} codes ({share:.4} %), {rows} of {all_rows} rows, {scales} scales, {all_ties} ties; {seconds:.1?} s", method.name);
            }
        }
    }
}

#[test]
fn micro() {
    for gpu in &mut common::engines::gpus() {
        for k in [32usize, 128, 256, 768] {
            let run = |engine: &mut dyn Engine| {
                let mut state = 7u32;
                let mut random = |n: usize| -> Vec<f32> {
                    (0..n)
                        .map(|_| {
                            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                            (state >> 8) as f32 / 8_388_608.0 - 1.0
                        })
                        .collect()
                };
                let (n, m) = (64, 256);
                let (a, b, c) = (random(n * k), random(k * m), random(n * m));
                let mut rec = Recording::new();
                let a = Mat::upload(&mut rec, "a", n, k, a);
                let bn = Mat::upload(&mut rec, "b", k, m, b.clone());
                let bt = Mat::upload(&mut rec, "b", m, k, b);
                let c = [Mat::upload(&mut rec, "c", n, m, c.clone()), Mat::upload(&mut rec, "c", n, m, c)];
                let p = MatmulNnParams { n: n as u32, m: m as u32, k: k as u32, lda: a.ld as u32, ldb: bn.ld as u32, ldc: m as u32, alpha: -1.0, beta: 1.0, ..Default::default() };
                kernels::matmul_nn(&mut rec, p, a.buffer, bn.buffer, c[0].buffer);
                let p = MatmulNtParams { n: n as u32, m: m as u32, k: k as u32, lda: a.ld as u32, ldw: bt.ld as u32, ldc: m as u32, alpha: 1.0, batches: 1, ..Default::default() };
                kernels::matmul_nt(&mut rec, p, a.buffer, bt.buffer.as_stored(), Buffer::none(), c[1].buffer);
                let pending = c.map(|c| c.download(&mut rec));
                let mut back = engine.run(rec).unwrap();
                pending.map(|p| p.take(&mut back).unwrap())
            };
            let (x, y) = (run(&mut CpuEngine::new()), run(gpu));
            let differ = |i: usize| x[i].iter().zip(&y[i]).filter(|(a, b)| a != b).count();
            let most = |i: usize| x[i].iter().zip(&y[i]).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            println!("k {k}: nn {} differ, at most {:e}; nt {} differ, at most {:e}; of {}", differ(0), most(0), differ(1), most(1), x[0].len());
        }
    }
}
