//! SentencePiece's BPE, which llama.cpp calls "llama": from `tokenizer.model`, or from a `tokenizer.json` that was made of one.
//!
//! llama.cpp has no list of merges. It joins any two neighbours whose joined text is a token, that with the highest score first and the leftmost
//! of equal ones, and spells characters that are no tokens as bytes. A `tokenizer.json` lists merges instead, by rank. With minus the rank of
//! the first merge that makes a token as its score, both visit the same merges, if all ways to split a token into two are listed, one after the
//! other, as `transformers` does when it converts a `tokenizer.model`. Whether a tokenizer is like that, and all else that a `tokenizer.json` may
//! do to a text, is tested: samples must become the same tokens ([`Reader::encode`] does as llama.cpp).

use super::sentencepiece::{self, Model, Piece};
use super::{Described, Files, Token, Vocabulary, byte_level, kind, part};
use crate::export::gguf::file::Value;
use crate::text::{Corpus, Tokenizer};
use crate::{Error, Result};
use serde_json::Value as Json;
use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::path::Path;

/// What stands for a space.
const SPACE: &str = "\u{2581}";
/// No published model comes near; a larger file is none.
const MAX_BYTES: u64 = 256 << 20;
/// Characters of the built-in novels that must become the same tokens.
const NOVEL: usize = 1 << 16;
/// What the other sample lacks: letters with marks of their own, compatible forms, scripts, runs of spaces within a line.
const SAMPLE: &str = "Hello, wörld!  Two  spaces,   three.\tA tab. e\u{301} é ﬁ ½ ② ＡＢＣ ß İ नमस्ते مرحبا 안녕하세요 ไทย 𝔘𝔫𝔦 l'été CamelCase \
    snake_case http://example.org/?q=1&r=%20 {\"a\": [1, 2]}\r\n    return x == 0x1F;\n\n\u{a0}\u{200b} fin. ";

/// Of a folder with a `tokenizer.model`.
///
/// # Errors
/// Input, naming the file: damage, settings that llama.cpp cannot follow, or a `tokenizer.json` beside it that tokenizes in another way; usage
/// if the name of a pre-tokenizer is given.
pub(super) fn of_model(files: &Files<'_>, path: &Path) -> Result<Described> {
    let wrong = |message: String| Error::input(path.display(), message);
    let cannot = |e| Error::input(path.display(), "cannot be read").caused_by(e);
    if std::fs::metadata(path).map_err(cannot)?.len() > MAX_BYTES {
        return Err(wrong(format!("is larger than {} MiB and so no SentencePiece model", MAX_BYTES >> 20)));
    }
    let bytes = std::fs::read(path).map_err(cannot)?;
    let model = sentencepiece::parse(&bytes).map_err(|message| wrong(format!("is no SentencePiece model: it {message}")))?;
    if let Some(reason) = unfit(&model) {
        return Err(wrong(format!("{reason}, which llama.cpp cannot do; choose another --format")));
    }
    let mut vocabulary = Vocabulary::new(files.checkpoint.spec().n_vocab);
    for (id, Piece { text, score, kind }) in (0..).zip(model.pieces) {
        let text = if kind == kind::USER_DEFINED { spaced(&text) } else { text };
        vocabulary.put(id, Token { text, kind, score }).map_err(wrong)?;
    }
    let special_ids = model.special_ids.map(|id| u64::try_from(id).ok());
    describe(files, path, vocabulary, model.add_dummy_prefix, special_ids)
}

/// Of a folder with nothing but a `tokenizer.json`, which is BPE with byte fallback.
///
/// # Errors
/// Input, naming the file: damage, or a tokenizer that llama.cpp cannot follow; usage if the name of a pre-tokenizer is given.
pub(super) fn of_json(files: &Files<'_>, json: &Json) -> Result<Described> {
    let path = files.dir().join("tokenizer.json");
    let wrong = |message: String| Error::input(path.display(), message);
    let merges = super::merges(&json["model"]).ok_or_else(|| wrong("has merges that are no pairs".to_owned()))?;
    let mut ranks = HashMap::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let unknown = json["model"]["unk_token"].as_str();
    let (mut vocabulary, mut unknown_id) = (Vocabulary::new(files.checkpoint.spec().n_vocab), None);
    for (text, id) in super::entries(json).map_err(wrong)? {
        let kind = match text {
            _ if unknown == Some(text) => kind::UNKNOWN,
            _ if byte_of(text).is_some() => kind::BYTE,
            _ => kind::NORMAL,
        };
        if kind == kind::UNKNOWN {
            unknown_id = Some(id);
        }
        // What no merge makes comes last, should its parts be tokens all the same.
        let rank = ranks.get(text).copied().unwrap_or(merges.len());
        vocabulary.put(id, Token { text: text.to_owned(), kind, score: 0.0 - rank as f32 }).map_err(wrong)?;
    }
    let description = [&json["normalizer"], &json["pre_tokenizer"]];
    let metaspace = description.iter().find_map(|part_of| part(part_of, "Metaspace"));
    if metaspace.is_some() {
        let file = path.display();
        tracing::info!("llama.cpp puts a space before texts that begin with one, and after special tokens; {file} may not");
    }
    let prepends = metaspace.is_some_and(|m| m["prepend_scheme"] != "never" && m["add_prefix_space"] != false);
    let add_space_prefix = prepends || description.iter().any(|part_of| part(part_of, "Prepend").is_some());
    describe(files, &path, vocabulary, add_space_prefix, [None, None, unknown_id, None])
}

/// What a model does that llama.cpp cannot.
fn unfit(model: &Model) -> Option<String> {
    const ALGORITHMS: [&str; 5] = ["0", "Unigram", "BPE", "words", "characters"];
    let algorithm = usize::try_from(model.algorithm).ok().and_then(|n| ALGORITHMS.get(n)).unwrap_or(&"unknown");
    if model.algorithm != 2 {
        return Some(format!("tokenizes by the algorithm {algorithm} instead of BPE"));
    }
    if model.has_table || !["", "identity"].contains(&model.normalization.as_str()) {
        return Some(format!("normalizes texts ({})", model.normalization));
    }
    let flags = [
        (model.remove_extra_whitespaces, "removes spaces (`remove_extra_whitespaces`)"),
        (!model.escape_whitespaces, "keeps spaces as they are (`escape_whitespaces`)"),
        (model.whitespace_as_suffix, "has spaces at the end of words (`treat_whitespace_as_suffix`)"),
    ];
    flags.iter().find(|(set, _)| *set).map(|(_, reason)| (*reason).to_owned())
}

/// A text as it is before spaces are escaped: there llama.cpp looks for the tokens that users have defined.
fn spaced(text: &str) -> String {
    text.replace(SPACE, " ")
}

/// The byte that a token like `<0x0A>` stands for.
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let upper = |c: char| c.is_ascii_digit() || ('A'..='F').contains(&c);
    (digits.len() == 2 && digits.chars().all(upper)).then(|| u8::from_str_radix(digits, 16).ok())?
}

fn describe(
    files: &Files<'_>,
    path: &Path,
    mut vocabulary: Vocabulary,
    add_space_prefix: bool,
    special_ids: [Option<u64>; 4],
) -> Result<Described> {
    if files.checkpoint.pre_tokenizer().is_some() {
        let message = format!("{} is a SentencePiece tokenizer, which has no pre-tokenizer; leave it out", path.display());
        return Err(Error::usage("--gguf-pre", message));
    }
    let wrong = |message: String| Error::input(path.display(), message);
    for added in files.added_tokens()? {
        let own = usize::try_from(added.id).ok().and_then(|id| vocabulary.0.get(id));
        let kind = match own {
            // Lists of added tokens repeat what the vocabulary knows better.
            Some(own) if own.text == added.text && [kind::UNKNOWN, kind::BYTE].contains(&own.kind) => own.kind,
            _ if added.special => kind::CONTROL,
            _ => kind::USER_DEFINED,
        };
        let text = if kind == kind::USER_DEFINED { spaced(&added.text) } else { added.text };
        vocabulary.put(added.id, Token::new(text, kind)).map_err(wrong)?;
    }
    // llama.cpp begins what follows such a token with a space.
    let is_blank = |token: &&Token| token.kind == kind::USER_DEFINED && !token.text.is_empty() && token.text.trim().is_empty();
    if let Some(Token { text, .. }) = vocabulary.0.iter().find(is_blank).filter(|_| add_space_prefix) {
        let message = format!("has the user-defined token {text:?}, after which llama.cpp would add a space; choose another --format");
        return Err(wrong(message));
    }
    let reader = Reader::new(&vocabulary, add_space_prefix).map_err(wrong)?;
    if let Some((_, tokenizer)) = &files.json {
        same_tokens(&reader, tokenizer, path)?;
    }
    let keys = vec![
        ("model", Value::Text("llama".to_owned())),
        ("pre", Value::Text("default".to_owned())),
        ("scores", Value::f32s(vocabulary.0.iter().map(|token| token.score))),
        ("add_space_prefix", Value::Bool(add_space_prefix)),
    ];
    Ok(Described { path: path.to_owned(), vocabulary, keys, special_ids, adds_bos: true })
}

/// Do samples become the tokens that `tokenizer.json` makes of them?
fn same_tokens(reader: &Reader<'_>, tokenizer: &Tokenizer, path: &Path) -> Result<()> {
    let novels = Corpus::built_in();
    let novel: String = novels.documents().iter().flat_map(|text| text.chars()).take(NOVEL).collect();
    for text in [byte_level::CHECK, SAMPLE, &novel] {
        let (theirs, ours) = (reader.encode(text), tokenizer.encode(text)?);
        if let Some(at) = (0..theirs.len().max(ours.len())).find(|at| theirs.get(*at) != ours.get(*at)) {
            let show = |ids: &[u32]| {
                let ids = ids.iter().skip(at).take(4);
                ids.map(|id| reader.vocabulary.0.get(*id as usize).map_or("?", |token| token.text.as_str())).collect::<Vec<_>>().join(" ")
            };
            let subject = tokenizer.path().display();
            let (theirs, ours) = (show(&theirs), show(&ours));
            let message = format!("makes the tokens {ours:?} where llama.cpp would make {theirs:?} by {}", path.display());
            let hint = if path.ends_with("tokenizer.json") { "choose another --format" } else { "remove the file that is wrong" };
            return Err(Error::input(subject, format!("{message}; {hint}")));
        }
    }
    Ok(())
}

/// What llama.cpp makes of texts by a vocabulary.
struct Reader<'v> {
    vocabulary: &'v Vocabulary,
    ids: HashMap<&'v str, u32>,
    bytes: [u32; 256],
    /// The tokens that are found before all else, the longest first.
    user_defined: Vec<u32>,
    add_space_prefix: bool,
}

impl<'v> Reader<'v> {
    /// The message if a byte has no token: llama.cpp throws at characters that are no tokens then.
    fn new(vocabulary: &'v Vocabulary, add_space_prefix: bool) -> Result<Self, String> {
        let ids = vocabulary.ids()?;
        let mut bytes = [0; 256];
        for (byte, slot) in bytes.iter_mut().enumerate() {
            let text = format!("<0x{byte:02X}>");
            let id =
                ids.get(text.as_str()).copied().filter(|id| vocabulary.0.get(*id as usize).is_some_and(|token| token.kind == kind::BYTE));
            *slot = id.ok_or_else(|| format!("has no byte token {text}, which llama.cpp needs; choose another --format"))?;
        }
        let text = |id: &u32| vocabulary.0.get(*id as usize).map_or("", |token| token.text.as_str());
        let mut user_defined: Vec<u32> =
            (0..).zip(&vocabulary.0).filter(|(_, t)| t.kind == kind::USER_DEFINED && !t.text.is_empty()).map(|(id, _)| id).collect();
        user_defined.sort_by_key(|id| Reverse(text(id).len()));
        Ok(Self { vocabulary, ids, bytes, user_defined, add_space_prefix })
    }

    /// The ids of a text; control tokens that it spells out are plain text.
    fn encode(&self, text: &str) -> Vec<u32> {
        let mut parts = vec![Part::Text(text)];
        for id in &self.user_defined {
            let own = self.vocabulary.0.get(*id as usize).map_or("", |token| token.text.as_str());
            parts = parts.into_iter().flat_map(|part| part.split(own, *id)).collect();
        }
        let (mut ids, mut at_start) = (Vec::new(), true);
        for part in parts {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => {
                    let prefix = if self.add_space_prefix && at_start { SPACE } else { "" };
                    self.merge(&format!("{prefix}{}", text.replace(' ', SPACE)), &mut ids);
                }
            }
            at_start = matches!(part, Part::Token(_));
        }
        ids
    }

    /// Joins the characters of `text` and appends what remains.
    fn merge(&self, text: &str, ids: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol { start, end: start + c.len_utf8(), previous: i.checked_sub(1), next: Some(i + 1) })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        let bigram = |symbols: &[Symbol], left: usize, right: usize| {
            let (start, end) = (symbols[left].start, symbols[right].end);
            let id = self.ids.get(&text[start..end])?;
            let score = self.vocabulary.0.get(*id as usize)?.score;
            Some(Bigram { score, left, right, len: end - start })
        };
        let mut queue: BinaryHeap<Bigram> = (1..symbols.len()).filter_map(|right| bigram(&symbols, right - 1, right)).collect();
        while let Some(Bigram { left, right, len, .. }) = queue.pop() {
            let (a, b) = (symbols[left].clone(), symbols[right].clone());
            // One of the two may have been joined with another since.
            if a.is_gone() || b.is_gone() || b.end - a.start != len {
                continue;
            }
            symbols[left] = Symbol { end: b.end, next: b.next, ..a };
            symbols[right].end = symbols[right].start;
            if let Some(next) = b.next {
                symbols[next].previous = Some(left);
                queue.extend(bigram(&symbols, left, next));
            }
            if let Some(previous) = symbols[left].previous {
                queue.extend(bigram(&symbols, previous, left));
            }
        }
        for symbol in symbols.iter().filter(|symbol| !symbol.is_gone()) {
            let text = &text[symbol.start..symbol.end];
            match self.ids.get(text) {
                Some(id) => ids.push(*id),
                None => ids.extend(text.bytes().map(|byte| self.bytes[usize::from(byte)])),
            }
        }
    }
}

/// Of a text in which some tokens have been found.
#[derive(Clone, Copy)]
enum Part<'t> {
    Text(&'t str),
    Token(u32),
}

impl<'t> Part<'t> {
    /// Cut wherever a token's own text stands in it.
    fn split(self, own: &str, id: u32) -> Vec<Self> {
        match self {
            Self::Text(text) => {
                let mut parts: Vec<Self> = text.split(own).flat_map(|piece| [Self::Text(piece), Self::Token(id)]).collect();
                parts.pop();
                parts.retain(|part| !matches!(part, Self::Text("")));
                parts
            }
            Self::Token(_) => vec![self],
        }
    }
}

/// A stretch of the text, empty once it has been joined to the one before, and its neighbours.
#[derive(Clone)]
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

impl Symbol {
    fn is_gone(&self) -> bool {
        self.start == self.end
    }
}

/// Two neighbours that can be joined. The greatest is the one to join first.
struct Bigram {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both.
    len: usize,
}

impl Ord for Bigram {
    fn cmp(&self, other: &Self) -> Ordering {
        // Scores are finite, and 0 is −0.
        self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Bigram {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Bigram {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Bigram {}
