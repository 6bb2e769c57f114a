//! Hostile folders of safetensors. An input is an archive of their files.

#![no_main]

use aespa_gpu_fuzz::choice::Choice;
use aespa_gpu_fuzz::guard::Guard;
use aespa_gpu_fuzz::{archive, drive, safetensors, seeds};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use std::fs;
use std::sync::OnceLock;
use tempfile::TempDir;

#[global_allocator]
static GUARD: Guard = Guard;

static FOLDER: OnceLock<(TempDir, Vec<u8>)> = OnceLock::new();

/// With a text, and the tokenizer of those inputs that have none.
fn folder() -> &'static (TempDir, Vec<u8>) {
    FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        fs::write(folder.path().join("text.txt"), "a text of some length").expect("it can be written");
        (folder, seeds::tokenizer())
    })
}

fuzz_target!(
    init: {
        drive::prepare();
        seeds::plant(seeds::folders());
    },
    |input: &[u8]| {
        let (folder, tokenizer) = folder();
        archive::write(folder.path(), &archive::unpack(input), tokenizer);
        drive::run(folder.path(), folder.path());
    }
);

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut choice = Choice::new(seed);
    let mut files = archive::unpack(&data[..size]);
    if files.is_empty() {
        return fuzzer_mutate(data, size, max_size);
    }
    if choice.one_in(6) {
        // Bytes of one file, mostly near its start, where headers are.
        let at = choice.below(files.len());
        let content = &mut files[at].1;
        let len = content.len();
        content.resize(len + 64, 0);
        let new = fuzzer_mutate(content, len, len + 64);
        content.truncate(new);
    } else {
        for _ in 0..1 + choice.below(2) {
            safetensors::mutate(&mut files, &mut choice);
        }
        if choice.one_in(60) {
            let at = choice.below(files.len());
            let keep = choice.below(files[at].1.len());
            files[at].1.truncate(keep);
        }
    }
    let bytes = archive::pack(&files);
    if bytes.len() > max_size {
        return fuzzer_mutate(data, size, max_size);
    }
    data[..bytes.len()].copy_from_slice(&bytes);
    bytes.len()
});
