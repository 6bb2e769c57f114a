//! Long texts in pieces that give the same tokens: a tokenizer takes over a hundred bytes of memory for every byte of a text.
//!
//! A text may be cut behind a line's end (exactly one: what a longer run of white space becomes depends on what follows) where the tokenizer
//! itself cuts: the `AROUND` bytes on both sides give the same tokens together and apart. Where that holds nowhere (tokenizers that put a space
//! before every text) the text stays in one piece.

use crate::{Result, interrupt};

/// Bytes of a piece, more or less.
const PIECE: usize = 256 << 10;
/// Bytes on both sides of a cut that are looked at.
const AROUND: usize = 256;
/// Line ends that are tried for a cut.
const TRIES: usize = 32;

/// The pieces of a text, in order.
///
/// # Errors
/// Those of `encode`, and an interruption.
pub fn pieces(text: &str, encode: impl Fn(&str) -> Result<Vec<u32>>) -> Result<Vec<&str>> {
    let (mut pieces, mut rest) = (Vec::new(), text);
    while rest.len() > 2 * PIECE {
        interrupt::check()?;
        let Some(at) = cut(rest, &encode)? else { break };
        let (piece, after) = rest.split_at(at);
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    Ok(pieces)
}

/// Where a text may be cut, soon after `PIECE` bytes.
fn cut(text: &str, encode: impl Fn(&str) -> Result<Vec<u32>>) -> Result<Option<usize>> {
    for at in line_ends(text).take(TRIES) {
        let (from, to) = (boundary(text, at.saturating_sub(AROUND)), boundary(text, at + AROUND));
        let mut apart = encode(&text[from..at])?;
        apart.extend(encode(&text[at..to])?);
        if apart == encode(&text[from..to])? {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

/// Positions behind single line ends between what is no white space, from `PIECE` bytes on.
fn line_ends(text: &str) -> impl Iterator<Item = usize> {
    let start = boundary(text, PIECE);
    text[start..].match_indices('\n').map(move |(at, _)| start + at).filter_map(|at| {
        let blank = |c: Option<char>| c.is_none_or(char::is_whitespace);
        (!blank(text[..at].chars().next_back()) && !blank(text[at + 1..].chars().next())).then_some(at + 1)
    })
}

/// The first position from `at` on where a character begins or the text ends.
fn boundary(text: &str, at: usize) -> usize {
    (at..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len())
}
