//! The weights of one block on the device.

use crate::engine::{Buffer, Engine, HostWeight, Panels, Recording, Weight, submit};
use crate::model::{Block, Input, Norm, Role, Weights};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Gain and bias of a norm; the bias may be absent.
#[derive(Clone, Copy, Debug)]
pub struct DeviceNorm {
    pub gain: Buffer<f32>,
    pub bias: Buffer<f32>,
}

pub(crate) fn upload_norm<'a>(rec: &mut Recording<'a>, gain: &'a [f32], bias: Option<&'a [f32]>) -> DeviceNorm {
    DeviceNorm { gain: rec.upload("norm", gain), bias: bias.map_or(Buffer::none(), |b| rec.upload("norm", b)) }
}

/// A linear on the device, for a use.
#[derive(Clone, Debug)]
pub struct DeviceLinear {
    pub role: Role,
    pub weight: Weight,
    pub bias: Buffer<f32>,
}

/// Which of a block's weights are on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Residency {
    /// All of them, from the block's beginning to its end.
    #[default]
    Block,
    /// Those of the linears at work: each comes for a use and goes after it, from a copy on the host. For blocks that are too large for the
    /// device; every batch of windows takes the weights once more.
    Linear,
}

#[derive(Clone, Debug)]
struct Linear {
    role: Role,
    weight: Held,
    bias: Buffer<f32>,
}

/// Where a weight is between two uses.
#[derive(Clone, Debug)]
enum Held {
    Device(Weight),
    Host(HostWeight),
}

/// One block's weights, on the device or on their way to it. Solvers replace a linear's weight by its quantized values.
#[derive(Debug)]
pub struct DeviceBlock {
    /// Attention norm, MLP norm.
    norms: Vec<DeviceNorm>,
    linears: Vec<Linear>,
}

impl DeviceBlock {
    /// Uploads a block as it is stored, one tensor after the other: what has been uploaded is let go of on the host.
    ///
    /// Errors name the file and tensor: a NaN, a missing tensor, a wrong shape.
    pub fn load(engine: &mut dyn Engine, weights: &dyn Weights, block: &Block) -> Result<Self> {
        Self::load_as(engine, weights, block, Residency::Block)
    }

    /// The same, with as much on the device as `residency` says.
    pub fn load_as(engine: &mut dyn Engine, weights: &dyn Weights, block: &Block, residency: Residency) -> Result<Self> {
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
            let weight = match residency {
                Residency::Block => Held::Device(submit(engine, |rec| Weight::upload(rec, "weight", &tensor, limits))?),
                Residency::Linear => Held::Host(HostWeight::new(tensor, limits)),
            };
            let bias = submit(engine, |rec| bias.as_deref().map_or(Buffer::none(), |b| rec.upload("bias", b)))?;
            linears.push(Linear { role: linear.role, weight, bias });
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

    fn held(&self, role: Role) -> Result<&Linear> {
        self.linears.iter().find(|l| l.role == role).ok_or_else(|| Error::internal(role, "is not in this block"))
    }

    /// Records the way of a linear's weight to the device, if it is not there; [`Self::leave`] ends the use.
    ///
    /// # Errors
    /// Internal where the block has no such linear.
    pub fn enter(&self, rec: &mut Recording<'_>, role: Role) -> Result<DeviceLinear> {
        let Linear { weight, bias, .. } = self.held(role)?;
        let weight = match weight {
            Held::Device(weight) => weight.clone(),
            Held::Host(weight) => weight.upload(rec),
        };
        Ok(DeviceLinear { role, weight, bias: *bias })
    }

    /// Records the end of a use.
    pub fn leave(&self, rec: &mut Recording<'_>, linear: DeviceLinear) {
        if self.held(linear.role).is_ok_and(|l| matches!(l.weight, Held::Host(_))) {
            linear.weight.free(rec);
        }
    }

    /// A linear's bias, which may be absent.
    pub fn bias(&self, role: Role) -> Result<Buffer<f32>> {
        self.held(role).map(|l| l.bias)
    }

    /// Puts `weight` in the place of the old one, which is given back.
    pub fn replace(&mut self, engine: &mut dyn Engine, role: Role, weight: Weight) -> Result<()> {
        let linear = self.linears.iter_mut().find(|l| l.role == role);
        let linear = linear.ok_or_else(|| Error::internal(role, "is not in this block"))?;
        match &mut linear.weight {
            Held::Device(old) => {
                let old = std::mem::replace(old, weight);
                submit(engine, |rec| old.free(rec))
            }
            Held::Host(old) => {
                let mut rec = Recording::new();
                let pending = HostWeight::download(&mut rec, &weight);
                weight.free(&mut rec);
                *old = pending.take(&mut engine.run(rec)?)?;
                Ok(())
            }
        }
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

    /// Records a copy of everything, weights that are on the device in f32.
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
                let weight = match &l.weight {
                    Held::Device(weight) => {
                        let mats: Vec<_> = Panels::widened(rec, weight).iter().map(|panel| panel.mat).collect();
                        Held::Device(Weight::from_f32(&mats))
                    }
                    Held::Host(weight) => Held::Host(weight.clone()),
                };
                Linear { role: l.role, weight, bias: vector(rec, l.bias) }
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
            if let Held::Device(weight) = linear.weight {
                weight.free(rec);
            }
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
