//! Reads what is needed of `tokenizer.model`, a protocol buffer of SentencePiece: its pieces, and the settings that decide whether llama.cpp
//! can do as they say. Fields have the numbers and defaults of `sentencepiece_model.proto`.

use super::kind;

/// A model's pieces by id, and its settings.
#[derive(Debug, PartialEq)]
pub(super) struct Model {
    pub pieces: Vec<Piece>,
    /// 1 unigram, 2 BPE, 3 words, 4 characters.
    pub algorithm: u64,
    /// Of the Unicode normalization; anything but "identity" changes texts.
    pub normalization: String,
    /// Has the normalization a table?
    pub has_table: bool,
    /// A space is put before every text.
    pub add_dummy_prefix: bool,
    pub remove_extra_whitespaces: bool,
    /// Spaces become U+2581.
    pub escape_whitespaces: bool,
    /// Spaces end words instead of beginning them.
    pub whitespace_as_suffix: bool,
    /// BOS, EOS, unknown, padding; negative: there is none.
    pub special_ids: [i64; 4],
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub text: String,
    pub score: f32,
    /// One of `kind`.
    pub kind: i32,
}

/// The message if the bytes are no such model; whatever they are, nothing panics or takes more memory than they.
pub(super) fn parse(bytes: &[u8]) -> Result<Model, String> {
    let mut model = Model {
        pieces: Vec::new(),
        algorithm: 1,
        normalization: String::new(),
        has_table: false,
        add_dummy_prefix: true,
        remove_extra_whitespaces: true,
        escape_whitespaces: true,
        whitespace_as_suffix: false,
        special_ids: [1, 2, 0, -1],
    };
    for field in Fields(bytes) {
        match field? {
            (1, Payload::Bytes(bytes)) => model.pieces.push(piece(bytes)?),
            (2, Payload::Bytes(bytes)) => trainer(bytes, &mut model)?,
            (3, Payload::Bytes(bytes)) => normalizer(bytes, &mut model)?,
            _ => {}
        }
    }
    if model.pieces.is_empty() { Err("has no pieces".to_owned()) } else { Ok(model) }
}

fn piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: kind::NORMAL };
    for field in Fields(bytes) {
        match field? {
            (1, Payload::Bytes(bytes)) => piece.text = text(bytes)?,
            (2, Payload::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Payload::Varint(kind)) => {
                let known = |kind: &i32| (kind::NORMAL..=kind::BYTE).contains(kind);
                piece.kind = i32::try_from(kind).ok().filter(known).ok_or_else(|| format!("has a piece of the unknown type {kind}"))?;
            }
            _ => {}
        }
    }
    if piece.score.is_finite() { Ok(piece) } else { Err(format!("has the score {} for {:?}", piece.score, piece.text)) }
}

fn trainer(bytes: &[u8], model: &mut Model) -> Result<(), String> {
    for field in Fields(bytes) {
        match field? {
            (3, Payload::Varint(value)) => model.algorithm = value,
            (24, Payload::Varint(value)) => model.whitespace_as_suffix = value != 0,
            // Negative numbers are stored as those of 64 bits.
            (40, Payload::Varint(value)) => model.special_ids[2] = value.cast_signed(),
            (41, Payload::Varint(value)) => model.special_ids[0] = value.cast_signed(),
            (42, Payload::Varint(value)) => model.special_ids[1] = value.cast_signed(),
            (43, Payload::Varint(value)) => model.special_ids[3] = value.cast_signed(),
            _ => {}
        }
    }
    Ok(())
}

fn normalizer(bytes: &[u8], model: &mut Model) -> Result<(), String> {
    for field in Fields(bytes) {
        match field? {
            (1, Payload::Bytes(bytes)) => model.normalization = text(bytes)?,
            (2, Payload::Bytes(bytes)) => model.has_table = !bytes.is_empty(),
            (3, Payload::Varint(value)) => model.add_dummy_prefix = value != 0,
            (4, Payload::Varint(value)) => model.remove_extra_whitespaces = value != 0,
            (5, Payload::Varint(value)) => model.escape_whitespaces = value != 0,
            _ => {}
        }
    }
    Ok(())
}

fn text(bytes: &[u8]) -> Result<String, String> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| "has a text that is not UTF-8".to_owned())
}

/// What follows a field's number.
#[derive(Debug, PartialEq)]
enum Payload<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

/// The fields of a message, in order.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Payload<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            // What follows a damaged field is anything.
            self.0 = &[];
        }
        Some(field.ok_or_else(|| "is damaged or cut off".to_owned()))
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Payload<'a>)> {
        let tag = self.varint()?;
        let payload = match tag & 7 {
            0 => Payload::Varint(self.varint()?),
            1 => self.take(8).map(|_| Payload::Fixed64)?,
            2 => {
                let len = usize::try_from(self.varint()?).ok()?;
                Payload::Bytes(self.take(len)?)
            }
            5 => Payload::Fixed32(u32::from_le_bytes(*self.take(4)?.first_chunk()?)),
            // Groups, which have long been out of use.
            _ => return None,
        };
        Some((tag >> 3, payload)).filter(|(number, _)| *number > 0)
    }

    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    /// Seven bits a byte, the lowest first; a set eighth bit means that more follow.
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = *self.take(1)?.first()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_and_others_skipped() {
        // A piece "▁a" of score -1.5, an unknown field of each wire type, a trainer with BPE and no padding, a normalizer.
        let mut bytes = vec![0x0a, 11, 0x0a, 4, 0xe2, 0x96, 0x81, b'a', 0x15, 0, 0, 0xc0, 0xbf];
        bytes.extend([0x78, 0x96, 0x01, 0x79, 1, 2, 3, 4, 5, 6, 7, 8, 0x7d, 1, 2, 3, 4, 0x7a, 1, 9]);
        bytes.extend([0x12, 14, 0x18, 2, 0xd8, 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]);
        bytes.extend([0x1a, 4, 0x18, 0, 0x20, 0]);
        let model = parse(&bytes).unwrap();
        assert_eq!(model.pieces, [Piece { text: "▁a".to_owned(), score: -1.5, kind: kind::NORMAL }]);
        assert_eq!((model.algorithm, model.special_ids), (2, [1, 2, 0, -1]));
        assert_eq!((model.add_dummy_prefix, model.remove_extra_whitespaces, model.escape_whitespaces), (false, false, true));
        // Cut between fields it is another model; anywhere else it is damage, and so is any length that is too long.
        let whole: Vec<usize> = (0..bytes.len()).filter(|n| parse(&bytes[..*n]).is_ok()).collect();
        assert_eq!(whole, [13, 16, 25, 30, 33, 49]);
        bytes[1] = 0x7f;
        assert!(parse(&bytes).is_err() && parse(&[]).is_err() && parse(&[0xff; 20]).is_err() && parse(&[0x0b]).is_err());
    }
}
