//! Runs of several formats and of GGUF files that are interrupted, killed, or run out of disk: nothing that a loader would accept is left, and
//! nothing at all where the program could still clean up.
#![cfg(unix)]

mod common;

use aespa_gpu::export;
use common::tiny_model::TinyLlama;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const FORMATS: &[&str] = &["compressed-tensors,gptq,mlx,gguf-q4_0,dense", "gguf-q4_1,gguf-q8_0", "gguf-q4_0", "gguf-q6_k", "awq"];

/// A folder with a model of many blocks, so that a run takes a while, and a text.
struct Place(tempfile::TempDir);

impl Place {
    fn new(n_layer: usize) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let shape = TinyLlama { d_model: 64, d_ff: 96, n_head: 4, n_kv: 2, d_head: 16, n_vocab: 256, ..TinyLlama::default() };
        TinyLlama { n_layer, tokenizer: true, ..shape }.write(&place.path("model"));
        let text: String = (0..3000).map(|i| format!("{} of {} ", i * i % 977, i)).collect();
        fs::write(place.path("text.txt"), text).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn listing(&self) -> Vec<PathBuf> {
        listing(self.0.path())
    }

    /// Starts a run and waits until all weight files are begun.
    fn begin(&self, formats: &str) -> Child {
        let weights = || self.listing().iter().filter(|p| !p.starts_with(self.path("model")) && is_weights(p)).count();
        let mut command = Command::new(env!("CARGO_BIN_EXE_aespa-gpu"));
        command.args(arguments("out", formats).split_whitespace()).current_dir(self.0.path()).env_remove("RUST_LOG");
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let begun = Instant::now();
        while weights() < formats.split(',').count() {
            assert!(begun.elapsed().as_secs() < 60, "{formats}: nothing is written");
            if child.try_wait().unwrap().is_some() {
                panic!("{formats}: ended too soon: {}", said(&child.wait_with_output().unwrap()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        child
    }
}

fn arguments(out: &str, formats: &str) -> String {
    format!("quantize model -o {out} --format {formats} --device cpu --calibration text.txt --samples 256 --sequence-length 32")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn is_weights(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "safetensors" || e == "gguf")
}

/// All paths under a folder, hidden ones too, while others may come and go.
fn listing(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.extend(listing(&entry.path()));
        }
        all.push(entry.path());
    }
    all.sort();
    all
}

/// The shell's own `kill`: a bare system has no program of that name.
fn signal(child: &Child, name: &str) {
    let killed = Command::new("sh").args(["-c", &format!("kill -{name} {}", child.id())]).status().unwrap();
    assert!(killed.success());
}

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

/// Whole folders that are left by a process that is killed between the last flush and the rename go with the next run. Those of a run that
/// lives stay, and what only looks like them.
#[test]
fn what_a_killed_run_leaves_goes_with_the_next_run() {
    let place = Place::new(60);
    let staging = |path: &&PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(".out.aespa-gpu-"));
    let mut alive = place.begin("awq");
    signal(&alive, "STOP");
    let held: Vec<PathBuf> = place.listing().iter().filter(staging).cloned().collect();
    assert_eq!(held.len(), 1);

    let run = || {
        let arguments = "quantize model -o out --overwrite --format awq --device cpu --method rtn --eval text.txt --eval-window 32";
        let mut command = Command::new(env!("CARGO_BIN_EXE_aespa-gpu"));
        command.args(arguments.split_whitespace()).current_dir(place.0.path()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let mut killed = run().spawn().unwrap();
    let whole = || place.listing().iter().filter(staging).find(|p| export::open(p).is_ok()).cloned();
    let left = loop {
        if let Some(whole) = whole() {
            break whole;
        }
        assert!(killed.try_wait().unwrap().is_none(), "{}", said(&killed.wait_with_output().unwrap()));
        std::thread::sleep(Duration::from_millis(2));
    };
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(left.is_dir() && !place.path("out").exists());

    let other = [".out.backup.partial", ".out.aespa-gpu-2024.partial", ".other.aespa-gpu-abcdef.partial", ".out.aespa-gpu-abcdef.old"];
    let other = other.map(|name| place.path(name));
    other.iter().for_each(|folder| fs::create_dir(folder).unwrap());
    let (file, link) = (place.path(".out.aespa-gpu-a1file.partial"), place.path(".out.aespa-gpu-a1link.partial"));
    fs::write(&file, "notes").unwrap();
    std::os::unix::fs::symlink(place.path("model"), &link).unwrap();
    let next = || {
        let output = run().output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        export::verify(&place.path("out")).unwrap();
        assert!(other.iter().chain([&file, &link, &place.path("model/config.json")]).all(|path| path.exists()));
    };
    next();
    assert!(!left.exists() && held[0].exists());
    alive.kill().unwrap();
    alive.wait().unwrap();
    next();
    assert!(!held[0].exists());
}

/// Runs a shell script in a folder with a file system of `kib` KiB mounted at `small`; none where this is not permitted.
#[cfg(target_os = "linux")]
fn on_small_disk(place: &Place, kib: usize, script: &str) -> Option<(i32, String, String)> {
    let _ = fs::create_dir(place.path("small"));
    let script = format!("mount -t tmpfs -o size={kib}k none small || exit 99\n{script}");
    let output = Command::new("unshare").args(["-rm", "sh", "-c", &script]).current_dir(place.0.path()).output().unwrap();
    let message = said(&output);
    if output.status.code() == Some(99) || message.contains("unshare") {
        eprintln!("SKIPPED: no small file system can be mounted here: {message}");
        return None;
    }
    Some((output.status.code().unwrap_or(-1), message, String::from_utf8_lossy(&output.stdout).into_owned()))
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
