//! Rotary position embeddings: the angles of a family's config, as `transformers` 5 computes them (modeling_rope_utils.py).
//!
//! Layout: half-split. Channel j of a head is rotated with channel j + d_head / 2 by the angle p * inv_freq[j] at position p.
//! Angles are computed in f64, so a table is the correctly rounded one rather than a copy of an f32 computation.

use super::config::{Config, Section};
use crate::Result;
use std::f64::consts::TAU;

/// Frequencies are theta^(-2j / d_head), changed by `scaling`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: Scaling,
}

/// How the frequencies are stretched beyond the length that the model was first trained for.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f64,
    },
    /// NTK-aware: up to `max_positions` nothing changes; a longer table gets a larger theta.
    Dynamic {
        factor: f64,
        max_positions: usize,
    },
    /// Low frequencies divided by `factor`, high ones kept, those between blended (LLaMA 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_positions: usize,
    },
    /// Each frequency divided by a factor of its own, [d_head / 2]: how GGUF files spell what changes single frequencies.
    Factors(Vec<f64>),
    /// Blended by a ramp over the dimensions (YaRN, arXiv 2309.00071); cos and sin are multiplied by `attention_factor`.
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_positions: usize,
        truncate: bool,
        attention_factor: f64,
    },
}

const KINDS: &str = "default, linear, dynamic, llama3, yarn";
const MAX_POSITIONS: usize = 1 << 31;

impl Rope {
    /// Reads `rope_theta` with `rope_scaling` (`rope_type` or the older `type`), or the `rope_parameters` of transformers 5.
    /// Kinds that we do not know and heads that are rotated in part are refused.
    pub fn from_config(config: &Config, max_positions: usize) -> Result<Self> {
        let root = config.root();
        whole_head(&root)?;
        let section = match root.section("rope_scaling")? {
            Some(scaling) if scaling.keys().next().is_some() => Some(scaling),
            _ => root.section("rope_parameters")?,
        };
        let theta_in = |s: &Section<'_>| s.number_where("rope_theta", "greater than 1", |n| n > 1.0);
        let Some(section) = section else {
            return Ok(Self { theta: theta_in(&root)?.unwrap_or(10_000.0), scaling: Scaling::Default });
        };
        whole_head(&section)?;
        if let Some(key) = section.keys().find(|k| section.get(k).is_some_and(|v| v.is_object() || v.is_array())) {
            return Err(section.error(key, "is not a number: rotary embeddings that differ by layer or channel are not supported"));
        }
        let theta = match theta_in(&section)? {
            Some(theta) => theta,
            None => theta_in(&root)?.unwrap_or(10_000.0),
        };
        Ok(Self { theta, scaling: scaling(&root, &section, max_positions)? })
    }

    /// cos and sin, each [n_pos, d_head / 2], times the attention factor.
    pub fn tables(&self, d_head: usize, n_pos: usize) -> (Vec<f32>, Vec<f32>) {
        let inv_freq = self.inv_freq(d_head, n_pos);
        let factor = self.attention_factor();
        let angles = (0..n_pos).flat_map(|p| inv_freq.iter().map(move |f| p as f64 * f));
        angles.map(|a| ((a.cos() * factor) as f32, (a.sin() * factor) as f32)).unzip()
    }

    /// What cos and sin are multiplied by: 1 except for YaRN.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            Scaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// [d_head / 2] angles per position, for a sequence of up to `n_pos` tokens (only `Dynamic` looks at that).
    pub fn inv_freq(&self, d_head: usize, n_pos: usize) -> Vec<f64> {
        let dim = d_head as f64;
        let plain = |theta: f64| (0..d_head / 2).map(move |j| theta.powf(-2.0 * j as f64 / dim));
        match self.scaling {
            Scaling::Default => plain(self.theta).collect(),
            Scaling::Factors(ref factors) => plain(self.theta).zip(factors).map(|(f, factor)| f / factor).collect(),
            Scaling::Linear { factor } => plain(self.theta).map(|f| f / factor).collect(),
            Scaling::Dynamic { factor, max_positions } => {
                let stretch = (n_pos.max(max_positions)) as f64 / max_positions as f64;
                let theta = self.theta * (factor * stretch - (factor - 1.0)).powf(dim / (dim - 2.0));
                plain(if stretch > 1.0 { theta } else { self.theta }).collect()
            }
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => plain(self.theta)
                .map(|f| {
                    let turns = original_positions as f64 * f / TAU; // in the original length
                    if turns > high_freq_factor {
                        f
                    } else if turns < low_freq_factor {
                        f / factor
                    } else {
                        let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - keep) * f / factor + keep * f
                    }
                })
                .collect(),
            Scaling::Yarn { factor, beta_fast, beta_slow, original_positions, truncate, .. } => {
                // The dimension that makes `turns` turns within the original length.
                let dim_of = |turns: f64| dim * (original_positions as f64 / (turns * TAU)).ln() / (2.0 * self.theta.ln());
                let (low, high) = (dim_of(beta_fast), dim_of(beta_slow));
                let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let high = if low == high { high + 0.001 } else { high };
                let ramp = |j: usize| ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain(self.theta).enumerate().map(|(j, f)| f / factor * ramp(j) + f * (1.0 - ramp(j))).collect()
            }
        }
    }
}

fn whole_head(section: &Section<'_>) -> Result<()> {
    let expect = "1: heads that are rotated in part are not supported";
    section.number_where("partial_rotary_factor", expect, |n| n == 1.0).map(|_| ())
}

fn scaling(root: &Section<'_>, section: &Section<'_>, max_positions: usize) -> Result<Scaling> {
    let key = if section.get("rope_type").is_some() { "rope_type" } else { "type" };
    let positive = |name: &str, fallback: f64| section.number_where(name, "greater than 0", |n| n > 0.0).map(|n| n.unwrap_or(fallback));
    let required = |name: &str, expect: &str, min: f64| {
        section.number_where(name, expect, |n| n >= min)?.ok_or_else(|| section.error(name, "is missing"))
    };
    let factor = || required("factor", "at least 1", 1.0);
    // transformers lets the top level win: Phi-3 keeps it there.
    let original_positions = || -> Result<usize> {
        let name = "original_max_position_embeddings";
        let given = match root.size(name, MAX_POSITIONS)? {
            Some(n) => Some(n),
            None => section.size(name, MAX_POSITIONS)?,
        };
        Ok(given.unwrap_or(max_positions))
    };
    match section.text(key)?.unwrap_or("default") {
        "default" => Ok(Scaling::Default),
        "linear" => Ok(Scaling::Linear { factor: factor()? }),
        "dynamic" => Ok(Scaling::Dynamic { factor: factor()?, max_positions }),
        "llama3" => {
            let low_freq_factor = required("low_freq_factor", "at least 0", 0.0)?;
            let high_freq_factor = required("high_freq_factor", "at least 0", 0.0)?;
            if low_freq_factor >= high_freq_factor {
                return Err(section.error("high_freq_factor", "must be greater than `low_freq_factor`"));
            }
            Ok(Scaling::Llama3 { factor: factor()?, low_freq_factor, high_freq_factor, original_positions: original_positions()? })
        }
        "yarn" => {
            let original_positions = original_positions()?;
            let factor = match section.get("factor") {
                Some(_) => factor()?,
                None => max_positions as f64 / original_positions as f64,
            };
            let (beta_fast, beta_slow) = (positive("beta_fast", 32.0)?, positive("beta_slow", 1.0)?);
            if beta_fast < beta_slow {
                return Err(section.error("beta_fast", "must not be less than `beta_slow`"));
            }
            let attention_factor = match section.number_where("attention_factor", "greater than 0", |n| n > 0.0)? {
                Some(given) => given,
                None => attention_factor(factor, section.number("mscale")?, section.number("mscale_all_dim")?),
            };
            let truncate = section.flag("truncate")?.unwrap_or(true);
            Ok(Scaling::Yarn { factor, beta_fast, beta_slow, original_positions, truncate, attention_factor })
        }
        other => Err(section.error(key, format!("is {other:?}, which is not supported; known are {KINDS}"))),
    }
}

/// YaRN's temperature, 0.1 ln(factor) + 1, or the ratio of two where both scales are given and not 0 (DeepSeek).
fn attention_factor(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let temperature = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    match (mscale, mscale_all_dim) {
        (Some(a), Some(b)) if a != 0.0 && b != 0.0 => temperature(a) / temperature(b),
        _ => temperature(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(text: &str, max_positions: usize) -> Result<Rope> {
        Rope::from_config(&Config::parse("config.json".into(), text.as_bytes()).unwrap(), max_positions)
    }

    /// `expect` is what transformers 5.23 computes in f32, hence the tolerance.
    fn check(text: &str, (d_head, max_positions, n_pos): (usize, usize, usize), expect: &[f64], attention: f64) {
        let rope = rope(text, max_positions).unwrap();
        let got = rope.inv_freq(d_head, n_pos);
        assert_eq!(got.len(), expect.len());
        for (j, (g, e)) in got.iter().zip(expect).enumerate() {
            assert!((g / e - 1.0).abs() < 2e-6, "{text}: inv_freq[{j}] is {g}, not {e}");
        }
        assert!((rope.attention_factor() - attention).abs() < 1e-12);
    }

    #[test]
    fn linear_scaling_equals_transformers() {
        let expect = [0.25, 0.079056941, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05];
        for text in [
            r#"{"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4}}"#,
            r#"{"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000}, "rope_scaling": null}"#,
        ] {
            check(text, (16, 512, 512), &expect, 1.0);
        }
    }

    #[test]
    fn dynamic_scaling_equals_transformers_within_and_beyond_the_trained_length() {
        let text = r#"{"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}"#;
        let within = [1.0, 0.316227764, 0.1, 0.0316227786, 0.00999999978, 0.00316227786, 0.001, 0.000316227786];
        let beyond = [1.0, 0.270296127, 0.0730599985, 0.0197478328, 0.00533776265, 0.00144277664, 0.000389976922, 0.000105409257];
        check(text, (16, 512, 512), &within, 1.0);
        check(text, (16, 512, 1024), &beyond, 1.0);
    }

    #[test]
    fn llama3_scaling_equals_transformers() {
        let text = r#"{"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#;
        let expect = [
            1.0,
            0.440366626,
            0.193922758,
            0.0853971019,
            0.0376060307,
            0.0165604409,
            0.00729266508,
            0.00321144611,
            0.000524846022,
            7.78465546e-05,
            3.42810235e-05,
            1.50962178e-05,
            6.64786967e-06,
            2.92749974e-06,
            1.28917316e-06,
            5.6770881e-07,
        ];
        check(text, (32, 131072, 64), &expect, 1.0);
    }

    #[test]
    fn yarn_scaling_equals_transformers() {
        let text = r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}"#;
        let expect = [
            1.0,
            0.562341332,
            0.316227764,
            0.177827939,
            0.1,
            0.0562341288,
            0.0282346234,
            0.0139721958,
            0.00678571407,
            0.00321337907,
            0.00146820047,
            0.00063509983,
            0.00025,
            0.000140585325,
            7.90569466e-05,
            4.44569851e-05,
        ];
        check(text, (32, 16384, 64), &expect, 1.138629436111989);
        let text = r#"{"rope_parameters": {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0,
            "mscale_all_dim": 0.8, "beta_fast": 16, "beta_slow": 2, "truncate": false, "rope_theta": 10000.0}}"#;
        let expect = [
            1.0,
            0.562341332,
            0.316227764,
            0.177827939,
            0.1,
            0.0562341288,
            0.0316227786,
            0.0150961196,
            0.00579010462,
            0.00173821871,
            0.000123952457,
            4.44569851e-05,
            2.49999994e-05,
            1.40585325e-05,
            7.90569447e-06,
            4.44569832e-06,
        ];
        check(text, (32, 163840, 64), &expect, 1.0569662567531275);
    }

    #[test]
    fn tables_are_cos_and_sin_times_the_attention_factor() {
        let rope = rope(r#"{"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 3.0}}"#, 128).unwrap();
        let (cos, sin) = rope.tables(4, 3);
        assert_eq!((cos.len(), sin.len()), (6, 6));
        assert_eq!((cos[0], cos[1], sin[0], sin[1]), (3.0, 3.0, 0.0, 0.0));
        assert_eq!((cos[4], sin[4]), ((2f64.cos() * 3.0) as f32, (2f64.sin() * 3.0) as f32));
        let defaults = Rope { theta: 10000.0, scaling: Scaling::Default };
        assert_eq!(defaults, super::Rope::from_config(&Config::parse("c".into(), b"{\"rope_scaling\": {}}").unwrap(), 9).unwrap());
    }

    #[test]
    fn what_is_not_understood_is_refused_by_key() {
        for (text, key) in [
            (r#"{"rope_scaling": {"type": "su", "factor": 2.0}}"#, "rope_scaling.type"),
            (r#"{"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}"#, "rope_parameters.rope_type"),
            (r#"{"rope_scaling": {"type": "linear"}}"#, "rope_scaling.factor"),
            (r#"{"rope_scaling": {"type": "linear", "factor": 0.0}}"#, "rope_scaling.factor"),
            (r#"{"rope_scaling": {"type": "linear", "factor": "4"}}"#, "rope_scaling.factor"),
            (r#"{"rope_scaling": "linear"}"#, "rope_scaling"),
            (r#"{"rope_theta": 0}"#, "rope_theta"),
            (r#"{"partial_rotary_factor": 0.5}"#, "partial_rotary_factor"),
            (r#"{"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}"#, "partial_rotary_factor"),
            (r#"{"rope_parameters": {"full_attention": {"rope_type": "default"}}}"#, "rope_parameters.full_attention"),
            (
                r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}"#,
                "rope_scaling.high_freq_factor",
            ),
        ] {
            let e = rope(text, 128).unwrap_err();
            assert!(e.subject == "config.json" && e.message.contains(&format!("{key}`")), "{text}: {e}");
        }
    }
}
