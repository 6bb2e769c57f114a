//! An engine that is watched by the native one: every launch runs on both, from the same inputs, and what they write is compared.

use super::buffer::{RawBuffer, Scalar};
use super::cpu::CpuEngine;
use super::kernel::Defined;
use super::profile::Profile;
use super::recording::{Command, Downloads, Recording};
use super::{Engine, Limits};
use crate::{Error, Result};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Of each kernel, the largest share of values that differed in any launch.
pub type Differences = Rc<RefCell<BTreeMap<&'static str, f64>>>;

/// Values differ where they are further apart than this, relative to their size and to the buffer's root mean square. Whole numbers differ
/// where they are not the same: codes of weights in the middle between two may.
const TOLERANCE: f64 = 1e-3;

pub struct Checked {
    engine: Box<dyn Engine>,
    native: CpuEngine,
    differences: Differences,
}

impl std::fmt::Debug for Checked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} checked by {}", self.engine.describe(), self.native.describe())
    }
}

impl Checked {
    pub fn new(engine: Box<dyn Engine>) -> (Self, Differences) {
        let differences = Differences::default();
        (Self { engine, native: CpuEngine::new(), differences: differences.clone() }, differences)
    }

    /// One command on both; what a launch has written goes from the engine to its watch, so that differences do not add up.
    fn step(&mut self, command: Command<'_>, out: &mut Downloads) -> Result<()> {
        if let Command::Download { buffer, slot } = command {
            out.set(slot, words(self.engine.as_mut(), buffer)?);
            return Ok(());
        }
        let dispatch = match &command {
            Command::Dispatch(dispatch) => Some(dispatch.clone()),
            _ => None,
        };
        let Some(dispatch) = dispatch else {
            self.native.run(one(command.clone()))?;
            self.engine.run(one(command))?;
            return Ok(());
        };
        let written: Vec<_> =
            dispatch.kernel.bindings.iter().zip(&dispatch.buffers).filter(|(b, _)| b.writes).map(|(b, buffer)| (b, *buffer)).collect();
        self.native.run(one(command.clone()))?;
        self.engine.run(one(command))?;
        let defined = (dispatch.kernel.defined)(&dispatch.params);
        for (binding, buffer) in written {
            let (got, mut want) = (words(self.engine.as_mut(), buffer)?, words(&mut self.native, buffer)?);
            if defined != Defined::All {
                // Such buffers hold a value a word.
                want.iter_mut().zip(&got).enumerate().filter(|(i, _)| !defined.holds(*i)).for_each(|(_, (want, got))| *want = *got);
            }
            let share = share_of(buffer.scalar, &got, &want);
            if share > 0.0 {
                tracing::debug!("kernel {}: {share:.2e} of {} differ", dispatch.kernel.name, binding.name);
            }
            let mut differences = self.differences.borrow_mut();
            let most = differences.entry(dispatch.kernel.name).or_default();
            *most = most.max(share);
            let mut rec = Recording::new();
            rec.commands.push(Command::Upload { buffer, data: super::recording::Bytes::Borrowed(bytemuck::cast_slice(&got)) });
            self.native.run(rec)?;
        }
        Ok(())
    }
}

/// The share of a buffer's values that differ.
fn share_of(scalar: Scalar, got: &[u32], want: &[u32]) -> f64 {
    match scalar {
        Scalar::F32 => differing(bytemuck::cast_slice(got), bytemuck::cast_slice(want)),
        Scalar::F16 => {
            let wide = |words: &[u32]| bytemuck::cast_slice::<_, half::f16>(words).iter().map(|v| v.to_f32()).collect::<Vec<_>>();
            differing(&wide(got), &wide(want))
        }
        _ => got.iter().zip(want).filter(|(a, b)| a != b).count() as f64 / want.len().max(1) as f64,
    }
}

/// The share of values that differ.
fn differing(got: &[f32], want: &[f32]) -> f64 {
    let square = |v: &f32| if v.is_finite() { f64::from(*v) * f64::from(*v) } else { 0.0 };
    let size = (want.iter().map(square).sum::<f64>() / want.len().max(1) as f64).sqrt();
    let apart = |a: f32, b: f32| {
        let (a, b) = (f64::from(a), f64::from(b));
        let same = a == b || (a.is_nan() && b.is_nan()) || (b.is_finite() && (a - b).abs() <= TOLERANCE * (b.abs() + size));
        !same
    };
    got.iter().zip(want).filter(|(a, b)| apart(**a, **b)).count() as f64 / want.len().max(1) as f64
}

fn one(command: Command<'_>) -> Recording<'_> {
    let mut rec = Recording::new();
    rec.commands.push(command);
    rec
}

/// All words of a buffer.
fn words(engine: &mut dyn Engine, buffer: RawBuffer) -> Result<Vec<u32>> {
    let mut rec = Recording::new();
    rec.commands.push(Command::Download { buffer, slot: 0 });
    rec.downloads = 1;
    let all = engine.run(rec)?.into_words().pop().flatten();
    all.ok_or_else(|| Error::internal("download", "brought nothing"))
}

impl Engine for Checked {
    fn describe(&self) -> String {
        self.engine.describe()
    }

    fn limits(&self) -> Limits {
        self.engine.limits()
    }

    fn run(&mut self, recording: Recording<'_>) -> Result<Downloads> {
        let (commands, downloads) = recording.into_commands()?;
        let mut out = Downloads::new(downloads);
        for command in commands {
            self.step(command, &mut out)?;
        }
        Ok(out)
    }

    fn fingerprint(&self) -> String {
        self.engine.fingerprint()
    }

    fn profile(&self) -> &Profile {
        self.engine.profile()
    }

    fn profile_mut(&mut self) -> &mut Profile {
        self.engine.profile_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::kernels::{self, axpy::AxpyParams, gram::GramParams};

    #[test]
    fn an_engine_that_computes_right_differs_nowhere_and_its_results_come_back() {
        let (mut engine, differences) = Checked::new(Box::new(CpuEngine::new()));
        let mut rec = Recording::new();
        let x = rec.upload("x", vec![1.0f32, 2.0, f32::NAN]);
        let y = rec.upload("y", vec![1.0f32, 1.0, 1.0]);
        kernels::axpy(&mut rec, AxpyParams { n: 2, alpha: 3.0 }, x, y);
        let pending = rec.download(y);
        rec.free(x);
        rec.free(y);
        let mut back = engine.run(rec).unwrap();
        assert_eq!(back.take(pending).unwrap(), [4.0, 7.0, 1.0]);
        assert_eq!(*differences.borrow(), BTreeMap::from([("axpy", 0.0)]));
    }

    /// An engine whose driver launches nothing.
    struct Idle(CpuEngine);

    impl Engine for Idle {
        fn describe(&self) -> String {
            "idle".to_owned()
        }

        fn limits(&self) -> Limits {
            self.0.limits()
        }

        fn run(&mut self, mut recording: Recording<'_>) -> Result<Downloads> {
            recording.commands.retain(|command| !matches!(command, Command::Dispatch(_)));
            self.0.run(recording)
        }

        fn profile(&self) -> &Profile {
            self.0.profile()
        }

        fn profile_mut(&mut self) -> &mut Profile {
            self.0.profile_mut()
        }
    }

    #[test]
    fn a_kernel_that_writes_nothing_differs_though_it_may_leave_a_part_undefined() {
        let (mut engine, differences) = Checked::new(Box::new(Idle(CpuEngine::new())));
        let mut rec = Recording::new();
        let x = rec.upload("x", vec![1.0f32; 64]);
        let g = rec.zeros::<f32>("g", 64);
        kernels::gram(&mut rec, GramParams { n_tok: 8, d: 8, ldx: 8, ldg: 8, rows: 8, ..Default::default() }, x, g);
        engine.run(rec).unwrap();
        assert_eq!(*differences.borrow(), BTreeMap::from([("gram", 36.0 / 64.0)]));
    }

    #[test]
    fn values_differ_by_more_than_rounding() {
        assert_eq!(differing(&[1.0, 2.0, f32::NAN, 0.0], &[1.0001, 2.1, f32::NAN, 1e-5]), 0.25);
        assert_eq!(differing(&[f32::NAN, 1.0], &[1.0, f32::INFINITY]), 1.0);
        assert_eq!(differing(&[], &[]), 0.0);
    }
}
