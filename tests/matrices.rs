//! The shader for cooperative matrices without such matrices: no driver of the tests has them, so `shaders/matmul_nt_matrices.wgsl` runs here
//! with functions in their place, whose "subgroups" are runs of threads of any length. What is tested is all but the matrices: staging,
//! passes, edges, batches, and the way of the sums to memory.

mod cases;
mod common;

use aespa_gpu::engine::gpu::Variants;
use aespa_gpu::engine::kernel::Kernel;
use aespa_gpu::engine::kernels::{self, KERNELS, matmul_nt::MatmulNtParams};
use aespa_gpu::engine::recording::Command;
use aespa_gpu::engine::shader::{Matrices, Needs, Shader, Variant};
use aespa_gpu::engine::{Elem, Engine, Recording, Scalar};
use aespa_gpu::tensor::Dtype;
use cases::matmul_nt::{View, params};
use cases::{EPS, Rng, TestElem};
use half::f16;

/// Lengths of "subgroups": the quarters of a tile have one each, in two passes, and with subgroups to spare.
const LANES: [u32; 3] = [32, 64, 16];

/// Operands are places in the tiles, a lane has every LANES-th element of a matrix of sums.
const EMULATION: &str = "// Cooperative matrices as functions.
struct Place { thread: u32, subgroup: u32, subgroups: u32, lane: u32, lanes: u32, }
struct Left { at: u32, }
struct Right { at: u32, }
struct Sums { own: array<f32, SIDE * SIDE / LANES>, }
fn load_sums(place: Place, at: u32) -> Sums {
    var out: Sums;
    for (var i = 0u; i < SIDE * SIDE / LANES; i++) { out.own[i] = stored[at + i * LANES + place.lane]; }
    return out;
}
fn store_sums(place: Place, sums: Sums, at: u32) {
    var all = sums;
    for (var i = 0u; i < SIDE * SIDE / LANES; i++) { stored[at + i * LANES + place.lane] = all.own[i]; }
}
fn multiply_add(place: Place, a: Left, b: Right, c: Sums) -> Sums {
    var out = c;
    for (var i = 0u; i < SIDE * SIDE / LANES; i++) {
        let e = i * LANES + place.lane;
        for (var k = 0u; k < SIDE; k++) {
            out.own[i] += f32(a_tile[a.at + e / SIDE * LD + k]) * f32(w_tile[b.at + e % SIDE * LD + k]);
        }
    }
    return out;
}
";

/// The variant's text with functions for matrices, in subgroups of `lanes`.
fn emulated(shader: &Shader, side: u32, operand: &str, lanes: u32) -> String {
    let replaced = [
        ("coopLoadT<Left>(&a_tile[", "Left("),
        ("coopLoad<Right>(&w_tile[", "Right("),
        ("], LD);", ");"),
        ("coopLoadT<Sums>(&stored[0], SIDE)", "load_sums(place, 0u)"),
        ("coopStoreT(sums, &stored[", "store_sums(place, sums, "),
        ("], SIDE);", ");"),
        ("coopMultiplyAdd(", "multiply_add(place, "),
        (
            "place: Place) {\n    let row0",
            "@builtin(local_invocation_index) thread: u32) {\n    let place = place_of(thread);\n    let row0",
        ),
    ];
    // What it shares with the base.
    let shared = shader.libs.iter().filter(|(file, _)| ["matmul_nt.wgsl", "store.wgsl"].contains(file)).map(|(_, wgsl)| *wgsl);
    let shared: String = shared.collect();
    let text = replaced.iter().fold(shader.wgsl.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "'{from}' is not in {}", shader.file);
        text.replace(from, to)
    });
    // Behind the text: naga wants overrides before arrays whose length depends on them.
    let place = "fn place_of(t: u32) -> Place { return Place(t, t / LANES, THREADS / LANES, t % LANES, LANES); }\n";
    format!("alias Operand = {operand};\nconst SIDE = {side}u;\nconst LANES = {lanes}u;\n{shared}{text}\n{EMULATION}{place}")
}

/// `matmul_nt` with the emulated text of a variant that any adapter can run.
fn kernel(variant: &Variant, matrices: Matrices, lanes: u32) -> &'static Kernel {
    let base = KERNELS.iter().find(|kernel| kernel.name == "matmul_nt").expect("a kernel");
    let operand = if matrices.operands == Scalar::F16 { "f16" } else { "f32" };
    let wgsl = Box::leak(emulated(&variant.shader, matrices.side, operand, lanes).into_boxed_str());
    let shader = Shader { wgsl, libs: &[], ..variant.shader };
    let variants = Box::leak(Box::new([Variant { needs: Needs::Subgroups(0), shader }]));
    Box::leak(Box::new(Kernel { variants, ..**base }))
}

/// What `kernel` makes of a product beside what the base makes of it: equal but for the order of sums, everything around it equal bit by bit.
#[allow(clippy::too_many_arguments, reason = "a product")]
fn compare<E: Elem + TestElem>(
    engine: &mut dyn Engine,
    kernel: &'static Kernel,
    dtype: Dtype,
    a: View,
    w: View,
    c: View,
    scales: [f32; 2],
) {
    let mut rng = Rng(5);
    let mut rec = Recording::new();
    let left = rec.upload("a", a.fill(&mut rng).into_iter().map(E::from_f32).collect::<Vec<_>>());
    let right: Vec<u8> = w.fill(&mut rng).into_iter().flat_map(|v| bytes(dtype, v)).collect();
    let right = rec.upload_stored("w", dtype, right.into());
    let bias = rec.upload("bias", rng.values(w.rows));
    let before = c.fill(&mut rng);
    let (base, other) = (rec.upload("c", before.clone()), rec.upload("c", before));
    let k = a.cols;
    let p = MatmulNtParams { bias_offset: 0, has_bias: 1, alpha: scales[0], beta: scales[1], ..params(&a, &w, &c) };
    kernels::matmul_nt(&mut rec, p, left, right, bias, base);
    let Some(Command::Dispatch(launch)) = rec.commands().last() else { panic!("no launch") };
    let mut launch = launch.clone();
    launch.kernel = kernel;
    launch.buffers[3] = other.raw();
    rec.dispatch(launch);
    let (base, other) = (rec.download(base), rec.download(other));
    let mut downloads = engine.run(rec).expect("a run");
    let (base, other) = (downloads.take(base).expect("c"), downloads.take(other).expect("c"));
    for (i, (x, y)) in base.iter().zip(&other).enumerate() {
        // Terms are below 1; the sums of both may be off.
        let near = f64::from((x - y).abs()) <= 2.0 * EPS * (k as f64 + 3.0) * (f64::from(scales[0].abs()) * k as f64 + 2.0);
        let same = if c.holds(i).is_some() { near } else { x.to_bits() == y.to_bits() };
        assert!(
            same,
            "{} {dtype:?} {a:?} {w:?}: c[{i}] is {y}, {x} by the base",
            kernel.variants[0].shader.wgsl.lines().nth(2).unwrap_or("")
        );
    }
}

fn bytes(dtype: Dtype, value: f32) -> Vec<u8> {
    match dtype {
        Dtype::F32 => value.to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::Bf16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
    }
}

#[test]
fn all_but_the_matrices_is_right() {
    let base = KERNELS.iter().find(|kernel| kernel.name == "matmul_nt").expect("a kernel");
    let variants = base.variants.iter().filter_map(|v| if let Needs::Matrices(m) = v.needs { Some((v, m)) } else { None });
    let mut run = 0;
    for (variant, matrices) in variants {
        // More elements of a matrix in a lane would take a software driver's compiler minutes.
        for lanes in LANES.into_iter().filter(|lanes| matrices.side * matrices.side / lanes <= 8) {
            let kernel = kernel(variant, matrices, lanes);
            for engine in common::engines::gpus() {
                let mut engine = engine.with_variants(Variants::Stable);
                let engine = &mut engine;
                let one = |n, m, k| (View::new(n, k), View::new(m, k), View::new(n, m));
                let inside = (View::new(70, 35).inside(16, 8), View::new(66, 35).inside(8, 24), View::new(70, 66).inside(24, 16));
                let (a, w, c) = (View::new(33, 24), View::new(24, 24), View::new(33, 24));
                let batches = (a.beside(3), w.stacked(3), c.beside(3));
                for (a, w, c) in [one(1, 1, 1), one(130, 131, 17), one(63, 65, 40), one(5, 200, 8), one(9, 6, 0), inside, batches] {
                    if matrices.operands == Scalar::F16 && !engine.limits().f16_operands {
                        continue;
                    }
                    run += 1;
                    for scales in [[1.0, 0.0], [-0.5, 0.25]] {
                        if matrices.operands == Scalar::F16 {
                            compare::<f16>(engine, kernel, Dtype::F16, a, w, c, scales);
                        } else {
                            compare::<f32>(engine, kernel, Dtype::F32, a, w, c, scales);
                            compare::<f32>(engine, kernel, Dtype::Bf16, a, w, c, scales);
                        }
                    }
                }
            }
        }
    }
    assert!(run > 0 || common::engines::gpus().is_empty());
}
