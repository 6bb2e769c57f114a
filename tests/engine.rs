//! What every engine promises beyond its kernels: order, contents of new buffers, limits, typed errors, bookkeeping.

mod cases;
mod common;

use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::device::{self, DeviceChoice};
use aespa_gpu::engine::estimate::Estimate;
use aespa_gpu::engine::kernel::{Binding, BindingScalar, Constants, Cost, Defined, Kernel, ParamsLayout};
use aespa_gpu::engine::kernels::{self, axpy::AxpyParams, rms_norm::RmsNormParams};
use aespa_gpu::engine::recording::Dispatch;
use aespa_gpu::engine::shader::Shader;
use aespa_gpu::engine::{Buffer, Engine, Recording};
use aespa_gpu::{Error, Kind};
use common::engines::engines;
use half::f16;

fn axpy(rec: &mut Recording<'_>, alpha: f32, x: Buffer<f32>, y: Buffer<f32>) {
    kernels::axpy(rec, AxpyParams { n: y.len() as u32, alpha }, x, y);
}

/// The error of running a recording on an engine.
fn failure(engine: &mut dyn Engine, rec: Recording<'_>) -> Error {
    engine.run(rec).map(drop).expect_err("a failure")
}

#[test]
fn commands_take_effect_in_order() {
    for mut engine in engines() {
        let mut rec = Recording::new();
        let x = rec.upload::<f32>("x", vec![1.0; 100]);
        let y = rec.upload::<f32>("y", vec![2.0; 100]);
        axpy(&mut rec, 1.0, x, y);
        let first = rec.download(y);
        // An upload after a launch, copied over what the launch used.
        let z = rec.upload::<f32>("z", vec![10.0; 100]);
        rec.copy(z, x);
        axpy(&mut rec, 1.0, x, y);
        let second = rec.download(y);
        rec.free(z);
        let mut out = engine.run(rec).expect("a run");
        assert_eq!(out.take(first).expect("first"), vec![3.0; 100]);
        assert_eq!(out.take(second).expect("second"), vec![13.0; 100]);
        // Buffers live on into the next recording.
        let mut rec = Recording::new();
        axpy(&mut rec, -1.0, x, y);
        let third = rec.download(y);
        rec.free(x);
        rec.free(y);
        let mut out = engine.run(rec).expect("a run");
        assert_eq!(out.take(third).expect("third"), vec![3.0; 100]);
        assert_eq!(engine.profile().live_buffers(), 0);
        assert_eq!(engine.profile().live_bytes, 0);
    }
}

#[test]
fn zeros_are_zero_whatever_lay_there() {
    for mut engine in engines() {
        for _ in 0..3 {
            let mut rec = Recording::new();
            let zeros = rec.zeros::<u32>("zeros", 1000);
            let pending = rec.download(zeros);
            let ones = rec.upload::<u32>("ones", vec![u32::MAX; 1000]);
            rec.copy(ones, zeros);
            rec.free(zeros);
            rec.free(ones);
            assert_eq!(engine.run(rec).expect("a run").take(pending).expect("zeros"), vec![0; 1000]);
        }
    }
}

#[test]
fn any_length_comes_back() {
    for mut engine in engines() {
        // Nothing, odd numbers of half words, and more than one piece of an upload.
        for n in [0, 1, 3, 17, (68 << 20) / 2 + 1] {
            let data: Vec<f16> = (0..n).map(|i| f16::from_bits((i % 30_000) as u16)).collect();
            let mut rec = Recording::new();
            let buffer = rec.upload("data", data.as_slice());
            let pending = rec.download(buffer);
            rec.free(buffer);
            let got = engine.run(rec).expect("a run").take(pending).expect("data");
            assert!(got[..n] == data[..], "{n} elements on {}", engine.describe());
        }
    }
}

/// More launches than one submission holds, each depending on the one before, with buffers coming and going.
#[test]
fn many_launches_keep_their_order() {
    for mut engine in engines() {
        let mut rec = Recording::new();
        let y = rec.zeros::<f32>("y", 70);
        for i in 0..2500 {
            let x = rec.upload::<f32>("x", vec![(i % 7) as f32; 70]);
            axpy(&mut rec, 1.0, x, y);
            axpy(&mut rec, -0.5, x, y);
            rec.free(x);
        }
        let pending = rec.download(y);
        rec.free(y);
        let want = (0..2500).map(|i| (i % 7) as f32 * 0.5).sum::<f32>();
        assert_eq!(engine.run(rec).expect("a run").take(pending).expect("y"), vec![want; 70]);
        assert_eq!(engine.profile().kernels["axpy"].launches, 5000);
    }
}

#[test]
fn a_short_buffer_is_refused_while_recording() {
    for mut engine in engines() {
        let mut rec = Recording::new();
        let (x, y) = (rec.zeros::<f32>("x", 9), rec.zeros::<f32>("y", 10));
        axpy(&mut rec, 1.0, x, y);
        let error = failure(&mut *engine, rec);
        assert_eq!((error.kind, error.to_string().as_str()), (Kind::Internal, "kernel axpy: x holds 9 elements, 10 are needed"));
        // Nothing ran.
        assert_eq!(engine.profile().live_buffers(), 0);
    }
}

#[test]
fn a_written_buffer_is_bound_once() {
    let mut rec = Recording::new();
    let y = rec.zeros::<f32>("y", 10);
    axpy(&mut rec, 1.0, y, y);
    let error = failure(&mut CpuEngine::new(), rec);
    assert_eq!((error.kind, error.subject.as_str()), (Kind::Internal, "kernel axpy"));
}

#[test]
fn use_after_free_is_refused() {
    for mut engine in engines() {
        let mut rec = Recording::new();
        let (x, y) = (rec.zeros::<f32>("x", 10), rec.zeros::<f32>("y", 10));
        rec.free(x);
        axpy(&mut rec, 1.0, x, y);
        assert_eq!(failure(&mut *engine, rec).kind, Kind::Internal);
        let mut rec = Recording::new();
        rec.free(y);
        rec.free(y);
        assert_eq!(failure(&mut *engine, rec).kind, Kind::Internal);
    }
}

#[test]
fn a_buffer_above_the_limit_is_refused_by_name() {
    let gpus = common::engines::gpus().into_iter().map(|gpu| Box::new(gpu.with_max_buffer(1 << 20)) as Box<dyn Engine>);
    for mut engine in std::iter::once(Box::new(CpuEngine::with_max_buffer(1 << 20)) as Box<dyn Engine>).chain(gpus) {
        assert_eq!(engine.limits().max_buffer, 1 << 20);
        let mut rec = Recording::new();
        let fits = rec.alloc::<f32>("fits", 1 << 18);
        rec.free(fits);
        engine.run(rec).expect("a run");
        let mut rec = Recording::new();
        rec.alloc::<f32>("hidden states", (1 << 18) + 1);
        let error = failure(&mut *engine, rec);
        assert_eq!((error.kind, error.subject.as_str()), (Kind::Device, "buffer hidden states"));
    }
    for mut engine in common::engines::gpus() {
        let mut rec = Recording::new();
        rec.alloc::<f32>("far too large", 1 << 40);
        assert_eq!(failure(&mut engine, rec).subject, "buffer far too large");
    }
}

/// What wgpu refuses comes back about the kernel, and the engine goes on.
#[test]
fn a_refused_shader_is_a_typed_error() {
    const fn broken(wgsl: &'static str) -> Kernel {
        Kernel {
            name: "broken",
            base: Shader { file: "broken.wgsl", wgsl, libs: &[], tuning: &[] },
            variants: &[],
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
    static UNREADABLE: Kernel = broken("this is not WGSL");
    static NAMELESS: Kernel = broken("@compute @workgroup_size(1) fn other() {}");
    static OVERSIZED: Kernel = broken("@compute @workgroup_size(1, 1, 9999) fn broken() {}");
    static MISBOUND: Kernel = broken("@group(0) @binding(1) var<uniform> x: vec4f; @compute @workgroup_size(1) fn broken() { _ = x; }");
    for mut engine in common::engines::gpus() {
        for kernel in [&UNREADABLE, &NAMELESS, &OVERSIZED, &MISBOUND] {
            let mut rec = Recording::new();
            let x = rec.zeros::<f32>("x", 10);
            let buffers = vec![x.raw()];
            rec.dispatch(Dispatch { kernel, params: vec![0; 16], constants: Constants::default(), buffers, grid: [1, 1, 1] });
            let error = failure(&mut engine, rec);
            assert_eq!((error.kind, error.subject.as_str()), (Kind::Device, "kernel broken"), "{error}");
        }
        let mut rec = Recording::new();
        let (x, y) = (rec.zeros::<f32>("x", 10), rec.zeros::<f32>("y", 10));
        axpy(&mut rec, 1.0, x, y);
        engine.run(rec).expect("the engine goes on");
    }
}

#[test]
fn a_lost_device_is_an_error_about_the_kernel() {
    for mut engine in common::engines::gpus() {
        let mut rec = Recording::new();
        let (x, y) = (rec.zeros::<f32>("x", 10), rec.zeros::<f32>("y", 10));
        axpy(&mut rec, 1.0, x, y);
        engine.run(rec).expect("a run");
        engine.lose_device();
        for _ in 0..2 {
            let mut rec = Recording::new();
            axpy(&mut rec, 1.0, x, y);
            let pending = rec.download(y);
            let error = engine.run(rec).and_then(|mut out| out.take(pending)).expect_err("a lost device");
            assert_eq!((error.kind, error.subject.as_str()), (Kind::Device, "kernel axpy"), "{error}");
        }
    }
}

#[test]
fn the_estimate_equals_what_engines_count() {
    let record = || {
        let mut rec = Recording::new();
        let (x, gain) = (rec.zeros::<f32>("x", 7 * 64), rec.zeros::<f32>("gain", 61));
        let out = rec.alloc::<f32>("out", 7 * 64);
        let p = RmsNormParams { n_tok: 7, d: 61, ld_x: 64, ld_out: 64, eps: 1e-5 };
        kernels::rms_norm(&mut rec, p, x, gain, out);
        rec.free(gain);
        let y = rec.upload::<f32>("y", vec![0.0; 7 * 64]);
        axpy(&mut rec, 1.0, x, y);
        let _ = rec.download(y);
        rec.free(x);
        rec
    };
    for mut engine in engines() {
        let mut estimate = Estimate::new(engine.limits());
        estimate.run(record()).expect("an estimate");
        engine.run(record()).expect("a run");
        let (want, got) = (estimate.profile(), engine.profile());
        assert!(want.flops() > 0.0 && want.peak_bytes > 0);
        assert_eq!(want.flops(), got.flops());
        let counts = |p: &aespa_gpu::engine::Profile| (p.peak_bytes, p.live_bytes, p.uploaded_bytes, p.downloaded_bytes, p.live_buffers());
        assert_eq!(counts(want), counts(got));
        for (name, kernel) in &want.kernels {
            let same = &got.kernels[name];
            assert_eq!((kernel.launches, kernel.flops, kernel.bytes), (same.launches, same.flops, same.bytes), "{name}");
        }
    }
}

#[test]
fn devices_are_chosen_as_asked() {
    let reports = device::list();
    let auto: Vec<_> = reports.iter().filter(|r| r.auto_choice).collect();
    assert!(auto.len() <= 1 && auto.iter().all(|r| !r.software));
    assert_eq!(auto.is_empty(), reports.iter().all(|r| r.software), "auto takes a hardware adapter if there is one");
    let native = CpuEngine::new().describe();
    assert_eq!(device::open(&DeviceChoice::Cpu).expect("cpu").describe(), native);
    let expected = auto.first().map_or(native.as_str(), |r| r.name.as_str());
    assert!(device::open(&DeviceChoice::Auto).expect("auto").describe().contains(expected));
    for choice in [DeviceChoice::GpuIndex(999), DeviceChoice::GpuName("no such adapter".to_owned())] {
        let error = device::open(&choice).map(|e| e.describe()).expect_err("no such adapter");
        assert_eq!(error.kind, Kind::Usage);
        for report in &reports {
            assert!(error.to_string().contains(&report.name), "{error}");
        }
    }
    for report in &reports {
        let by_index = device::open(&DeviceChoice::GpuIndex(report.index)).expect("an adapter");
        assert!(by_index.describe().contains(&report.name));
        assert!(by_index.limits().max_buffer >= 128 << 20, "{report:?}");
        device::open(&DeviceChoice::GpuName(report.name.to_uppercase())).expect("names match in any case");
    }
    assert_eq!(device::open(&DeviceChoice::Gpu).is_ok(), !reports.is_empty());
}

#[test]
fn device_names_parse() {
    let parse = |s: &str| s.parse::<DeviceChoice>();
    assert_eq!(parse("gpu:1").expect("an index"), DeviceChoice::GpuIndex(1));
    assert_eq!(parse("gpu:RTX 4090").expect("a name"), DeviceChoice::GpuName("RTX 4090".to_owned()));
    for wrong in ["", "gpu:", "tpu", "cpu:0"] {
        assert_eq!(parse(wrong).expect_err("refused").kind, Kind::Usage);
    }
}
