//! The forward pass of one block, driven by the block graph, and the statistics that methods ask for.

mod forward;
mod gram;
mod residency;
mod stream;
mod walk;

pub use forward::{Batch, Forward};
pub use gram::{Gram, GramSet, PendingGrams};
pub(crate) use residency::upload_norm;
pub use residency::{DeviceBlock, DeviceLinear, DeviceNorm, HostBlock};
pub use stream::{HiddenStates, batch_windows};
pub use walk::{Moments, Statistic, Walk, collect};
