//! What is known of one input of a block: its moments, of all windows or of each half of them.

use super::gram::Gram;

/// H of one input and, with a second stream, C and D; on the host.
#[derive(Clone, Debug)]
pub struct Moments {
    pub gram: Gram,
    /// (X̃ − X)ᵀ X / n_tok, [d, d] row-major: rows are channels of the difference.
    pub cross: Option<Vec<f32>>,
    /// Where the linear's output is added to the residual stream R, (R̃ − R)ᵀ X / n_tok, [d_model, d] row-major.
    pub residual: Option<Vec<f32>>,
}

impl Moments {
    /// The moments of two sets of tokens together, in the memory of the first.
    fn merged(mut self, other: &Self) -> Self {
        if self.gram.is_blank() {
            return self;
        }
        let n_tok = self.gram.n_tok + other.gram.n_tok;
        let share = self.gram.n_tok as f32 / n_tok.max(1) as f32;
        let mix = |a: &mut [f32], b: &[f32]| a.iter_mut().zip(b).for_each(|(a, b)| *a = share * *a + (1.0 - share) * b);
        mix(&mut self.gram.h, &other.gram.h);
        for (a, b) in [(&mut self.cross, &other.cross), (&mut self.residual, &other.residual)] {
            if let (Some(a), Some(b)) = (a, b) {
                mix(a, b);
            }
        }
        self.gram.n_tok = n_tok;
        self
    }
}

/// Moments of all windows: of each half of them, where they do not all fit one batch, so that what is learned from one half can be tested on
/// the other.
#[derive(Clone, Debug)]
pub enum Statistic {
    Whole(Moments),
    Halves([Moments; 2]),
}

impl Statistic {
    /// Of two halves of the windows, or of all windows at once.
    pub(super) fn of_halves(moments: Vec<Moments>) -> Self {
        match <[Moments; 2]>::try_from(moments) {
            Ok(halves) => Self::Halves(halves),
            Err(mut one) => Self::Whole(one.remove(0)),
        }
    }

    /// H alone, of all windows at once.
    pub fn of(gram: Gram) -> Self {
        Self::Whole(Moments { gram, cross: None, residual: None })
    }

    pub fn halves(&self) -> Option<&[Moments; 2]> {
        match self {
            Self::Whole(_) => None,
            Self::Halves(halves) => Some(halves),
        }
    }

    /// Was there a second stream?
    pub fn has_cross(&self) -> bool {
        match self {
            Self::Whole(one) | Self::Halves([one, _]) => one.cross.is_some(),
        }
    }

    /// The moments of all windows. What is told of the halves goes: matrices of the widest input are most of what a block takes.
    pub fn into_whole(self) -> Moments {
        match self {
            Self::Whole(whole) => whole,
            Self::Halves([one, other]) => one.merged(&other),
        }
    }
}
