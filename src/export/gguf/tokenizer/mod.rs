//! A folder's tokenizer as metadata.
//!
//! llama.cpp has two kinds for the models that this program knows: byte-level BPE (`byte_level`), and SentencePiece's BPE, which spells characters
//! that it does not know as bytes (`spm`). Others are refused.

mod byte_level;
mod sentencepiece;
mod spm;

use super::file::Value;
use crate::model::Checkpoint;
use crate::text::Tokenizer;
use crate::{Error, Result};
use serde_json::Value as Json;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// What a token is, by the numbers of SentencePiece, which are those of GGUF.
mod kind {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

#[derive(Clone, Debug, PartialEq)]
struct Token {
    text: String,
    /// One of `kind`.
    kind: i32,
    /// Of two possible merges SentencePiece takes the one whose result has the higher score.
    score: f32,
}

impl Token {
    /// Of padding and of what is added to a vocabulary: below everything that is merged. The number is that of llama.cpp's converter.
    const LOWEST: f32 = -1000.0;

    fn new(text: impl Into<String>, kind: i32) -> Self {
        Self { text: text.into(), kind, score: Self::LOWEST }
    }
}

/// The tokens of all ids, as many as the embedding has rows.
#[derive(Debug)]
struct Vocabulary(Vec<Token>);

impl Vocabulary {
    /// All of it padding.
    fn new(n_vocab: usize) -> Self {
        Self((0..n_vocab).map(|id| Token::new(format!("[PAD{id}]"), kind::UNUSED)).collect())
    }

    /// Replaces the token of an id; the message if there is no such id.
    fn put(&mut self, id: u64, token: Token) -> Result<(), String> {
        let n_vocab = self.0.len();
        match usize::try_from(id).ok().and_then(|id| self.0.get_mut(id)) {
            Some(slot) => {
                *slot = token;
                Ok(())
            }
            None => Err(format!("has the token {:?} with the id {id}, and the model has {n_vocab}", token.text)),
        }
    }

    /// Ids by text; the message if two have the same text, which llama.cpp aborts on.
    fn ids(&self) -> Result<HashMap<&str, u32>, String> {
        let mut ids = HashMap::new();
        for (id, token) in (0..).zip(&self.0) {
            if let Some(other) = ids.insert(token.text.as_str(), id) {
                return Err(format!("has the token {:?} with the ids {other} and {id}, and llama.cpp wants one id for each", token.text));
            }
        }
        Ok(ids)
    }
}

/// What the two kinds of tokenizers say in their own ways.
struct Described {
    /// The file that it is from.
    path: PathBuf,
    vocabulary: Vocabulary,
    /// Without the prefix that all have.
    keys: Vec<(&'static str, Value)>,
    /// Of `SPECIALS`, for those that no config names.
    special_ids: [Option<u64>; 4],
    /// Does BOS precede a text where no file says it?
    adds_bos: bool,
}

/// Special tokens as `tokenizer_config.json` and GGUF call them.
const SPECIALS: [(&str, &str); 4] =
    [("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"), ("unk_token", "unknown_token_id"), ("pad_token", "padding_token_id")];

/// A token that was added to a vocabulary.
struct Added {
    id: u64,
    text: String,
    special: bool,
}

/// The files that describe a folder's tokenizer.
struct Files<'c> {
    checkpoint: &'c Checkpoint,
    /// `tokenizer.json`, also as a program.
    json: Option<(Json, Tokenizer)>,
    /// `tokenizer_config.json`.
    settings: Json,
}

impl<'c> Files<'c> {
    fn open(checkpoint: &'c Checkpoint) -> Result<Self> {
        let dir = checkpoint.dir();
        let json = read(&dir.join("tokenizer.json"))?.map(|json| Tokenizer::open(dir).map(|tokenizer| (json, tokenizer))).transpose()?;
        Ok(Self { checkpoint, json, settings: read(&dir.join("tokenizer_config.json"))?.unwrap_or_default() })
    }

    fn dir(&self) -> &Path {
        self.checkpoint.dir()
    }

    /// Of a folder that has a `tokenizer.json`.
    fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || Error::internal(self.dir().display(), "has no tokenizer.json");
        self.json.as_ref().map(|(_, tokenizer)| tokenizer).ok_or_else(missing)
    }

    fn describe(&self) -> Result<Described> {
        let model_file = self.dir().join("tokenizer.model");
        let json = self.json.as_ref().map(|(json, _)| json);
        let byte_fallback = |json: &&Json| json["model"]["byte_fallback"] == true;
        let is_bpe = |json: &&Json| json["model"]["type"] == "BPE";
        match json {
            // LLaMA 3's own folders have a tokenizer.model too, which is none of SentencePiece's.
            Some(json) if is_bpe(&json) && !byte_fallback(&json) && part(&json["pre_tokenizer"], "ByteLevel").is_some() => {
                byte_level::describe(self, json)
            }
            _ if model_file.is_file() => spm::of_model(self, &model_file),
            Some(json) if is_bpe(&json) && byte_fallback(&json) => spm::of_json(self, json),
            Some(_) => {
                let message =
                    "is neither byte-level BPE nor BPE with byte fallback, the kinds that can be stored as GGUF; choose another --format";
                Err(Error::input(self.dir().join("tokenizer.json").display(), message))
            }
            // Its error says what is needed.
            None => Err(Tokenizer::open(self.dir()).err().unwrap_or_else(|| Error::internal("tokenizer.json", "has just come"))),
        }
    }

    /// Of `tokenizer.json`, which has all of them, or else of the files that go with a `tokenizer.model`.
    fn added_tokens(&self) -> Result<Vec<Added>> {
        let damaged = |file: &str| Error::input(self.dir().join(file).display(), "has a damaged added token");
        let entry = |id: Option<u64>, token: &Json| {
            Some(Added { id: id?, text: token["content"].as_str()?.to_owned(), special: token["special"] == true })
        };
        if let Some((json, _)) = &self.json {
            let tokens = json["added_tokens"].as_array().into_iter().flatten();
            return tokens.map(|token| entry(token["id"].as_u64(), token).ok_or_else(|| damaged("tokenizer.json"))).collect();
        }
        let mut added = Vec::new();
        let file = read(&self.dir().join("added_tokens.json"))?.unwrap_or_default();
        for (text, id) in file.as_object().into_iter().flatten() {
            let id = id.as_u64().ok_or_else(|| damaged("added_tokens.json"))?;
            added.push(Added { id, text: text.clone(), special: false });
        }
        for (id, token) in self.settings["added_tokens_decoder"].as_object().into_iter().flatten() {
            added.push(entry(id.parse().ok(), token).ok_or_else(|| damaged("tokenizer_config.json"))?);
        }
        Ok(added)
    }
}

/// All keys that begin with `tokenizer.`.
///
/// # Errors
/// Input, naming the file: a kind of tokenizer that cannot be stored, one that llama.cpp would read differently, or damage; usage where the
/// name of a pre-tokenizer is missing or not needed.
pub fn metadata(checkpoint: &Checkpoint) -> Result<Vec<(String, Value)>> {
    let files = Files::open(checkpoint)?;
    let Described { path, vocabulary, mut keys, special_ids, adds_bos } = files.describe()?;
    let ids = vocabulary.ids().map_err(|message| Error::input(path.display(), message))?;
    let special = |key: &str, own: Option<u64>| {
        let content = files.settings[key].as_str().or_else(|| files.settings[key]["content"].as_str());
        let of_config = || checkpoint.config().json().get(&key.replace("token", "token_id")).and_then(Json::as_u64).or(own);
        let id = content.and_then(|text| ids.get(text).copied()).or_else(|| of_config().and_then(|id| u32::try_from(id).ok()));
        id.filter(|id| (*id as usize) < vocabulary.0.len())
    };
    let found: Vec<Option<u32>> = SPECIALS.iter().zip(special_ids).map(|((key, _), own)| special(key, own)).collect();
    for ((_, name), id) in SPECIALS.iter().zip(&found) {
        keys.extend(id.map(|id| (*name, Value::U32(id))));
    }
    let (adds_bos, adds_eos) = match &files.json {
        Some((_, tokenizer)) => {
            let ids = tokenizer.encode_with_special_tokens("a")?;
            (found[0].is_some() && ids.first().copied() == found[0], found[1].is_some() && ids.last().copied() == found[1])
        }
        None => {
            let flag = |key: &str, default: bool| files.settings[key].as_bool().unwrap_or(default);
            (flag("add_bos_token", adds_bos), flag("add_eos_token", false))
        }
    };
    keys.extend([("add_bos_token", Value::Bool(adds_bos)), ("add_eos_token", Value::Bool(adds_eos))]);
    keys.push(("token_type", Value::i32s(vocabulary.0.iter().map(|token| token.kind))));
    keys.push(("tokens", Value::texts(vocabulary.0.iter().map(|token| token.text.as_str()))));
    let mut keys: Vec<(String, Value)> = keys.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    let file = std::fs::read_to_string(files.dir().join("chat_template.jinja")).ok();
    match files.settings["chat_template"].as_str().map(str::to_owned).or(file) {
        Some(template) => keys.push(("tokenizer.chat_template".to_owned(), Value::Text(template))),
        None => keys.extend(named_templates(&files.settings["chat_template"])),
    }
    Ok(keys)
}

/// The keys of chat templates that come as a list of objects with names, as the converter has them: a key for each, and one with the names but
/// that of the default.
fn named_templates(list: &Json) -> Vec<(String, Value)> {
    let of = |template: &Json| {
        let name = template["name"].as_str()?.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect::<String>();
        Some((name, template["template"].as_str()?.to_owned()))
    };
    let mut keys = Vec::new();
    let mut names = BTreeSet::new();
    for (name, template) in
        list.as_array().into_iter().flatten().filter_map(of).filter(|(name, template)| !name.is_empty() && !template.is_empty())
    {
        let key = match name.as_str() {
            "default" => "tokenizer.chat_template".to_owned(),
            other => format!("tokenizer.chat_template.{other}"),
        };
        if name == "default" || names.insert(name) {
            keys.push((key, Value::Text(template)));
        }
    }
    if !names.is_empty() {
        keys.push(("tokenizer.chat_templates".to_owned(), Value::texts(names.iter().map(String::as_str))));
    }
    keys
}

fn read(path: &Path) -> Result<Option<Json>> {
    let Ok(bytes) = std::fs::read(path) else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::input(path.display(), "is not valid JSON").caused_by(e))
}

/// The first part of a description that has this type.
fn part<'j>(description: &'j Json, kind: &str) -> Option<&'j Json> {
    match description {
        Json::Object(map) if map.get("type").is_some_and(|t| t == kind) => Some(description),
        Json::Object(map) => map.values().find_map(|value| part(value, kind)),
        Json::Array(parts) => parts.iter().find_map(|value| part(value, kind)),
        _ => None,
    }
}

/// Texts and ids of a `tokenizer.json`, without its added tokens; the message if an id is none.
fn entries(json: &Json) -> Result<Vec<(&str, u64)>, String> {
    let vocab = json["model"]["vocab"].as_object().into_iter().flatten();
    vocab.map(|(text, id)| id.as_u64().map(|id| (text.as_str(), id)).ok_or_else(|| format!("has a wrong id for {text:?}"))).collect()
}

/// In the order in which they are applied.
fn merges(model: &Json) -> Option<Vec<(&str, &str)>> {
    let pairs = model["merges"].as_array()?.iter().map(|merge| match merge {
        Json::String(pair) => pair.split_once(' '),
        Json::Array(pair) => Some((pair.first()?.as_str()?, pair.get(1)?.as_str()?)),
        _ => None,
    });
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_with_names_have_a_key_each() {
        let list = serde_json::json!([
            {"name": "default", "template": "a"}, {"name": "tool-use", "template": "b"}, {"name": "rag", "template": "c"}, {"name": "", "template": "d"}
        ]);
        let keys = named_templates(&list);
        let named = |name: &str, text: &str| (name.to_owned(), Value::Text(text.to_owned()));
        let texts = [
            named("tokenizer.chat_template", "a"),
            named("tokenizer.chat_template.tool_use", "b"),
            named("tokenizer.chat_template.rag", "c"),
        ];
        assert_eq!(keys[..3], texts);
        assert_eq!(keys[3..], [("tokenizer.chat_templates".to_owned(), Value::texts(["rag", "tool_use"].into_iter()))]);
        assert_eq!(named_templates(&Json::Null), []);
    }
}
