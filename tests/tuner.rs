//! The tuner of tiles, on software adapters too, where it does not run by itself: what it reports, keeps and loads.

mod cases;
mod common;

use aespa_gpu::cache::Cache;
use aespa_gpu::engine::gpu::{GpuEngine, TuneReport};
use aespa_gpu::engine::kernels::{self, KERNELS, matmul_nn::MatmulNnParams};
use aespa_gpu::engine::recording::Command;
use aespa_gpu::engine::{Buffer, Engine, Recording, submit};
use common::engines::gpus;
use std::path::PathBuf;

/// The side of the tiles that a product would run with: (TILE_N, TILE_M).
fn tiles_of_matmul_nn(engine: &GpuEngine) -> (u32, u32) {
    let mut rec = Recording::new();
    let [a, b, c] = [(); 3].map(|()| rec.zeros::<f32>("matrix", 64));
    record(&mut rec, 8, a, b, c);
    let Some(Command::Dispatch(dispatch)) = rec.commands().last() else { panic!("no launch") };
    let choice = engine.choice(dispatch);
    (choice.constants.get("TILE_N"), choice.constants.get("TILE_M"))
}

fn record(rec: &mut Recording<'_>, side: u32, a: Buffer<f32>, b: Buffer<f32>, c: Buffer<f32>) {
    let p = MatmulNnParams { n: side, m: side, k: side, lda: side, ldb: side, ldc: side, alpha: 1.0, ..Default::default() };
    kernels::matmul_nn(rec, p, a, b, c);
}

/// The one file of a cache.
fn file(folder: &std::path::Path) -> PathBuf {
    let files: Vec<_> = folder.read_dir().expect("a folder").map(|entry| entry.expect("a file").path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

#[test]
fn picks_are_kept_and_loaded() {
    for mut engine in gpus() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache::at(folder.path().to_owned());
        assert!(!engine.load_tiles(&cache), "nothing is there yet");
        assert_eq!(tiles_of_matmul_nn(&engine), (128, 64), "the registry's");
        let reports = engine.tune(&cache).expect("reports");
        assert!(!reports.is_empty());
        for report in &reports {
            let kernel = KERNELS.iter().find(|kernel| kernel.name == report.kernel).expect("a kernel");
            let tilings = kernel.base.tunings();
            assert_eq!(report.candidates.len(), tilings.len(), "all compute the same: {report:?}");
            for ((tiles, seconds), wanted) in report.candidates.iter().zip(&tilings) {
                assert!(tiles.iter().map(|(n, v)| (n.as_str(), *v)).eq(wanted.iter().copied()), "{report:?}");
                assert!(seconds.is_finite() && *seconds > 0.0, "{report:?}");
            }
            let picked = report.candidates.iter().find(|(tiles, _)| *tiles == report.picked).expect("a candidate");
            assert!(picked.1 <= report.candidates[0].1, "slower than the default: {report:?}");
            println!("{}: {report:?}", engine.describe());
        }
        assert_eq!(engine.profile().live_buffers(), 0);

        let text = std::fs::read_to_string(file(folder.path())).expect("what was kept");
        let kept: Vec<TuneReport> = serde_json::from_str(&text).expect("reports");
        let picks =
            |reports: &[TuneReport]| reports.iter().map(|r| (r.kernel.clone(), r.f16_operands, r.picked.clone())).collect::<Vec<_>>();
        assert_eq!(picks(&kept), picks(&reports));
        assert!(engine.load_tiles(&cache));
    }
}

#[test]
fn only_tiles_of_the_registry_are_loaded() {
    for mut engine in gpus() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache::at(folder.path().to_owned());
        let report = |n, m| TuneReport {
            kernel: "matmul_nn".to_owned(),
            f16_operands: false,
            side: 256,
            candidates: Vec::new(),
            picked: vec![("TILE_N".to_owned(), n), ("TILE_M".to_owned(), m)],
        };
        engine.tune(&cache).expect("reports");
        let path = file(folder.path());
        let keep = |reports: &[TuneReport]| std::fs::write(&path, serde_json::to_vec(reports).expect("JSON")).expect("a file");
        keep(&[report(64, 128)]);
        assert!(engine.load_tiles(&cache));
        assert_eq!(tiles_of_matmul_nn(&engine), (64, 128));
        // Neither other sides nor names or kernels that are gone.
        let nameless = TuneReport { picked: vec![("TILE".to_owned(), 64)], ..report(64, 64) };
        keep(&[report(64, 96), nameless, TuneReport { kernel: "matmul_xx".to_owned(), ..report(64, 64) }]);
        assert!(engine.load_tiles(&cache));
        assert_eq!(tiles_of_matmul_nn(&engine), (64, 128));
        std::fs::write(&path, "[{").expect("a file");
        assert!(!engine.load_tiles(&cache), "damaged");
    }
}

#[test]
fn launches_are_timed() {
    for mut engine in gpus() {
        let seconds = [64, 512].map(|side| {
            let len = (side * side) as usize;
            let [a, b, c] = submit(&mut engine, |rec| [(); 3].map(|()| rec.zeros::<f32>("matrix", len))).expect("buffers");
            // The first launch makes the pipeline.
            let times = [(); 3].map(|()| {
                let mut rec = Recording::new();
                record(&mut rec, side, a, b, c);
                engine.time(rec).expect("a time")
            });
            submit(&mut engine, |rec| [a, b, c].map(|buffer| rec.free(buffer))).expect("freed");
            times[1].min(times[2])
        });
        // 512 times the arithmetic.
        assert!(seconds[0] > 0.0 && seconds[1] > 4.0 * seconds[0], "{}: {seconds:?}", engine.describe());
        let nothing = engine.time(Recording::new()).expect("a time");
        assert!(nothing < seconds[1], "{nothing} and {seconds:?}");
    }
}
