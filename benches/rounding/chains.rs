//! What is compared: chains of rounding steps.

use aespa_gpu::round::{AdaRound, Descent};
use serde_json::{Value, json};

/// One way to round: a last step, and the chain whose result it works on.
pub struct Chain {
    pub name: &'static str,
    /// In the picture.
    pub label: &'static str,
    pub from: Option<usize>,
    pub step: Step,
}

#[derive(Clone, Copy)]
pub enum Step {
    Nearest,
    Gptq,
    /// The best rows of this many column orders.
    Orders(usize),
    AdaRound(AdaRound),
    Descent(Descent),
}

pub const NEAREST: usize = 0;
pub const GPTQ: usize = 1;
/// AdaRound as published, which the others are compared with.
pub const PUBLISHED: usize = 3;
const NORMALISED: usize = 4;
/// The default of this program.
pub const DESCENT: usize = 7;
pub const BEST_ORDERS: usize = 9;
const BLOCKS: usize = 11;
/// Column orders of those chains that try several.
pub const ORDERS: usize = 8;

const fn refined(name: &'static str, label: &'static str, step: Step) -> Chain {
    Chain { name, label, from: Some(GPTQ), step }
}

pub const CHAINS: &[Chain] = &[
    Chain { name: "nearest", label: "nearest", from: None, step: Step::Nearest },
    Chain { name: "gptq", label: "GPTQ", from: None, step: Step::Gptq },
    refined("gptq+adaround, published, 200", "A 200", Step::AdaRound(AdaRound { iterations: 200, ..AdaRound::PUBLISHED })),
    refined("gptq+adaround, published, 2000", "A 2000", Step::AdaRound(AdaRound::PUBLISHED)),
    refined("gptq+adaround, normalised, 200", "N 200", Step::AdaRound(AdaRound { iterations: 200, ..AdaRound::NORMALISED })),
    refined("gptq+descent, greedy", "greedy", Step::Descent(Descent { temperature: 0.0, ..Descent::DEFAULT })),
    refined("gptq+descent, scales fixed", "D fixed", Step::Descent(Descent { refit: false, ..Descent::DEFAULT })),
    refined("gptq+descent", "D", Step::Descent(Descent::DEFAULT)),
    Chain {
        name: "gptq+adaround, normalised, 200+descent",
        label: "N 200 + D",
        from: Some(NORMALISED),
        step: Step::Descent(Descent::DEFAULT),
    },
    Chain { name: "gptq, 8 orders", label: "GPTQ x 8", from: None, step: Step::Orders(ORDERS) },
    Chain { name: "gptq, 8 orders+descent", label: "x 8 + D", from: Some(BEST_ORDERS), step: Step::Descent(Descent::DEFAULT) },
    refined("gptq+adaround-blocks", "B", Step::AdaRound(AdaRound::BLOCKS)),
    Chain { name: "gptq+adaround-blocks+descent", label: "B + D", from: Some(BLOCKS), step: Step::Descent(Descent::DEFAULT) },
];

impl Step {
    pub fn settings(self) -> Value {
        match self {
            Step::Nearest => json!("nearest"),
            Step::Gptq => json!("gptq"),
            Step::Orders(orders) => json!({ "gptq": { "orders": orders } }),
            Step::AdaRound(options) => json!({ "adaround": options }),
            Step::Descent(options) => json!({ "descent": options }),
        }
    }
}
