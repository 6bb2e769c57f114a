//! `config.json`: a parsed object with typed getters whose errors name the file and the key.

use super::json;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// No published config comes near; a larger file is not a config.
const MAX_BYTES: u64 = 16 << 20;

/// A model's `config.json`.
#[derive(Clone, Debug)]
pub struct Config {
    path: PathBuf,
    root: Map<String, Value>,
}

impl Config {
    /// Reads `dir/config.json`. Errors: unreadable, not JSON, not an object, a key given twice.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::read(dir.join("config.json"), "cannot be read; a model folder needs a config.json")
    }

    /// Reads any such file; `missing` is what an error says where it is not there. Errors as [`Self::open`].
    pub fn read(path: PathBuf, missing: &str) -> Result<Self> {
        let meta = std::fs::metadata(&path).map_err(|e| Error::input(path.display(), missing).caused_by(e))?;
        if !meta.is_file() || meta.len() > MAX_BYTES {
            return Err(Error::input(path.display(), format!("is not a file of at most {} MiB", MAX_BYTES >> 20)));
        }
        let bytes = std::fs::read(&path).map_err(|e| Error::input(path.display(), "cannot be read").caused_by(e))?;
        Self::parse(path, &bytes)
    }

    /// `path` is only named in errors.
    pub fn parse(path: PathBuf, bytes: &[u8]) -> Result<Self> {
        match json::parse(bytes) {
            Ok(Value::Object(root)) => Ok(Self { path, root }),
            Ok(other) => Err(Error::input(path.display(), format!("must be a JSON object, not {}", json::brief(&other)))),
            Err(e) => Err(Error::input(path.display(), "is not valid JSON").caused_by(e)),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole object, for writers that copy a config and change a few keys.
    pub fn json(&self) -> &Map<String, Value> {
        &self.root
    }

    /// The top level, for its getters.
    pub fn root(&self) -> Section<'_> {
        Section { path: &self.path, prefix: String::new(), map: &self.root }
    }

    /// What quantized checkpoints carry; its readers live with the export formats.
    pub fn quantization_config(&self) -> Option<&Value> {
        self.root.get("quantization_config").filter(|v| !v.is_null())
    }
}

/// An object inside a config. A getter returns `None` for a missing or null key and an error for a value of the wrong kind.
#[derive(Clone, Debug)]
pub struct Section<'a> {
    path: &'a Path,
    prefix: String,
    map: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// An error about `key` of this section.
    pub fn error(&self, key: &str, message: impl std::fmt::Display) -> Error {
        Error::input(self.path.display(), format!("`{}{key}` {message}", self.prefix))
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// The key is in the file, be it with the value null: some defaults depend on that.
    pub fn mentions(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// A whole number from 1 to `max`.
    pub fn size(&self, key: &str, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.error(key, format!("must be a whole number from 1 to {max}, not {}", json::brief(value)))),
        }
    }

    pub fn required_size(&self, key: &str, max: usize) -> Result<usize> {
        self.size(key, max)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// A finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(n) if n.is_finite() => Ok(Some(n)),
            _ => Err(self.error(key, format!("must be a number, not {}", json::brief(value)))),
        }
    }

    /// A number that `accept` agrees with; `expect` says what that means: "must be EXPECT".
    pub fn number_where(&self, key: &str, expect: &str, accept: impl Fn(f64) -> bool) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(n) if !accept(n) => Err(self.error(key, format!("must be {expect}, not {n}"))),
            other => Ok(other),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(key, format!("must be true or false, not {}", json::brief(value))))
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(key, format!("must be a string, not {}", json::brief(value))))
    }

    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let texts = value.as_array().and_then(|items| items.iter().map(Value::as_str).collect());
        texts.map(Some).ok_or_else(|| self.error(key, format!("must be a list of strings, not {}", json::brief(value))))
    }

    pub fn section(&self, key: &str) -> Result<Option<Section<'a>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_object() {
            Some(map) => Ok(Some(Section { path: self.path, prefix: format!("{}{key}.", self.prefix), map })),
            None => Err(self.error(key, format!("must be an object, not {}", json::brief(value)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn getters_name_the_file_and_the_key() {
        let text = br#"{"n": 4, "f": 4.0, "zero": 0, "neg": -1, "null": null, "s": "x", "in": {"b": true}, "list": ["a", 1]}"#;
        let config = Config::parse("dir/config.json".into(), text).unwrap();
        let root = config.root();
        assert_eq!(root.size("n", 10).unwrap(), Some(4));
        assert_eq!(root.size("null", 10).unwrap(), None);
        assert!(root.mentions("null") && !root.mentions("nothing"));
        assert_eq!(root.section("in").unwrap().unwrap().flag("b").unwrap(), Some(true));
        for (key, max) in [("f", 10), ("zero", 10), ("neg", 10), ("s", 10), ("n", 3)] {
            let e = root.size(key, max).unwrap_err();
            assert_eq!(e.subject, "dir/config.json");
            assert!(e.message.contains(&format!("`{key}`")), "{e}");
        }
        assert!(root.section("in").unwrap().unwrap().text("b").unwrap_err().message.contains("`in.b`"));
        assert!(root.texts("list").is_err() && root.section("s").is_err());
        assert!(root.required_size("nothing", 9).unwrap_err().message.contains("missing"));
    }
}
