//! Launches of kernels: the shader that is chosen, and launches that are given to the device in parts.

use super::GpuEngine;
use crate::engine::gpu::batch::Batch;
use crate::engine::gpu::choice::Choice;
use crate::engine::gpu::timer::Timer;
use crate::engine::recording::Dispatch;
use crate::{Error, Result};
use std::time::Instant;

impl GpuEngine {
    /// Runs one launch; its errors are about its kernel.
    pub(super) fn dispatch(&mut self, dispatch: &Dispatch, batch: &mut Batch) -> Result<()> {
        let result = if self.timed { self.timed_launch(dispatch, batch) } else { self.launch(dispatch, batch) };
        result.map_err(|error| match error.subject.contains("kernel") {
            true => error,
            false => Error { subject: format!("kernel {}", dispatch.kernel.name), ..error },
        })
    }

    /// The choice for a launch, its pipeline made. A variant that the driver does not take is given up: the base does the same.
    fn chosen<'a>(&mut self, dispatch: &'a Dispatch) -> Result<Choice<'a>> {
        loop {
            let choice = self.choices.of(dispatch);
            match (self.pipelines.get(&self.context, dispatch, &choice), choice.text) {
                (Ok(_), _) => return Ok(choice),
                (Err(error), Some(text)) if self.context.check(String::new).is_ok() => {
                    tracing::warn!("{error}; from now on the base shader of {} runs", dispatch.kernel.name);
                    self.choices.give_up(dispatch, text);
                }
                (Err(error), _) => return Err(error),
            }
        }
    }

    /// The halves of a launch that is too much to be given to the device at once.
    fn halves(&self, dispatch: &Dispatch) -> Option<[Dispatch; 2]> {
        let kernel = dispatch.kernel;
        if (kernel.cost)(&dispatch.params).flops <= self.max_launch {
            return None;
        }
        let half = |params: Vec<u8>| Dispatch { grid: (kernel.grid)(&params, &dispatch.constants), params, ..dispatch.clone() };
        (kernel.halves)(&dispatch.params).map(|halves| halves.map(half))
    }

    /// In how many parts it is given to the device.
    fn parts(&self, dispatch: &Dispatch) -> u32 {
        self.halves(dispatch).map_or(1, |halves| halves.iter().map(|half| self.parts(half)).sum())
    }

    /// Launches a kernel, in parts where it is too much at once.
    fn launch(&mut self, dispatch: &Dispatch, batch: &mut Batch) -> Result<()> {
        match self.halves(dispatch) {
            Some(halves) => halves.iter().try_for_each(|half| self.launch(half, batch)),
            None => self.launch_whole(dispatch, batch),
        }
    }

    fn launch_whole(&mut self, dispatch: &Dispatch, batch: &mut Batch) -> Result<()> {
        let kernel = dispatch.kernel;
        if self.dummy.is_none() {
            self.dummy = Some(self.context.buffer("absent input", 16, wgpu::BufferUsages::STORAGE)?);
        }
        batch.make_room(&self.context)?;
        let choice = self.chosen(dispatch)?;
        let pipeline = self.pipelines.get(&self.context, dispatch, &choice)?;
        let flops = (kernel.cost)(&dispatch.params).flops;
        let params = wgpu::BindingResource::Buffer(batch.slot(kernel.name, &dispatch.params, flops)?);
        let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: params }];
        for ((binding, declared), raw) in (1..).zip(kernel.bindings).zip(&dispatch.buffers) {
            let absent = if declared.writes { None } else { self.dummy.as_ref() };
            let buffer = if raw.is_none() { absent } else { self.buffers.get(&raw.id) };
            let Some(buffer) = buffer else {
                return Err(Error::internal("", format!("binding {} is not allocated (freed too early?)", declared.name)));
            };
            entries.push(wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() });
        }
        let descriptor = wgpu::BindGroupDescriptor { label: Some(kernel.name), layout: &pipeline.layout, entries: &entries };
        let group = self.context.guarded(|| format!("kernel {}", kernel.name), || self.context.device.create_bind_group(&descriptor))?;
        let encoder = batch.encoder(&self.context, dispatch.buffers.iter().map(|raw| raw.id));
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some(kernel.name),
            timestamp_writes: self.timer.as_mut().and_then(Timer::next),
        });
        pass.set_pipeline(&pipeline.pipeline);
        pass.set_bind_group(0, &group, &[]);
        let [x, y, z] = choice.grid;
        pass.dispatch_workgroups(x, y, z);
        drop(pass);
        self.profile.launch(dispatch, 0.0);
        Ok(())
    }

    /// A launch by itself, timed by the device or, where it has no timestamps, from idle to idle by the clock on the wall.
    fn timed_launch(&mut self, dispatch: &Dispatch, batch: &mut Batch) -> Result<()> {
        let name = dispatch.kernel.name;
        // Its pipeline is made before.
        self.chosen(dispatch)?;
        batch.submit(&self.context)?;
        batch.wait(&self.context, name)?;
        if self.context.timestamps {
            self.timer = Some(Timer::new(&self.context, self.parts(dispatch))?);
        }
        let start = Instant::now();
        self.launch(dispatch, batch)?;
        batch.submit(&self.context)?;
        batch.wait(&self.context, name)?;
        let seconds = match self.timer.take() {
            Some(timer) => timer.read(&self.context)?,
            None => start.elapsed().as_secs_f64(),
        };
        self.profile.took(name, seconds);
        Ok(())
    }
}
