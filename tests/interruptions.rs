//! Runs of several formats and of GGUF files that are interrupted, killed, or run out of disk: nothing that a loader would accept is left, and
//! nothing at all where the program could still clean up.
#![cfg(unix)]

mod common;

use aespa_gpu::export;
use common::place::{Place, arguments, is_weights, on_small_disk, said, signal};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

const FORMATS: &[&str] = &["compressed-tensors,gptq,mlx,gguf-q4_0,dense", "gguf-q4_1,gguf-q8_0", "gguf-q4_0", "gguf-q6_k", "awq"];

#[test]
fn a_run_that_is_interrupted_leaves_nothing() {
    let place = Place::new(60);
    let before = place.listing();
    for (formats, name) in FORMATS.iter().zip(["INT", "TERM"].iter().cycle()) {
        let child = place.begin(formats);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{formats}: {}", said(&output));
        assert!(said(&output).contains("interrupted"), "{formats}: {}", said(&output));
        assert_eq!(place.listing(), before, "{formats}");
    }
}

/// The second signal ends the process wherever it is, as happens by itself to work that does not hear the first one in time.
#[test]
fn a_demo_that_is_ended_by_force_leaves_nothing() {
    let place = Place::new(1);
    let before = place.listing();
    for wait in [0, 200, 1000] {
        let mut child = place.command("quantize --demo -o demo --device cpu").spawn().unwrap();
        while !place.path("demo").exists() {
            assert!(child.try_wait().unwrap().is_none(), "ended too soon");
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(wait));
        signal(&child, "INT");
        signal(&child, "INT");
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{}", said(&output));
        assert!(said(&output).contains("nothing was written"), "{}", said(&output));
        assert_eq!(place.listing(), before);
    }
}

/// A process that is killed, as by a machine that loses its power, cannot clean up; what it leaves no reader takes for a model.
#[test]
fn a_run_that_is_killed_leaves_no_model() {
    for formats in FORMATS {
        for wait in [0, 40] {
            let place = Place::new(60);
            let mut child = place.begin(formats);
            std::thread::sleep(Duration::from_millis(wait));
            child.kill().unwrap();
            child.wait().unwrap();
            let left: Vec<PathBuf> = place.listing().into_iter().filter(|p| !p.starts_with(place.path("model"))).collect();
            assert!(left.iter().any(|p| is_weights(p)), "{formats}: it was over too soon");
            for path in left {
                assert!(export::open_packed(&path).is_err(), "{formats}: {} is a model", path.display());
                if path.extension().is_some_and(|e| e == "safetensors") {
                    // Loaders of single files have no config to miss.
                    assert!(safetensors::SafeTensors::deserialize(&fs::read(&path).unwrap()).is_err(), "{formats}: {}", path.display());
                }
            }
            // It is not in the way of the next run.
            signal(&place.begin(formats), "KILL");
        }
    }
}

/// Too small from the start: for any of the formats, for all of them together, or for the small files of all.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_too_small_is_refused_before_the_work() {
    let place = Place::new(1);
    // What is copied for every format.
    fs::write(place.path("model/notes.txt"), vec![b'n'; 1 << 20]).unwrap();
    let program = env!("CARGO_BIN_EXE_aespa-gpu");
    // Weights take about 60 KB, or 180 KB as floats; copies and the margin 2 MB for each format.
    for (formats, kib) in [("gguf-q4_0", 64), ("compressed-tensors,gguf-f32", 128), ("gguf-f32,mlx,gguf-f16", 5000), ("awq,dense", 4000)] {
        let run = format!("{program} {}; code=$?; ls -A small; exit $code", arguments("small/out", formats));
        let Some((code, message, left)) = on_small_disk(&place, kib, &run) else { return };
        assert_eq!((code, left.as_str()), (1, ""), "{formats} in {kib} KiB: {message}");
        assert!(message.contains("the disk is full") && message.contains("small"), "{formats}: {message}");
    }
    let run = format!("{program} {} 2>&1; code=$?; ls -A small; exit $code", arguments("small/out", "gguf-f32,mlx,gguf-f16"));
    let Some((code, message, left)) = on_small_disk(&place, 9000, &run) else { return };
    assert!(code == 0 && left.ends_with("out\n"), "{message} {left}");
}

/// Somebody else fills the disk while the run computes: its weights have their place, and the small files that come last have not.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_others_fill_is_an_error_that_leaves_nothing() {
    let place = Place::new(60);
    let program = env!("CARGO_BIN_EXE_aespa-gpu");
    for (formats, outs) in [("compressed-tensors,mlx,gguf-q4_0", 3), ("gguf-q4_0,gguf-q4_1", 2), ("gguf-q8_0", 1)] {
        let script = format!(
            "{program} {} &\n\
             until [ $(find small -name '*.gguf' -o -name '*.safetensors' | wc -l) = {outs} ]; do kill -0 $! || break; done\n\
             cat /dev/zero > small/ballast 2> /dev/null\n\
             wait $!; code=$?; rm small/ballast; ls -A small; exit $code",
            arguments("small/out", formats)
        );
        let Some((code, message, left)) = on_small_disk(&place, 16_000, &script) else { return };
        assert_eq!((code, left.as_str()), (1, ""), "{formats}: {message}");
        assert!(message.contains("the disk is full"), "{formats}: {message}");
    }
}
