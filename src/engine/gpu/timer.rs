//! How long launches take on the device: timestamps at both ends of every pass, where the adapter has them.

use super::context::Context;
use crate::{Error, Result};

#[derive(Debug)]
pub(super) struct Timer {
    set: wgpu::QuerySet,
    ticks: wgpu::Buffer,
    readable: wgpu::Buffer,
    /// Timestamps that there are places for, two for every launch, and those taken.
    places: u32,
    used: u32,
}

impl Timer {
    /// For `launches` launches; further ones are not timed.
    pub fn new(context: &Context, launches: u32) -> Result<Self> {
        use wgpu::BufferUsages as Usage;
        let places = 2 * launches;
        let bytes = u64::from(places) * 8;
        let descriptor = wgpu::QuerySetDescriptor { label: Some("times"), ty: wgpu::QueryType::Timestamp, count: places };
        Ok(Self {
            set: context.guarded(|| "timestamps".to_owned(), || context.device.create_query_set(&descriptor))?,
            ticks: context.buffer("timestamps", bytes, Usage::QUERY_RESOLVE | Usage::COPY_SRC)?,
            readable: context.buffer("timestamps", bytes, Usage::MAP_READ | Usage::COPY_DST)?,
            places,
            used: 0,
        })
    }

    /// What the next pass writes; nothing when all places are taken.
    pub fn next(&mut self) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let at = self.used;
        if at >= self.places {
            return None;
        }
        self.used += 2;
        Some(wgpu::ComputePassTimestampWrites {
            query_set: &self.set,
            beginning_of_pass_write_index: Some(at),
            end_of_pass_write_index: Some(at + 1),
        })
    }

    /// Seconds of all passes, added up; waits for them.
    pub fn read(self, context: &Context) -> Result<f64> {
        let subject = || "timestamps".to_owned();
        let used = self.used;
        if used == 0 {
            return Ok(0.0);
        }
        let bytes = u64::from(used) * 8;
        context.guarded(subject, || {
            let mut encoder = context.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("timestamps") });
            encoder.resolve_query_set(&self.set, 0..used, &self.ticks, 0);
            encoder.copy_buffer_to_buffer(&self.ticks, 0, &self.readable, 0, bytes);
            context.queue.submit([encoder.finish()]);
            self.readable.map_async(wgpu::MapMode::Read, ..bytes, |_| {});
        })?;
        context.wait(subject)?;
        let view = self.readable.get_mapped_range(..bytes).map_err(|e| Error::device(subject(), "they cannot be read").caused_by(e))?;
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&view[..]);
        let passed: u64 = ticks.chunks_exact(2).map(|both| both[1].saturating_sub(both[0])).sum();
        Ok(passed as f64 * f64::from(context.queue.get_timestamp_period()) * 1e-9)
    }
}
