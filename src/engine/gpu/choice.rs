//! Which text of a kernel an adapter runs, and with which constants.
//!
//! A recording carries the base shader's defaults. Here a launch gets the first variant that the adapter has what it takes for, and tiles
//! that were found to suit the adapter; the grid follows from both. What a launch gets depends on the adapter, its driver and the choices
//! made when the engine was opened, never on time, so runs can be repeated.

use crate::engine::Scalar;
use crate::engine::kernel::{BindingScalar, Constants};
use crate::engine::recording::{Dispatch, MAX_GROUPS};
use crate::engine::shader::{Matrices, Needs, Variant};
use crate::tensor::Dtype;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

/// What an adapter can do that not every one can.
#[derive(Clone, Debug, Default)]
pub struct Ability {
    /// Threads of its smallest subgroups, 0 without subgroup operations.
    pub subgroup_min: u32,
    /// Cooperative matrices with f32 sums: side and type of the operands.
    pub matrices: Vec<(u32, Scalar)>,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
}

impl Ability {
    /// Is everything there, whatever the launch?
    pub fn has(&self, needs: Needs) -> bool {
        match needs {
            Needs::Subgroups(least) => self.subgroup_min >= least,
            Needs::Matrices(Matrices { side, operands, workgroup_bytes }) => {
                self.matrices.contains(&(side, operands)) && self.workgroup_bytes >= workgroup_bytes
            }
        }
    }
}

/// Which variants an engine may run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Variants {
    /// The base shaders only.
    None,
    /// Those that use subgroups. Cooperative matrices are experimental in wgpu.
    #[default]
    Stable,
    /// All that the adapter has what it takes for.
    All,
}

/// What runs for a launch.
#[derive(Clone, Debug)]
pub struct Choice<'a> {
    /// The index of the kernel's variant; the base, if none.
    pub text: Option<usize>,
    pub constants: Cow<'a, Constants>,
    pub grid: [u32; 3],
}

/// A text of a kernel for an operand type: the kernel's name, the index of the variant, f16 operands?
pub(super) type Version = (&'static str, Option<usize>, bool);

/// The choices of one engine.
#[derive(Debug, Default)]
pub(super) struct Choices {
    ability: Ability,
    pub variants: Variants,
    tiles: HashMap<Version, Vec<(String, u32)>>,
    /// Variants that the driver does not take.
    broken: HashSet<Version>,
}

impl Choices {
    pub fn new(ability: Ability) -> Self {
        Self { ability, ..Self::default() }
    }

    /// Launches run with the variant and the tiles of their kernel; where the grid would become too large, as they were recorded.
    pub fn of<'a>(&self, dispatch: &'a Dispatch) -> Choice<'a> {
        let kernel = dispatch.kernel;
        let text = kernel.variants.iter().enumerate().position(|(index, variant)| self.takes(index, variant, dispatch));
        let tiles = self.tiles.get(&version(dispatch, text));
        let recorded = Choice { text: None, constants: Cow::Borrowed(&dispatch.constants), grid: dispatch.grid };
        if text.is_none() && tiles.is_none() {
            return recorded;
        }
        let constants = Constants::of(kernel.shader(text), kernel.bindings, &dispatch.buffers).with(tiles.map_or(&[], Vec::as_slice));
        let grid = (kernel.grid)(&dispatch.params, &constants);
        if grid.iter().any(|groups| *groups > MAX_GROUPS) {
            return recorded;
        }
        Choice { text, constants: Cow::Owned(constants), grid }
    }

    fn takes(&self, index: usize, variant: &Variant, dispatch: &Dispatch) -> bool {
        let allowed = match (self.variants, variant.needs) {
            (Variants::None, _) | (Variants::Stable, Needs::Matrices(_)) => false,
            (Variants::All, _) | (Variants::Stable, Needs::Subgroups(_)) => true,
        };
        allowed && self.ability.has(variant.needs) && holds(variant, dispatch) && !self.broken.contains(&version(dispatch, Some(index)))
    }

    /// From now on another text runs for launches like this one.
    pub fn give_up(&mut self, dispatch: &Dispatch, text: usize) {
        self.broken.insert(version(dispatch, Some(text)));
    }

    /// From now on this version runs with these constants.
    pub fn set_tiles(&mut self, version: Version, tiles: Vec<(String, u32)>) {
        self.tiles.insert(version, tiles);
    }
}

/// Can the variant's operands hold a launch's inputs? f32 holds everything.
fn holds(variant: &Variant, dispatch: &Dispatch) -> bool {
    let Needs::Matrices(Matrices { operands: Scalar::F16, .. }) = variant.needs else { return true };
    let inputs = dispatch.kernel.bindings.iter().zip(&dispatch.buffers);
    inputs
        .filter(|(b, _)| matches!(b.scalar, BindingScalar::Elem | BindingScalar::Stored))
        .all(|(_, buffer)| matches!(buffer.scalar, Scalar::F16 | Scalar::Stored(Dtype::F16)))
}

fn version(dispatch: &Dispatch, text: Option<usize>) -> Version {
    (dispatch.kernel.name, text, dispatch.kernel.elem(&dispatch.buffers) == Scalar::F16)
}
