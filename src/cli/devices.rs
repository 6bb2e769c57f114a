//! `aespa-gpu devices`.

use super::progress::Bars;
use super::quantize::table;
use super::{print, print_json};
use crate::Result;
use crate::cache::Cache;
use crate::engine::{DeviceChoice, device, open};
use crate::measure::{Measurement, measure};
use serde_json::json;

pub fn run(json: bool) -> Result<()> {
    let adapters = device::list();
    let auto = open(&DeviceChoice::Auto)?.describe();
    if json {
        return print_json(&json!({ "adapters": adapters, "auto": auto, "cpu_threads": rayon::current_num_threads() }));
    }
    if adapters.is_empty() {
        print("no Vulkan, Metal or DX12 adapter")?;
    } else {
        let mut rows = table(&["device", "name", "backend", "kind", "buffer", "workgroup memory", "f16", "subgroups"]);
        for a in &adapters {
            rows.add_row([
                format!("gpu:{}", a.index),
                a.name.clone(),
                a.backend.clone(),
                a.kind.to_owned(),
                format!("{:.2} GiB", a.max_buffer.min(a.max_storage_binding) as f64 / f64::from(1 << 30)),
                format!("{} KiB", a.workgroup_storage / 1024),
                if a.shader_f16 { "yes" } else { "no" }.to_owned(),
                if a.subgroups { format!("{}-{}", a.subgroup_min, a.subgroup_max) } else { "no".to_owned() },
            ]);
        }
        print(&rows.to_string())?;
    }
    print(&format!("--device auto takes: {auto}"))
}

/// Measures a device, keeps what was found out, and prints it.
pub fn bench(choice: &DeviceChoice, json: bool) -> Result<()> {
    let mut bars = Bars::new();
    let measured = measure(choice, &Cache::user(), &mut bars);
    bars.finish();
    let measured = measured?;
    if json { print_json(&measured) } else { print(&told(&measured)) }
}

fn told(measured: &Measurement) -> String {
    let Measurement { device, rates, kernels, host, differences } = measured;
    let giga = |rate: f64| format!("{:.2}", rate / 1e9);
    let mut text = format!("{device}\n");
    let mut limits = table(&["limit", "GB/s or GFLOP/s"]);
    for (name, rate) in [
        ("copy, read and written", rates.copy),
        ("multiply-add", rates.multiply_add),
        ("upload", rates.upload),
        ("download", rates.download),
        ("new buffers", rates.allocate),
    ] {
        limits.add_row([name.to_owned(), giga(rate)]);
    }
    text += &format!("{limits}\n");
    let checked = !differences.is_empty();
    let mut rows = table(&["kernel", "launches", "ms", "GFLOP/s", "of multiply-add", "GB/s", "of copy", "differs"]);
    let mut slowest_first: Vec<_> = kernels.iter().chain(host).collect();
    slowest_first.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
    for (name, k) in slowest_first {
        let (flops, bytes) = (k.flops / k.seconds, k.bytes / k.seconds);
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let or_dash = |is: bool, text: String| if is { text } else { "-".to_owned() };
        rows.add_row([
            (*name).to_owned(),
            k.launches.to_string(),
            format!("{:.2}", 1e3 * k.seconds),
            or_dash(k.flops > 0.0, giga(flops)),
            or_dash(k.flops > 0.0, percent(flops / rates.multiply_add)),
            or_dash(k.bytes > 0.0, giga(bytes)),
            or_dash(k.bytes > 0.0, percent(bytes / rates.copy)),
            or_dash(checked, differences.get(name).map_or("-".to_owned(), |share| percent(*share))),
        ]);
    }
    text += &format!("{rows}\n");
    text += match checked {
        true => "differs: the largest share of a launch's results that are not those of the native engine; ties may be",
        false => "results were not checked: the native engine is what others are checked by",
    };
    text
}
