//! `aespa-gpu devices`.

use super::quantize::table;
use super::{print, print_json};
use crate::Result;
use crate::engine::{DeviceChoice, device, open};
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
