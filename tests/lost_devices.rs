//! A device that is lost in the middle of a run: blocks since the last record are done again, and the result is what it would have been.
#![cfg(unix)]

mod common;

use aespa_gpu::calib::Tier;
use aespa_gpu::engine::cpu::CpuEngine;
use aespa_gpu::engine::{self, DeviceChoice, Downloads, Engine, Limits, Profile, Recording};
use aespa_gpu::pipeline::{self, Quiet};
use aespa_gpu::plan::{Plan, Request};
use aespa_gpu::quant::Scheme;
use aespa_gpu::{Error, Kind, Result, export, method};
use common::place::Place;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Recordings that engines of this test run before they are lost.
static LEFT: AtomicUsize = AtomicUsize::new(usize::MAX);
/// How often engines were opened, and how often that works.
static OPENED: AtomicUsize = AtomicUsize::new(0);
static COMES_BACK: AtomicUsize = AtomicUsize::new(usize::MAX);
/// The counters above are everybody's.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The native engine until it is lost.
struct Fragile(CpuEngine, bool);

impl Engine for Fragile {
    fn describe(&self) -> String {
        self.0.describe()
    }

    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn run(&mut self, recording: Recording<'_>) -> Result<Downloads> {
        let left = LEFT.load(Ordering::SeqCst);
        LEFT.store(left.saturating_sub(usize::from(left != usize::MAX)), Ordering::SeqCst);
        self.1 |= left == 0;
        if self.1 {
            LEFT.store(usize::MAX, Ordering::SeqCst);
            return Err(Error::device("kernel gram", "the device is lost"));
        }
        self.0.run(recording)
    }

    fn profile(&self) -> &Profile {
        self.0.profile()
    }

    fn profile_mut(&mut self) -> &mut Profile {
        self.0.profile_mut()
    }
}

fn fragile() -> Box<dyn Engine> {
    Box::new(Fragile(CpuEngine::new(), false))
}

fn open(choice: &DeviceChoice) -> Result<Box<dyn Engine>> {
    let opened = OPENED.fetch_add(1, Ordering::SeqCst);
    match choice {
        DeviceChoice::Cpu => engine::open(choice),
        _ if opened < COMES_BACK.load(Ordering::SeqCst) => Ok(fragile()),
        _ => Err(Error::device("gpu", "is gone")),
    }
}

/// The weights that a run writes whose device is lost after `left` recordings and comes back `comes_back` times, and how often one was opened.
fn run(place: &Place, tier: Tier, left: usize, comes_back: usize, fallback_cpu: bool) -> (Result<Vec<u8>>, usize) {
    let out: PathBuf = place.path("out");
    let request = Request {
        calibration: Some(place.path("text.txt")),
        samples: Some(16),
        sequence_length: Some(32),
        fallback_cpu,
        restart: true,
        journal_seconds: 0.0,
        ..Request::new(
            place.path("model"),
            out.clone(),
            method::find("aespa").unwrap(),
            Scheme::new(3, -1, false).unwrap(),
            vec![export::find("compressed-tensors").unwrap()],
        )
    };
    let mut plan = Plan::new(request).unwrap();
    (plan.engine, plan.open, plan.streaming.tier) = (fragile(), open, tier);
    LEFT.store(left, Ordering::SeqCst);
    OPENED.store(0, Ordering::SeqCst);
    COMES_BACK.store(comes_back, Ordering::SeqCst);
    let result = pipeline::run(plan, &mut Quiet).map(|_| {
        let weights = std::fs::read(out.join("model.safetensors")).unwrap();
        std::fs::remove_dir_all(&out).unwrap();
        weights
    });
    (result, OPENED.load(Ordering::SeqCst))
}

#[test]
fn blocks_are_done_again_when_the_device_comes_back() {
    let _held = ONE_AT_A_TIME.lock();
    let place = Place::new(3);
    let want = run(&place, Tier::Memory, usize::MAX, 0, false).0.unwrap();
    let mut lost = 0;
    // What waited on the device is lost with it.
    for tier in [Tier::Memory, Tier::Device] {
        for left in [0, 3, 40, 111, 333, 700, 1000] {
            let (weights, opened) = run(&place, tier.clone(), left, usize::MAX, false);
            assert!(weights.unwrap() == want, "{tier:?}, lost after {left}");
            lost += opened;
        }
    }
    assert!(lost >= 8, "lost {lost} times only: the run is too short");
}

#[test]
fn the_cpu_takes_over_where_that_is_allowed() {
    let _held = ONE_AT_A_TIME.lock();
    let place = Place::new(3);
    let want = run(&place, Tier::Memory, usize::MAX, 0, false).0.unwrap();
    let (weights, opened) = run(&place, Tier::Device, 111, 0, true);
    assert!(weights.unwrap() == want && opened == 2, "{opened}");

    let (error, _) = run(&place, Tier::Memory, 111, 0, false);
    let error = error.unwrap_err();
    assert_eq!(error.kind, Kind::Device);
    assert!(error.to_string().contains("is gone") && error.to_string().contains("--fallback-cpu"), "{error}");
    assert!(!place.path("out").exists());
}
