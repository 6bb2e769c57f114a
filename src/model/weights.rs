//! Where a forward pass gets its weights from: a plain folder here, quantized folders in the export formats.

use super::checkpoint::Checkpoint;
use super::graph::{Block, Linear, ModelSpec};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// A source of weights, read one tensor at a time; prefetching threads share it.
pub trait Weights: Send + Sync {
    fn spec(&self) -> &ModelSpec;

    /// A tensor that is never quantized: embedding, norm, bias.
    fn tensor(&self, name: &str) -> Result<Tensor<'_>>;

    /// W [d_out, d_in] of a linear, dequantized if the folder is quantized. A tied head gives the embedding.
    fn linear(&self, linear: &Linear) -> Result<Tensor<'_>>;

    /// Lets go of the memory of what has been read so far.
    fn release(&self);

    /// Has the system read a block that is needed soon, where it lies in the file as it is.
    fn prefetch(&self, block: &Block) {
        let _ = block;
    }
}

impl Weights for Checkpoint {
    fn spec(&self) -> &ModelSpec {
        Checkpoint::spec(self)
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        Checkpoint::tensor(self, name)
    }

    /// An input error for a linear that the folder holds in quantized form, which this reader does not decode.
    fn linear(&self, linear: &Linear) -> Result<Tensor<'_>> {
        let name = linear.weight();
        let tensor = Checkpoint::tensor(self, &name)?;
        if tensor.shape != [linear.d_out, linear.d_in] {
            let message = format!("has shape {:?} where [{}, {}] is needed", tensor.shape, linear.d_out, linear.d_in);
            return Err(Error::input(self.subject(&name), message));
        }
        Ok(tensor)
    }

    fn release(&self) {
        Checkpoint::release(self);
    }

    fn prefetch(&self, block: &Block) {
        block.linears.iter().for_each(|linear| self.read_ahead(&linear.weight()));
    }
}
