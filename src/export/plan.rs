//! Where every tensor will lie: safetensors headers are fixed before the first weight is computed, so that results can be written in
//! place as they arrive and the disk space can be reserved at once.

use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::cmp::Reverse;

/// A tensor of the written folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub name: String,
    /// As safetensors headers spell it: "F16", "I32", ...
    pub dtype: Cow<'static, str>,
    pub shape: Vec<usize>,
    pub bytes: u64,
}

impl Stored {
    pub fn new(name: String, dtype: &'static str, element_size: usize, shape: Vec<usize>) -> Self {
        let bytes = shape.iter().product::<usize>() as u64 * element_size as u64;
        Self { name, dtype: Cow::Borrowed(dtype), shape, bytes }
    }

    fn element_size(&self) -> u64 {
        self.bytes / (self.shape.iter().product::<usize>() as u64).max(1)
    }

    /// An upper bound of this tensor's part of the header.
    fn header_bound(&self) -> u64 {
        let digits = 21; // of the longest u64, and a comma
        let fixed = r#""":{"dtype":"","shape":[],"data_offsets":[]},"#.len();
        (6 * self.name.len() + self.dtype.len() + digits * (self.shape.len() + 2) + fixed) as u64
    }
}

/// One file to write.
#[derive(Debug)]
pub struct Shard {
    pub file_name: String,
    /// What the file begins with: of a safetensors file the 8 length bytes and the JSON, padded with spaces to a multiple of 8.
    pub header: Vec<u8>,
    /// With the offset from the start of the file.
    pub tensors: Vec<(Stored, u64)>,
    pub len: u64,
}

/// Distributes tensors, kept in order, over files of at most `max_shard` bytes whose headers say `metadata`; a single larger tensor gets a file of its own.
pub(super) fn shards(tensors: Vec<Stored>, max_shard: u64, metadata: &str) -> Result<Vec<Shard>> {
    const FIXED: u64 = 8 + r#"{"__metadata__":{"format":"mlx"}}"#.len() as u64 + 8;
    let mut groups: Vec<Vec<Stored>> = Vec::new();
    let mut room = 0;
    for tensor in tensors {
        let need = tensor.bytes + tensor.header_bound();
        match groups.last_mut() {
            Some(group) if need <= room => group.push(tensor),
            _ => {
                groups.push(vec![tensor]);
                room = max_shard.saturating_sub(FIXED).max(need);
            }
        }
        room -= need;
    }
    let count = groups.len();
    let name = |number: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    };
    groups.into_iter().enumerate().map(|(number, group)| shard(name(number), group, metadata)).collect()
}

fn shard(file_name: String, mut tensors: Vec<Stored>, metadata: &str) -> Result<Shard> {
    // Wider elements first, so that every tensor starts at a multiple of its element size: some readers map them in place.
    tensors.sort_by_key(|t| Reverse(t.element_size()));
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({ "format": metadata }));
    let mut end = 0u64;
    let mut starts = Vec::with_capacity(tensors.len());
    for t in &tensors {
        starts.push(end);
        let entry = json!({ "dtype": t.dtype, "shape": t.shape, "data_offsets": [end, end + t.bytes] });
        if entries.insert(t.name.clone(), entry).is_some() {
            return Err(Error::internal(&t.name, "is planned twice"));
        }
        end += t.bytes;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    let data = header.len() as u64;
    let tensors = tensors.into_iter().zip(starts).map(|(t, start)| (t, data + start)).collect();
    Ok(Shard { file_name, header, tensors, len: data + end })
}

/// `model.safetensors.index.json` of several files.
pub(super) fn index(shards: &[Shard]) -> Value {
    let mut places: Vec<(&str, &str)> =
        shards.iter().flat_map(|s| s.tensors.iter().map(|(t, _)| (t.name.as_str(), s.file_name.as_str()))).collect();
    places.sort_unstable();
    let total: u64 = shards.iter().flat_map(|s| &s.tensors).map(|(t, _)| t.bytes).sum();
    let weight_map: Map<String, Value> = places.into_iter().map(|(tensor, file)| (tensor.to_owned(), file.into())).collect();
    json!({ "metadata": { "total_size": total }, "weight_map": weight_map })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: &'static str, size: usize, n: usize) -> Stored {
        Stored::new(name.into(), dtype, size, vec![n])
    }

    #[test]
    fn files_stay_below_the_limit_and_readers_agree_with_the_offsets() {
        let tensors: Vec<Stored> = (0..40)
            .flat_map(|i| [tensor(&format!("a\"{i}"), "F16", 2, 101 + i), tensor(&format!("b{i}"), "I64", 8, 2)])
            .chain([tensor("huge", "F32", 4, 3000)])
            .collect();
        for limit in [1, 1000, 5000, 1 << 20] {
            let shards = shards(tensors.clone(), limit, "pt").unwrap();
            assert_eq!(shards.iter().map(|s| s.tensors.len()).sum::<usize>(), tensors.len());
            assert_eq!(shards.len() == 1, limit == 1 << 20);
            for shard in &shards {
                assert!(shard.len <= limit || shard.tensors.len() == 1, "{} bytes of {limit}", shard.len);
                assert_eq!(shard.header.len() % 8, 0);
                let mut file = shard.header.clone();
                file.resize(shard.len as usize, 0);
                let (n, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
                for (t, offset) in &shard.tensors {
                    let info = metadata.info(&t.name).unwrap();
                    assert_eq!((info.data_offsets.0 + n + 8, &info.shape), (*offset as usize, &t.shape));
                    assert_eq!(offset % t.element_size(), 0);
                }
            }
            let index = index(&shards);
            assert_eq!(index["weight_map"].as_object().unwrap().len(), tensors.len());
            assert_eq!(index["weight_map"]["huge"], shards.last().unwrap().file_name);
        }
    }

    #[test]
    fn a_name_given_twice_is_a_bug() {
        assert!(shards(vec![tensor("a", "F16", 2, 1), tensor("a", "F16", 2, 1)], 1 << 20, "pt").is_err());
    }
}
