//! The weights of one block on the device.

use crate::engine::{Buffer, Engine, Panels, Recording, Weight, submit};
use crate::model::{Block, Input, Norm, Role, Weights};
use crate::{Error, Result};

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
    /// Uploads a block as it is stored, one tensor after the other: what has been uploaded is let go of on the host.
    ///
    /// Errors name the file and tensor: a NaN, a missing tensor, a wrong shape.
    pub fn load(engine: &mut dyn Engine, weights: &dyn Weights, block: &Block) -> Result<Self> {
        let limits = engine.limits();
        let vector = |name: &str| weights.tensor(name).map(|t| t.to_f32());
        let mut norms = Vec::new();
        for norm in [&block.attn_norm, &block.mlp_norm] {
            let Norm { name, bias, .. } = norm;
            let (gain, bias) = (vector(name)?, bias.as_deref().map(vector).transpose()?);
            norms.push(submit(engine, |rec| upload_norm(rec, &gain, bias.as_deref()))?);
        }
        let mut linears = Vec::new();
        for linear in &block.linears {
            let (tensor, bias) = (weights.linear(linear)?, linear.bias_name().as_deref().map(vector).transpose()?);
            linears.push(submit(engine, |rec| DeviceLinear {
                role: linear.role,
                weight: Weight::upload(rec, "weight", &tensor, limits),
                bias: bias.as_deref().map_or(Buffer::none(), |b| rec.upload("bias", b)),
            })?);
            weights.release();
        }
        Ok(Self { norms, linears })
    }

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
