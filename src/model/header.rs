//! The header of a safetensors file: 8 bytes of length, JSON, then the tensors' bytes without gaps.
//!
//! The `safetensors` crate has a parser, but it accepts names that occur twice, adds offsets without an overflow check and does not
//! say which tensor is wrong. Its type table is used here, its file checks are restated.

use super::json;
use crate::{Error, Result};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::Value;
use std::ops::Range;
use std::path::Path;

/// The format's own limit.
const MAX_HEADER: usize = 100_000_000;

/// No tensor of a model has more dimensions, and messages show shapes.
const MAX_RANK: usize = 16;

/// One tensor of a file; `bytes` counts from the start of the file and lies within it.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Range<usize>,
}

/// How errors name a tensor of a file.
pub(super) fn subject(path: &Path, tensor: &str) -> String {
    format!("{}: tensor {tensor}", path.display())
}

/// The entries of a whole file, in the order of their bytes.
///
/// Errors: a header that is cut off, too long or not such JSON; a tensor whose offsets leave the file, leave a gap, overlap
/// another or do not fit its shape and type; bytes that belong to no tensor.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<Vec<Entry>> {
    let bad = |message: String| Error::input(path.display(), message);
    let Some((prefix, rest)) = file.split_first_chunk::<8>() else {
        return Err(bad(format!("is truncated: {} bytes are too few for a safetensors file", file.len())));
    };
    let length = match usize::try_from(u64::from_le_bytes(*prefix)) {
        Ok(length) if length <= MAX_HEADER => length,
        _ => return Err(bad("is not a safetensors file: its first 8 bytes are no header length".into())),
    };
    let Some((header, data)) = rest.split_at_checked(length) else {
        return Err(bad(format!("is truncated: its header should have {length} bytes, but only {} follow", rest.len())));
    };
    let start = 8 + length;
    let object = match json::parse(header) {
        Ok(Value::Object(object)) => object,
        Ok(_) => return Err(bad("has a header that is not a JSON object".into())),
        Err(e) => return Err(bad("has a damaged header".into()).caused_by(e)),
    };

    let mut tensors = Vec::with_capacity(object.len());
    for (name, value) in object {
        if name == "__metadata__" {
            continue;
        }
        let shown = json::brief(&value);
        match serde_json::from_value::<TensorInfo>(value) {
            Ok(info) => tensors.push((name, info)),
            Err(e) => return Err(Error::input(subject(path, &name), format!("has a damaged description {shown}")).caused_by(e)),
        }
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);

    let mut entries = Vec::with_capacity(tensors.len());
    let mut end = 0;
    for (name, info) in tensors {
        let range = check(path, &name, &info, end, data.len())?;
        end = range.end;
        entries.push(Entry { name, dtype: info.dtype, shape: info.shape, bytes: start + range.start..start + range.end });
    }
    if end != data.len() {
        return Err(bad(format!("has {} bytes after its last tensor that belong to no tensor", data.len() - end)));
    }
    Ok(entries)
}

/// Checks one tensor that must begin where the one before ended.
fn check(path: &Path, name: &str, info: &TensorInfo, expected_start: usize, available: usize) -> Result<Range<usize>> {
    let bad = |message: String| Err(Error::input(subject(path, name), message));
    if info.shape.len() > MAX_RANK {
        return bad(format!("has {} dimensions; {MAX_RANK} can be read", info.shape.len()));
    }
    let (start, end) = info.data_offsets;
    if end < start {
        return bad(format!("has offsets {start}..{end} that run backwards"));
    }
    if end > available {
        return bad(format!("ends at byte {end} of the data, but the file has only {available}: it is truncated or damaged"));
    }
    if start != expected_start {
        let what = if start < expected_start { "overlaps another tensor" } else { "comes after a gap" };
        return bad(format!("{what}: it starts at byte {start} of the data, the tensor before it ends at {expected_start}"));
    }
    let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, d| n.checked_mul(*d));
    if bits.is_none_or(|bits| bits % 8 != 0 || bits / 8 != end - start) {
        return bad(format!("has {} bytes, which shape {:?} of {} does not fill", end - start, info.shape, info.dtype));
    }
    Ok(start..end)
}
