//! Shader texts of a kernel: the base, which runs on every adapter, and variants for adapters that can do more.
//!
//! A variant has the same parameters, bindings and entry point, so a recording does not know which one will run: the GPU engine chooses
//! per adapter (`engine/gpu/choice.rs`), and the other engines never look. Variants may be other files of `shaders/`, or the same file with
//! other parts of `shaders/lib/` in front.

use super::buffer::Scalar;

/// A tuning constant: an `override` of the shader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunable {
    pub name: &'static str,
    pub default: u32,
    /// What an adapter may be given instead. Results must be the same, bit by bit.
    pub others: &'static [u32],
}

impl Tunable {
    /// The default, then the others.
    pub fn values(&self) -> impl Iterator<Item = u32> {
        std::iter::once(self.default).chain(self.others.iter().copied())
    }
}

/// One text.
#[derive(Clone, Copy, Debug)]
pub struct Shader {
    pub file: &'static str,
    pub wgsl: &'static str,
    /// What it shares with other shaders, by file.
    pub libs: &'static [(&'static str, &'static str)],
    /// Overrides that tell the dtype of stored weights come on top.
    pub tuning: &'static [Tunable],
}

impl Shader {
    /// Every combination of tuning constants, the defaults first.
    pub fn tunings(&self) -> Vec<Vec<(&'static str, u32)>> {
        self.tuning.iter().fold(vec![Vec::new()], |made: Vec<Vec<_>>, tunable| {
            made.iter().flat_map(|start| tunable.values().map(|value| [start.as_slice(), &[(tunable.name, value)]].concat())).collect()
        })
    }
}

/// What an adapter must have for a variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Operations over subgroups of at least this many threads.
    Subgroups(u32),
    /// Cooperative matrices.
    Matrices(Matrices),
}

/// Products of `side` x `side` matrices whose operands are `operands` (f32 or f16) and whose sums are f32. With f16 operands only launches
/// whose inputs all are f16 can take the variant; f32 holds every input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrices {
    pub side: u32,
    pub operands: Scalar,
    /// Bytes of workgroup memory, which may be more than the 16 KiB that every adapter has.
    pub workgroup_bytes: u32,
}

#[derive(Clone, Copy, Debug)]
pub struct Variant {
    pub needs: Needs,
    pub shader: Shader,
}

/// The lines in front of a shader: extensions, and the operand type where there are two.
pub(super) fn prelude(needs: Option<Needs>, generic: bool, elem: Scalar) -> String {
    // Subgroup operations need no line: naga takes them without one, and refuses `enable subgroups`.
    let matrices = if matches!(needs, Some(Needs::Matrices(_))) { "enable wgpu_cooperative_matrix;\n" } else { "" };
    let elem = match (generic, elem) {
        (false, _) => "",
        (true, Scalar::F16) => "enable f16;\nalias Elem = f16;\n",
        (true, _) => "alias Elem = f32;\n",
    };
    [matrices, elem].concat()
}
