//! Which modules a config group means: by exact name, by `re:` and a regular expression that matches from the start of the name, or
//! by the class `Linear`, in this order of precedence.

use crate::quant::Scheme;
use regex::{Regex, RegexBuilder};
use std::collections::BTreeMap;

/// The class name of all linears.
pub(super) const CLASS: &str = "Linear";
const PATTERN: &str = "re:";
/// A short pattern can stand for a large automaton: with these, all of them take some 100 MB at most.
const MAX_PATTERNS: usize = 256;
const MAX_PATTERN_BYTES: usize = 1 << 18;

/// The schemes of a folder by target.
#[derive(Debug, Default)]
pub(super) struct Schemes {
    names: BTreeMap<String, Scheme>,
    patterns: Vec<(Regex, Scheme)>,
    class: Option<Scheme>,
}

impl Schemes {
    /// Says what is wrong with a target that cannot be understood.
    pub fn add(&mut self, target: &str, scheme: Scheme) -> Result<(), String> {
        if target == CLASS {
            self.class = Some(scheme);
        } else if let Some(pattern) = target.strip_prefix(PATTERN) {
            if self.patterns.len() == MAX_PATTERNS {
                return Err(format!("is one pattern too many: {MAX_PATTERNS} can be read"));
            }
            let regex = RegexBuilder::new(&format!("^(?:{pattern})")).size_limit(MAX_PATTERN_BYTES).build();
            let regex = regex.map_err(|e| format!("is no regular expression: {e}"))?;
            self.patterns.push((regex, scheme));
        } else {
            self.names.insert(target.to_owned(), scheme);
        }
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.patterns.is_empty() && self.class.is_none()
    }

    pub fn scheme(&self, module: &str) -> Option<Scheme> {
        let by_pattern = || self.patterns.iter().find(|(regex, _)| regex.is_match(module)).map(|(_, scheme)| *scheme);
        self.names.get(module).copied().or_else(by_pattern).or(self.class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_before_patterns_and_patterns_before_the_class() {
        let scheme = |bits| Scheme { bits, group: None, symmetric: true, keep_embeddings: false };
        let mut schemes = Schemes::default();
        assert!(schemes.is_empty());
        schemes.add("Linear", scheme(2)).unwrap();
        schemes.add(r"re:model\.layers\.\d+\.mlp\.down_proj$", scheme(3)).unwrap();
        schemes.add("model.layers.7.mlp.down_proj", scheme(4)).unwrap();
        assert_eq!(schemes.scheme("model.layers.12.mlp.down_proj"), Some(scheme(3)));
        assert_eq!(schemes.scheme("model.layers.7.mlp.down_proj"), Some(scheme(4)));
        assert_eq!(schemes.scheme("model.layers.12.mlp.down_proj2"), Some(scheme(2)));
        assert_eq!(schemes.scheme("a.model.layers.12.mlp.down_proj"), Some(scheme(2)));
        assert!(schemes.add("re:(", scheme(2)).unwrap_err().contains("regular expression"));
        assert!(schemes.add(r"re:(\w{100}){100}", scheme(2)).unwrap_err().contains("regular expression"));
        (1..MAX_PATTERNS).for_each(|i| schemes.add(&format!("re:model.{i}"), scheme(2)).unwrap());
        assert!(schemes.add("re:x", scheme(2)).unwrap_err().contains("too many"));
    }
}
