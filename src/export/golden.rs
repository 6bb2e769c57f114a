//! Matrices that the formats' own tools packed (`tests/golden/make_packed.py`): decoded to the values that those tools read, and encoded again
//! byte for byte.

use super::Format;
use super::packed::Codec;
use crate::model::{Config, Input, Linear, ModelSpec, Role, spec_of};
use crate::quant::Scheme;
use crate::tensor::Dtype;
use safetensors::SafeTensors;

/// The tensor called `name` of a golden file: its type, shape and bytes.
pub(super) fn tensor<'f>(file: &'f [u8], name: &str) -> (String, Vec<usize>, &'f [u8]) {
    let found = SafeTensors::deserialize(file).unwrap();
    let view = found.tensor(name).unwrap_or_else(|_| panic!("{name} is not in the file"));
    let start = view.data().as_ptr() as usize - file.as_ptr() as usize;
    (view.dtype().to_string(), view.shape().to_vec(), &file[start..start + view.data().len()])
}

/// The values called `name`, in f32, and their shape.
pub(super) fn values(file: &[u8], name: &str) -> (Vec<f32>, [usize; 2]) {
    let (dtype, shape, bytes) = tensor(file, name);
    let dtype: Dtype = dtype.parse().unwrap();
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    dtype.decode(bytes, &mut values);
    (values, shape.try_into().unwrap())
}

pub(super) fn any_model() -> ModelSpec {
    let config = r#"{"model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 1, "vocab_size": 4}"#;
    spec_of(&Config::parse("config.json".into(), config.as_bytes()).unwrap()).unwrap()
}

/// The tensors of `file` whose names begin with `prefix` are a matrix by `scheme` with scales in f16.
pub(super) fn check(format: &Format, codec: &Codec, scheme: Scheme, file: &[u8], prefix: &str) {
    let (want, [d_out, d_in]) = values(file, &format!("{prefix}.values"));
    let linear = Linear { role: Role::Up, block: Some(0), module: prefix.to_owned(), d_out, d_in, bias: false, input: Input::MlpNorm };
    let (spec, lattice) = (any_model(), (codec.lattice)(scheme, Dtype::F16));
    let mut parts = Vec::new();
    for stored in (codec.tensors)(&spec, &linear, lattice) {
        let (dtype, shape, bytes) = tensor(file, &stored.name);
        assert_eq!((dtype, &shape, bytes.len() as u64), (stored.dtype.to_string(), &stored.shape, stored.bytes), "{}", stored.name);
        parts.push(bytes);
    }
    let packed = (codec.decode)(&linear, lattice, &parts).unwrap_or_else(|(part, what)| panic!("{prefix}: part {part}: {what}"));
    let dtype = (codec.values)(lattice);
    let got: Vec<f32> = packed.dequantize().into_iter().map(|v| dtype.round(v)).collect();
    assert!(got == want, "{prefix}: the values differ");
    let mut bytes = vec![Vec::new(); parts.len()];
    (format.encode)(&spec, &linear, &packed, &mut |part, more| {
        bytes[part].extend_from_slice(more);
        Ok(())
    })
    .unwrap();
    assert!(bytes == parts, "{prefix}: the bytes differ");
}
