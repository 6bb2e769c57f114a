//! The metric of an input on the device, ready for the rounding of the linears that read it.

use super::Settings;
use crate::calib::Gram;
use crate::engine::{Engine, on_host, submit};
use crate::metric::ColumnMetric;
use crate::round::factor::{Factor, factor, factor_in};
use crate::round::gptq::DeviceFactor;
use crate::round::{Start, orders};
use crate::{Error, Result};

/// A column metric on the device, factored where the rounding needs that: once for each column order.
pub(super) struct Columns {
    pub metric: ColumnMetric,
    pub factors: Vec<DeviceFactor>,
    /// Of the first factor.
    pub record: Option<FactorRecord>,
}

/// How the metric was factored: for the report.
#[derive(Clone, Copy, Debug)]
pub struct FactorRecord {
    pub damping: f64,
    pub raised: u32,
    pub dead: usize,
}

impl From<&Factor> for FactorRecord {
    fn from(f: &Factor) -> Self {
        Self { damping: f.damping, raised: f.raised, dead: f.dead }
    }
}

impl Columns {
    /// `gram` is `None` for the identity of width `d`.
    pub fn new(engine: &mut dyn Engine, settings: &Settings, d: usize, gram: Option<Gram>) -> Result<Self> {
        let (limits, damping) = (engine.limits(), settings.method.damping.value()?);
        let (mut factors, mut record) = (Vec::new(), None);
        let orders = match settings.method.rounding.start {
            Start::Gptq => settings.method.rounding.orders,
            Start::Nearest => 0,
        };
        for index in 0..orders {
            let Some(gram) = &gram else { return Err(Error::internal("solver", "this method needs the layer's statistics")) };
            let host = on_host(engine, Factor::what(d), Factor::flops(d), || match index {
                _ if gram.is_blank() => Ok(Factor::blank(d)),
                0 => factor(&gram.h, d, settings.act_order, damping),
                _ => factor_in(orders::drawn(&gram.h, d, settings.seed, index), &gram.h, d, damping),
            })?;
            record.get_or_insert(FactorRecord::from(&host));
            factors.push(submit(engine, |rec| DeviceFactor::upload(rec, host))?);
        }
        // Last, since it takes the matrix with it.
        let metric = submit(engine, |rec| match gram {
            Some(gram) => ColumnMetric::layer(rec, gram, damping as f32, limits),
            None => ColumnMetric::identity(rec, d),
        })?;
        Ok(Self { metric, factors, record })
    }

    pub fn free(self, engine: &mut dyn Engine) -> Result<()> {
        submit(engine, |rec| {
            self.metric.free(rec);
            self.factors.into_iter().for_each(|factor| factor.free(rec));
        })
    }
}
