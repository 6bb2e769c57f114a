//! Windows of token ids.

use crate::{Error, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Calibration windows, [samples][length].
///
/// The rule. ChaCha8 is keyed with `seed` as 8 little-endian bytes followed by 24 zero bytes; a draw below n is the upper half of
/// the 128-bit product of its next u64 with n.
/// 1. Let slack = min(length - 1, n_tok - samples * length). Draw the offset of the grid below slack + 1.
/// 2. The grid has m = floor((n_tok - offset) / length) windows; window i starts at offset + i * length.
/// 3. Shuffle the windows by Fisher and Yates, from the front: for i = 0, 1, ..., samples - 1 swap i with i + (a draw below m - i).
/// 4. The first `samples` windows are the result, in this order.
///
/// So windows never overlap, all of the text is equally likely to be seen, and the same tokens and seed give the same windows
/// everywhere. Errors: no samples, windows shorter than 2, or a text with fewer than samples * length tokens.
pub fn sample_windows(tokens: &[u32], samples: usize, length: usize, seed: u64) -> Result<Vec<Vec<u32>>> {
    let needed = needed_tokens(samples, length)?;
    let Some(spare) = tokens.len().checked_sub(needed) else {
        let message = format!(
            "is too short: {samples} samples of {length} tokens need {needed} tokens, but it has {}; give more text, or lower \
             --samples or --sequence-length",
            tokens.len()
        );
        return Err(Error::input("calibration text", message));
    };
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    let mut below = |n: usize| ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize;

    let offset = below(spare.min(length - 1) + 1);
    let mut starts: Vec<usize> = (offset..=tokens.len() - length).step_by(length).collect();
    for i in 0..samples {
        let j = i + below(starts.len() - i);
        starts.swap(i, j);
    }
    Ok(starts[..samples].iter().map(|start| tokens[*start..start + length].to_vec()).collect())
}

/// How many tokens `samples` windows take. Errors: settings that make no sense.
pub(super) fn needed_tokens(samples: usize, length: usize) -> Result<usize> {
    if samples == 0 {
        return Err(Error::usage("--samples", "must be at least 1"));
    }
    if length < 2 {
        return Err(Error::usage("--sequence-length", format!("must be at least 2, not {length}")));
    }
    samples.checked_mul(length).ok_or_else(|| Error::usage("--samples", format!("of {samples} times {length} tokens is too much")))
}

/// Consecutive windows from the first token on, without overlap: the first `limit`, or all whole ones.
///
/// Errors: windows shorter than 2, a limit of 0, or fewer whole windows than `limit` (or none).
pub fn eval_windows(tokens: &[u32], window: usize, limit: Option<usize>) -> Result<Vec<&[u32]>> {
    if window < 2 {
        return Err(Error::usage("evaluation window", format!("must be at least 2 tokens, not {window}")));
    }
    let wanted = limit.unwrap_or(1);
    if wanted == 0 {
        return Err(Error::usage("evaluation windows", "must be at least 1"));
    }
    let whole = tokens.len() / window;
    if whole < wanted {
        let needed = wanted.saturating_mul(window);
        let message = format!("is too short: {wanted} windows of {window} tokens need {needed} tokens, but it has {}", tokens.len());
        return Err(Error::input("evaluation text", message));
    }
    Ok(tokens.chunks_exact(window).take(limit.unwrap_or(whole)).collect())
}

/// Every id must be a row of the embedding; otherwise tokenizer and weights belong to different models.
pub fn check_ids(tokens: &[u32], n_vocab: usize) -> Result<()> {
    match tokens.iter().position(|id| *id as usize >= n_vocab) {
        Some(position) => {
            let message = format!(
                "gives id {} at token {position}, but the model's vocabulary has {n_vocab} entries: tokenizer and weights belong to \
                 different models",
                tokens[position]
            );
            Err(Error::input("tokenizer.json", message))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn windows_are_disjoint_contiguous_and_repeatable() {
        for (n, samples, length) in [(1000, 7, 32), (64, 2, 32), (65, 2, 32), (96, 3, 32), (95, 2, 32), (4, 2, 2)] {
            let tokens: Vec<u32> = (0..n).collect();
            for seed in 0..20 {
                let windows = sample_windows(&tokens, samples, length, seed).unwrap();
                assert_eq!(windows, sample_windows(&tokens, samples, length, seed).unwrap());
                assert_eq!(windows.len(), samples);
                let mut seen = HashSet::new();
                for window in &windows {
                    assert_eq!(window.len(), length);
                    assert!(window.windows(2).all(|p| p[1] == p[0] + 1));
                    assert!(window.iter().all(|t| seen.insert(*t)));
                }
            }
        }
    }

    #[test]
    fn every_token_is_reached_and_seeds_differ() {
        let tokens: Vec<u32> = (0..200).collect();
        let runs: Vec<_> = (0..400).map(|seed| sample_windows(&tokens, 4, 16, seed).unwrap()).collect();
        let reached: HashSet<u32> = runs.iter().flatten().flatten().copied().collect();
        assert_eq!(reached.len(), tokens.len());
        assert!(runs.iter().collect::<HashSet<_>>().len() > 390);
    }

    #[test]
    fn the_draw_is_pinned() {
        // Guards the documented rule: a change here changes every calibrated result.
        let tokens: Vec<u32> = (0..1000).collect();
        let starts = |n, seed| sample_windows(&tokens, n, 10, seed).unwrap().iter().map(|w| w[0]).collect::<Vec<_>>();
        // From a separate implementation of the rule, ChaCha included, in Python.
        assert_eq!(starts(5, 42), [283, 493, 373, 823, 103]);
        assert_eq!(starts(12, (1 << 63) + 5), [816, 606, 326, 266, 726, 826, 296, 666, 376, 56, 926, 136]);
    }

    #[test]
    fn too_little_text_says_how_much_is_needed() {
        let e = sample_windows(&[1; 63], 2, 32, 0).unwrap_err();
        assert!(e.message.contains("need 64 tokens, but it has 63"), "{e}");
        assert!(sample_windows(&[1; 64], 0, 32, 0).is_err());
        assert!(sample_windows(&[1; 64], 2, 1, 0).is_err());
        assert!(sample_windows(&[1; 64], usize::MAX, 3, 0).is_err());
        let e = eval_windows(&[1; 63], 32, Some(2)).unwrap_err();
        assert!(e.message.contains("need 64 tokens, but it has 63"), "{e}");
        assert!(eval_windows(&[1; 63], 64, None).is_err());
        assert!(eval_windows(&[1; 63], 1, None).is_err());
        assert!(eval_windows(&[1; 63], 2, Some(0)).is_err());
        assert!(eval_windows(&[1; 63], 2, Some(usize::MAX)).is_err());
    }

    #[test]
    fn evaluation_takes_whole_windows_in_order() {
        let tokens: Vec<u32> = (0..10).collect();
        assert_eq!(eval_windows(&tokens, 4, None).unwrap(), [&[0, 1, 2, 3][..], &[4, 5, 6, 7]]);
        assert_eq!(eval_windows(&tokens, 5, Some(1)).unwrap(), [&[0, 1, 2, 3, 4][..]]);
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_named() {
        assert!(check_ids(&[0, 31], 32).is_ok());
        let e = check_ids(&[0, 32], 32).unwrap_err();
        assert!(e.message.contains("id 32 at token 1"), "{e}");
    }
}
