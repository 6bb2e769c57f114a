//! Which type every matrix has in a file of a name: those of llama.cpp's own quantizer.
//!
//! Matrices that lose most by few bits have a better type than the rest: v, for which groups of heads share rows, the output of attention, and
//! the down projection, of the blocks at either end first. Rows that a type's blocks do not divide have the next type of about that size whose
//! blocks do; rows that no block divides stay floats.

use super::types::{Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, Type};
use crate::model::{Linear, ModelSpec, Role};
use crate::tensor::Dtype;

/// A kind of file.
pub struct Mix {
    pub name: &'static str,
    pub about: &'static str,
    /// llama.cpp's number for it.
    pub file_type: u32,
    pub base: Base,
    /// What stands in for the base for a matrix of a block, if anything does.
    better: fn(&Place) -> Option<&'static Type>,
}

/// What most matrices are.
#[derive(Clone, Copy)]
pub enum Base {
    Blocks(&'static Type),
    /// Nothing is quantized.
    Floats(Dtype),
}

/// A matrix of a block.
pub struct Place {
    role: Role,
    /// Its block, and how many there are.
    layer: usize,
    n_layer: usize,
    /// Query heads that share a key and a value.
    shared: usize,
}

impl Place {
    /// In the first eighth of blocks.
    fn is_early(&self) -> bool {
        self.layer < self.n_layer / 8
    }

    /// In the first or last eighth, or one of every three between.
    fn counts_more(&self) -> bool {
        let early = self.n_layer / 8;
        self.is_early() || self.layer >= 7 * self.n_layer / 8 || (self.layer - early) % 3 == 2
    }
}

const fn plain(name: &'static str, about: &'static str, file_type: u32, base: &'static Type) -> Mix {
    Mix { name, about, file_type, base: Base::Blocks(base), better: |_| None }
}

const fn floats(name: &'static str, about: &'static str, file_type: u32, dtype: Dtype) -> Mix {
    Mix { name, about, file_type, base: Base::Floats(dtype), better: |_| None }
}

const fn mixed(
    name: &'static str,
    about: &'static str,
    file_type: u32,
    base: &'static Type,
    better: fn(&Place) -> Option<&'static Type>,
) -> Mix {
    Mix { name, about, file_type, base: Base::Blocks(base), better }
}

pub static MIXES: [Mix; 18] = [
    mixed("gguf-q2_k", "GGUF for llama.cpp, 2 bits, 3 where it matters", 10, &Q2_K, |place| match place.role {
        Role::V if place.shared >= 4 => Some(&Q4_K),
        Role::V | Role::O | Role::Down => Some(&Q3_K),
        _ => None,
    }),
    mixed("gguf-q2_k_s", "GGUF for llama.cpp, 2 bits", 21, &Q2_K, |place| match place.role {
        Role::V if place.shared >= 4 => Some(&Q4_K),
        Role::Down if place.is_early() => Some(&Q4_K),
        _ => None,
    }),
    plain("gguf-q3_k_s", "GGUF for llama.cpp, 3 bits", 11, &Q3_K),
    mixed("gguf-q3_k_m", "GGUF for llama.cpp, 3 bits, 4 where it matters", 12, &Q3_K, |place| match place.role {
        Role::V => Some(if place.layer < 2 { &Q5_K } else { &Q4_K }),
        Role::Down => Some(if place.layer < place.n_layer / 16 { &Q5_K } else { &Q4_K }),
        Role::O => Some(&Q4_K),
        _ => None,
    }),
    mixed("gguf-q3_k_l", "GGUF for llama.cpp, 3 bits, 5 where it matters", 13, &Q3_K, |place| match place.role {
        Role::V | Role::Down | Role::O => Some(&Q5_K),
        _ => None,
    }),
    plain("gguf-q4_0", "GGUF for llama.cpp, 4 bits, symmetric, 4.5 bits per weight", 2, &Q4_0),
    plain("gguf-q4_1", "GGUF for llama.cpp, 4 bits with minima, 5 bits per weight", 3, &Q4_1),
    mixed("gguf-q4_k_s", "GGUF for llama.cpp, 4 bits, 4.5 bits per weight", 14, &Q4_K, |place| match place.role {
        Role::V if place.layer < 4 => Some(&Q5_K),
        Role::Down if place.is_early() => Some(&Q5_K),
        _ => None,
    }),
    mixed("gguf-q4_k_m", "GGUF for llama.cpp, 4 bits, 6 where it matters", 15, &Q4_K, six_where_it_matters),
    plain("gguf-q5_0", "GGUF for llama.cpp, 5 bits, symmetric, 5.5 bits per weight", 8, &Q5_0),
    plain("gguf-q5_1", "GGUF for llama.cpp, 5 bits with minima, 6 bits per weight", 9, &Q5_1),
    plain("gguf-q5_k_s", "GGUF for llama.cpp, 5 bits, 5.5 bits per weight", 16, &Q5_K),
    mixed("gguf-q5_k_m", "GGUF for llama.cpp, 5 bits, 6 where it matters", 17, &Q5_K, six_where_it_matters),
    plain("gguf-q6_k", "GGUF for llama.cpp, 6 bits, 6.6 bits per weight", 18, &Q6_K),
    plain("gguf-q8_0", "GGUF for llama.cpp, 8 bits, symmetric, 8.5 bits per weight", 7, &Q8_0),
    floats("gguf-f16", "GGUF for llama.cpp, nothing quantized, f16", 1, Dtype::F16),
    floats("gguf-bf16", "GGUF for llama.cpp, nothing quantized, bf16", 32, Dtype::Bf16),
    floats("gguf-f32", "GGUF for llama.cpp, nothing quantized, f32", 0, Dtype::F32),
];

fn six_where_it_matters(place: &Place) -> Option<&'static Type> {
    (matches!(place.role, Role::V | Role::Down) && place.counts_more()).then_some(&Q6_K)
}

impl Mix {
    /// The type of a matrix; `None`: it stays floats. The head, or the embedding that is the head, has six bits at least.
    pub fn kind(&self, spec: &ModelSpec, linear: &Linear) -> Option<&'static Type> {
        let Base::Blocks(base) = self.base else { return None };
        let is_head = linear.role == Role::Head || (linear.role == Role::Embedding && spec.tied_head);
        let wanted = if is_head {
            if *base == Q8_0 { base } else { &Q6_K }
        } else {
            let better = place(spec, linear).and_then(|place| (self.better)(&place)).unwrap_or(base);
            // Of 70B models, where eight heads share a v.
            let is_large = spec.blocks.len() == 80 && spec.n_kv < spec.n_head;
            let few = *better == Q3_K || *better == Q4_K;
            if is_large && few && linear.role == Role::V { &Q5_K } else { better }
        };
        fitting(wanted, linear.d_in)
    }

    /// The type that a matrix would have if its rows were long enough.
    pub fn falls_back(&self, spec: &ModelSpec, linear: &Linear) -> bool {
        matches!(self.base, Base::Blocks(_)) && self.kind(spec, linear) != self.kind(spec, &Linear { d_in: 256, ..linear.clone() })
    }
}

fn place(spec: &ModelSpec, linear: &Linear) -> Option<Place> {
    Some(Place { role: linear.role, layer: linear.block?, n_layer: spec.blocks.len(), shared: spec.n_head / spec.n_kv.max(1) })
}

/// The type itself, or what stands in for it where its blocks do not divide rows of `d_in`.
fn fitting(kind: &'static Type, d_in: usize) -> Option<&'static Type> {
    let instead: &'static Type = match kind {
        _ if d_in.is_multiple_of(kind.elements) => return Some(kind),
        k if *k == Q2_K || *k == Q3_K => &Q4_0,
        k if *k == Q4_K => &Q5_0,
        k if *k == Q5_K => &Q5_1,
        _ => &Q8_0,
    };
    d_in.is_multiple_of(instead.elements).then_some(instead)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_that_count_more() {
        let of = |n_layer: usize| -> Vec<usize> {
            (0..n_layer).filter(|layer| Place { role: Role::V, layer: *layer, n_layer, shared: 1 }.counts_more()).collect()
        };
        assert_eq!(of(4), [2, 3]);
        assert_eq!(of(16), [0, 1, 4, 7, 10, 13, 14, 15]);
    }

    #[test]
    fn rows_that_blocks_do_not_divide() {
        assert_eq!(fitting(&Q2_K, 512), Some(&Q2_K));
        assert_eq!([&Q2_K, &Q4_K, &Q5_K, &Q6_K].map(|k| fitting(k, 576)), [Some(&Q4_0), Some(&Q5_0), Some(&Q5_1), Some(&Q8_0)]);
        assert_eq!((fitting(&Q4_K, 172), fitting(&Q4_0, 172)), (None, None));
    }
}
