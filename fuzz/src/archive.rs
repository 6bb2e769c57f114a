//! The files of a model folder as one input: for each the number of its name, its length in four bytes, and its bytes. What does not fit this
//! is cut off, so that any bytes are some folder.

use std::path::Path;

pub const NAMES: [&str; 7] = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "quantize_config.json",
    "tokenizer.json",
];

/// By the numbers of their names.
pub type Files = Vec<(usize, Vec<u8>)>;

pub fn unpack(mut input: &[u8]) -> Files {
    let mut files = Files::new();
    while let Some(([name, length @ ..], rest)) = input.split_first_chunk::<5>() {
        let length = (u32::from_le_bytes(*length) as usize).min(rest.len());
        let (content, rest) = rest.split_at(length);
        if usize::from(*name) < NAMES.len() && files.iter().all(|f| f.0 != usize::from(*name)) {
            files.push((usize::from(*name), content.to_vec()));
        }
        input = rest;
    }
    files
}

pub fn pack(files: &Files) -> Vec<u8> {
    let one = |(name, content): &(usize, Vec<u8>)| [&[*name as u8], &(content.len() as u32).to_le_bytes()[..], content].concat();
    files.iter().flat_map(one).collect()
}

/// The files of a folder that have a name here.
pub fn read(folder: &Path) -> Files {
    NAMES.iter().enumerate().filter_map(|(i, name)| Some((i, std::fs::read(folder.join(name)).ok()?))).collect()
}

/// Makes `folder` hold these files, and the given tokenizer where they have none.
pub fn write(folder: &Path, files: &Files, tokenizer: &[u8]) {
    for (i, name) in NAMES.iter().enumerate() {
        let path = folder.join(name);
        // A file that is cut off while it is mapped would end the process: a new one, always.
        let _ = std::fs::remove_file(&path);
        let content = files.iter().find(|f| f.0 == i).map(|f| f.1.as_slice());
        if let Some(content) = content.or((*name == "tokenizer.json").then_some(tokenizer)) {
            std::fs::write(&path, content).expect("a temporary folder can be written");
        }
    }
}
