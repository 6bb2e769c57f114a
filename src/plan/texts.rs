//! The texts of a run: first opened, which gives all windows their sizes, then tokenized, which takes a second for two megabytes.

use super::{EvalRequest, Request};
use crate::eval::MIN_WINDOW;
use crate::method::Method;
use crate::model::ModelSpec;
use crate::text::{Corpus, TokenFile, Tokenizer, eval_windows};
use crate::{Error, Result};
use std::path::Path;

/// Windows to calibrate on where nothing else is said, as in the papers.
const DEFAULT_SAMPLES: usize = 128;

/// Calibration windows and where they are from.
pub struct Calibration {
    pub name: String,
    pub sha256: String,
    pub windows: Vec<Vec<u32>>,
}

/// Evaluation tokens, all windows one after the other.
pub struct EvalText {
    pub name: String,
    pub sha256: String,
    pub(super) window: usize,
    tokens: Vec<u32>,
}

impl EvalText {
    /// Tokenizes a text for a model and cuts its windows.
    ///
    /// # Errors
    /// A window that is too short or longer than the model can read; too little text, saying how much is needed.
    pub fn new(request: &EvalRequest, tokenizer: &Tokenizer, spec: &ModelSpec) -> Result<Self> {
        let window = sequence_length("--window", request.window, spec)?;
        Self::cut(&request.text.open()?, window, request.windows, tokenizer, spec)
    }

    fn cut(corpus: &Corpus, window: usize, windows: Option<usize>, tokenizer: &Tokenizer, spec: &ModelSpec) -> Result<Self> {
        let tokens = corpus.tokens(tokenizer, spec.n_vocab)?;
        let windows = eval_windows(&tokens, window, windows).map_err(|e| Error { subject: corpus.name.clone(), ..e })?;
        Ok(Self { name: corpus.name.clone(), sha256: corpus.sha256.clone(), window, tokens: windows.concat() })
    }

    /// Tokens of all windows.
    pub fn n_tok(&self) -> usize {
        self.tokens.len()
    }

    pub fn windows(&self) -> Vec<&[u32]> {
        self.tokens.chunks(self.window).collect()
    }
}

/// The length to use: what was asked for if the model can read it, else 2048 or the model's longest.
pub fn sequence_length(option: &str, asked: Option<usize>, spec: &ModelSpec) -> Result<usize> {
    const DEFAULT: usize = 2048;
    let longest = spec.max_positions;
    let length = asked.unwrap_or(DEFAULT.min(longest));
    if length > longest {
        return Err(Error::usage(option, format!("{length} is more than the {longest} positions of this model; ask for at most that")));
    }
    if length < MIN_WINDOW {
        return Err(Error::usage(option, format!("{length} is too short: a window needs at least {MIN_WINDOW} tokens")));
    }
    Ok(length)
}

/// What a run reads, not yet tokenized.
pub(super) struct Texts {
    calibration: Option<Source>,
    eval: Option<EvalSource>,
}

enum Source {
    /// A token file.
    Ids(Calibration),
    Corpus {
        corpus: Corpus,
        samples: usize,
        length: usize,
        seed: u64,
    },
}

enum EvalSource {
    /// All of a text: only its tokens tell how many windows that is.
    Whole(EvalText),
    Corpus {
        corpus: Corpus,
        window: usize,
        windows: usize,
    },
}

impl Texts {
    /// # Errors
    /// A file that cannot be read; no windows, windows that the model cannot read, or more of them than a token file has.
    pub fn open(request: &Request, method: &Method, spec: &ModelSpec) -> Result<Self> {
        let calibration = method.calibrates().then(|| Source::open(request, spec)).transpose()?;
        let eval = request.eval.as_ref().map(|eval| EvalSource::open(eval, &request.model, spec)).transpose()?;
        Ok(Self { calibration, eval })
    }

    /// The windows with their sizes, but with zeros for ids.
    pub fn blank(&self) -> (Option<Calibration>, Option<EvalText>) {
        (self.calibration.as_ref().map(Source::blank), self.eval.as_ref().map(EvalSource::blank))
    }

    /// Tokenizes with the tokenizer of the model in `folder`.
    ///
    /// # Errors
    /// A tokenizer that cannot be read or is another model's; too little text, saying how much is needed.
    pub fn tokenize(self, folder: &Path, spec: &ModelSpec) -> Result<(Option<Calibration>, Option<EvalText>)> {
        // Token files need none.
        let reads_text = matches!(self.calibration, Some(Source::Corpus { .. })) || matches!(self.eval, Some(EvalSource::Corpus { .. }));
        let tokenizer = reads_text.then(|| Tokenizer::open(folder)).transpose()?;
        let calibration = self.calibration.map(|source| source.tokenize(tokenizer.as_ref(), spec)).transpose()?;
        Ok((calibration, self.eval.map(|eval| eval.tokenize(tokenizer.as_ref(), spec)).transpose()?))
    }
}

impl Source {
    fn open(request: &Request, spec: &ModelSpec) -> Result<Self> {
        if request.samples == Some(0) {
            return Err(Error::usage("--samples", "must be at least 1"));
        }
        if let Some(path) = request.calibration.as_deref().filter(|p| TokenFile::is_one(p)) {
            return Ok(Self::Ids(ids(request, path, spec)?));
        }
        let length = sequence_length("--sequence-length", request.sequence_length, spec)?;
        let corpus = request.calibration.as_deref().map_or_else(|| Ok(Corpus::built_in()), Corpus::open)?;
        Ok(Self::Corpus { corpus, samples: request.samples.unwrap_or(DEFAULT_SAMPLES), length, seed: request.seed })
    }

    fn blank(&self) -> Calibration {
        let (name, sha256, samples, length) = match self {
            Self::Ids(c) => (&c.name, &c.sha256, c.windows.len(), c.windows.first().map_or(0, Vec::len)),
            Self::Corpus { corpus, samples, length, .. } => (&corpus.name, &corpus.sha256, at_most(corpus, *samples, *length), *length),
        };
        Calibration { name: name.clone(), sha256: sha256.clone(), windows: vec![vec![0; length]; samples] }
    }

    fn tokenize(self, tokenizer: Option<&Tokenizer>, spec: &ModelSpec) -> Result<Calibration> {
        match self {
            Self::Ids(calibration) => Ok(calibration),
            Self::Corpus { corpus, samples, length, seed } => {
                let windows = corpus.sample(tokenizer.ok_or_else(no_tokenizer)?, spec.n_vocab, samples, length, seed)?;
                Ok(Calibration { name: corpus.name, sha256: corpus.sha256, windows })
            }
        }
    }
}

/// The windows of a token file: all of them, or the first `--samples`.
fn ids(request: &Request, path: &Path, spec: &ModelSpec) -> Result<Calibration> {
    let TokenFile { sha256, mut windows } = TokenFile::open(path, spec.n_vocab)?;
    let length = windows.first().map_or(0, Vec::len);
    sequence_length(&path.display().to_string(), Some(length), spec)?;
    if request.sequence_length.is_some_and(|asked| asked != length) {
        return Err(Error::usage("--sequence-length", format!("the windows of {} have {length} tokens; leave it out", path.display())));
    }
    match request.samples {
        Some(n) if n > windows.len() => {
            return Err(Error::usage("--samples", format!("{n} is more than the {} windows of {}", windows.len(), path.display())));
        }
        Some(n) => windows.truncate(n),
        None => {}
    }
    Ok(Calibration { name: path.display().to_string(), sha256, windows })
}

impl EvalSource {
    fn open(request: &EvalRequest, model: &Path, spec: &ModelSpec) -> Result<Self> {
        let Some(windows) = request.windows else {
            return Ok(Self::Whole(EvalText::new(request, &Tokenizer::open(model)?, spec)?));
        };
        if windows == 0 {
            return Err(Error::usage("evaluation windows", "must be at least 1"));
        }
        let window = sequence_length("--window", request.window, spec)?;
        Ok(Self::Corpus { corpus: request.text.open()?, window, windows })
    }

    fn blank(&self) -> EvalText {
        let (name, sha256, window, tokens) = match self {
            Self::Whole(text) => (&text.name, &text.sha256, text.window, text.tokens.len()),
            Self::Corpus { corpus, window, windows } => {
                (&corpus.name, &corpus.sha256, *window, window * at_most(corpus, *windows, *window))
            }
        };
        EvalText { name: name.clone(), sha256: sha256.clone(), window, tokens: vec![0; tokens] }
    }

    fn tokenize(self, tokenizer: Option<&Tokenizer>, spec: &ModelSpec) -> Result<EvalText> {
        match self {
            Self::Whole(text) => Ok(text),
            Self::Corpus { corpus, window, windows } => {
                EvalText::cut(&corpus, window, Some(windows), tokenizer.ok_or_else(no_tokenizer)?, spec)
            }
        }
    }
}

fn no_tokenizer() -> Error {
    Error::internal("text", "has no tokenizer")
}

/// As many windows as were asked for, but for what no text of so many bytes can give: that is refused when it is tokenized.
fn at_most(corpus: &Corpus, windows: usize, length: usize) -> usize {
    let bytes: usize = corpus.documents().iter().map(String::len).sum();
    windows.min(bytes / length + 1)
}
