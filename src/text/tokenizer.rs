//! `tokenizer.json` through the `tokenizers` crate.

use super::pieces::pieces;
use crate::{Error, Result};
use rayon::prelude::*;
use serde::de::IgnoredAny;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use tokenizers::ModelWrapper;

/// Several times the largest that is published.
const MAX_BYTES: u64 = 256 << 20;

pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `dir/tokenizer.json`. Errors: it is missing, damaged, or splits words at random (BPE dropout).
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        // A pipe would be waited for, and a device read without an end.
        if std::fs::metadata(&path).is_ok_and(|meta| !meta.is_file() || meta.len() > MAX_BYTES) {
            return Err(Error::input(path.display(), format!("is not a file of at most {} MiB", MAX_BYTES >> 20)));
        }
        let bytes = std::fs::read(&path).map_err(|e| {
            let hint = if dir.join("tokenizer.model").is_file() {
                "; there is a tokenizer.model: let transformers convert it (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))"
            } else {
                ""
            };
            Error::input(path.display(), format!("cannot be read; a model folder needs a tokenizer.json{hint}")).caused_by(e)
        })?;
        serde_json::from_slice::<IgnoredAny>(&bytes).map_err(|e| Error::input(path.display(), "is not valid JSON").caused_by(e))?;
        let damaged = || Error::input(path.display(), "is damaged or of an unknown kind");
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(&bytes)).ok_or_else(damaged)?.map_err(|e| damaged().caused_by(e))?;
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some_and(|p| p > 0.0)
        {
            return Err(Error::input(path.display(), "has BPE dropout, which tokenizes at random; set `dropout` to null"));
        }
        // Settings for training batches that a file may carry: they would cut a corpus off or fill it up.
        inner.with_truncation(None).map_err(|e| Error::input(path.display(), "has a broken truncation setting").caused_by(e))?;
        inner.with_padding(None);
        Ok(Self { path, inner })
    }

    /// The ids of `text`, as if tokenized whole; no special tokens are added, but those that the text spells out are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encode = |text: &str| self.ids("cannot encode the text", || self.inner.encode_fast(text, false));
        let parts: Vec<Vec<u32>> = pieces(text, encode)?.into_par_iter().map(encode).collect::<Result<_>>()?;
        Ok(parts.concat())
    }

    /// The ids of `text` with what the tokenizer puts before and after every text.
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<u32>> {
        self.ids("cannot encode a text", || self.inner.encode(text, true))
    }

    fn ids(&self, failed: &str, encode: impl FnOnce() -> tokenizers::Result<tokenizers::Encoding>) -> Result<Vec<u32>> {
        let failed = || Error::input(self.path.display(), failed);
        let encoding = guarded(encode).ok_or_else(failed)?.map_err(|e| failed().caused_by(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The id of a token by its text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Where it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Entries of the vocabulary, added tokens included.
    pub fn n_vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

/// Runs a call into the `tokenizers` crate, which unwraps what it should check: a damaged file can make it panic. `None` then; the
/// panic's own message has gone to stderr.
fn guarded<T>(call: impl FnOnce() -> T) -> Option<T> {
    // Nothing of ours is half-changed after a panic: the call only reads what it borrows.
    catch_unwind(AssertUnwindSafe(call)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file's own settings for `truncation`, `padding` and `dropout`, as JSON.
    fn open_with(truncation: &str, padding: &str, dropout: &str) -> Result<Tokenizer> {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            r#"{{"version": "1.0", "truncation": {truncation}, "padding": {padding}, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null, "model": {{"type": "BPE", "dropout": {dropout},
            "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "vocab": {{"a": 0, "b": 1, "ab": 2}}, "merges": ["a b"]}}}}"#
        );
        std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
        Tokenizer::open(dir.path())
    }

    #[test]
    fn a_long_text_is_cut_where_that_changes_no_token() {
        let demo = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo"));
        let tokenizer = Tokenizer::open(demo).unwrap();
        // Two bytes a letter at times, and line ends of all kinds.
        let text = include_str!("../../assets/calibration.txt").replace("e", "é").replace(". ", ".\n").replace(", ", " \n\n,\r\n");
        let whole = |text: &str| tokenizer.ids("", || tokenizer.inner.encode_fast(text, false));
        let cut = pieces(&text, whole).unwrap();
        assert!(cut.len() > 5 && cut.concat() == text, "{} pieces", cut.len());
        assert!(tokenizer.encode(&text).unwrap() == whole(&text).unwrap());
        // One that makes something else of every beginning leaves it whole, as one does in which there are no lines.
        assert_eq!(pieces(&text, |part| Ok([vec![0], whole(part)?].concat())).unwrap().len(), 1);
        assert_eq!(pieces(&text.replace('\n', " "), whole).unwrap().len(), 1);
    }

    #[test]
    fn truncation_and_padding_of_the_file_do_not_apply() {
        let truncation = r#"{"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}"#;
        let padding = r#"{"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "a"}"#;
        let tokenizer = open_with(truncation, padding, "null").unwrap();
        assert_eq!(tokenizer.encode("abbab").unwrap(), [2, 1, 2]);
        assert_eq!(tokenizer.n_vocab(), 3);
    }

    #[test]
    fn a_missing_damaged_or_random_tokenizer_is_refused() {
        let e = open_with("null", "null", "0.1").err().unwrap();
        assert!(e.message.contains("dropout"), "{e}");
        assert!(open_with("nul", "null", "null").err().unwrap().subject.ends_with("tokenizer.json"));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
        let e = Tokenizer::open(dir.path()).err().unwrap();
        assert!(e.subject.ends_with("tokenizer.json") && e.message.contains("save_pretrained"), "{e}");
    }
}
