//! The weights of one block, on the host as the checkpoint stores them and on the device.

use crate::engine::{Buffer, Limits, Panels, Recording, Weight};
use crate::model::{Block, Input, Norm, Role, Weights};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// One block's tensors, borrowed from the checkpoint's memory map where they can be.
pub struct HostBlock<'w> {
    block: &'w Block,
    norms: Vec<HostNorm>,
    linears: Vec<(Tensor<'w>, Option<Vec<f32>>)>,
}

struct HostNorm {
    gain: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl HostNorm {
    fn read(weights: &dyn Weights, norm: &Norm) -> Result<Self> {
        let bias = norm.bias.as_ref().map(|b| weights.tensor(b).map(|t| t.to_f32())).transpose()?;
        Ok(Self { gain: weights.tensor(&norm.name)?.to_f32(), bias })
    }
}

impl<'w> HostBlock<'w> {
    /// Errors name the file and tensor: a NaN, a missing tensor, a wrong shape.
    pub fn read(weights: &'w dyn Weights, block: &'w Block) -> Result<Self> {
        let norms = [&block.attn_norm, &block.mlp_norm].into_iter().map(|n| HostNorm::read(weights, n)).collect::<Result<_>>()?;
        let linears = block
            .linears
            .iter()
            .map(|l| {
                let bias = l.bias_name().map(|b| weights.tensor(&b).map(|t| t.to_f32())).transpose()?;
                Ok((weights.linear(l)?, bias))
            })
            .collect::<Result<_>>()?;
        Ok(Self { block, norms, linears })
    }

    /// Records the upload of all weights as they are stored.
    pub fn upload<'a>(&'a self, rec: &mut Recording<'a>, limits: Limits) -> DeviceBlock {
        let norms = self.norms.iter().map(|n| upload_norm(rec, &n.gain, n.bias.as_deref())).collect();
        let linears = self
            .block
            .linears
            .iter()
            .zip(&self.linears)
            .map(|(linear, (weight, bias))| DeviceLinear {
                role: linear.role,
                weight: Weight::upload(rec, "weight", weight, limits),
                bias: bias.as_deref().map_or(Buffer::none(), |b| rec.upload("bias", b)),
            })
            .collect();
        DeviceBlock { norms, linears }
    }
}

/// Gain and bias of a norm; the bias may be absent.
#[derive(Clone, Copy, Debug)]
pub struct DeviceNorm {
    pub gain: Buffer<f32>,
    pub bias: Buffer<f32>,
}

pub(crate) fn upload_norm<'a>(rec: &mut Recording<'a>, gain: &'a [f32], bias: Option<&'a [f32]>) -> DeviceNorm {
    DeviceNorm { gain: rec.upload("norm", gain), bias: bias.map_or(Buffer::none(), |b| rec.upload("norm", b)) }
}

#[derive(Clone, Debug)]
pub struct DeviceLinear {
    pub role: Role,
    pub weight: Weight,
    pub bias: Buffer<f32>,
}

/// One block's weights on the device. Solvers replace a linear's weight by its quantized values.
#[derive(Debug)]
pub struct DeviceBlock {
    /// Attention norm, MLP norm.
    norms: Vec<DeviceNorm>,
    linears: Vec<DeviceLinear>,
}

impl DeviceBlock {
    pub fn attn_norm(&self) -> DeviceNorm {
        self.norms[0]
    }

    pub fn mlp_norm(&self) -> DeviceNorm {
        self.norms[1]
    }

    /// An internal error where the block has no such linear.
    pub fn linear(&self, role: Role) -> Result<&DeviceLinear> {
        self.linears.iter().find(|l| l.role == role).ok_or_else(|| Error::internal(role, "is not in this block"))
    }

    /// Puts `weight` in the place of the old one, which is given back.
    pub fn replace(&mut self, rec: &mut Recording<'_>, role: Role, weight: Weight) -> Result<()> {
        let linear = self.linears.iter_mut().find(|l| l.role == role);
        let linear = linear.ok_or_else(|| Error::internal(role, "is not in this block"))?;
        std::mem::replace(&mut linear.weight, weight).free(rec);
        Ok(())
    }

    /// Puts `bias` in the place of a linear's old one, which is given back.
    pub fn replace_bias(&mut self, rec: &mut Recording<'_>, role: Role, bias: Buffer<f32>) -> Result<()> {
        let linear = self.linears.iter_mut().find(|l| l.role == role);
        let linear = linear.ok_or_else(|| Error::internal(role, "is not in this block"))?;
        rec.free(std::mem::replace(&mut linear.bias, bias));
        Ok(())
    }

    /// The norm whose output is `input`; an internal error where that is no norm's output.
    pub fn norm(&self, input: Input) -> Result<DeviceNorm> {
        norm_index(input).map(|index| self.norms[index])
    }

    /// Puts `norm` in the place of the old one, which is given back.
    pub fn replace_norm(&mut self, rec: &mut Recording<'_>, input: Input, norm: DeviceNorm) -> Result<()> {
        let old = std::mem::replace(&mut self.norms[norm_index(input)?], norm);
        rec.free(old.gain);
        rec.free(old.bias);
        Ok(())
    }

    /// Records a copy of everything, weights in f32.
    pub fn copy(&self, rec: &mut Recording<'_>) -> Self {
        let vector = |rec: &mut Recording<'_>, source: Buffer<f32>| {
            if source.is_empty() {
                return Buffer::none();
            }
            let copy = rec.alloc("copy", source.len());
            rec.copy(source, copy);
            copy
        };
        let norms = self.norms.iter().map(|n| DeviceNorm { gain: vector(rec, n.gain), bias: vector(rec, n.bias) }).collect();
        let linears = self
            .linears
            .iter()
            .map(|l| {
                let mats: Vec<_> = Panels::widened(rec, &l.weight).iter().map(|panel| panel.mat).collect();
                DeviceLinear { role: l.role, weight: Weight::from_f32(&mats), bias: vector(rec, l.bias) }
            })
            .collect();
        Self { norms, linears }
    }

    pub fn free(self, rec: &mut Recording<'_>) {
        for norm in self.norms {
            rec.free(norm.gain);
            rec.free(norm.bias);
        }
        for linear in self.linears {
            linear.weight.free(rec);
            rec.free(linear.bias);
        }
    }
}

fn norm_index(input: Input) -> Result<usize> {
    match input {
        Input::AttnNorm => Ok(0),
        Input::MlpNorm => Ok(1),
        Input::Context | Input::Hidden | Input::FinalNorm => Err(Error::internal(input, "is no output of a norm of this block")),
    }
}
