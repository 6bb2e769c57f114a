//! Every kernel on every engine against its f64 oracle, over one case table.
//!
//! `cargo test --release --test kernels -- NAME` runs one kernel; `AESPA_ADAPTERS` names the adapters to test, see `cases::gpus`.

mod cases;
mod common;

use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::gpu::Variants;
use aespa_gpu::engine::kernels::KERNELS;
use aespa_gpu::engine::{Element, Engine};
use cases::{Case, TABLE, TestElement, Want, for_each_kernel, judge};

const SEED: u64 = 20_240_607;

macro_rules! tests {
    ($($name:ident)*) => {
        $(mod $name {
            #[test]
            fn cpu() {
                super::check(stringify!($name), &mut aespa_gpu::engine::cpu::CpuEngine::poisoned());
            }

            #[test]
            fn gpu() {
                super::check_gpus(stringify!($name));
            }
        })*
    };
}
for_each_kernel!(tests);

/// All variants that an adapter can run, and the base shaders, which others run.
fn check_gpus(kernel: &str) {
    let has_variants = KERNELS.iter().any(|k| k.name == kernel && !k.variants.is_empty());
    let all: &[Variants] = if has_variants { &[Variants::All, Variants::None] } else { &[Variants::Stable] };
    for variants in all {
        for engine in common::engines::gpus() {
            check(kernel, &mut engine.with_variants(*variants));
        }
    }
}

fn check(kernel: &str, engine: &mut dyn Engine) {
    let (_, cases) = TABLE.iter().find(|(name, _)| *name == kernel).expect("in the table");
    let mut wrong = Vec::new();
    for case in cases() {
        if case.f16 && !engine.limits().f16_operands {
            eprintln!("{kernel} {}: skipped, {} has no f16", case.name, engine.describe());
            continue;
        }
        let found = cases::run(&case, SEED, engine);
        if let Some(first) = found.first() {
            wrong.push(format!("{}: {first} and {} more", case.name, found.len() - 1));
        }
    }
    assert!(wrong.is_empty(), "{kernel} on {} with seed {SEED}:\n{}", engine.describe(), wrong.join("\n"));
}

#[test]
fn every_kernel_has_a_case() {
    for kernel in KERNELS {
        let has = TABLE.iter().any(|(name, cases)| *name == kernel.name && !cases().is_empty());
        assert!(has, "{}: no case", kernel.name);
    }
    for (name, _) in TABLE {
        assert!(KERNELS.iter().any(|k| k.name == *name), "{name} has cases but is no kernel");
    }
}

/// A case of a copy whose output is judged against `want`; `len` of `3` elements are meant to be written.
fn copied<T: TestElement + Element>(data: Vec<T>, len: usize, want: fn(usize) -> Want) -> Vec<String> {
    let case = Case::new("copy", move |io| {
        let mut before = data.clone();
        before.resize(data.len() + cases::SENTINELS, T::SENTINEL);
        before[len..].fill(data[0]);
        let from = io.upload(before);
        let out = io.output::<T>("out", data.len());
        io.rec.copy(from, out.buffer);
        io.expect(out, want);
    });
    cases::run(&case, SEED, &mut CpuEngine::poisoned())
}

#[test]
fn the_checks_can_fail() {
    // A write one past the end.
    assert_eq!(judge("x", &[1.0f32, 2.0], &[0.0, f32::SENTINEL], &[Want::Near(1.0, 0.0)]).len(), 1);
    assert!(judge("x", &[1.0f32, f32::SENTINEL], &[0.0, f32::SENTINEL], &[Want::Near(1.0, 0.0)]).is_empty());
    // A value outside the tolerance, a NaN, a wrong code, a changed element, too few elements.
    assert_eq!(judge("x", &[1.1f32], &[0.0], &[Want::Near(1.0, 0.05)]).len(), 1);
    assert_eq!(judge("x", &[f32::NAN], &[0.0], &[Want::Near(1.0, 1e30)]).len(), 1);
    assert_eq!(judge("x", &[3u32], &[0], &[Want::Bits(4)]).len(), 1);
    assert_eq!(judge("x", &[3u32], &[0], &[Want::Same]).len(), 1);
    assert_eq!(judge::<u32>("x", &[], &[0], &[Want::Bits(0)]).len(), 1);
}

#[test]
fn an_overrun_on_an_engine_is_found() {
    let wrong = copied(vec![1.0f32, 2.0, 3.0], 3, |i| Want::Near(i as f64 + 1.0, 0.0));
    assert_eq!(wrong.len(), cases::SENTINELS, "{wrong:?}");
    assert!(wrong.iter().all(|w| w.contains("past the end")), "{wrong:?}");
}
