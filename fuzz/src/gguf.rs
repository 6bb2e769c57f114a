//! GGUF files with something changed: values of keys, tensor infos, or tensors with infos that are true to them.

use crate::choice::Choice;
use crate::safetensors::fill;

const ALIGNMENT: usize = 32;
const MOST: usize = 1 << 18;
/// A text, and an array, among the kinds of values.
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

pub struct File {
    version: u32,
    keys: Vec<(Vec<u8>, u32, Value)>,
    tensors: Vec<Tensor>,
    data: Vec<u8>,
}

enum Value {
    /// A number or a text, as it lies in the file.
    One(Vec<u8>),
    /// The kind of the elements, how many the file says there are, and those that are there.
    Array(u32, u64, Vec<Vec<u8>>),
}

struct Tensor {
    name: Vec<u8>,
    /// As the file has them, fastest first.
    shape: Vec<u64>,
    kind: u32,
    offset: u64,
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(n).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Option<Vec<u8>> {
        let n = self.u64()?;
        Some(self.take(n)?.to_vec())
    }

    /// A number or a text with its length.
    fn one(&mut self, kind: u32) -> Option<Vec<u8>> {
        match kind {
            TEXT => self.text().map(|text| [&(text.len() as u64).to_le_bytes()[..], &text].concat()),
            0 | 1 | 7 => self.take(1).map(<[u8]>::to_vec),
            2 | 3 => self.take(2).map(<[u8]>::to_vec),
            4..=6 => self.take(4).map(<[u8]>::to_vec),
            10..=12 => self.take(8).map(<[u8]>::to_vec),
            _ => None,
        }
    }
}

pub fn parse(bytes: &[u8]) -> Option<File> {
    let mut cursor = Cursor(bytes);
    cursor.take(4)?;
    let version = cursor.u32()?;
    let (n_tensors, n_keys) = (cursor.u64()?, cursor.u64()?);
    let (mut keys, mut tensors) = (Vec::new(), Vec::new());
    for _ in 0..n_keys {
        let (key, kind) = (cursor.text()?, cursor.u32()?);
        let value = match kind {
            ARRAY => {
                let (kind, n) = (cursor.u32()?, cursor.u64()?);
                Value::Array(kind, n, (0..n).map(|_| cursor.one(kind)).collect::<Option<_>>()?)
            }
            kind => Value::One(cursor.one(kind)?),
        };
        keys.push((key, kind, value));
    }
    for _ in 0..n_tensors {
        let name = cursor.text()?;
        let n_dims = cursor.u32()?;
        let shape = (0..n_dims).map(|_| cursor.u64()).collect::<Option<_>>()?;
        tensors.push(Tensor { name, shape, kind: cursor.u32()?, offset: cursor.u64()? });
    }
    let start = (bytes.len() - cursor.0.len()).next_multiple_of(ALIGNMENT);
    Some(File { version, keys, tensors, data: bytes.get(start..)?.to_vec() })
}

impl File {
    pub fn write(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        let text = |out: &mut Vec<u8>, text: &[u8]| {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text);
        };
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.keys {
            text(&mut out, key);
            out.extend(kind.to_le_bytes());
            match value {
                Value::One(bytes) => out.extend(bytes),
                Value::Array(kind, n, all) => {
                    out.extend(kind.to_le_bytes());
                    out.extend(n.to_le_bytes());
                    all.iter().for_each(|one| out.extend(one));
                }
            }
        }
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.extend(&self.data);
        out
    }

    /// Changes a file with a knowledge of what its bytes mean.
    pub fn mutate(&mut self, choice: &mut Choice) {
        for _ in 0..1 + choice.below(3) {
            match choice.below(10) {
                0..4 => self.edit_key(choice),
                4..6 => self.edit_info(choice),
                6..8 => {
                    self.edit_info(choice);
                    self.lay_out();
                }
                8 => {
                    self.edit_size(choice);
                    self.lay_out();
                }
                _ => fill_any(&mut self.data, choice),
            }
        }
    }

    fn edit_key(&mut self, choice: &mut Choice) {
        let at = choice.below(self.keys.len());
        match choice.below(6) {
            0 => {
                let key = choice.of(KEYS).as_bytes().to_vec();
                let (kind, value) = any(choice);
                self.keys.push((key, kind, value));
            }
            1 if choice.one_in(20) => self.version = choice.number() as u32,
            _ if self.keys.is_empty() => {}
            1 => drop(self.keys.remove(at)),
            2 => (self.keys[at].1, self.keys[at].2) = any(choice),
            _ => {
                let (_, kind, value) = &mut self.keys[at];
                edit_value(*kind, value, choice);
            }
        }
    }

    fn edit_info(&mut self, choice: &mut Choice) {
        let (at, other) = (choice.below(self.tensors.len()), choice.below(self.tensors.len()));
        if self.tensors.is_empty() {
            return;
        }
        let name = self.tensors[other].name.clone();
        let Tensor { shape, kind, offset, .. } = &self.tensors[at];
        let (shape, kind, offset) = (shape.clone(), *kind, *offset);
        let tensor = &mut self.tensors[at];
        match choice.below(9) {
            0 => tensor.kind = choice.of(&[0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 24, 30, 40, u32::MAX]),
            1 => tensor.offset = choice.near(tensor.offset),
            2 => tensor.shape.reverse(),
            3 => drop(tensor.shape.pop()),
            4 => tensor.shape.push(choice.below(4) as u64),
            5 => tensor.name = name,
            6 if choice.one_in(2) => drop(self.tensors.remove(at)),
            7 => {
                let name = choice.of(&["rope_freqs.weight", "output.weight", "blk.0.attn_q.bias", "blk.1.attn_q.weight", ""]).into();
                self.tensors.push(Tensor { name, shape, kind, offset });
            }
            _ => {
                let dim = choice.below(tensor.shape.len());
                if let Some(d) = tensor.shape.get_mut(dim) {
                    *d = choice.near(*d);
                }
            }
        }
    }

    /// Another width, and tensors of the shapes that it asks for: what comes after the checks of shapes sees odd models too.
    fn edit_size(&mut self, choice: &mut Choice) {
        const SIZES: [&str; 6] = [
            "llama.embedding_length",
            "llama.feed_forward_length",
            "llama.attention.head_count",
            "llama.attention.head_count_kv",
            "llama.attention.key_length",
            "llama.rope.dimension_count",
        ];
        let key = choice.of(&SIZES[..5]);
        let new = choice.of(&[1u32, 2, 3, 4, 5, 6, 8, 16, 18, 32, 64, 96, 128, 256, 512]);
        let mut sizes = [0u64; 6];
        for (name, _, value) in &mut self.keys {
            let Some(i) = SIZES.iter().position(|size| size.as_bytes() == *name) else { continue };
            if let Value::One(bytes) = value
                && (SIZES[i] == key || SIZES[i] == SIZES[5] && key == SIZES[4])
            {
                *bytes = new.to_le_bytes().to_vec();
            }
            if let Value::One(bytes) = value
                && let Some(bytes) = bytes.first_chunk()
            {
                sizes[i] = u32::from_le_bytes(*bytes).min(1024).into();
            }
        }
        let [model, ff, heads, kv, d_head, _] = sizes;
        for Tensor { name, shape, .. } in &mut self.tensors {
            let name = String::from_utf8_lossy(name);
            let wanted = match name.rsplit('.').nth(1).unwrap_or_default() {
                "attn_q" => [model, heads * d_head],
                "attn_k" | "attn_v" => [model, kv * d_head],
                "attn_output" => [heads * d_head, model],
                "ffn_gate" | "ffn_up" => [model, ff],
                "ffn_down" => [ff, model],
                "token_embd" | "output" => [model, shape.get(1).copied().unwrap_or(1)],
                "rope_freqs" => [d_head / 2, 1],
                _ => [model, 1],
            };
            let n_dims = shape.len();
            *shape = if name.ends_with(".bias") { vec![wanted[1]] } else { wanted[..n_dims.clamp(1, 2)].to_vec() };
        }
    }

    /// Offsets and data as the infos want them, as far as they are small.
    fn lay_out(&mut self) {
        let old = std::mem::take(&mut self.data);
        for tensor in &mut self.tensors {
            let (elements, bytes) = block(tensor.kind);
            let n = tensor.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).and_then(|n| (n / elements).checked_mul(bytes));
            let start = usize::try_from(tensor.offset).unwrap_or(0);
            let mut own = old.get(start..).unwrap_or_default().to_vec();
            own.resize(n.map_or(0, |n| (n as usize).min(MOST)), 0x3c);
            tensor.offset = self.data.len() as u64;
            self.data.extend(own);
            self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
            if self.data.len() > 4 * MOST {
                return;
            }
        }
    }
}

/// Elements and bytes of a block.
fn block(kind: u32) -> (u64, u64) {
    match kind {
        0 => (1, 4),
        1 | 30 => (1, 2),
        2 => (32, 18),
        3 => (32, 20),
        6 => (32, 22),
        7 => (32, 24),
        8 => (32, 34),
        10 => (256, 84),
        11 => (256, 110),
        12 => (256, 144),
        13 => (256, 176),
        14 => (256, 210),
        _ => (1, 1),
    }
}

fn fill_any(data: &mut [u8], choice: &mut Choice) {
    if !data.is_empty() {
        fill(data, choice);
    }
}

fn edit_value(kind: u32, value: &mut Value, choice: &mut Choice) {
    match value {
        Value::One(bytes) => edit_one(kind, bytes, choice),
        Value::Array(kind, n, all) => match choice.below(7) {
            0 => *n = choice.near(*n),
            1 => {
                let at = choice.below(all.len());
                all.truncate(at);
                *n = all.len() as u64;
            }
            2 => *kind = choice.below(14) as u32,
            3 if !all.is_empty() => {
                all.push(all[choice.below(all.len())].clone());
                *n = all.len() as u64;
            }
            4 if !all.is_empty() => {
                let (a, b) = (choice.below(all.len()), choice.below(all.len()));
                all.swap(a, b);
            }
            _ => {
                let at = choice.below(all.len());
                if let Some(one) = all.get_mut(at) {
                    edit_one(*kind, one, choice);
                }
            }
        },
    }
}

fn edit_one(kind: u32, bytes: &mut Vec<u8>, choice: &mut Choice) {
    let n = bytes.len();
    match kind {
        TEXT => *bytes = text(choice.of(WORDS)),
        6 => *bytes = (choice.float() as f32).to_le_bytes().to_vec(),
        12 => *bytes = choice.float().to_le_bytes().to_vec(),
        _ => {
            let mut wide = [0; 8];
            wide[..n.min(8)].copy_from_slice(&bytes[..n.min(8)]);
            *bytes = choice.near(u64::from_le_bytes(wide)).to_le_bytes()[..n.min(8)].to_vec();
        }
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn any(choice: &mut Choice) -> (u32, Value) {
    match choice.below(6) {
        0 => (TEXT, Value::One(text(choice.of(WORDS)))),
        1 => (6, Value::One((choice.float() as f32).to_le_bytes().to_vec())),
        2 => (10, Value::One(choice.number().to_le_bytes().to_vec())),
        3 => (7, Value::One(vec![choice.below(3) as u8])),
        4 => {
            let n = choice.below(5);
            (ARRAY, Value::Array(4, n as u64, (0..n).map(|_| (choice.number() as u32).to_le_bytes().to_vec()).collect()))
        }
        _ => (4, Value::One((choice.number() as u32).to_le_bytes().to_vec())),
    }
}

const KEYS: &[&str] = &[
    "general.architecture",
    "general.alignment",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.rope.freq_base",
    "llama.rope.dimension_count",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.attn_factor",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.unknown_token_id",
];

const WORDS: &[&str] = &["", "llama", "gpt2", "none", "linear", "yarn", "longrope", "llama-bpe", "<0x00>", "a", "é\u{10ffff}"];
