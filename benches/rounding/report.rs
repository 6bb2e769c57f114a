//! Sums over linears: as a table, and as JSON.

use super::chains::{CHAINS, Chain, DESCENT, GPTQ, PUBLISHED};
use super::measure::Measured;
use aespa_gpu::model::Role;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const ROLES: &[Role] = &[Role::Q, Role::K, Role::V, Role::O, Role::Gate, Role::Up, Role::Down];

/// Six digits: what a file is read for, and what f32 losses have.
pub fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// All linears at one width. Seconds are sums, those of products included in the others.
pub struct Summary {
    pub bits: u32,
    pub linears: usize,
    pub scale_seconds: f64,
    pub loss: Vec<f64>,
    pub seconds: Vec<f64>,
    pub products: Vec<f64>,
    /// Geometric mean of each linear's loss over GPTQ's.
    pub mean: Vec<f64>,
    /// Sums of losses by role.
    pub roles: BTreeMap<String, Vec<f64>>,
    /// Linears in which descent ends below AdaRound as published.
    pub lower: usize,
}

impl Summary {
    pub fn of(bits: u32, linears: &[Measured]) -> Self {
        let own: Vec<&Measured> = linears.iter().filter(|m| m.bits == bits).collect();
        let each = |value: &dyn Fn(usize) -> f64| (0..CHAINS.len()).map(value).collect::<Vec<f64>>();
        let loss = |of: &[&Measured]| each(&|i| of.iter().map(|m| m.loss[i]).sum());
        let mean = |i: usize| {
            let logs: Vec<f64> = own.iter().filter(|m| m.loss[GPTQ] > 0.0).map(|m| (m.loss[i] / m.loss[GPTQ]).ln()).collect();
            (logs.iter().sum::<f64>() / logs.len().max(1) as f64).exp()
        };
        let role = |role: &Role| (role.to_string(), loss(&own.iter().copied().filter(|m| m.role == *role).collect::<Vec<_>>()));
        Self {
            bits,
            linears: own.len(),
            scale_seconds: own.iter().map(|m| m.scale_seconds).sum(),
            loss: loss(&own),
            seconds: each(&|i| own.iter().map(|m| m.seconds[i]).sum()),
            products: each(&|i| own.iter().map(|m| m.products[i]).sum()),
            mean: each(&mean),
            roles: ROLES.iter().map(role).collect(),
            lower: own.iter().filter(|m| m.loss[DESCENT] < m.loss[PUBLISHED]).count(),
        }
    }

    pub fn relative(&self, chain: usize) -> f64 {
        self.loss[chain] / self.loss[GPTQ]
    }

    pub fn print(&self) {
        println!("\n{} bits, {} linears; scale search {:.2} s", self.bits, self.linears, self.scale_seconds);
        println!("{:<40} {:>9} {:>9} {:>9} {:>9} {:>10}", "rounding", "sum/GPTQ", "mean/GPTQ", "seconds", "products", "of A 2000");
        for (i, chain) in CHAINS.iter().enumerate().filter(|(i, _)| self.loss[*i].is_finite()) {
            let (seconds, products, part) = (self.seconds[i], self.products[i], self.seconds[i] / self.seconds[PUBLISHED]);
            println!("{:<40} {:>9.4} {:>9.4} {seconds:>9.3} {products:>9.3} {part:>10.5}", chain.name, self.relative(i), self.mean[i]);
        }
    }

    /// The default against AdaRound as published.
    pub fn compare(&self) {
        let [[l2, s2], [l1, s1]] = [PUBLISHED, DESCENT].map(|i| [self.loss[i], self.seconds[i]]);
        let refining = |i: usize| self.seconds[i] - self.seconds[GPTQ];
        let (percent, word) = (100.0 * (l1 / l2 - 1.0).abs(), if l1 < l2 { "lower" } else { "HIGHER" });
        println!(
            "  {} bits: AdaRound, published, 2000 iterations: {l2:.6e} in {s2:.2} s, {:.2} s of them in products",
            self.bits, self.products[PUBLISHED]
        );
        println!("          descent: {l1:.6e} in {s1:.2} s: {percent:.2} % {word} in 1/{:.1} of the time", s2 / s1);
        println!(
            "          (1/{:.1} without their common start; lower in {} of {} linears)",
            refining(PUBLISHED) / refining(DESCENT),
            self.lower,
            self.linears
        );
    }

    pub fn json(&self) -> Value {
        let chain = |(i, chain): (usize, &Chain)| {
            let roles: BTreeMap<&str, Value> = self
                .roles
                .iter()
                .map(|(role, loss)| (role.as_str(), json!({ "loss": rounded(loss[i]), "over_gptq": rounded(loss[i] / loss[GPTQ]) })))
                .collect();
            json!({
                "chain": chain.name,
                "loss": rounded(self.loss[i]),
                "loss_over_gptq": rounded(self.relative(i)),
                "mean_over_gptq": rounded(self.mean[i]),
                "seconds": rounded(self.seconds[i]),
                "product_seconds": rounded(self.products[i]),
                "seconds_over_adaround_2000": rounded(self.seconds[i] / self.seconds[PUBLISHED]),
                "roles": roles,
            })
        };
        json!({
            "bits": self.bits,
            "linears": self.linears,
            "descent_below_adaround_2000": self.lower,
            "scale_seconds": rounded(self.scale_seconds),
            "chains": CHAINS.iter().enumerate().map(chain).collect::<Vec<_>>(),
        })
    }
}
