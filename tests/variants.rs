//! Which text of a kernel an adapter runs, with which tiles: fall-backs on every adapter, and that tiles change no bit.

mod cases;
mod common;

use aespa_gpu::engine::gpu::{Ability, GpuEngine, Variants};
use aespa_gpu::engine::kernel::{Binding, BindingScalar, Constants, Cost, Defined, Kernel, ParamsLayout};
use aespa_gpu::engine::kernels::{self, KERNELS};
use aespa_gpu::engine::kernels::{gram::GramParams, matmul_nn::MatmulNnParams, matmul_nt::MatmulNtParams, matmul_tn::MatmulTnParams};
use aespa_gpu::engine::matrix::stride;
use aespa_gpu::engine::recording::Command;
use aespa_gpu::engine::recording::Dispatch;
use aespa_gpu::engine::shader::{Matrices, Needs, Shader, Variant};
use aespa_gpu::engine::{Buffer, Elem, Engine, Recording, Scalar, Stored};
use cases::{Rng, TABLE};
use common::engines::gpus;
use half::f16;

const fn shader(wgsl: &'static str) -> Shader {
    Shader { file: "which.wgsl", wgsl, libs: &[], tuning: &[] }
}

/// A kernel that says which of its texts ran: 1 is the base, 2 its variant.
const fn which(needs: &'static [Variant]) -> Kernel {
    Kernel {
        name: "which",
        base: shader(
            "@group(0) @binding(1) var<storage, read_write> x: array<f32>; @compute @workgroup_size(1) fn which() { x[0] = 1.0; }",
        ),
        variants: needs,
        params: ParamsLayout { name: "P", fields: &[] },
        bindings: &[Binding { name: "x", writes: true, scalar: BindingScalar::F32 }],
        generic: false,
        native: |_| Ok(()),
        check: |_, _| Ok(()),
        cost: |_| Cost { flops: 0.0 },
        grid: |_, _| [1, 1, 1],
        defined: |_| Defined::All,
        halves: |_| None,
    }
}

const fn second(needs: Needs) -> Variant {
    let wgsl = "@group(0) @binding(1) var<storage, read_write> x: array<f32>; @compute @workgroup_size(1) fn which() { x[0] = 2.0; }";
    Variant { needs, shader: shader(wgsl) }
}

const ANY_SUBGROUPS: Needs = Needs::Subgroups(1);
const MATRICES: Matrices = Matrices { side: 8, operands: Scalar::F32, workgroup_bytes: 0 };

fn answer(engine: &mut GpuEngine, kernel: &'static Kernel) -> f32 {
    let mut rec = Recording::new();
    let x = rec.zeros::<f32>("x", 1);
    rec.dispatch(Dispatch { kernel, params: vec![0; 16], constants: Constants::default(), buffers: vec![x.raw()], grid: [1, 1, 1] });
    let pending = rec.download(x);
    rec.free(x);
    engine.run(rec).and_then(|mut downloads| downloads.take(pending)).expect("an answer")[0]
}

#[test]
fn a_variant_runs_where_the_adapter_has_what_it_needs() {
    static SUBGROUPS: Kernel = which(&[second(ANY_SUBGROUPS)]);
    static WIDE: Kernel = which(&[second(Needs::Subgroups(1 << 20))]);
    static MATRIX: Kernel = which(&[second(Needs::Matrices(MATRICES))]);
    for mut engine in gpus() {
        let has = |engine: &GpuEngine, needs| if engine.ability().has(needs) { 2.0 } else { 1.0 };
        assert_eq!(answer(&mut engine, &SUBGROUPS), has(&engine, ANY_SUBGROUPS), "{}", engine.describe());
        assert_eq!(answer(&mut engine, &WIDE), 1.0, "{}", engine.describe());
        assert_eq!(answer(&mut engine, &MATRIX), 1.0, "experimental ones must be asked for: {}", engine.describe());
        let mut engine = engine.with_variants(Variants::All);
        assert_eq!(answer(&mut engine, &MATRIX), has(&engine, Needs::Matrices(MATRICES)), "{}", engine.describe());
        assert_eq!(answer(&mut engine, &WIDE), 1.0, "{}", engine.describe());
        let mut engine = engine.with_variants(Variants::None);
        assert_eq!(answer(&mut engine, &SUBGROUPS), 1.0, "{}", engine.describe());
    }
}

/// The base does what a variant does, so a driver that does not take the variant costs speed only.
#[test]
fn a_variant_that_the_driver_refuses_is_given_up() {
    const REFUSED: Variant = Variant { needs: Needs::Subgroups(0), shader: shader("this is not WGSL") };
    static REFUSES: Kernel = which(&[REFUSED]);
    static HAS_ANOTHER: Kernel = which(&[REFUSED, second(Needs::Subgroups(0))]);
    for (kernel, ran) in [(&REFUSES, 1.0), (&HAS_ANOTHER, 2.0)] {
        for mut engine in gpus() {
            assert_eq!(answer(&mut engine, kernel), ran, "{}", engine.describe());
            assert_eq!(answer(&mut engine, kernel), ran, "the second time: {}", engine.describe());
        }
    }
}

/// The drivers of the tests take every variant that their adapters have what it takes for: none was given up when the kernels' cases ran.
#[test]
fn variants_run_and_are_not_given_up() {
    for kernel in KERNELS.iter().filter(|kernel| !kernel.variants.is_empty()) {
        let (_, cases) = TABLE.iter().find(|(name, _)| *name == kernel.name).expect("in the table");
        for engine in gpus() {
            let mut engine = engine.with_variants(Variants::All);
            let case = cases().into_iter().find(|case| !case.f16).expect("a case");
            assert!(cases::run(&case, 3, &mut engine).is_empty());
            let mut io = cases::Io::new(3);
            (case.record)(&mut io);
            let launches = io.rec.commands().iter().filter_map(|c| if let Command::Dispatch(d) = c { Some(d) } else { None });
            for dispatch in launches.filter(|d| d.kernel.name == kernel.name) {
                let fits = |v: &Variant| matches!(v.needs, Needs::Subgroups(_)) && engine.ability().has(v.needs);
                let chosen = engine.choice(dispatch).text;
                assert!(chosen.is_some() || !kernel.variants.iter().any(fits), "{} on {}", kernel.name, engine.describe());
            }
        }
    }
}

#[test]
fn what_is_there_is_compared_with_what_is_needed() {
    let none = Ability::default();
    assert!(!none.has(ANY_SUBGROUPS) && !none.has(Needs::Matrices(MATRICES)));
    let all = Ability { subgroup_min: 8, matrices: vec![(16, Scalar::F16), (8, Scalar::F32)], workgroup_bytes: 16384 };
    assert!(all.has(Needs::Subgroups(8)) && !all.has(Needs::Subgroups(9)));
    assert!(all.has(Needs::Matrices(MATRICES)));
    for matrices in
        [Matrices { side: 16, ..MATRICES }, Matrices { operands: Scalar::F16, ..MATRICES }, Matrices { workgroup_bytes: 16385, ..MATRICES }]
    {
        assert!(!all.has(Needs::Matrices(matrices)), "{matrices:?}");
    }
}

/// Every tile that an adapter may be given, edges included, against the oracle.
#[test]
fn every_tile_is_right() {
    for kernel in KERNELS.iter().filter(|kernel| !kernel.base.tuning.is_empty()) {
        let (_, cases) = TABLE.iter().find(|(name, _)| *name == kernel.name).expect("in the table");
        for tiles in kernel.base.tunings() {
            for engine in gpus() {
                let mut engine = engine.with_variants(Variants::None).with_tiles(kernel.name, &tiles);
                let f16 = engine.limits().f16_operands;
                for case in cases().into_iter().filter(|case| !case.f16 || f16) {
                    let wrong = cases::run(&case, 7, &mut engine);
                    assert!(wrong.is_empty(), "{} {tiles:?} {}: {}", kernel.name, case.name, wrong[0]);
                }
            }
        }
    }
}

/// A run that is resumed may have other tiles than it began with, and must end with the same bytes.
#[test]
fn tiles_change_no_bit() {
    for kernel in KERNELS.iter().filter(|kernel| !kernel.base.tuning.is_empty()) {
        let mut results: Vec<(String, Vec<u32>)> = Vec::new();
        for tiles in kernel.base.tunings() {
            for engine in gpus() {
                let name = engine.describe();
                let mut engine = engine.with_variants(Variants::None).with_tiles(kernel.name, &tiles);
                let mut bits = product::<f32>(kernel.name, &mut engine, &tiles);
                if engine.limits().f16_operands {
                    bits.extend(product::<f16>(kernel.name, &mut engine, &tiles));
                }
                match results.iter().find(|(of, _)| *of == name) {
                    Some((_, first)) => assert!(*first == bits, "{} {tiles:?} on {name}", kernel.name),
                    None => results.push((name, bits)),
                }
            }
        }
    }
}

#[test]
fn parted_launches_give_the_same_bits() {
    for kernel in KERNELS.iter().filter(|kernel| !kernel.base.tuning.is_empty()) {
        for (mut whole, parted) in gpus().into_iter().zip(gpus()) {
            let mut parted = parted.with_max_launch(0.0);
            assert!(product::<f32>(kernel.name, &mut whole, &[]) == product::<f32>(kernel.name, &mut parted, &[]), "{}", kernel.name);
            assert_eq!((whole.profile().launches(), parted.profile().launches()), (1, 2), "{}", kernel.name);
        }
    }
}

/// The bits that a product of odd extents gives with an engine's tiles; those must be what the engine takes.
fn product<E: Elem>(kernel: &str, engine: &mut GpuEngine, tiles: &[(&str, u32)]) -> Vec<u32> {
    let (n, m, k) = (203, 131, 77);
    let mut rng = Rng(11);
    let mut rec = Recording::new();
    let longest = n.max(m).max(k);
    let ld = stride(longest);
    let len = longest * ld;
    let a: Buffer<f32> = rec.upload("a", rng.values(len));
    let b: Buffer<E> = rec.upload("b", rng.values(len).into_iter().map(E::from_f32).collect::<Vec<_>>());
    let w: Buffer<Stored> = a.as_stored();
    let c = rec.zeros::<f32>("c", len);
    let [n, m, k, ld] = [n, m, k, ld].map(|v| v as u32);
    match kernel {
        "matmul_nt" => {
            let p = MatmulNtParams { n, m, k, lda: ld, ldw: ld, ldc: ld, batches: 1, alpha: 1.0, ..Default::default() };
            kernels::matmul_nt(&mut rec, p, b, w, Buffer::none(), c);
        }
        "matmul_nn" => {
            let p = MatmulNnParams { n, m, k, lda: ld, ldb: ld, ldc: ld, alpha: 1.0, ..Default::default() };
            kernels::matmul_nn(&mut rec, p, a, b, c);
        }
        "matmul_tn" => {
            let p = MatmulTnParams { n, m, k, lda: ld, ldb: ld, ldc: ld, batches: 1, alpha: 1.0, ..Default::default() };
            kernels::matmul_tn(&mut rec, p, a, b, c);
        }
        "gram" => kernels::gram(&mut rec, GramParams { n_tok: k, d: n, ldx: ld, ldg: ld, rows: n, ..Default::default() }, b, c),
        other => panic!("{other} has tiles and no product here"),
    }
    let mut defined = Defined::All;
    for command in rec.commands() {
        if let Command::Dispatch(dispatch) = command {
            let choice = engine.choice(dispatch);
            assert!(tiles.iter().all(|(name, side)| choice.constants.get(name) == *side), "{choice:?}");
            defined = (dispatch.kernel.defined)(&dispatch.params);
        }
    }
    let pending = rec.download(c);
    rec.free(a);
    rec.free(b);
    rec.free(c);
    let c = engine.run(rec).and_then(|mut downloads| downloads.take(pending)).expect("a product");
    c.into_iter().enumerate().filter(|(i, _)| defined.holds(*i)).map(|(_, value)| value.to_bits()).collect()
}
