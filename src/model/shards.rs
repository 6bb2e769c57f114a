//! Which files of a folder hold the weights.

use super::json;
use crate::{Error, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = ".safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// The weight files of a folder, sorted, and what an index promises about them.
pub(super) struct Shards {
    pub files: Vec<PathBuf>,
    pub index: Option<Index>,
}

pub(super) struct Index {
    pub path: PathBuf,
    /// Tensor to file name.
    pub weight_map: BTreeMap<String, String>,
}

/// `model.safetensors` if it exists, else the shards of the folder's one index, else its one safetensors file.
pub(super) fn find(dir: &Path) -> Result<Shards> {
    let single = dir.join(SINGLE);
    if single.exists() {
        return Ok(Shards { files: vec![single], index: None });
    }
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .and_then(|entries| entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect())
        .map_err(|e| Error::input(dir.display(), "cannot be listed").caused_by(e))?;
    names.sort();
    let with_end = |end: &str| names.iter().filter(|n| n.ends_with(end)).collect::<Vec<_>>();
    match (with_end(INDEX).as_slice(), with_end(".safetensors").as_slice()) {
        ([index], _) => from_index(dir, dir.join(index)),
        ([], [file]) => Ok(Shards { files: vec![dir.join(file)], index: None }),
        ([], []) if names.iter().any(|n| n.ends_with(".bin") || n.ends_with(".pth") || n.ends_with(".pt")) => {
            Err(Error::input(dir.display(), "holds no safetensors file; convert the PyTorch weights to safetensors first"))
        }
        ([], []) => Err(Error::input(dir.display(), "holds no safetensors file")),
        ([], several) => Err(Error::input(dir.display(), format!("holds {} safetensors files but no *{INDEX}", several.len()))),
        (several, _) => Err(Error::input(dir.display(), format!("holds {} *{INDEX} files; keep one", several.len()))),
    }
}

fn from_index(dir: &Path, path: PathBuf) -> Result<Shards> {
    let bad = |message: String| Error::input(path.display(), message);
    let meta = std::fs::metadata(&path).map_err(|e| bad("cannot be read".into()).caused_by(e))?;
    if !meta.is_file() || meta.len() > MAX_INDEX_BYTES {
        return Err(bad(format!("is not a file of at most {} MiB", MAX_INDEX_BYTES >> 20)));
    }
    let bytes = std::fs::read(&path).map_err(|e| bad("cannot be read".into()).caused_by(e))?;
    let value = json::parse(&bytes).map_err(|e| bad("is not valid JSON".into()).caused_by(e))?;
    let map = value.get("weight_map").and_then(Value::as_object).filter(|m| !m.is_empty());
    let mut weight_map = BTreeMap::new();
    for (tensor, file) in map.ok_or_else(|| bad("has no `weight_map` with tensors".into()))? {
        let Some(name) = file.as_str() else {
            return Err(bad(format!("maps tensor {tensor} to {}, not to a file name", json::brief(file))));
        };
        // A name with folders in it could reach any file of the machine.
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) || name.contains(['/', '\\']) {
            return Err(bad(format!("maps tensor {tensor} to {name:?}, which is not a plain file name")));
        }
        if !dir.join(name).is_file() {
            return Err(bad(format!("maps tensor {tensor} to {name}, but {} does not exist", dir.join(name).display())));
        }
        weight_map.insert(tensor.clone(), name.to_owned());
    }
    let files = weight_map.values().collect::<BTreeSet<_>>().into_iter().map(|name| dir.join(name)).collect();
    Ok(Shards { files, index: Some(Index { path, weight_map }) })
}
