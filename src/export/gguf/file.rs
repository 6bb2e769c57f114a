//! The GGUF container, version 3: metadata, tensor infos, aligned data. Everything is little-endian.

use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Every tensor starts at a multiple of it; `general.alignment` may say otherwise.
pub const ALIGNMENT: u64 = 32;
const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// Elements of all lists together: many times those of the largest vocabulary with its merges. One takes 32 bytes in memory and may take a
/// single one in a file, which need not even have it on the disk where that is a zero.
const MAX_ELEMENTS: u64 = 1 << 23;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    U64(u64),
    I64(i64),
    F64(f64),
    /// All of one kind, which is none of these; the number names the kind of an empty one.
    Array(u32, Vec<Value>),
}

impl Value {
    const TEXT: u32 = 8;
    const ARRAY: u32 = 9;
    const LAST: u32 = 12;

    fn kind(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::Text(_) => Self::TEXT,
            Self::Array(..) => Self::ARRAY,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    pub fn texts<S: Into<String>>(values: impl IntoIterator<Item = S>) -> Self {
        Self::Array(Self::TEXT, values.into_iter().map(|v| Self::Text(v.into())).collect())
    }

    pub fn i32s(values: impl IntoIterator<Item = i32>) -> Self {
        Self::Array(5, values.into_iter().map(Self::I32).collect())
    }

    pub fn f32s(values: impl IntoIterator<Item = f32>) -> Self {
        Self::Array(6, values.into_iter().map(Self::F32).collect())
    }

    /// A whole number of any kind that is not negative.
    pub fn whole(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            Self::I8(v) => v.try_into().ok(),
            Self::I16(v) => v.try_into().ok(),
            Self::I32(v) => v.try_into().ok(),
            Self::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    pub fn number(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => Some(v.into()),
            Self::F64(v) => Some(v),
            _ => self.whole().map(|v| v as f64),
        }
    }

    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(v) => out.push(*v),
            Self::I8(v) => out.extend(v.to_le_bytes()),
            Self::U16(v) => out.extend(v.to_le_bytes()),
            Self::I16(v) => out.extend(v.to_le_bytes()),
            Self::U32(v) => out.extend(v.to_le_bytes()),
            Self::I32(v) => out.extend(v.to_le_bytes()),
            Self::F32(v) => out.extend(v.to_le_bytes()),
            Self::Bool(v) => out.push(u8::from(*v)),
            Self::Text(v) => write_text(v, out),
            Self::U64(v) => out.extend(v.to_le_bytes()),
            Self::I64(v) => out.extend(v.to_le_bytes()),
            Self::F64(v) => out.extend(v.to_le_bytes()),
            Self::Array(kind, values) => {
                out.extend(kind.to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                values.iter().for_each(|v| v.write(out));
            }
        }
    }
}

fn write_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A tensor's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    pub name: String,
    /// Row-major, slowest first, as everywhere here; the file has them the other way round.
    pub shape: Vec<usize>,
    pub kind: u32,
    /// From the start of the data.
    pub offset: u64,
}

/// What precedes the data, padded to the alignment.
pub fn header(metadata: &[(String, Value)], tensors: &[Info]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        write_text(key, &mut out);
        out.extend(value.kind().to_le_bytes());
        value.write(&mut out);
    }
    for info in tensors {
        write_text(&info.name, &mut out);
        out.extend((info.shape.len() as u32).to_le_bytes());
        info.shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
        out.extend(info.kind.to_le_bytes());
        out.extend(info.offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

/// What a file's head says.
#[derive(Debug)]
pub struct Head {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: Vec<Info>,
    /// Where the data start.
    pub data: u64,
}

/// Reads the head of a file. Errors name `path` and what in it is wrong; whatever the bytes, nothing panics, and memory stays
/// within [`MAX_ELEMENTS`] and a few times their number.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Head> {
    let mut cursor = Cursor { path, bytes, at: 0, elements: 0 };
    if cursor.take(4)? != MAGIC {
        return Err(cursor.error("is no GGUF file"));
    }
    let version = cursor.u32()?;
    if version != VERSION {
        return Err(cursor.error(format!("is GGUF of version {version}; version {VERSION} can be read")));
    }
    let (n_tensors, n_values) = (cursor.u64()?, cursor.u64()?);
    let mut metadata = BTreeMap::new();
    for _ in 0..n_values {
        let key = cursor.text()?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(cursor.error(format!("has the key {key} twice")));
        }
    }
    let alignment = metadata.get("general.alignment").map_or(Some(ALIGNMENT), Value::whole);
    let alignment =
        alignment.filter(|a| a.is_power_of_two() && *a <= 1 << 20).ok_or_else(|| cursor.error("has a wrong `general.alignment`"))?;
    let mut tensors = Vec::new();
    for _ in 0..n_tensors {
        let name = cursor.text()?;
        let n_dims = cursor.u32()?;
        if n_dims == 0 || n_dims > 4 {
            return Err(cursor.error(format!("has {n_dims} dimensions for tensor {name}")));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            shape.push(usize::try_from(cursor.u64()?).map_err(|_| cursor.error(format!("has an absurd shape for tensor {name}")))?);
        }
        shape.reverse();
        tensors.push(Info { name, shape, kind: cursor.u32()?, offset: cursor.u64()? });
    }
    Ok(Head { metadata, tensors, data: (cursor.at as u64).next_multiple_of(alignment) })
}

struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    /// Of the lists so far.
    elements: u64,
}

impl<'a> Cursor<'a> {
    fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::input(self.path.display(), message)
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| self.error(format!("ends in its head: {n} bytes at {} are missing", self.at)))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String> {
        let n = self.u64()?;
        let n = usize::try_from(n).map_err(|_| self.error("has a text that is too long"))?;
        let at = self.at;
        let bytes = self.take(n)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| self.error(format!("has a text at {at} that is not UTF-8")))
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(self.array::<1>()?[0]),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => match self.array::<1>()?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(self.error(format!("has the truth value {other}"))),
            },
            Value::TEXT => Value::Text(self.text()?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            Value::ARRAY => {
                let kind = self.u32()?;
                if kind > Value::LAST {
                    return Err(self.error(format!("has a list of the unknown kind {kind}")));
                }
                if kind == Value::ARRAY {
                    return Err(self.error("has arrays of arrays, which cannot be read"));
                }
                let n = self.u64()?;
                self.elements = self.elements.saturating_add(n);
                if self.elements > MAX_ELEMENTS {
                    return Err(self.error(format!("has a list of {n} values; all lists may have {MAX_ELEMENTS}")));
                }
                let mut values = Vec::new();
                // Each takes a byte at least, so that a wrong length ends with the file.
                for _ in 0..n {
                    values.push(self.value(kind)?);
                }
                Value::Array(kind, values)
            }
            other => return Err(self.error(format!("has a value of the unknown kind {other}"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_reads_back_and_damage_is_an_error() {
        let metadata = vec![
            ("general.architecture".to_owned(), Value::Text("llama".into())),
            ("a".to_owned(), Value::U32(7)),
            ("b".to_owned(), Value::texts(["x", "ÿ"])),
            ("c".to_owned(), Value::i32s([1, -1])),
            ("d".to_owned(), Value::F32(1.5)),
            ("e".to_owned(), Value::Bool(true)),
        ];
        let tensors = vec![Info { name: "t".into(), shape: vec![3, 64], kind: 2, offset: 0 }];
        let bytes = header(&metadata, &tensors);
        assert_eq!((bytes.len() as u64 % ALIGNMENT, &bytes[..8]), (0, b"GGUF\x03\0\0\0".as_slice()));
        let head = parse(Path::new("f"), &bytes).unwrap();
        assert_eq!(head.metadata.into_iter().collect::<Vec<_>>().len(), metadata.len());
        assert_eq!((head.tensors, head.data), (tensors, bytes.len() as u64));
        // A file that ends early, wherever it does, and one that promises what it does not hold.
        let end = bytes.len() - 32;
        (0..end).for_each(|n| assert!(parse(Path::new("f"), &bytes[..n]).is_err(), "{n}"));
        let mut huge = bytes.clone();
        huge[8..16].fill(0xff);
        assert!(parse(Path::new("f"), &huge).is_err());
        // A list of no elements still has a kind.
        let list = |kind| header(&[("a".to_owned(), Value::Array(kind, Vec::new()))], &[]);
        assert!(parse(Path::new("f"), &list(12)).is_ok());
        assert!(parse(Path::new("f"), &list(13)).unwrap_err().message.contains("unknown kind 13"));
    }
}
