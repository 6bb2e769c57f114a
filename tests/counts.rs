//! What one block costs a GPU besides arithmetic: launches, submissions, bytes up and down, against what the algorithm needs.
//!
//! A block's share is the difference between runs of a model with one block more, so that what happens once in a run falls out.

mod common;

use aespa_gpu::calib::Tier;
use aespa_gpu::engine::{DeviceChoice, Profile};
use aespa_gpu::pipeline::{self, Quiet};
use aespa_gpu::plan::{Plan, Request};
use aespa_gpu::quant::Scheme;
use aespa_gpu::{export, method};
use common::tiny_model::TinyLlama;
use std::fs;
use std::path::Path;

const D: usize = 128;
const D_FF: usize = 384;
const D_KV: usize = 64;
const BITS: usize = 4;
const GROUP: usize = 128;
const WINDOWS: usize = 128;
const LENGTH: usize = 128;
/// Windows lie in three batches of 4096 tokens.
const BATCHES: usize = 4;
const TOKENS: usize = WINDOWS * LENGTH;
/// Bytes of an f32, of an index, and of a count.
const WORD: usize = 4;

/// [d_out, d_in] of q, k, v, o, gate, up, down.
const LINEARS: [[usize; 2]; 7] = [[D, D], [D_KV, D], [D_KV, D], [D, D], [D_FF, D], [D_FF, D], [D, D_FF]];
/// Widths of the four distinct inputs.
const INPUTS: [usize; 4] = [D, D, D, D_FF];

/// What a run did that has `n_layer` blocks.
fn run(folder: &Path, adapter: usize, method: &str, tier: &Tier, n_layer: usize) -> Profile {
    let (model, text, out) = (folder.join(format!("model-{n_layer}")), folder.join("text.txt"), folder.join("out"));
    if !model.exists() {
        let shape = TinyLlama { d_model: D, d_ff: D_FF, n_head: 4, n_kv: 2, d_head: D / 4, n_vocab: 256, ..TinyLlama::default() };
        TinyLlama { n_layer, max_positions: LENGTH, tokenizer: true, ..shape }.write(&model);
        fs::write(&text, (0..30_000).map(|i| format!("{} of {} ", i * i % 977, i)).collect::<String>()).unwrap();
    }
    let request = Request {
        calibration: Some(text),
        samples: Some(WINDOWS),
        sequence_length: Some(LENGTH),
        device: DeviceChoice::GpuIndex(adapter),
        restart: true,
        // No record, which would read the states back.
        journal_seconds: 1e9,
        ..Request::new(
            model,
            out.clone(),
            method::find(method).unwrap(),
            Scheme::new(BITS as u32, GROUP as i64, false).unwrap(),
            vec![export::find("compressed-tensors").unwrap()],
        )
    };
    let mut plan = Plan::new(request).unwrap();
    plan.streaming.tier = tier.clone();
    let report = pipeline::run(plan, &mut Quiet).unwrap().remove(0);
    fs::remove_dir_all(out).unwrap();
    report.kernels
}

/// What a block adds.
struct Block {
    launches: usize,
    submissions: usize,
    up: usize,
    down: usize,
}

fn block(adapter: usize, method: &str, tier: &Tier) -> Block {
    let folder = tempfile::tempdir().unwrap();
    let [one, two] = [1, 2].map(|n_layer| run(folder.path(), adapter, method, tier, n_layer));
    let step = |of: fn(&Profile) -> u64| (of(&two) - of(&one)) as usize;
    let found = Block {
        launches: step(Profile::launches),
        submissions: step(|p| p.submissions),
        up: step(|p| p.uploaded_bytes),
        down: step(|p| p.downloaded_bytes),
    };
    let Block { launches, submissions, up, down } = found;
    println!("{method}, states in {}: {launches} launches, {submissions} submissions, {up} bytes up, {down} bytes down", tier.name());
    found
}

/// One kind of traffic: the bytes that the algorithm needs, and those that are moved.
type Traffic = (usize, usize);

fn needed(all: &[Traffic]) -> usize {
    all.iter().map(|traffic| traffic.0).sum()
}

fn moved(all: &[Traffic]) -> usize {
    all.iter().map(|traffic| traffic.1).sum()
}

fn weights() -> usize {
    LINEARS.iter().map(|[d_out, d_in]| d_out * d_in).sum()
}

fn rows() -> usize {
    LINEARS.iter().map(|[d_out, _]| d_out).sum()
}

/// Groups of all rows: each has a scale and a zero point.
fn groups() -> usize {
    LINEARS.iter().map(|[d_out, d_in]| d_out * d_in / GROUP).sum()
}

fn squares() -> usize {
    INPUTS.iter().map(|d| d * d).sum()
}

fn triangles() -> usize {
    INPUTS.iter().map(|d| d * (d + 1) / 2).sum()
}

/// All hidden states once.
const STATES: usize = WORD * TOKENS * D;
/// A scale and a zero point.
const GRID: usize = 2 * WORD;
/// Grids of a group that are scored by the whole metric.
const KEPT: usize = 6;

/// GPTQ with statistics from the float block and a scale search by the layer's metric.
#[test]
fn gptq_moves_little_more_than_it_needs() {
    let widths: usize = INPUTS.iter().sum();
    let up = |states: usize| {
        [
            // As they are stored, once; and two norms.
            (WORD * weights(), WORD * weights()),
            (WORD * 2 * D, WORD * 2 * D),
            // For the statistics, and again for the outputs, which follow from them.
            (2 * states, 2 * states),
            // Triangular factors, as whole squares, with an order of columns and its inverse.
            (WORD * triangles(), WORD * (squares() + 2 * widths)),
            // Metrics, which come down as Gram matrices and are damped on the host; their diagonals, inverses, and a natural order.
            (0, WORD * (squares() + 3 * widths)),
            // Grids that the screen keeps, the best of them, and what is left after the comparison with round-to-nearest: chosen on the host.
            (0, GRID * groups() * (KEPT + 2)),
            // Which rows are better rounded to nearest.
            (0, WORD * rows()),
        ]
    };
    let down = |states: usize| {
        [
            // The block's outputs.
            (states, states),
            // Symmetric, as whole squares.
            (WORD * triangles(), WORD * squares()),
            // Codes, and grids; the screen's and those of round-to-nearest besides, with the losses of the former.
            (weights() * BITS / 8, weights() * BITS / 8),
            (GRID * groups(), GRID * groups() * (2 + KEPT) + WORD * groups() * KEPT),
            // For the report: losses and near ties of each row, of the method and of round-to-nearest.
            (WORD * 2 * rows(), WORD * 4 * rows()),
        ]
    };
    // Of each linear: a copy to work on, the way into and out of the order of columns and the codes of what comes out; two screens for grids, of which the first is
    // that of round-to-nearest; a rounding for that and for each kept grid; four launches for each of eight losses, of which the rounding
    // is one but for the two last; their two dequantizations and that of the result; ties, the choice between the two, packing. Sweeps of
    // 32 columns, and a product between two of them.
    let of_linear = |d_in: usize| 4 + 2 + (1 + KEPT) + 3 * (KEPT + 2) + 3 + 2 + 1 + 1 + (d_in / 32) + (d_in / 32 - 1);
    // Norms, projections, rotary embeddings, attention and activation, with the Gram matrices or with Down.
    let (statistics, outputs) = (2 + 6 + 2 + 1 + 1 + INPUTS.len(), 2 + 7 + 2 + 1 + 1);
    let launches = BATCHES * (statistics + outputs) + LINEARS.iter().map(|[_, d_in]| of_linear(*d_in)).sum::<usize>();
    // The statistics of a block are read back once; each linear's rounding to nearest, screen, scores, rounding and codes; each batch's outputs.
    let submissions = |batches: usize| 1 + 5 * LINEARS.len() + batches;
    // Of the bytes that are needed, in tenths. Without the states, squares instead of triangles and metrics that go up again make it twice;
    // they are as large as the weights only in a model as narrow as this one.
    for (tier, states, batches, most) in [(Tier::Memory, STATES, BATCHES, 11), (Tier::Device, 0, 0, 22)] {
        let (up, down) = (up(states), down(states));
        for adapter in common::engines::gpu_indices() {
            let found = block(adapter, "gptq", &tier);
            assert_eq!((found.launches, found.submissions), (launches, submissions(batches)));
            assert_eq!((found.up, found.down), (moved(&up), moved(&down)));
            assert!(10 * found.up <= most * needed(&up), "{} of {}", found.up, needed(&up));
            assert!(10 * found.down <= most * needed(&down), "{} of {}", found.down, needed(&down));
        }
    }
}

/// The default method: token weights, two streams input by input, a test of the damping, coordinate descent.
#[test]
fn aespa_moves_no_states_that_wait_on_the_device() {
    // The damping test rounds a part of each linear on two halves of the windows with four dampings; the result is the ninth descent.
    let descents = 2 * 4 + 1;
    let up = [
        (WORD * weights(), WORD * weights()),
        (WORD * 2 * D, WORD * 2 * D),
        // Roots of the tokens' weights, for every input and stream, and for what the residual stream lacks at two of them.
        (WORD * TOKENS * (2 * 4 + 2 * 2), WORD * TOKENS * (2 * 4 + 2 * 2)),
        // H of both halves, plain and damped in four ways, and of all windows; its factor; C and the factor of the regression on it.
        (WORD * (2 * squares() + 2 * triangles()), WORD * squares() * (2 * (1 + 4) + 1 + 1 + 2)),
        // D of the linears that add to the residual stream.
        (WORD * (D * D + D * D_FF), WORD * (D * D + D * D_FF)),
    ];
    let down = [
        // H and C of both halves, D of the two inputs that have it.
        (WORD * 2 * (triangles() + squares() + D * D + D * D_FF), WORD * 2 * (2 * squares() + D * D + D * D_FF)),
        (weights() * BITS / 8, weights() * BITS / 8),
        // Losses of all tokens' squares.
        (WORD * TOKENS, WORD * TOKENS),
    ];
    for adapter in common::engines::gpu_indices() {
        let found = block(adapter, "aespa", &Tier::Device);
        // A descent reads back how many codes have moved after each of at most 10 sweeps, or 30 where it is not a test, and what it starts
        // from and ends with; the search for its grid comes before it, its losses after it.
        let submissions = LINEARS.len() * ((descents - 1) * (10 + 10) + 30 + 15) + BATCHES + 8 * INPUTS.len();
        assert!(found.submissions <= submissions, "{} of {submissions}", found.submissions);
        // What descents start from and where they end, a few words a row: how many depends on what they find. A quarter of the states of one
        // pass, of which there would be twelve.
        let rest = STATES / 4;
        assert!((moved(&up)..moved(&up) + rest).contains(&found.up), "{} of {}", found.up, moved(&up));
        assert!((moved(&down)..moved(&down) + rest).contains(&found.down), "{} of {}", found.down, moved(&down));
        // H goes up twelve times where once would do with dampings made on the device, and that is most of it.
        assert!(10 * found.up <= 35 * needed(&up), "{} of {}", found.up, needed(&up));
        assert!(10 * found.down <= 16 * needed(&down), "{} of {}", found.down, needed(&down));
    }
}
