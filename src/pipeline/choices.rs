//! The choices that a plan has for how hidden states wait, how many of them go through the device at a time, and how many of a block's weights
//! are there, the best first.

use crate::calib::{Place, Residency, Streaming, Tier};
use crate::engine::matrix::stride;
use crate::method::Inputs;
use crate::plan::Plan;

/// States on a GPU at most where nobody has said how much memory it may take: devices do not tell how much they have free, and anything that
/// holds a block of a model with so much text has this much besides.
const UNBOUNDED: u64 = 1 << 30;

/// Bytes that wait for each token of the calibration windows: a hidden state for every stream, and a context of the heads where streams walk from
/// input to input.
pub(super) fn waiting_bytes(plan: &Plan) -> usize {
    let (spec, inputs) = (plan.checkpoint.spec(), plan.settings.method.inputs);
    let context = if inputs == Inputs::Block { 0 } else { stride(spec.n_head * spec.d_head) };
    let streams = if inputs.two_streams() { 2 } else { 1 };
    streams * (stride(spec.d_model) + context) * size_of::<f32>()
}

/// Bytes of all that waits, in calibration or in an evaluation, whichever has more.
fn states_bytes(plan: &Plan) -> u64 {
    let tokens: usize = plan.calibration.iter().flat_map(|c| &c.windows).map(Vec::len).sum();
    let evaluated: usize = plan.eval.iter().flat_map(|text| text.windows()).map(<[u32]>::len).sum();
    let of_evaluation = evaluated * stride(plan.checkpoint.spec().d_model) * size_of::<f32>();
    (tokens * waiting_bytes(plan)).max(of_evaluation) as u64
}

/// May states try to live on the device? On a native engine they would lie in the same memory.
fn device_may_hold(plan: &Plan) -> bool {
    !plan.engine.is_native() && states_bytes(plan) <= plan.request.bounds.max_vram.unwrap_or(UNBOUNDED)
}

/// Where nothing is bounded: whole batches, on a GPU if they are not many.
pub(super) fn unbounded(plan: &Plan) -> Streaming {
    let tier = if device_may_hold(plan) { Tier::Device } else { Tier::Memory };
    Streaming { tier, ..Streaming::default() }
}

/// Where something is: on the device, in memory, on disk, with whole blocks on the device or, where a GPU's memory is bounded, linear by linear.
/// Batches are halved down to one window where that gives room: on disk, and on a GPU whose memory is bounded also in memory. `place` is for what waits on disk.
pub(super) fn bounded(plan: &Plan, place: Option<Place>) -> Vec<Streaming> {
    let bounds = plan.request.bounds;
    let seq_len = plan.calibration.as_ref().and_then(|c| c.windows.first()).map_or(1, Vec::len);
    let whole = Streaming::default().batch_tokens;
    let halved = || std::iter::successors(Some(whole), |tokens| (tokens / 2 >= seq_len).then_some(tokens / 2));
    let mut all = Vec::new();
    if device_may_hold(plan) {
        all.push(Streaming { tier: Tier::Device, ..Streaming::default() });
    }
    let in_memory = if !plan.engine.is_native() && bounds.max_vram.is_some() { usize::MAX } else { 1 };
    all.extend(halved().take(in_memory).map(|batch_tokens| Streaming { batch_tokens, ..Streaming::default() }));
    // Files give room in memory, and take less of the disk than records of what is in memory.
    if let Some(place) = place.filter(|_| bounds.max_ram.is_some() || bounds.max_disk.is_some()) {
        all.extend(halved().map(|batch_tokens| Streaming { batch_tokens, tier: Tier::Disk(place.clone()), ..Streaming::default() }));
    }
    // Linear by linear every batch takes the weights once more, so fewer batches come first again.
    if !plan.engine.is_native() && bounds.max_vram.is_some() {
        let whole_blocks = all.clone();
        all.extend(whole_blocks.into_iter().map(|how| Streaming { weights: Residency::Linear, ..how }));
    }
    all
}
