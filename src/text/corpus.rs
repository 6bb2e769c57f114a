//! Texts: a file of the user's or one of the two that the program carries.

use super::tokenizer::Tokenizer;
use super::windows::{check_ids, needed_tokens, sample_windows};
use crate::{Error, Result};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::path::Path;

/// Excerpts of public-domain novels; see assets/README.md.
const CALIBRATION: &str = include_str!("../../assets/calibration.txt");
/// Parts of other novels, neither in the above nor seen by the demo model.
const HELDOUT: &str = include_str!("../../assets/heldout.txt");

/// What one document of several ends with, so that the next one begins like a new text.
const BETWEEN: &str = "\n\n";

pub struct Corpus {
    /// The path, or "built-in" or "built-in held-out".
    pub name: String,
    /// Of the file's bytes, in hexadecimal: what a report cites.
    pub sha256: String,
    documents: Vec<String>,
}

impl Corpus {
    /// A JSONL file (`.jsonl`, `.json-lines`, `.jsonlines`, `.ndjson`) with the field `text` on every line, else plain UTF-8 text.
    ///
    /// Errors name the file, and the line or the byte where the trouble is.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Err(Error::input(path.display(), "is a folder; give a text file or a JSONL file"));
        }
        let bytes = std::fs::read(path).map_err(|e| Error::input(path.display(), "cannot be read").caused_by(e))?;
        let sha256 = sha256(&bytes);
        let text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            Error::input(path.display(), format!("is not UTF-8 text: byte {at} cannot be read; convert it, or unpack it first"))
        })?;
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        let documents = match extension.as_deref() {
            Some("jsonl" | "json-lines" | "jsonlines" | "ndjson") => documents_of_lines(path, &text)?,
            _ => vec![text],
        };
        if documents.iter().all(|d| d.trim().is_empty()) {
            return Err(Error::input(path.display(), "holds no text"));
        }
        Ok(Self { name: path.display().to_string(), sha256, documents })
    }

    /// The default calibration text: 2 MB of public-domain English novels.
    pub fn built_in() -> Self {
        Self::carried("built-in", CALIBRATION)
    }

    /// A text to judge the demo model on: other novels.
    pub fn built_in_heldout() -> Self {
        Self::carried("built-in held-out", HELDOUT)
    }

    fn carried(name: &str, text: &str) -> Self {
        Self { name: name.to_owned(), sha256: sha256(text.as_bytes()), documents: vec![text.to_owned()] }
    }

    /// One for a plain text, one per line of a JSONL file.
    pub fn documents(&self) -> &[String] {
        &self.documents
    }

    /// The ids of the whole corpus by the rule of [`crate::text`]. Errors: the tokenizer fails, or gives an id of `n_vocab` or above.
    pub fn tokens(&self, tokenizer: &Tokenizer, n_vocab: usize) -> Result<Vec<u32>> {
        let last = self.documents.len().saturating_sub(1);
        let parts: Vec<Vec<u32>> = self
            .documents
            .par_iter()
            .enumerate()
            .map(|(i, text)| if i == last { tokenizer.encode(text) } else { tokenizer.encode(&format!("{text}{BETWEEN}")) })
            .collect::<Result<_>>()?;
        let tokens = parts.concat();
        check_ids(&tokens, n_vocab).map_err(|e| Error { subject: tokenizer.path().display().to_string(), ..e })?;
        Ok(tokens)
    }

    /// Calibration windows by the rule of [`sample_windows`]. A text that is too short is an error that also says in bytes how much
    /// is needed, at the bytes per token of this text.
    pub fn sample(&self, tokenizer: &Tokenizer, n_vocab: usize, samples: usize, length: usize, seed: u64) -> Result<Vec<Vec<u32>>> {
        let needed = needed_tokens(samples, length)?;
        let tokens = self.tokens(tokenizer, n_vocab)?;
        if tokens.len() < needed {
            let bytes: usize = self.documents.iter().map(String::len).sum();
            let needed_bytes = (bytes as f64 * needed as f64 / tokens.len().max(1) as f64).ceil();
            let message = format!(
                "is too short: {samples} samples of {length} tokens need {needed} tokens, about {needed_bytes:.0} bytes of such text, \
                 but it has {} tokens in {bytes} bytes; give more text, or lower --samples or --sequence-length",
                tokens.len()
            );
            return Err(Error::input(&self.name, message));
        }
        sample_windows(&tokens, samples, length, seed)
    }
}

fn documents_of_lines(path: &Path, text: &str) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Line {
        text: String,
    }
    let mut documents = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let Line { text } = serde_json::from_str(line).map_err(|e| {
            Error::input(path.display(), format!("line {} is not a JSON object with a string `text`", number + 1)).caused_by(e)
        })?;
        documents.push(text);
    }
    Ok(documents)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(name: &str, content: &[u8]) -> Result<Corpus> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        Corpus::open(&path)
    }

    #[test]
    fn a_text_is_one_document_and_jsonl_one_per_line() {
        let plain = corpus("a.txt", b"one\r\n{\"text\": 1}\n").unwrap();
        assert_eq!(plain.documents(), ["one\r\n{\"text\": 1}\n"]);
        for name in ["a.jsonl", "a.json-lines", "a.NDJSON"] {
            let lines = corpus(name, b"{\"text\": \"a\\nb\", \"id\": 1}\r\n\n{\"text\": \"\xc3\xa9\"}").unwrap();
            assert_eq!(lines.documents(), ["a\nb", "é"]);
        }
        assert_eq!(plain.sha256.len(), 64);
    }

    #[test]
    fn bad_texts_are_refused_with_the_place() {
        let message = |name: &str, content: &[u8]| corpus(name, content).err().unwrap().message;
        assert!(message("a.txt", b"ab\xffcd").contains("byte 2"));
        assert!(message("a.txt", b"").contains("no text"));
        assert!(message("a.txt", b" \n").contains("no text"));
        assert!(message("a.jsonl", b"\n").contains("no text"));
        assert!(message("a.jsonl", b"{\"text\": \"a\"}\n\n{\"texts\": \"a\"}").contains("line 3"));
        assert!(message("a.jsonl", b"{\"text\": \"a\"}\n{\"text\": 5}").contains("line 2"));
        assert!(message("a.jsonl", b"\"text\"").contains("line 1"));
        assert!(Corpus::open(Path::new("/")).err().unwrap().message.contains("folder"));
        assert!(Corpus::open(Path::new("nothing.txt")).err().unwrap().subject.contains("nothing.txt"));
    }

    #[test]
    fn the_assets_are_those_that_their_readme_describes() {
        let readme = include_str!("../../assets/README.md");
        let files = crate_assets();
        for (name, bytes) in &files {
            let line = readme.lines().find(|l| l.contains(&format!("`{name}`"))).unwrap_or_else(|| panic!("{name} is not described"));
            assert!(line.contains(&sha256(bytes)), "{name} is not the file that assets/README.md describes: {}", sha256(bytes));
        }
        let described = readme.lines().filter(|l| l.split('`').any(|w| w.len() == 64 && w.chars().all(|c| c.is_ascii_hexdigit()))).count();
        assert_eq!(described, files.len());
        assert_eq!(Corpus::built_in().sha256, sha256(CALIBRATION.as_bytes()));
    }

    /// Every file under assets/ but the README, by relative name.
    fn crate_assets() -> Vec<(String, Vec<u8>)> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
        let mut files = Vec::new();
        for dir in [root.clone(), root.join("demo")] {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(&root).unwrap().to_string_lossy().replace('\\', "/");
                if path.is_file() && name != "README.md" && !name.starts_with('.') {
                    files.push((name, std::fs::read(path).unwrap()));
                }
            }
        }
        files
    }
}
