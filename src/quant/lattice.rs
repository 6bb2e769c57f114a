//! What one group of a matrix can stand for in a file: the grid that solvers round to.
//!
//! A code q is a whole number below 2^bits. With the scale s of its group it stands for s (q − z), where the format says which z there
//! can be: one fixed in the middle, whole zero points, or z = −m / s for a stored minimum m, so that the value is s q + m. Scales and
//! minima are values of the type in which the file stores them, or whole numbers of steps of that type which several groups of a row share;
//! solvers round them to that before they choose codes.

use super::Offsets;
use crate::tensor::Dtype;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Lattice {
    pub bits: u32,
    /// Columns per scale; `None`: one scale per output channel.
    pub group: Option<usize>,
    pub offset: Offset,
    /// The type of stored scales and minima, or of the steps that they are counted in.
    pub dtype: Dtype,
    pub steps: Option<Steps>,
}

/// Lattices of two levels: a scale is a whole number of steps, a minimum minus a whole number of steps of its own, and `dtype` is the type of
/// the two steps of a super-block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Steps {
    /// Columns of a super-block, a multiple of the group.
    pub columns: usize,
    /// Of a count.
    pub bits: u32,
}

/// Where the values of a group lie relative to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Offset {
    /// z = 2^(bits − 1), not stored.
    Centre,
    /// The same, and scales of either sign: the codes reach one step further below the middle than above it, and a group may turn that round.
    Signed,
    /// A whole z from `lowest` to 2^bits − 1 for each group.
    Zero { lowest: u32 },
    /// A minimum m for each group: s q + m.
    Minimum,
}

impl Lattice {
    /// The largest code, 2^bits − 1.
    pub fn max_code(&self) -> u32 {
        (1 << self.bits) - 1
    }

    /// The zero point that is fixed in the middle.
    pub fn centre(&self) -> u32 {
        1 << (self.bits - 1)
    }

    /// Is z fixed in the middle?
    pub fn is_centred(&self) -> bool {
        matches!(self.offset, Offset::Centre | Offset::Signed)
    }

    /// Zero points of integer grids that a group may have, for minima all of them.
    pub fn zeros(&self) -> std::ops::RangeInclusive<u32> {
        match self.offset {
            Offset::Centre | Offset::Signed => self.centre()..=self.centre(),
            Offset::Zero { lowest } => lowest..=self.max_code(),
            Offset::Minimum => 0..=self.max_code(),
        }
    }

    /// The type to which scales and minima are rounded one by one.
    pub fn parameter_dtype(&self) -> Dtype {
        if self.steps.is_some() { Dtype::F32 } else { self.dtype }
    }

    /// Counts of steps that a scale may have; those of minima begin at 0 too.
    pub fn counts(&self) -> std::ops::RangeInclusive<i32> {
        match self.steps {
            None => 0..=0,
            Some(Steps { bits, .. }) if self.offset == Offset::Signed => -(1 << (bits - 1))..=(1 << (bits - 1)) - 1,
            Some(Steps { bits, .. }) => 0..=(1 << bits) - 1,
        }
    }

    /// Super-blocks per row of a matrix of `d_in` columns; none where scales have no steps.
    pub fn n_super(&self, d_in: usize) -> usize {
        self.steps.map_or(0, |steps| d_in.div_ceil(steps.columns))
    }

    /// Groups of a super-block in a matrix of `d_in` columns; 0 where scales have no steps.
    pub fn groups_per_super(&self, d_in: usize) -> usize {
        self.steps.map_or(0, |steps| steps.columns / self.group_width(d_in))
    }

    /// Columns per scale in a matrix of `d_in` columns.
    pub fn group_width(&self, d_in: usize) -> usize {
        self.group.unwrap_or(d_in).max(1)
    }

    /// Scales per row of a matrix of `d_in` columns.
    pub fn n_group(&self, d_in: usize) -> usize {
        d_in.div_ceil(self.group_width(d_in)).max(1)
    }

    /// Do groups divide a linear of `d_in` input columns? Runtimes read no others.
    pub fn divides(&self, d_in: usize) -> bool {
        let unit = self.steps.map_or(self.group_width(d_in), |steps| steps.columns);
        d_in.is_multiple_of(unit)
    }

    /// What is stored beside the scales of groups with these zero points: for minima the stored value that z = −m / s came from.
    pub fn offsets(&self, d_in: usize, scales: &[f32], zeros: &[f32], steps: &[[f32; 2]]) -> Offsets {
        match self.offset {
            Offset::Centre | Offset::Signed => Offsets::Centre,
            Offset::Zero { .. } => Offsets::Zeros(zeros.iter().map(|z| *z as u8).collect()),
            Offset::Minimum => {
                let exact = scales.iter().zip(zeros).map(|(s, z)| -s * z);
                let per_super = self.groups_per_super(d_in);
                Offsets::Minima(match self.steps {
                    None => exact.map(|m| self.dtype.round(m)).collect(),
                    // Minus zero would be another number than the reader makes.
                    Some(_) => {
                        exact.enumerate().map(|(at, m)| 0.0 - steps[at / per_super][1] * (-m / steps[at / per_super][1]).round()).collect()
                    }
                })
            }
        }
    }
}
