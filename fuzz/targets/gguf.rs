//! Hostile GGUF files. An input is a file as it is.

#![no_main]

use aespa_gpu_fuzz::choice::Choice;
use aespa_gpu_fuzz::guard::Guard;
use aespa_gpu_fuzz::{drive, gguf, seeds};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use std::fs;
use std::sync::OnceLock;
use tempfile::TempDir;

#[global_allocator]
static GUARD: Guard = Guard;

static FOLDER: OnceLock<TempDir> = OnceLock::new();

/// With a tokenizer and a text.
fn folder() -> &'static TempDir {
    FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        fs::write(folder.path().join("tokenizer.json"), seeds::tokenizer()).expect("it can be written");
        fs::write(folder.path().join("text.txt"), "a text of some length").expect("it can be written");
        folder
    })
}

fuzz_target!(
    init: {
        drive::prepare();
        seeds::plant(seeds::gguf());
    },
    |input: &[u8]| {
        let folder = folder().path();
        let path = folder.join("model.gguf");
        // A file that is cut off while it is mapped would end the process: a new one, always.
        let _ = fs::remove_file(&path);
        fs::write(&path, input).expect("a temporary folder can be written");
        drive::run(&path, folder);
    }
);

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut choice = Choice::new(seed);
    if !choice.one_in(6)
        && let Some(mut file) = gguf::parse(&data[..size])
    {
        file.mutate(&mut choice);
        let bytes = file.write();
        // Some are cut off.
        let keep = if choice.one_in(40) { choice.below(bytes.len()) } else { bytes.len() };
        if keep <= max_size {
            data[..keep].copy_from_slice(&bytes[..keep]);
            return keep;
        }
    }
    fuzzer_mutate(data, size, max_size)
});
