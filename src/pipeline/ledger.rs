//! What work each stage of a run is, for an estimate.

use crate::engine::Profile;

/// Adds up profiles per stage, in the order in which stages first came.
#[derive(Clone, Debug, Default)]
pub(super) struct Ledger {
    last: Profile,
    stages: Vec<(&'static str, Profile)>,
}

impl Ledger {
    /// Books what `profile` has more than at the last call on `name`.
    pub fn lap(&mut self, name: &'static str, profile: &Profile) {
        let work = profile.since(&self.last);
        self.last = profile.clone();
        match self.stages.iter_mut().find(|(stage, _)| *stage == name) {
            Some((_, all)) => all.add(&work),
            None => self.stages.push((name, work)),
        }
    }

    /// Each stage's work of more of the same, as [`Profile::continued`].
    pub fn continued(&self, next: &Self, times: f64) -> Self {
        let mut all = next.clone();
        for (name, work) in &mut all.stages {
            if let Some((_, less)) = self.stages.iter().find(|(stage, _)| stage == name) {
                *work = less.continued(work, times);
            }
        }
        all
    }

    pub fn stages(&self) -> &[(&'static str, Profile)] {
        &self.stages
    }
}
