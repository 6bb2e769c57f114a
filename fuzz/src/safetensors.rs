//! Folders of safetensors with something changed: a config, a header, or tensors with a header that is true to them.

use crate::archive::{Files, NAMES};
use crate::choice::Choice;
use crate::json;
use aespa_gpu::model::{Config, spec_of};
use serde_json::{Map, Value};

const CONFIG: usize = 0;
const WEIGHTS: usize = 1;
/// No tensor and no model gets larger than this.
const MOST: usize = 1 << 18;

struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    bytes: Vec<u8>,
}

/// Changes a folder with a knowledge of what its bytes mean.
pub fn mutate(files: &mut Files, choice: &mut Choice) {
    match choice.below(10) {
        0..4 => edit_json(files, CONFIG, choice),
        4..8 => {
            let weights: Vec<usize> = (0..files.len()).filter(|i| NAMES[files[*i].0].ends_with(".safetensors")).collect();
            if let Some(at) = weights.get(choice.below(weights.len())) {
                let file = &mut files[*at].1;
                if choice.one_in(2) { edit_header(file, choice) } else { edit_tensors(file, choice) }
            }
        }
        8 => {
            edit_json(files, CONFIG, choice);
            refit(files, choice);
        }
        _ => {
            let name = choice.below(NAMES.len());
            edit_json(files, name, choice);
            if choice.one_in(20) {
                files.retain(|f| f.0 != name);
            }
        }
    }
}

fn edit_json(files: &mut Files, name: usize, choice: &mut Choice) {
    let Some((_, content)) = files.iter_mut().find(|f| f.0 == name) else { return };
    if let Ok(mut value) = serde_json::from_slice::<Value>(content) {
        json::mutate(&mut value, choice);
        *content = value.to_string().into_bytes();
    }
}

fn split(file: &[u8]) -> Option<(Map<String, Value>, &[u8])> {
    let (length, rest) = file.split_first_chunk::<8>()?;
    let (header, data) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    Some((serde_json::from_slice(header).ok()?, data))
}

fn join(header: &Map<String, Value>, data: &[u8]) -> Vec<u8> {
    let header = serde_json::to_vec(header).expect("JSON can be written");
    [&(header.len() as u64).to_le_bytes()[..], &header, data].concat()
}

/// A header that lies.
fn edit_header(file: &mut Vec<u8>, choice: &mut Choice) {
    let Some((header, data)) = split(file) else { return };
    let mut header = Value::Object(header);
    json::mutate(&mut header, choice);
    if let Value::Object(header) = header {
        *file = join(&header, data);
    }
}

fn tensors(file: &[u8]) -> Option<Vec<Tensor>> {
    let (header, data) = split(file)?;
    let mut all: Vec<(u64, Tensor)> = Vec::new();
    for (name, info) in &header {
        let numbers = |key: &str| -> Option<Vec<u64>> { info.get(key)?.as_array()?.iter().map(Value::as_u64).collect() };
        let (Some(dtype), Some(shape), Some(range)) =
            (info.get("dtype").and_then(Value::as_str), numbers("shape"), numbers("data_offsets"))
        else {
            continue;
        };
        let [start, end] = range[..] else { continue };
        let bytes = data.get(start as usize..end as usize).unwrap_or_default().to_vec();
        all.push((start, Tensor { name: name.clone(), dtype: dtype.to_owned(), shape, bytes }));
    }
    all.sort_by_key(|(start, _)| *start);
    Some(all.into_iter().map(|(_, tensor)| tensor).collect())
}

fn size(dtype: &str) -> u64 {
    match dtype {
        "I64" | "U64" | "F64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        _ => 1,
    }
}

/// A file whose header is true, unless a tensor would be too large.
fn lay_out(tensors: Vec<Tensor>) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for Tensor { name, dtype, shape, mut bytes } in tensors {
        let wanted = shape.iter().try_fold(size(&dtype), |n, d| n.checked_mul(*d)).and_then(|n| usize::try_from(n).ok());
        if let Some(wanted) = wanted.filter(|n| *n <= MOST) {
            bytes.resize(wanted, 0);
        }
        let start = data.len();
        data.extend(bytes);
        header.insert(name, serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
    }
    join(&header, &data)
}

fn edit_tensors(file: &mut Vec<u8>, choice: &mut Choice) {
    let Some(mut all) = tensors(file).filter(|all| !all.is_empty()) else { return };
    let at = choice.below(all.len());
    let other = choice.below(all.len());
    match choice.below(7) {
        0 => drop(all.remove(at)),
        1 => all[at].dtype = choice.of(&["F32", "F16", "BF16", "I32", "U32", "I64", "U8", "BOOL", "F8_E4M3"]).to_owned(),
        2 => {
            let dim = choice.below(all[at].shape.len());
            if let Some(d) = all[at].shape.get_mut(dim) {
                *d = choice.near(*d);
            }
        }
        3 => match choice.below(3) {
            0 => all[at].shape.reverse(),
            1 => drop(all[at].shape.pop()),
            _ => all[at].shape.push(choice.below(4) as u64),
        },
        4 => {
            let name = std::mem::take(&mut all[at].name);
            all[at].name = std::mem::replace(&mut all[other].name, name);
        }
        5 => {
            let name = all[at].name.replace(".0.", ".1.").replace(".weight", if choice.one_in(2) { ".bias" } else { ".scales" });
            let Tensor { dtype, shape, bytes, .. } = &all[other];
            let copy = Tensor { name, dtype: dtype.clone(), shape: shape.clone(), bytes: bytes.clone() };
            all.push(copy);
        }
        _ => fill(&mut all[at].bytes, choice),
    }
    *file = lay_out(all);
}

/// Overwrites a part of the data with what codes, scales and zero points should not be.
pub fn fill(bytes: &mut [u8], choice: &mut Choice) {
    let start = choice.below(bytes.len());
    let part = &mut bytes[start..];
    let longest = if choice.one_in(3) { part.len() } else { 8 };
    let end = 1 + choice.below(longest);
    const PATTERNS: &[&[u8]] =
        &[&[0], &[0xff], &[0, 0x7c], &[0, 0x7e], &[0xff, 0x7b], &[1, 0], &[0x80, 0x7f], &[0, 0, 0x80, 0x7f], &[0x88]];
    let pattern = choice.of(PATTERNS);
    part.iter_mut().take(end).zip(pattern.iter().cycle()).for_each(|(byte, new)| *byte = *new);
}

/// The plain tensors that the config asks for, if they are small: what comes after the checks of shapes sees odd configs too.
fn refit(files: &mut Files, choice: &mut Choice) {
    let Some(text) = files.iter().find(|f| f.0 == CONFIG).map(|f| f.1.clone()) else { return };
    let Ok(mut value) = serde_json::from_slice::<Map<String, Value>>(&text) else { return };
    value.shift_remove("quantization_config");
    let text = serde_json::to_vec(&value).expect("JSON can be written");
    let Ok(config) = Config::parse("config.json".into(), &text) else { return };
    let Ok(spec) = spec_of(&config) else { return };
    let wanted = if spec.n_layer > 8 { Vec::new() } else { spec.tensors() };
    let elements = wanted.iter().try_fold(0usize, |n, t| n.checked_add(t.shape.iter().product()));
    if wanted.is_empty() || elements.is_none_or(|n| n > MOST / 2) {
        return;
    }
    let dtype = choice.of(&["F32", "F16", "BF16"]);
    let made = wanted.into_iter().map(|t| {
        let shape: Vec<u64> = t.shape.iter().map(|d| *d as u64).collect();
        let bytes = choice.bytes(t.shape.iter().product::<usize>() * size(dtype) as usize);
        // Exponents of numbers near 1.
        let bytes = bytes.iter().enumerate().map(|(i, b)| if i % 2 == 1 { 0x3c | b & 0x83 } else { *b }).collect();
        Tensor { name: t.name, dtype: dtype.to_owned(), shape, bytes }
    });
    let weights = lay_out(made.collect());
    files.retain(|f| f.0 != CONFIG && !NAMES[f.0].starts_with("model"));
    files.extend([(CONFIG, text), (WEIGHTS, weights)]);
}
