//! Our token ids are those of `transformers`, on both kinds of tokenizer that LLaMA checkpoints have.

mod common;

use aespa_gpu::model::{Checkpoint, unpack_demo};
use aespa_gpu::text::{Corpus, Tokenizer, sample_windows};
use common::tiny_model::TinyLlama;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

fn tests_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

fn golden_ids(file: &str) -> Vec<u32> {
    let bytes = std::fs::read(tests_dir().join("golden").join(file)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = tensors.tensor("input_ids").unwrap();
    ids.data().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

#[test]
fn byte_level_bpe_equals_transformers() {
    let dir = tempfile::tempdir().unwrap();
    unpack_demo(dir.path()).unwrap();
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    let ids = Corpus::built_in_heldout().tokens(&tokenizer, 2048).unwrap();
    assert_eq!(ids[..64], golden_ids("demo.safetensors"));
}

#[test]
fn sentencepiece_style_bpe_equals_transformers_after_its_bos() {
    let dir = tests_dir().join("models/stories260k");
    let tokenizer = Tokenizer::open(&dir).unwrap();
    let corpus = Corpus::open(&tests_dir().join("golden/tinystories-head.txt")).unwrap();
    let golden = golden_ids("stories260k.safetensors");
    let ids = corpus.tokens(&tokenizer, 512).unwrap();
    assert_eq!(golden[0], 1, "the golden ids start with BOS");
    assert_eq!(ids[..63], golden[1..]);
    assert_eq!(Checkpoint::open(&dir).unwrap().spec().d_ff, 172);
}

#[test]
fn a_corpus_that_is_too_short_says_how_many_bytes_are_needed() {
    let dir = tempfile::tempdir().unwrap();
    let model = TinyLlama { n_vocab: 256, tokenizer: true, ..TinyLlama::default() };
    model.write(dir.path());
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    let path = dir.path().join("text.jsonl");
    std::fs::write(&path, "{\"text\": \"hello w\u{f6}rld\"}\n{\"text\": \"bye\"}\n").unwrap();
    let corpus = Corpus::open(&path).unwrap();

    // 12 bytes, a blank line, 3 bytes; one token per byte.
    let tokens = corpus.tokens(&tokenizer, 256).unwrap();
    assert_eq!(tokens, b"hello w\xc3\xb6rld\n\nbye".map(u32::from));
    assert_eq!(corpus.sample(&tokenizer, 256, 3, 4, 7).unwrap(), sample_windows(&tokens, 3, 4, 7).unwrap());

    let e = corpus.sample(&tokenizer, 256, 4, 8, 0).unwrap_err();
    assert!(e.subject.ends_with("text.jsonl") && e.message.contains("need 32 tokens") && e.message.contains("bytes"), "{e}");
    let e = corpus.tokens(&tokenizer, 100).unwrap_err();
    assert!(e.subject.ends_with("tokenizer.json") && e.message.contains("vocabulary"), "{e}");
}
