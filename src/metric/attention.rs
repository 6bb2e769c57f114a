//! Attention-wise metrics of one block (aespa, arXiv 2402.08958): what the heads of W_Q, W_K and W_V are weighed by.
//!
//!   W_Q, W_K:  L = Σ_h tr(G_h E_h H E_hᵀ), G the second moment of the other operand (K or Q, rotary embedding averaged out), or the
//!              exact Gauss-Newton factor of the attention's output, measured by probes (`calib::Probe`);
//!   W_V:       L = Σ_h tr(G_h E_h H_V,h E_hᵀ), H_V = Xᵀ Aᵀ A X / n_tok; with G = W_Oᵀ W_O this is the attention output's error, exactly.
//!
//! All are estimates, and H_V and G weigh few directions much more than H does. Two shrinkages trade their bias for variance:
//! H_V / tr H_V towards H / tr H, and G towards its mean diagonal.

use crate::calib::{AttentionMoments, Gram, QueryKeyMetric};
use crate::model::Role;

/// What weighs the rows of a linear whose rows belong to heads of `d_head` rows, or gives every head a column metric of its own.
#[derive(Clone, Copy, Debug)]
pub enum Heads<'a> {
    /// Rows are independent, all under the metric of the input.
    None,
    /// G [n_head, d_head, d_head].
    Rows { d_head: usize, g: &'a [f32] },
    /// H per head, and perhaps G.
    Columns { d_head: usize, h: &'a [Gram], g: Option<&'a [f32]> },
}

/// The metrics of one block's heads, on the host.
#[derive(Clone, Debug)]
pub struct AttentionMetric {
    pub rows: QueryKeyMetric,
    /// H_V per key/value head; empty: the input's H.
    pub h_v: Vec<Gram>,
    /// [n_kv, d_head, d_head].
    pub g_v: Option<Vec<f32>>,
}

impl AttentionMetric {
    pub fn new(rows: QueryKeyMetric, moments: AttentionMoments) -> Self {
        Self { rows, h_v: moments.h_v, g_v: None }
    }

    /// What weighs the heads of `role`.
    pub fn heads(&self, role: Role) -> Heads<'_> {
        let d_head = self.rows.d_head;
        match role {
            Role::Q => Heads::Rows { d_head, g: &self.rows.g_q },
            Role::K => Heads::Rows { d_head, g: &self.rows.g_k },
            Role::V if !self.h_v.is_empty() => Heads::Columns { d_head, h: &self.h_v, g: self.g_v.as_deref() },
            Role::V => self.g_v.as_deref().map_or(Heads::None, |g| Heads::Rows { d_head, g }),
            _ => Heads::None,
        }
    }

    /// G ← (1 − ρ) G + ρ mean(diag G) I for every head of q, k and v.
    pub fn shrink_rows(&mut self, rho: f32) {
        let d = self.rows.d_head;
        let all = [Some(&mut self.rows.g_q), Some(&mut self.rows.g_k), self.g_v.as_mut()];
        for g in all.into_iter().flatten().flat_map(|g| g.chunks_mut(d * d)) {
            let mean = (0..d).map(|i| g[i * d + i]).sum::<f32>() / d as f32;
            g.iter_mut().for_each(|v| *v *= 1.0 - rho);
            (0..d).for_each(|i| g[i * d + i] += rho * mean);
        }
    }

    /// H_V ← (1 − ρ) H_V + ρ H · tr(H_V) / tr(H) for every head.
    pub fn shrink_columns(&mut self, rho: f32, input: &Gram) {
        let trace = |g: &Gram| (0..g.d).map(|i| g.h[i * g.d + i]).sum::<f32>();
        for h_v in &mut self.h_v {
            let to = rho * trace(h_v) / trace(input).max(f32::MIN_POSITIVE);
            h_v.h.iter_mut().zip(&input.h).for_each(|(v, h)| *v = (1.0 - rho) * *v + to * h);
        }
    }
}
