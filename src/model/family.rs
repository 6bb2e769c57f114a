//! The registry of architectures and the choice of one from a `config.json`.

use super::config::Config;
use super::graph::ModelSpec;
use super::llama;
use crate::{Error, Result};

/// An architecture that we know: how to recognise its configs and how to turn one into a [`ModelSpec`].
pub struct Family {
    pub name: &'static str,
    /// The `model_type`s of its configs.
    pub model_types: &'static [&'static str],
    /// The names in `architectures` that mean the language model itself, not a classifier or an adapter on top.
    pub architectures: &'static [&'static str],
    /// One line for help texts: the models that belong here.
    pub about: &'static str,
    pub spec: fn(&Config) -> Result<ModelSpec>,
}

/// One line per architecture.
pub const FAMILIES: &[&Family] = &[&llama::FAMILY];

/// The family of a config: by `model_type`, else by `architectures`; both must agree where both are given.
pub fn find_family(config: &Config) -> Result<&'static Family> {
    let root = config.root();
    let architectures = root.texts("architectures")?.unwrap_or_default();
    let family = match root.text("model_type")? {
        Some(kind) => FAMILIES.iter().find(|f| f.model_types.contains(&kind)).ok_or_else(|| unknown(config, "model_type", kind))?,
        None => {
            let first = architectures.first().ok_or_else(|| root.error("model_type", "is missing"))?;
            FAMILIES.iter().find(|f| f.architectures.contains(first)).ok_or_else(|| unknown(config, "architectures", first))?
        }
    };
    match architectures.iter().find(|a| !family.architectures.contains(a)) {
        Some(other) => Err(unknown(config, "architectures", other)),
        None => Ok(family),
    }
}

/// The model that a config describes, as far as it goes: the type of the weights is in their files.
pub fn spec_of(config: &Config) -> Result<ModelSpec> {
    (find_family(config)?.spec)(config)
}

fn unknown(config: &Config, key: &str, value: &str) -> Error {
    let known: Vec<String> = FAMILIES.iter().map(|f| format!("{} ({})", f.name, f.model_types.join(", "))).collect();
    config.root().error(key, format!("is {value:?}, which no known family has; families (model types): {}", known.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_every_family_is_described() {
        let mut seen = HashSet::new();
        for family in FAMILIES {
            assert!(!family.about.is_empty() && !family.architectures.is_empty(), "{}", family.name);
            assert!(seen.insert(family.name));
        }
        let types: Vec<_> = FAMILIES.iter().flat_map(|f| f.model_types).collect();
        assert_eq!(types.iter().collect::<HashSet<_>>().len(), types.len());
    }

    #[test]
    fn unknown_architectures_are_refused_with_the_list_of_known_ones() {
        let find = |text: &str| find_family(&Config::parse("config.json".into(), text.as_bytes()).unwrap());
        assert_eq!(find(r#"{"model_type": "mistral"}"#).unwrap().name, "llama");
        assert_eq!(find(r#"{"architectures": ["LlamaForCausalLM"]}"#).unwrap().name, "llama");
        for text in [
            r#"{"model_type": "bert"}"#,
            r#"{"architectures": ["BertModel"]}"#,
            r#"{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}"#,
        ] {
            let e = find(text).err().unwrap();
            assert!(e.message.contains("llama (llama, mistral)"), "{e}");
        }
        assert!(find("{}").err().unwrap().message.contains("`model_type` is missing"));
    }
}
