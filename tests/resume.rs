//! Runs that are killed, stopped, or run out of disk, and go on: the result is that of a run that was left alone, byte for byte.
#![cfg(unix)]

mod common;

#[cfg(target_os = "linux")]
use common::place::on_small_disk;
use common::place::{Place, said, signal};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

/// What to do, and what makes each interesting: two streams and folds; several formats and an embedding; nothing calibrated.
const RUNS: [&str; 3] = [
    "--method aespa --format compressed-tensors --bits 3 --group-size -1",
    "--method gptq --format mlx,gguf-q4_0 --bits 4 --group-size 32",
    "--method rtn --format awq --group-size 32",
];
const JOURNAL: &str = ".out.aespa-gpu.unfinished/journal";

fn arguments(run: &str) -> String {
    format!(
        "quantize model -o out {run} --device cpu --calibration text.txt --samples 64 --sequence-length 32 --eval text.txt --eval-window 32 \
         --eval-windows 20 --journal-seconds 0"
    )
}

/// Content of all files of the output but the report, which tells seconds.
fn content(place: &Place) -> BTreeMap<String, Vec<u8>> {
    let out = place.path("out");
    let files = place.listing().into_iter().filter(|p| p.starts_with(&out) && p.is_file() && !p.ends_with("quantization_report.json"));
    files.map(|p| (p.strip_prefix(&out).unwrap().display().to_string(), fs::read(&p).unwrap())).collect()
}

fn finished(output: &Output) {
    assert!(output.status.success(), "{}", said(output));
}

/// What a run that is left alone writes, and how long it takes.
fn alone(place: &Place, run: &str) -> (BTreeMap<String, Vec<u8>>, Duration) {
    let begun = Instant::now();
    finished(&place.command(&arguments(run)).output().unwrap());
    let took = begun.elapsed();
    let want = content(place);
    assert!(!want.is_empty());
    fs::remove_dir_all(place.path("out")).unwrap();
    (want, took)
}

/// Runs to the end and compares.
fn complete(place: &Place, run: &str, want: &BTreeMap<String, Vec<u8>>) -> bool {
    let output = place.command(&arguments(run)).output().unwrap();
    finished(&output);
    let got = content(place);
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{run}");
    let other: Vec<&String> = got.iter().filter(|(name, bytes)| want[*name] != **bytes).map(|(name, _)| name).collect();
    assert!(other.is_empty(), "{run}: {other:?} differ");
    fs::remove_dir_all(place.path("out")).unwrap();
    let hidden: Vec<_> = place.listing().into_iter().filter(|p| is_hidden(p)).collect();
    assert!(hidden.is_empty(), "{run}: {hidden:?} are left");
    said(&output).contains("going on with an unfinished run")
}

fn is_hidden(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str().to_string_lossy().contains(".unfinished"))
}

#[test]
fn killed_at_random_moments_the_result_is_the_same() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let (mut killed, mut resumed) = (0, 0);
    for run in RUNS {
        let place = Place::new(6);
        let (want, took) = alone(&place, run);
        for _ in 0..5 {
            for _ in 0..2 {
                let mut child = place.command(&arguments(run)).spawn().unwrap();
                let part = f64::from(random.next_u32()) / f64::from(u32::MAX);
                std::thread::sleep(took.mul_f64(part));
                child.kill().unwrap();
                killed += usize::from(child.wait().unwrap().code().is_none());
                if place.path("out").exists() {
                    fs::remove_dir_all(place.path("out")).unwrap();
                }
            }
            resumed += usize::from(complete(&place, run, &want));
        }
    }
    assert!(killed >= 20 && resumed >= 3, "{killed} of 30 were killed in time, {resumed} of 15 went on with something");
}

/// Kills a run once its journal has a number of lines, the first of which says what it is.
fn killed_after(place: &Place, run: &str, lines: usize) {
    let mut child = place.command(&arguments(run)).spawn().unwrap();
    let count = || fs::read(place.path(JOURNAL)).map_or(0, |text| text.iter().filter(|b| **b == b'\n').count());
    let begun = Instant::now();
    while count() < lines {
        assert!(begun.elapsed().as_secs() < 60 && child.try_wait().unwrap().is_none(), "{run}: the journal has {} lines", count());
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_journal_that_lost_its_end_or_is_damaged_is_gone_on_with_or_begun_anew() {
    let (place, run) = (Place::new(6), RUNS[0]);
    let (want, _) = alone(&place, run);
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for damage in 0..6 {
        killed_after(&place, run, 5);
        let mut text = fs::read(place.path(JOURNAL)).unwrap();
        let at = random.next_u32() as usize % text.len();
        match damage % 2 {
            0 => text.truncate(at),
            _ => text[at] ^= 4,
        }
        fs::write(place.path(JOURNAL), text).unwrap();
        complete(&place, run, &want);
    }
}

#[test]
fn another_setting_is_refused_and_restart_begins_anew() {
    let (place, run) = (Place::new(6), RUNS[0]);
    let (want, _) = alone(&place, run);
    killed_after(&place, run, 4);
    for (change, named) in [("--seed 3", "seed was 0 and is 3"), ("--sweeps 3", "sweeps was"), ("--format dense", "format was")] {
        let output = place.command(&format!("{} {change}", arguments(run).replace("--format compressed-tensors", ""))).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{change}: {}", said(&output));
        assert!(said(&output).contains(named) && said(&output).contains("--restart"), "{change}: {}", said(&output));
    }
    // The same text is other tokens by another tokenizer.
    let [tokenizer, kept] = ["model/tokenizer.json", "tokenizer.json"].map(|name| place.path(name));
    fs::rename(&tokenizer, &kept).unwrap();
    fs::write(&tokenizer, fs::read_to_string(&kept).unwrap() + "\n").unwrap();
    let output = place.command(&arguments(run)).output().unwrap();
    assert!(output.status.code() == Some(2) && said(&output).contains("tokenizer.json"), "{}", said(&output));
    fs::rename(&kept, &tokenizer).unwrap();
    assert!(complete(&place, run, &want), "what was refused took something away");
    killed_after(&place, run, 4);
    let output = place.command(&format!("{} --restart", arguments(run))).output().unwrap();
    finished(&output);
    assert!(!said(&output).contains("going on") && content(&place) == want);
}

#[test]
fn two_runs_for_one_output_are_kept_apart() {
    let place = Place::new(60);
    let mut first = place.begin("gguf-q4_0");
    let second = place.command(&common::place::arguments("out", "gguf-q4_0")).output().unwrap();
    assert_eq!(second.status.code(), Some(2));
    assert!(said(&second).contains("is being written by another run"), "{}", said(&second));
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn interrupted_it_says_how_to_go_on() {
    let (place, run) = (Place::new(60), "--method gptq --format awq --group-size 32");
    let (want, _) = alone(&place, run);
    for name in ["INT", "TERM"] {
        let child = place.command(&arguments(run)).spawn().unwrap();
        while fs::read(place.path(JOURNAL)).map_or(0, |text| text.iter().filter(|b| **b == b'\n').count()) < 4 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let asked = Instant::now();
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        assert!(asked.elapsed() < Duration::from_secs(2));
        assert_eq!(output.status.code(), Some(130), "{}", said(&output));
        assert!(said(&output).contains("of 60 blocks are kept: repeat the command"), "{}", said(&output));
        assert!(complete(&place, run, &want));
    }
}

/// The disk is full at some moment, of the journal, of hidden states, or of what is copied last; when there is space again the run goes on.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_was_full_for_a_while_does_not_matter() {
    let (place, run) = (Place::new(30), RUNS[1]);
    let program = env!("CARGO_BIN_EXE_aespa-gpu");
    let (want, took) = alone(&place, run);
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let arguments = arguments(run).replace("-o out", "-o small/out");
    for _ in 0..4 {
        let wait = took.as_secs_f64() * f64::from(random.next_u32()) / f64::from(u32::MAX);
        let script = format!(
            "{program} {arguments} & sleep {wait:.3}; cat /dev/zero > small/ballast 2> /dev/null; wait $!; echo first $?; rm small/ballast\n\
             [ -d small/out/gguf-q4_0 ] || {program} {arguments}; code=$?; rm -rf out; cp -r small/out out; ls -A small; exit $code"
        );
        let Some((code, message, left)) = on_small_disk(&place, 40_000, &script) else { return };
        assert!(code == 0 && left.ends_with("\nout\n"), "{message} {left}");
        assert!(content(&place) == want, "{message}");
    }
}
