//! The program at work in a folder of its own, which tests interrupt, kill, or give too small a disk.

use super::tiny_model::TinyLlama;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A folder with a model of many blocks, so that a run takes a while, and a text.
pub struct Place(pub tempfile::TempDir);

impl Place {
    pub fn new(n_layer: usize) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let shape = TinyLlama { d_model: 64, d_ff: 96, n_head: 4, n_kv: 2, d_head: 16, n_vocab: 256, ..TinyLlama::default() };
        TinyLlama { n_layer, tokenizer: true, ..shape }.write(&place.path("model"));
        let text: String = (0..3000).map(|i| format!("{} of {} ", i * i % 977, i)).collect();
        fs::write(place.path("text.txt"), text).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn listing(&self) -> Vec<PathBuf> {
        listing(self.0.path())
    }

    /// A run of the program here.
    pub fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aespa-gpu"));
        command.args(arguments.split_whitespace()).current_dir(self.0.path()).env_remove("RUST_LOG");
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// Starts a run and waits until all weight files are begun.
    pub fn begin(&self, formats: &str) -> Child {
        let weights = || self.listing().iter().filter(|p| !p.starts_with(self.path("model")) && is_weights(p)).count();
        let mut child = self.command(&arguments("out", formats)).spawn().unwrap();
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

pub fn arguments(out: &str, formats: &str) -> String {
    format!("quantize model -o {out} --format {formats} --device cpu --calibration text.txt --samples 256 --sequence-length 32")
}

pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn is_weights(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "safetensors" || e == "gguf")
}

/// All paths under a folder, hidden ones too, while others may come and go.
pub fn listing(folder: &Path) -> Vec<PathBuf> {
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
pub fn signal(child: &Child, name: &str) {
    let killed = Command::new("sh").args(["-c", &format!("kill -{name} {}", child.id())]).status().unwrap();
    assert!(killed.success());
}

/// Runs a shell script in a folder with a file system of `kib` KiB mounted at `small`; none where this is not permitted.
#[cfg(target_os = "linux")]
pub fn on_small_disk(place: &Place, kib: usize, script: &str) -> Option<(i32, String, String)> {
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
