//! What a run takes is what its plan says: never more, and not much less.
#![cfg(unix)]

mod common;

use common::place::{Place, said};
use common::tiny_model::TinyLlama;
use serde_json::Value;
use std::fs;

/// A block of 13 million weights, so that matrices outweigh the program.
fn place() -> Place {
    let place = Place::new(1);
    let shape = TinyLlama { d_model: 1024, d_ff: 3072, n_head: 16, n_kv: 4, d_head: 64, n_vocab: 256, ..TinyLlama::default() };
    TinyLlama { n_layer: 2, tokenizer: true, max_positions: 256, ..shape }.write(&place.path("model"));
    fs::write(place.path("text.txt"), (0..30_000).map(|i| format!("{} of {} ", i * i % 977, i)).collect::<String>()).unwrap();
    place
}

fn json(place: &Place, arguments: &str) -> Value {
    let mut command = place.command(arguments);
    let output = command.stdout(std::process::Stdio::piped()).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", said(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_peak_is_what_the_plan_says() {
    let place = place();
    for (run, least) in
        [("--method gptq --samples 32", 0.6), ("--method aespa --samples 8", 0.6), ("--method gptq --samples 32 --max-ram 400MiB", 0.6)]
    {
        let common = format!("model -o out {run} --bits 4 --device cpu --calibration text.txt --sequence-length 256 --overwrite");
        let plan = json(&place, &format!("plan {common} --json"));
        assert!(!place.path("out").exists(), "a plan writes nothing");
        let output = place.command(&format!("quantize {common}")).output().unwrap();
        assert!(output.status.success(), "{run}: {}", said(&output));
        let report: Value = serde_json::from_slice(&fs::read(place.path("out/quantization_report.json")).unwrap()).unwrap();
        let (planned, measured) = (plan["ram_bytes"].as_f64().unwrap(), report["memory"]["peak_resident_bytes"].as_f64().unwrap());
        assert!(measured <= planned && measured >= least * planned, "{run}: {measured:e} of planned {planned:e}");
        // A run plans for itself, in a process of its own.
        let own = report["memory"]["planned_resident_bytes"].as_f64().unwrap();
        assert!((own / planned - 1.0).abs() <= 0.02, "{run}: {own:e} in the run, {planned:e} before");
        let written: u64 = fs::read_dir(place.path("out")).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
        let of_format = plan["outputs"][0]["bytes"].as_u64().unwrap();
        assert_eq!((plan["outputs"][0]["format"].as_str(), Some(of_format)), (Some("compressed-tensors"), plan["output_bytes"].as_u64()));
        assert!(written <= of_format && written as f64 >= 0.9 * of_format as f64, "{run}: {written} bytes were written");
        fs::remove_dir_all(place.path("out")).unwrap();
    }
}

/// Hidden states of the evaluation wait on disk as those of the calibration do, in two files of bf16 until the end.
#[test]
fn the_evaluation_is_part_of_what_the_disk_takes() {
    let place = place();
    let common =
        "model -o out --method gptq --samples 32 --bits 4 --device cpu --calibration text.txt --sequence-length 256 --max-ram 400MiB";
    let spilled = |more: &str| {
        let plan = json(&place, &format!("plan {common} {more} --json"));
        assert_eq!(plan["tier"], "disk");
        plan["spill_bytes"].as_u64().unwrap()
    };
    assert_eq!(spilled("--eval text.txt --eval-window 256 --eval-windows 8") - spilled(""), 2 * 8 * 256 * 1024 * 2);
}

/// On a GPU, with states on the device where nothing is bounded, and in memory where the device shall take less; more batches than are
/// recorded for the plan.
#[test]
fn the_device_takes_what_the_plan_says() {
    let place = Place::new(1);
    let shape = TinyLlama { d_model: 64, d_ff: 128, n_head: 4, n_kv: 2, d_head: 16, n_vocab: 256, ..TinyLlama::default() };
    TinyLlama { n_layer: 2, tokenizer: true, max_positions: 64, ..shape }.write(&place.path("model"));
    fs::write(place.path("text.txt"), (0..30_000).map(|i| format!("{} of {} ", i * i % 977, i)).collect::<String>()).unwrap();
    let methods = ["gptq", "aespa --sweeps 3"];
    for (adapter, method) in common::engines::gpu_indices().into_iter().flat_map(|adapter| methods.map(|method| (adapter, method))) {
        let mut weights = Vec::new();
        let common =
            format!("model -o out --method {method} --samples 320 --sequence-length 64 --device gpu:{adapter} --calibration text.txt");
        let whole = json(&place, &format!("plan {common} --json"))["device_bytes"].as_u64().unwrap();
        for (bound, tier) in [(String::new(), "device"), (format!("--max-vram {}", whole - 1), "memory")] {
            let common = format!("{common} {bound}");
            let plan = json(&place, &format!("plan {common} --json"));
            let output = place.command(&format!("quantize {common}")).output().unwrap();
            assert!(output.status.success(), "{bound}: {}", said(&output));
            let report: Value = serde_json::from_slice(&fs::read(place.path("out/quantization_report.json")).unwrap()).unwrap();
            let (planned, measured) = (plan["device_bytes"].as_f64().unwrap(), report["memory"]["peak_device_bytes"].as_f64().unwrap());
            println!("{method}, {tier}: {measured} of planned {planned}");
            assert_eq!((&plan["tier"], &report["streaming"]["tier"]), (&tier.into(), &tier.into()));
            assert_eq!(report["memory"]["planned_device_bytes"], plan["device_bytes"]);
            assert!(measured <= planned && measured >= 0.9 * planned, "{method}, {tier}: {measured:e} of planned {planned:e}");
            weights.push(fs::read(place.path("out/model.safetensors")).unwrap());
            fs::remove_dir_all(place.path("out")).unwrap();
        }
        assert!(weights[0] == weights[1], "other bytes");
    }
}

/// What a run of the program took of a GPU, where it keeps to a bound.
fn bounded_peak(place: &Place, common: &str, bound: u64) -> u64 {
    let output = place.command(&format!("quantize {common} --max-vram {bound}")).output().unwrap();
    assert!(output.status.success(), "{bound}: {}", said(&output));
    let report: Value = serde_json::from_slice(&fs::read(place.path("out/quantization_report.json")).unwrap()).unwrap();
    fs::remove_dir_all(place.path("out")).unwrap();
    report["memory"]["peak_device_bytes"].as_u64().unwrap()
}

/// Bounds that fall until the plan has nothing left but to bring the weights linear by linear, and then nothing at all.
#[test]
fn a_block_that_does_not_fit_goes_linear_by_linear() {
    let place = Place::new(1);
    let shape = TinyLlama { d_model: 256, d_ff: 768, n_head: 8, n_kv: 4, d_head: 32, n_vocab: 256, ..TinyLlama::default() };
    TinyLlama { n_layer: 2, tokenizer: true, max_positions: 64, ..shape }.write(&place.path("model"));
    fs::write(place.path("text.txt"), (0..3000).map(|i| format!("{} of {} ", i * i % 977, i)).collect::<String>()).unwrap();
    for adapter in common::engines::gpu_indices() {
        let common = format!("model -o out --method gptq --samples 16 --sequence-length 32 --device gpu:{adapter} --calibration text.txt");
        let plan = |bound: u64| {
            let output =
                place.command(&format!("plan {common} --max-vram {bound} --json")).stdout(std::process::Stdio::piped()).output().unwrap();
            output.status.success().then(|| serde_json::from_slice::<Value>(&output.stdout).unwrap())
        };
        let mut plans = Vec::new();
        let mut bound = 1 << 30;
        while let Some(next) = plan(bound) {
            bound = next["device_bytes"].as_u64().unwrap() - 1;
            plans.push(next);
        }
        let device_bytes = |plan: &Value| plan["device_bytes"].as_u64().unwrap();
        let (whole, single): (Vec<_>, Vec<_>) = plans.iter().partition(|plan| plan["weights"] == "block");
        println!(
            "whole blocks {:?}, linear by linear {:?}",
            whole.iter().map(|p| device_bytes(p)).collect::<Vec<_>>(),
            single.iter().map(|p| device_bytes(p)).collect::<Vec<_>>()
        );
        let (least_whole, most_single) = (device_bytes(whole[whole.len() - 1]), device_bytes(single[0]));
        assert!(most_single < least_whole, "{most_single} and {least_whole}");
        for plan in [whole[whole.len() - 1], single[0], single[single.len() - 1]] {
            let (planned, measured) = (device_bytes(plan), bounded_peak(&place, &common, device_bytes(plan)));
            assert!(measured <= planned && measured as f64 >= 0.9 * planned as f64, "{measured} of planned {planned}");
        }
    }
}

#[test]
fn a_bound_that_cannot_be_kept_is_refused_with_what_would_do() {
    let place = place();
    let common = "model -o out --method gptq --samples 64 --device cpu --calibration text.txt --sequence-length 256";
    for (bound, option) in [("--max-ram 100MB", "--max-ram"), ("--max-disk 1MB", "--max-disk")] {
        let output = place.command(&format!("quantize {common} {bound}")).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{bound}: {}", said(&output));
        assert!(said(&output).contains(option) && said(&output).contains("needs"), "{bound}: {}", said(&output));
        assert!(!place.path("out").exists());
    }
    let output = place.command(&format!("quantize {common} --max-ram lots")).output().unwrap();
    assert!(!output.status.success() && said(&output).contains("is no size"), "{}", said(&output));
    for (nothing, subject) in [("--samples 0", "--samples"), ("--eval text.txt --eval-windows 0", "evaluation windows")] {
        let output = place.command(&format!("plan {} {nothing} --max-ram 1GB", common.replace("--samples 64", ""))).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{nothing}: {}", said(&output));
        assert!(said(&output).contains(&format!("{subject}: must be at least 1")), "{nothing}: {}", said(&output));
    }
    // Reading a long text takes more than the work.
    fs::write(place.path("long.txt"), "one of two ".repeat(300_000)).unwrap();
    let long = common.replace("text.txt", "long.txt");
    let output = place.command(&format!("plan {long} --max-ram 400MiB")).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("--max-ram"), "{}", said(&output));
    // Refused before a text is tokenized, which takes longer than all else: without a tokenizer, too.
    fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    for (bound, subject) in [("100MB", "--max-ram"), ("1GB", "tokenizer.json")] {
        let output = place.command(&format!("quantize {common} --max-ram {bound}")).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{bound}: {}", said(&output));
        assert!(said(&output).contains(subject), "{bound}: {}", said(&output));
    }
}
