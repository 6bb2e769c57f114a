//! How a matrix is quantized: bits per code, columns per scale, and whether the zero point is free.

use super::{Lattice, Offset};
use crate::tensor::Dtype;
use crate::{Error, Result};
use serde::Serialize;

/// The code widths that can be asked for.
pub const BITS: &[u32] = &[2, 3, 4, 5, 6, 7, 8];
/// The group sizes that can be asked for; -1 is one scale per output channel.
pub const GROUP_SIZES: &[i64] = &[-1, 32, 64, 128];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Scheme {
    pub bits: u32,
    /// Columns per scale; `None`: one scale per output channel.
    pub group: Option<usize>,
    pub symmetric: bool,
    /// Leave the embedding and the head as they are, where the format could quantize them.
    pub keep_embeddings: bool,
}

impl Scheme {
    /// `group_size` -1 means per channel. A usage error names the option whose value is not in [`BITS`] or [`GROUP_SIZES`].
    pub fn new(bits: u32, group_size: i64, symmetric: bool) -> Result<Self> {
        if !BITS.contains(&bits) {
            return Err(Error::usage("--bits", format!("{bits} is not possible; choose one of {}", list(BITS))));
        }
        if !GROUP_SIZES.contains(&group_size) {
            let choices = list(GROUP_SIZES);
            return Err(Error::usage("--group-size", format!("{group_size} is not possible; choose one of {choices} (-1: per channel)")));
        }
        Ok(Self { bits, group: usize::try_from(group_size).ok(), symmetric, keep_embeddings: false })
    }

    /// The group size as options and configs spell it: -1 for per channel.
    pub fn group_size(&self) -> i64 {
        self.group.map_or(-1, |g| g as i64)
    }

    /// The integer lattice of the scheme with scales of a type: every zero point is possible, or one in the middle.
    pub fn lattice(&self, dtype: Dtype) -> Lattice {
        let offset = if self.symmetric { Offset::Centre } else { Offset::Zero { lowest: 0 } };
        Lattice { bits: self.bits, group: self.group, offset, dtype, steps: None }
    }

    /// Do groups divide a linear of `d_in` input columns? Runtimes read no others.
    pub fn divides(&self, d_in: usize) -> bool {
        d_in.is_multiple_of(self.group.unwrap_or(d_in).max(1))
    }

    /// This scheme for a model whose linears (module and input columns) are `linears`: where the group does not divide all of them,
    /// the largest smaller one of [`GROUP_SIZES`] that does takes its place (128 on 576 columns becomes 64), for the whole model,
    /// since not every reader takes different groups in one folder.
    ///
    /// A usage error naming the module where none does.
    pub fn fitted<'a>(&self, linears: impl IntoIterator<Item = (&'a str, usize)>) -> Result<Self> {
        let mut fitted = *self;
        for (module, d_in) in linears {
            while !fitted.divides(d_in) {
                let smaller = GROUP_SIZES.iter().filter_map(|g| usize::try_from(*g).ok()).filter(|g| Some(*g) < fitted.group).max();
                fitted.group = smaller;
                if smaller.is_none() {
                    let message = format!(
                        "neither {} nor a smaller group divides the {d_in} input columns of {module}; choose -1 (per channel) and a format that has it",
                        self.group_size()
                    );
                    return Err(Error::usage("--group-size", message));
                }
            }
        }
        Ok(fitted)
    }
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_values_name_their_option() {
        assert_eq!(Scheme::new(9, 128, true).unwrap_err().subject, "--bits");
        let e = Scheme::new(4, 100, true).unwrap_err();
        assert_eq!((e.subject.as_str(), e.exit_code()), ("--group-size", 2));
    }

    #[test]
    fn groups_shrink_until_they_divide() {
        let fit = |size: i64, widths: &[usize]| Scheme::new(4, size, true).unwrap().fitted(widths.iter().map(|d| ("m", *d)));
        let group = |size: i64, widths: &[usize]| fit(size, widths).unwrap().group_size();
        assert_eq!((group(128, &[512]), group(128, &[576, 1536]), group(128, &[512, 96]), group(-1, &[193])), (128, 64, 32, -1));
        let e = Scheme::new(4, 128, true).unwrap().fitted([("q_proj", 128), ("down_proj", 172)]).unwrap_err();
        assert!(e.message.contains("128") && e.message.contains("down_proj") && e.message.contains("choose -1"), "{e}");
        // A group that another tool chose and that divides stays.
        assert!(Scheme { bits: 4, group: Some(48), symmetric: true, keep_embeddings: false }.divides(96));
    }
}
