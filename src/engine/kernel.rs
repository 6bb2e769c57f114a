//! What a kernel is: a WGSL file, its parameters and bindings, its tuning constants, its cost, and its native twin.
//!
//! A kernel is one file `shaders/NAME.wgsl`, one file `engine/kernels/NAME.rs` (parameters, launch grid, cost, native twin),
//! one case `tests/cases/NAME.rs`, and one line in `engine/kernels/mod.rs`. The macros below turn that line into a typed
//! function that records a launch. `tests/shaders.rs` compares every line with what naga reads from the shader. What several
//! shaders share lies in `shaders/lib/`, and the lines of those that use it name it. A line may name variants for adapters that can do
//! more, see `shader`.

use super::buffer::{Elem, Element, RawBuffer, Scalar};
use super::cpu::Args;
use super::shader::{Shader, Variant, prelude};
use crate::tensor::Dtype;
use crate::{Error, Result};
use half::f16;

/// Values of a shader's `override` constants, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Constants(Vec<(String, u32)>);

impl Constants {
    /// The value of `name`; 0 when the kernel has no such constant, which the registry test rules out.
    pub fn get(&self, name: &str) -> u32 {
        self.0.iter().find(|(n, _)| n == name).map_or(0, |(_, v)| *v)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        self.0.iter().map(|(n, v)| (n.as_str(), *v))
    }

    /// The dtype that the buffer bound as `binding` stores its weights in.
    pub fn stored(&self, binding: &str) -> Dtype {
        match self.get(&dtype_constant(binding)) {
            0 => Dtype::F32,
            1 => Dtype::F16,
            _ => Dtype::Bf16,
        }
    }

    /// A shader's defaults, and for each binding of stored weights the constant that tells their dtype.
    pub(super) fn of(shader: &Shader, bindings: &[Binding], buffers: &[RawBuffer]) -> Self {
        let mut all: Vec<(String, u32)> = shader.tuning.iter().map(|t| (t.name.to_owned(), t.default)).collect();
        for (binding, buffer) in bindings.iter().zip(buffers) {
            if let Scalar::Stored(dtype) = buffer.scalar {
                let code = dtype.code();
                all.push((dtype_constant(binding.name), code));
            }
        }
        Self(all)
    }

    /// The same with other values for some of its names.
    pub(super) fn with(mut self, values: &[(String, u32)]) -> Self {
        for (name, value) in &mut self.0 {
            if let Some((_, other)) = values.iter().find(|(n, _)| n == name) {
                *value = *other;
            }
        }
        self
    }
}

/// The override that tells the dtype of a binding of stored weights: `w` has `W_DTYPE`, 0 for f32, 1 for f16, 2 for bf16.
pub fn dtype_constant(binding: &str) -> String {
    format!("{}_DTYPE", binding.to_uppercase())
}

/// How a binding is declared in the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BindingScalar {
    F32,
    U32,
    /// f32 or f16, by the prelude.
    Elem,
    /// 32-bit words of stored weights.
    Stored,
}

#[derive(Clone, Copy, Debug)]
pub struct Binding {
    pub name: &'static str,
    pub writes: bool,
    pub scalar: BindingScalar,
}

/// A parameter struct's name and its fields as WGSL declares them: (name, type), four bytes each, in order.
#[derive(Clone, Copy, Debug)]
pub struct ParamsLayout {
    pub name: &'static str,
    pub fields: &'static [(&'static str, &'static str)],
}

/// Arithmetic of one launch. Bytes moved follow from the bindings unless a kernel knows better.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Floating-point operations; a fused multiply-add counts as two.
    pub flops: f64,
}

/// Which elements of what a launch writes mean something; tiles may leave anything in the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defined {
    All,
    /// Row r of rows `ld` apart up to column `row0` + r: what is on or below the diagonal of a square matrix, from its row `row0` on.
    Lower {
        row0: usize,
        ld: usize,
    },
}

impl Defined {
    pub fn holds(self, index: usize) -> bool {
        match self {
            Self::All => true,
            Self::Lower { row0, ld } => index % ld <= row0 + index / ld,
        }
    }
}

/// What every parameter struct says about a launch of its kernel.
pub trait Launch: bytemuck::Pod {
    const LAYOUT: ParamsLayout;
    /// Workgroups in x, y, z for these parameters. A zero means that there is nothing to do.
    fn grid(&self, constants: &Constants) -> [u32; 3];
    fn cost(&self) -> Cost;
    /// Are the buffers (element counts in binding order) long enough, the strides aligned? The shader does not check.
    fn check(&self, len: &[usize]) -> Result<(), String>;

    fn defined(&self) -> Defined {
        Defined::All
    }

    /// Two launches that together do the same, bit by bit, where the work of one may be more than a device should be given at once.
    fn halves(&self) -> Option<[Self; 2]>
    where
        Self: Sized,
    {
        None
    }
}

/// One registry entry.
pub struct Kernel {
    pub name: &'static str,
    /// What runs on every adapter.
    pub base: Shader,
    /// What adapters run that can do more, the best first.
    pub variants: &'static [Variant],
    pub params: ParamsLayout,
    pub bindings: &'static [Binding],
    /// Does the shader use `Elem`, so that it exists in an f32 and an f16 version?
    pub generic: bool,
    pub native: fn(&Args<'_>) -> Result<()>,
    pub check: fn(&[u8], &[usize]) -> Result<(), String>,
    pub cost: fn(&[u8]) -> Cost,
    /// Workgroups for these parameters, with other constants than those it was recorded with.
    pub grid: fn(&[u8], &Constants) -> [u32; 3],
    pub defined: fn(&[u8]) -> Defined,
    pub halves: fn(&[u8]) -> Option<[Vec<u8>; 2]>,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl Kernel {
    /// Its texts: `None` is the base, an index one of the variants.
    pub fn texts(&self) -> impl Iterator<Item = Option<usize>> + use<> {
        std::iter::once(None).chain((0..self.variants.len()).map(Some))
    }

    /// The variant of this index, or the base.
    pub fn shader(&self, text: Option<usize>) -> &Shader {
        text.map_or(&self.base, |index| &self.variants[index].shader)
    }

    /// A text as it is compiled for an operand type: prelude, shared parts, its own file.
    pub fn source(&self, text: Option<usize>, elem: Scalar) -> String {
        let shader = self.shader(text);
        let prelude = prelude(text.map(|index| self.variants[index].needs), self.generic, elem);
        let libs = shader.libs.iter().map(|(_, wgsl)| *wgsl);
        std::iter::once(prelude.as_str()).chain(libs).chain([shader.wgsl]).collect()
    }

    /// The operand type of a launch: that of the first `Elem` binding.
    pub fn elem(&self, buffers: &[RawBuffer]) -> Scalar {
        let found = self.bindings.iter().zip(buffers).find(|(b, _)| b.scalar == BindingScalar::Elem);
        found.map_or(Scalar::F32, |(_, buffer)| buffer.scalar)
    }
}

/// Parameters read back from a launch's bytes.
pub fn read_params<P: Launch>(bytes: &[u8]) -> Result<P> {
    bytemuck::try_pod_read_unaligned(bytes).map_err(|e| Error::internal(P::LAYOUT.name, format!("parameter bytes: {e}")))
}

/// Splits `groups` workgroups of a one-dimensional kernel over x and y, since a dimension holds at most 65535.
/// The shader finds its index as `workgroup_id.y * num_workgroups.x + workgroup_id.x` and returns early past the end.
pub fn grid_1d(groups: usize) -> [u32; 3] {
    let x = groups.min(32768);
    [x as u32, groups.div_ceil(x.max(1)) as u32, 1]
}

/// `need` elements in the binding called `name`, or a sentence that says what is missing.
pub fn need(name: &str, len: usize, need: usize) -> Result<(), String> {
    if len < need { Err(format!("{name} holds {len} elements, {need} are needed")) } else { Ok(()) }
}

/// Rows of `cols` elements fit a row stride of `ld`; else a sentence that says where not.
pub fn within(name: &str, cols: u32, ld: u32) -> Result<(), String> {
    if cols > ld { Err(format!("rows of {name} are {ld} elements apart, {cols} are needed")) } else { Ok(()) }
}

/// Declares a parameter struct: four-byte scalars only, so Rust and WGSL lay it out alike.
macro_rules! params {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$fmeta:meta])* pub $field:ident: $ty:ident,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty,)* }
        impl $name {
            /// Name and fields, for the registry test.
            pub const PARAMS: $crate::engine::kernel::ParamsLayout = $crate::engine::kernel::ParamsLayout {
                name: stringify!($name),
                fields: &[$((stringify!($field), stringify!($ty))),*],
            };
        }
    };
}
pub(crate) use params;

/// Turns registry lines into `Kernel` statics, the `KERNELS` slice and one recording function per kernel.
macro_rules! kernels {
    ($($(#[doc = $doc:literal])* $file:literal $(with $lib:literal)* fn $name:ident $(<$elem:ident>)?
        $([$($const:ident = $value:literal $(| $other:literal)*),*])? (p: $params:ident $(, $arg:ident: $access:ident<$scalar:ident>)*)
        $(or $need:ident($($needed:tt)*) $vfile:literal $(with $vlib:literal)* $([$($vconst:ident = $vvalue:literal),*])?)*;)*) => {
        $(pub mod $name;)*
        /// Every kernel, in the order of the registry.
        pub static KERNELS: &[&$crate::engine::kernel::Kernel] = &[$(&statics::$name),*];
        #[allow(non_upper_case_globals, reason = "a kernel has one name everywhere: file, shader, entry point, static")]
        mod statics {
            use $crate::engine::kernel::{Binding, BindingScalar, Defined, Kernel, Launch, read_params};
            $(pub static $name: Kernel = Kernel {
                name: stringify!($name),
                base: $crate::engine::kernel::kernels!(@shader $file, [$($lib),*], [$($($const = $value $(| $other)*),*)?]),
                variants: &[$($crate::engine::shader::Variant {
                    needs: $crate::engine::kernel::kernels!(@needs $need($($needed)*)),
                    shader: $crate::engine::kernel::kernels!(@shader $vfile, [$($vlib),*], [$($($vconst = $vvalue),*)?]),
                }),*],
                params: <super::$name::$params as Launch>::LAYOUT,
                bindings: &[$(Binding {
                    name: stringify!($arg),
                    writes: $crate::engine::kernel::kernels!(@writes $access),
                    scalar: $crate::engine::kernel::kernels!(@scalar $scalar),
                }),*],
                generic: $crate::engine::kernel::kernels!(@generic $($elem)?),
                native: |args| $crate::engine::kernel::kernels!(@native $name, args, $params, $($elem)?; $($arg: $access<$scalar>),*),
                check: |bytes, len| read_params::<super::$name::$params>(bytes).map_err(|e| e.to_string())?.check(len),
                cost: |bytes| read_params::<super::$name::$params>(bytes).map(|p| p.cost()).unwrap_or_default(),
                halves: |bytes| read_params::<super::$name::$params>(bytes).ok()?.halves().map(|halves| halves.map(|p| bytemuck::bytes_of(&p).to_vec())),
                defined: |bytes| read_params::<super::$name::$params>(bytes).map_or(Defined::All, |p| p.defined()),
                grid: |bytes, constants| read_params::<super::$name::$params>(bytes).map(|p| p.grid(constants)).unwrap_or_default(),
            };)*
        }
        $($(#[doc = $doc])*
        #[allow(clippy::too_many_arguments, reason = "one argument per binding")]
        pub fn $name $(<$elem: $crate::engine::Elem>)? (
            rec: &mut $crate::engine::Recording<'_>,
            p: $name::$params
            $(, $arg: $crate::engine::Buffer<$crate::engine::kernel::kernels!(@type $scalar)>)*
        ) {
            let buffers = vec![$($arg.raw()),*];
            let constants = $crate::engine::kernel::Constants::of(&statics::$name.base, statics::$name.bindings, &buffers);
            let grid = $crate::engine::kernel::Launch::grid(&p, &constants);
            let params = bytemuck::bytes_of(&p).to_vec();
            rec.dispatch($crate::engine::recording::Dispatch { kernel: &statics::$name, params, constants, buffers, grid });
        })*
    };
    (@shader $file:literal, [$($lib:literal),*], [$($const:ident = $value:literal $(| $other:literal)*),*]) => {
        $crate::engine::shader::Shader {
            file: $file,
            wgsl: include_str!(concat!("../../../shaders/", $file)),
            libs: &[$(($lib, include_str!(concat!("../../../shaders/lib/", $lib)))),*],
            tuning: &[$($crate::engine::shader::Tunable { name: stringify!($const), default: $value, others: &[$($other),*] }),*],
        }
    };
    (@needs subgroups($threads:literal)) => { $crate::engine::shader::Needs::Subgroups($threads) };
    (@needs matrices($side:literal, $operands:ident, $bytes:literal)) => {
        $crate::engine::shader::Needs::Matrices($crate::engine::shader::Matrices {
            side: $side,
            operands: $crate::engine::Scalar::$operands,
            workgroup_bytes: $bytes,
        })
    };
    (@writes Read) => { false };
    (@writes ReadWrite) => { true };
    (@scalar f32) => { BindingScalar::F32 };
    (@scalar u32) => { BindingScalar::U32 };
    (@scalar Stored) => { BindingScalar::Stored };
    (@scalar $elem:ident) => { BindingScalar::Elem };
    (@type Stored) => { $crate::engine::Stored };
    (@type $other:ident) => { $other };
    (@generic) => { false };
    (@generic $elem:ident) => { true };
    (@native $name:ident, $args:ident, $params:ident, ; $($arg:ident: $access:ident<$scalar:ident>),*) => {{
        $crate::engine::kernel::kernels!(@run $name, $args, $params; $($arg: $access<$scalar>),*)
    }};
    (@native $name:ident, $args:ident, $params:ident, $elem:ident; $($arg:ident: $access:ident<$scalar:ident>),*) => {{
        if $args.elem() == $crate::engine::Scalar::F16 {
            type $elem = half::f16;
            $crate::engine::kernel::kernels!(@run $name, $args, $params; $($arg: $access<$scalar>),*)
        } else {
            type $elem = f32;
            $crate::engine::kernel::kernels!(@run $name, $args, $params; $($arg: $access<$scalar>),*)
        }
    }};
    (@run $name:ident, $args:ident, $params:ident; $($arg:ident: $access:ident<$scalar:ident>),*) => {{
        let mut next = 0usize..;
        $($crate::engine::kernel::kernels!(@bind $arg, $args, next, $access, $scalar);)*
        super::$name::native(&$args.params::<super::$name::$params>()?, $args.constants(), $($crate::engine::kernel::kernels!(@pass $arg, $access)),*);
        Ok(())
    }};
    (@bind $arg:ident, $args:ident, $next:ident, Read, Stored) => { let $arg = $args.read::<u32>($next.next().unwrap_or_default())?; };
    (@bind $arg:ident, $args:ident, $next:ident, Read, $scalar:ident) => { let $arg = $args.read::<$scalar>($next.next().unwrap_or_default())?; };
    (@bind $arg:ident, $args:ident, $next:ident, ReadWrite, $scalar:ident) => { let mut $arg = $args.write::<$scalar>($next.next().unwrap_or_default())?; };
    (@pass $arg:ident, Read) => { &$arg };
    (@pass $arg:ident, ReadWrite) => { &mut $arg };
}
pub(crate) use kernels;

// `Elem` is implemented for exactly the two types that the prelude can name.
const _: () = {
    const fn elem<E: Elem + Element>() {}
    elem::<f32>();
    elem::<f16>();
};
