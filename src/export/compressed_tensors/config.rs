//! The `quantization_config` of `config.json`, written and read.

use super::targets::{CLASS, Schemes};
use crate::model::{Config, ModelSpec, Section};
use crate::quant::Scheme;
use crate::{Error, Result};
use serde_json::{Map, Value, json};

pub(super) const METHOD: &str = "compressed-tensors";
/// The first version of the library that packs densely, and so the oldest that reads all that we write.
pub(super) const VERSION: &str = "0.17.0";
const KEY: &str = "quantization_config";

/// How codes are stored, and whether inputs are rounded at run time.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub format: &'static str,
    /// Inputs become whole numbers of 8 bits, each token with a scale of its own.
    pub rounds_inputs: bool,
}

pub(super) const PACKED: Layout = Layout { format: "pack-quantized", rounds_inputs: false };
pub(super) const INTEGER: Layout = Layout { format: "int-quantized", rounds_inputs: true };

impl Layout {
    /// Is a `quantization_config` one of this layout?
    pub fn reads(&self, config: &Value) -> bool {
        let text = |key: &str| config.get(key).and_then(Value::as_str);
        // What has another format is read as the first, which says what is wrong with it.
        text("quant_method") == Some(METHOD) && (text("format") == Some(INTEGER.format)) == (self.format == INTEGER.format)
    }

    fn input_activations(&self) -> Value {
        match self.rounds_inputs {
            false => Value::Null,
            true => json!({
                "num_bits": 8,
                "type": "int",
                "symmetric": true,
                "strategy": "token",
                "group_size": null,
                "block_structure": null,
                "dynamic": true,
                "actorder": null,
                "observer": null,
                "observer_kwargs": {},
            }),
        }
    }
}

/// Codes that fill words without a rest were packed the same way before [`VERSION`].
pub(super) fn same_in_old_versions(scheme: Scheme) -> bool {
    32 % scheme.bits == 0
}

pub(super) fn write(config: &mut Map<String, Value>, spec: &ModelSpec, scheme: Scheme, layout: Layout) {
    // A tied head is still a module of its own to the readers, under its usual name.
    let head = if spec.tied_head { "lm_head" } else { &spec.head.module };
    let weights = json!({
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": if scheme.group.is_some() { "group" } else { "channel" },
        "group_size": scheme.group,
        "block_structure": null,
        "dynamic": false,
        "actorder": null,
        "observer": null,
        "observer_kwargs": {},
    });
    let group = json!({
        "targets": [CLASS],
        "weights": weights,
        "input_activations": layout.input_activations(),
        "output_activations": null,
        "format": layout.format,
    });
    let value = json!({
        "quant_method": METHOD,
        "format": layout.format,
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": { "group_0": group },
        "ignore": [head],
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
        "sparsity_config": {},
        "transform_config": {},
    });
    config.insert(KEY.into(), value);
}

/// The schemes of a folder, or an input error that names the key which asks for something we do not read.
pub(super) fn read(config: &Config, layout: Layout) -> Result<Schemes> {
    let root = config.root();
    let section = root.section(KEY)?.ok_or_else(|| root.error(KEY, "is missing"))?;
    expect(&section, "format", &[layout.format])?;
    if let Some(status) = section.text("quantization_status")?
        && status != "compressed"
    {
        return Err(section.error("quantization_status", format!("is {status:?}; only compressed folders can be read")));
    }
    for key in ["kv_cache_scheme", "sparsity_config", "transform_config"] {
        expect_nothing(&section, key)?;
    }
    let groups = required_section(&section, "config_groups")?;
    let mut schemes = Schemes::default();
    for name in groups.keys() {
        let group = required_section(&groups, name)?;
        let scheme = read_group(&group, layout)?;
        if layout.format == PACKED.format && !same_in_old_versions(scheme) && !is_dense(section.text("version")?) {
            let message = format!("must be at least {VERSION}, since older ones packed {} bits differently", scheme.bits);
            return Err(section.error("version", message));
        }
        let targets = group.get("targets").and_then(Value::as_array).ok_or_else(|| group.error("targets", "is no list"))?;
        for target in targets {
            let target = target.as_str().ok_or_else(|| group.error("targets", format!("holds {target}, which is no text")))?;
            schemes.add(target, scheme).map_err(|why| group.error("targets", format!("{target:?} {why}")))?;
        }
    }
    if schemes.is_empty() {
        return Err(section.error("config_groups", "has no targets"));
    }
    Ok(schemes)
}

fn read_group(group: &Section<'_>, layout: Layout) -> Result<Scheme> {
    let plain = |key: &str| {
        expect_nothing(group, key).map_err(|e| Error { message: format!("{}: quantized activations cannot be read", e.message), ..e })
    };
    plain("output_activations")?;
    match group.section("input_activations")? {
        Some(inputs) if layout.rounds_inputs => read_inputs(&inputs)?,
        _ => plain("input_activations")?,
    }
    if group.get("format").is_some() {
        expect(group, "format", &[layout.format])?;
    }
    read_weights(&required_section(group, "weights")?)
}

/// Only what we write ourselves.
fn read_inputs(inputs: &Section<'_>) -> Result<()> {
    if inputs.required_size("num_bits", 32)? != 8 {
        return Err(inputs.error("num_bits", "must be 8"));
    }
    expect(inputs, "strategy", &["token"])?;
    for key in ["symmetric", "dynamic"] {
        if !inputs.flag(key)?.unwrap_or(false) {
            return Err(inputs.error(key, "must be true"));
        }
    }
    Ok(())
}

fn read_weights(weights: &Section<'_>) -> Result<Scheme> {
    if weights.get("type").is_some() {
        expect(weights, "type", &["int"])?;
    }
    if weights.flag("dynamic")?.unwrap_or(false) {
        return Err(weights.error("dynamic", "must be false"));
    }
    // Ordering by activations that leaves columns in place does not show in the stored tensors.
    if weights.get("actorder").is_some_and(|v| v.as_bool() != Some(false)) {
        expect(weights, "actorder", &["static", "weight"])?;
    }
    let bits = weights.required_size("num_bits", 32)?;
    let group_size = match expect(weights, "strategy", &["group", "channel"])? {
        "group" => weights.required_size("group_size", 1 << 20)? as i64,
        _ => -1,
    };
    let symmetric = weights.flag("symmetric")?.unwrap_or(true);
    Scheme::new(bits as u32, group_size, symmetric).map_err(|e| {
        let key = if e.subject == "--bits" { "num_bits" } else { "group_size" };
        weights.error(key, e.message)
    })
}

fn required_section<'a>(section: &Section<'a>, key: &str) -> Result<Section<'a>> {
    section.section(key)?.ok_or_else(|| section.error(key, "is missing"))
}

fn expect<'a>(section: &Section<'a>, key: &str, allowed: &[&str]) -> Result<&'a str> {
    match section.text(key)? {
        Some(text) if allowed.contains(&text) => Ok(text),
        Some(text) => Err(section.error(key, format!("is {text:?}; we read {}", allowed.join(" and ")))),
        None => Err(section.error(key, format!("is missing; we read {}", allowed.join(" and ")))),
    }
}

/// Missing, null or an empty object.
fn expect_nothing(section: &Section<'_>, key: &str) -> Result<()> {
    match section.get(key) {
        None => Ok(()),
        Some(Value::Object(map)) if map.is_empty() => Ok(()),
        Some(_) => Err(section.error(key, "must be null or empty")),
    }
}

/// Is it [`VERSION`] or later?
fn is_dense(version: Option<&str>) -> bool {
    let mut parts = version.unwrap_or_default().split('.').map(|part| part.parse::<u32>());
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (0, 17),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(change: impl Fn(&mut Value)) -> Result<Schemes> {
        let weights = json!({"num_bits": 3, "type": "int", "symmetric": false, "strategy": "group", "group_size": 64, "dynamic": false});
        let group = json!({"targets": ["Linear"], "weights": weights, "input_activations": null});
        let mut value = json!({"quant_method": METHOD, "format": PACKED.format, "version": "0.20.1", "config_groups": {"group_0": group}});
        change(&mut value);
        let text = json!({ KEY: value }).to_string();
        read(&Config::parse("dir/config.json".into(), text.as_bytes()).unwrap(), PACKED)
    }

    #[test]
    fn a_config_is_read_or_refused_by_key() {
        let any = "model.layers.0.mlp.up_proj";
        assert_eq!(
            written(|_| ()).unwrap().scheme(any),
            Some(Scheme { bits: 3, group: Some(64), symmetric: false, keep_embeddings: false })
        );
        type Change = fn(&mut Value);
        let refused: [(&str, Change); 15] = [
            ("config_groups.group_1.weights", |v| v["config_groups"]["group_1"] = json!({})),
            ("config_groups.group_0.targets", |v| v["config_groups"]["group_0"]["targets"] = json!(["re:(", "Linear"])),
            ("config_groups.group_0.targets", |v| v["config_groups"]["group_0"]["targets"] = json!([3])),
            ("format", |v| v["format"] = "int-quantized".into()),
            ("version", |v| v["version"] = "0.16.9".into()),
            ("version", |v| v["version"] = Value::Null),
            ("quantization_status", |v| v["quantization_status"] = "frozen".into()),
            ("kv_cache_scheme", |v| v["kv_cache_scheme"] = json!({"num_bits": 8})),
            ("config_groups", |v| v["config_groups"] = json!({})),
            ("config_groups.group_0.input_activations", |v| v["config_groups"]["group_0"]["input_activations"] = json!({"num_bits": 8})),
            ("config_groups.group_0.weights.num_bits", |v| v["config_groups"]["group_0"]["weights"]["num_bits"] = 9.into()),
            ("config_groups.group_0.weights.group_size", |v| v["config_groups"]["group_0"]["weights"]["group_size"] = 48.into()),
            ("config_groups.group_0.weights.type", |v| v["config_groups"]["group_0"]["weights"]["type"] = "float".into()),
            ("config_groups.group_0.weights.strategy", |v| v["config_groups"]["group_0"]["weights"]["strategy"] = "tensor".into()),
            ("config_groups.group_0.weights.actorder", |v| v["config_groups"]["group_0"]["weights"]["actorder"] = "group".into()),
        ];
        for (key, change) in refused {
            let e = written(change).unwrap_err();
            assert_eq!((e.subject.as_str(), e.exit_code()), ("dir/config.json", 2));
            assert!(e.message.contains(&format!("`quantization_config.{key}`")), "{key}: {e}");
        }
        assert!(written(|v| v["config_groups"]["group_0"]["weights"]["num_bits"] = 4.into()).is_ok());
    }

    #[test]
    fn rounded_inputs_are_read_as_they_are_written() {
        let text = r#"{"model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
            "vocab_size": 4}"#;
        let config = Config::parse("config.json".into(), text.as_bytes()).unwrap();
        let spec = crate::model::spec_of(&config).unwrap();
        let scheme = Scheme::new(8, -1, true).unwrap();
        let mut map = Map::new();
        write(&mut map, &spec, scheme, INTEGER);
        assert!(INTEGER.reads(&map[KEY]) && !PACKED.reads(&map[KEY]));
        let read_back = |map: &Map<String, Value>| read(&Config::parse("config.json".into(), json!(map).to_string().as_bytes())?, INTEGER);
        assert_eq!(read_back(&map).unwrap().scheme("model.layers.0.mlp.up_proj"), Some(scheme));
        for (key, wrong) in [("num_bits", json!(4)), ("strategy", json!("tensor")), ("dynamic", json!(false)), ("symmetric", json!(false))]
        {
            let mut map = map.clone();
            map[KEY]["config_groups"]["group_0"]["input_activations"][key] = wrong;
            let e = read_back(&map).unwrap_err();
            assert!(e.message.contains(&format!("input_activations.{key}`")), "{e}");
        }
    }
}
