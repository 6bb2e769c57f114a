//! The forward pass of one block, driven by the block graph, and the statistics that methods ask for.

mod attention;
mod forward;
mod gram;
mod head;
mod observer;
mod probe;
mod residency;
mod rope_average;
mod spill;
mod statistic;
mod stream;
mod tier;
mod tokens;
mod walk;

pub use attention::{AttentionMoments, AttentionStats, PendingAttention, QueryKeyMetric, output_metric};
pub use forward::{Batch, Forward};
pub use gram::{Gram, GramSet, PendingGrams};
pub use head::head_statistic;
pub use observer::{AttentionPoint, Observer};
pub use probe::{PendingProbe, Probe, probe_signs};
pub(crate) use residency::upload_norm;
pub use residency::{DeviceBlock, DeviceLinear, DeviceNorm, Residency};
pub use rope_average::RopeAverage;
pub use spill::Place;
pub use statistic::{Moments, Statistic};
pub use stream::{HiddenStates, Streaming};
pub use tier::Tier;
pub use tokens::{RowWeights, TOKENS, TokenWeights, Tokens};
pub use walk::{Collector, Walk};
