//! What a folder will hold: the model's tensors as the format stores them, and the files that are copied.

use crate::export::plan::Stored;
use crate::export::{Format, Names};
use crate::model::{Checkpoint, Linear};
use crate::quant::Lattice;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Where `transformers` 5 keeps the chat templates that have names.
const TEMPLATES: &str = "additional_chat_templates";

/// The model's tensors in order, quantized matrices as the format stores them, and the names in the file of those that are not quantized. Where
/// nothing is quantized, what the model does not use comes behind, by name; runtimes that look for codes do not take tensors that they do not know.
pub(super) fn all_tensors(
    checkpoint: &Checkpoint,
    format: &Format,
    names: &Names,
    lattices: &BTreeMap<String, Lattice>,
) -> Result<(Vec<Stored>, BTreeMap<String, String>)> {
    let spec = checkpoint.spec();
    let linears: BTreeMap<String, (&Linear, Lattice)> =
        spec.matrices().filter_map(|l| lattices.get(&l.module).map(|lattice| (l.weight(), (l, *lattice)))).collect();
    let used: Vec<String> = spec.tensors().into_iter().map(|t| t.name).collect();
    let known: BTreeSet<&str> = used.iter().map(String::as_str).collect();
    let unused = checkpoint.names().filter(|n| !known.contains(n) && lattices.is_empty());
    let (mut tensors, mut plain) = (Vec::new(), BTreeMap::new());
    for name in used.iter().map(String::as_str).chain(unused) {
        match linears.get(name) {
            Some((linear, lattice)) => tensors.extend(names.rename((format.tensors)(spec, linear, *lattice))),
            None => {
                let raw = checkpoint.raw(name)?;
                if let Some(stored) = names.in_file(name).and_then(|in_file| format.container.plain(in_file, &raw)) {
                    plain.insert(name.to_owned(), stored.name.clone());
                    tensors.push(stored);
                }
            }
        }
    }
    tensors.extend(format.container.added(spec).into_iter().map(|(stored, _)| stored));
    let mut seen = BTreeSet::new();
    match tensors.iter().find(|t| !seen.insert(t.name.as_str())) {
        Some(twice) => Err(Error::input(checkpoint.subject(&twice.name), format!("has a name that {} needs", format.name))),
        None => Ok((tensors, plain)),
    }
}

/// The regular files of a folder that are neither weights nor written by us, and their size. Links are followed: caches use them.
pub(super) fn files_to_copy(folder: &Path) -> Result<(Vec<String>, u64)> {
    let cannot = |e| Error::input(folder.display(), "cannot be listed").caused_by(e);
    let (mut names, mut bytes) = (Vec::new(), 0);
    for entry in fs::read_dir(folder).map_err(cannot)? {
        let name = entry.map_err(cannot)?.file_name();
        let path = folder.join(&name);
        let meta = fs::metadata(&path).map_err(|e| Error::input(path.display(), "cannot be read").caused_by(e))?;
        match name.into_string() {
            Ok(name) if meta.is_file() && !is_weights(&name) && name != "config.json" => {
                bytes += meta.len();
                names.push(name);
            }
            Ok(name) if meta.is_dir() && name == TEMPLATES => {
                for template in fs::read_dir(&path).map_err(cannot)? {
                    let template = template.map_err(cannot)?;
                    if let (Ok(file), true) = (template.file_name().into_string(), template.path().is_file()) {
                        bytes += fs::metadata(template.path()).map_err(cannot)?.len();
                        names.push(format!("{TEMPLATES}/{file}"));
                    }
                }
            }
            Ok(name) if meta.is_file() => tracing::debug!("{name} is not copied: it holds weights or is written anew"),
            Ok(name) => tracing::debug!("{name} is not copied: it is no regular file"),
            Err(name) => return Err(Error::input(folder.join(name).display(), "has a name that is not UTF-8 and cannot be copied")),
        }
    }
    names.sort();
    Ok((names, bytes))
}

/// Weights of any framework: a copy of the original ones beside the quantized ones would be loaded by some readers.
fn is_weights(name: &str) -> bool {
    const ENDS: &[&str] = &[".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"];
    const INDEXES: &[&str] = &[".safetensors.index.json", ".bin.index.json", ".h5.index.json", ".msgpack.index.json"];
    ENDS.iter().chain(INDEXES).any(|end| name.ends_with(end))
}
