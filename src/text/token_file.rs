//! Calibration windows that are token ids already: a safetensors file with `input_ids` [samples, length].

use super::windows::check_ids;
use crate::{Error, Result};
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use std::path::Path;

const TENSOR: &str = "input_ids";

/// Windows of equal length, and the file's SHA-256 in hexadecimal.
#[derive(Debug)]
pub struct TokenFile {
    pub sha256: String,
    pub windows: Vec<Vec<u32>>,
}

impl TokenFile {
    /// Is `path` such a file by its name?
    pub fn is_one(path: &Path) -> bool {
        path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors"))
    }

    /// Reads `input_ids` (i32 or i64) for a vocabulary of `n_vocab`.
    ///
    /// Errors name the file: unreadable, no such tensor, another type or shape, an id that is negative or not in the vocabulary.
    pub fn open(path: &Path, n_vocab: usize) -> Result<Self> {
        let bad = |message: String| Error::input(path.display(), message);
        let bytes = std::fs::read(path).map_err(|e| bad("cannot be read".into()).caused_by(e))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad("is no safetensors file, or a damaged one".into()).caused_by(e))?;
        let tensor = file.tensor(TENSOR).map_err(|e| bad(format!("has no tensor `{TENSOR}` [samples, length]")).caused_by(e))?;
        let &[samples, length] = tensor.shape() else {
            return Err(bad(format!("`{TENSOR}` has shape {:?} instead of [samples, length]", tensor.shape())));
        };
        if samples == 0 || length < 2 {
            return Err(bad(format!("`{TENSOR}` of [{samples}, {length}] has no window of at least 2 tokens")));
        }
        let ids: Vec<i64> = match tensor.dtype() {
            Dtype::I32 => tensor.data().as_chunks::<4>().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect(),
            Dtype::I64 => tensor.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            other => return Err(bad(format!("`{TENSOR}` is {other:?}; only I32 and I64 hold token ids"))),
        };
        let ids: Vec<u32> = ids
            .into_iter()
            .map(|id| u32::try_from(id).map_err(|_| bad(format!("`{TENSOR}` holds {id}, which is no token id"))))
            .collect::<Result<_>>()?;
        check_ids(&ids, n_vocab).map_err(|e| Error { subject: path.display().to_string(), ..e })?;
        let sha256 = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        Ok(Self { sha256, windows: ids.chunks(length).map(<[u32]>::to_vec).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::{TensorView, serialize_to_file};

    fn open(dtype: Dtype, shape: &[usize], data: &[u8]) -> Result<TokenFile> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.safetensors");
        serialize_to_file([(TENSOR, TensorView::new(dtype, shape.to_vec(), data).unwrap())], None, &path).unwrap();
        TokenFile::open(&path, 100)
    }

    #[test]
    fn ids_of_either_type_are_windows_and_others_are_refused() {
        let i32s: Vec<u8> = [1i32, 2, 3, 4, 5, 6].iter().flat_map(|v| v.to_le_bytes()).collect();
        let i64s: Vec<u8> = [1i64, 2, 3, 4, 5, 99].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(open(Dtype::I32, &[2, 3], &i32s).unwrap().windows, [[1, 2, 3], [4, 5, 6]]);
        assert_eq!(open(Dtype::I64, &[3, 2], &i64s).unwrap().windows, [[1, 2], [3, 4], [5, 99]]);
        for (dtype, shape, data, says) in [
            (Dtype::F32, vec![2, 3], i32s.clone(), "F32"),
            (Dtype::I32, vec![6], i32s.clone(), "[6]"),
            (Dtype::I32, vec![6, 1], i32s.clone(), "at least 2"),
            (Dtype::I32, vec![1, 2], [1i32, 100].iter().flat_map(|v| v.to_le_bytes()).collect(), "100"),
            (Dtype::I32, vec![1, 2], [1i32, -1].iter().flat_map(|v| v.to_le_bytes()).collect(), "-1"),
        ] {
            let e = open(dtype, &shape, &data).unwrap_err();
            assert!(e.to_string().contains(says), "{e}");
        }
    }
}
