//! Data flows one way: a module may use modules of lower rank only, and one module alone names the GPU API.

use std::path::{Path, PathBuf};

/// Modules by rank; those on one line do not know each other. `interrupt` is a flag that anyone may ask.
const RANKS: &[&[&str]] = &[
    &["error"],
    &["cache", "interrupt", "memory"],
    &["journal", "tensor"],
    &["engine"],
    &["quant"],
    &["model", "text"],
    &["calib"],
    &["metric"],
    &["scale", "round"],
    &["transform"],
    &["method", "export", "eval"],
    &["plan"],
    &["report"],
    &["pipeline"],
    &["measure"],
    &["cli"],
];

fn rank(module: &str) -> Option<usize> {
    RANKS.iter().position(|modules| modules.contains(&module))
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|p| if p.is_dir() { sources(&p) } else { vec![p] }).filter(|p| p.extension().is_some_and(|e| e == "rs")).collect()
}

/// Modules that a source names as `crate::module`, in `use` lists with braces too.
fn named(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for part in text.split("crate::").skip(1) {
        let list = match part.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap_or_default(),
            None => part,
        };
        let items: Vec<&str> = if part.starts_with('{') { list.split(',').collect() } else { vec![list] };
        found.extend(items.iter().map(|i| i.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>()));
    }
    found
}

/// What one file does wrong.
fn violations(module: &str, text: &str) -> Vec<String> {
    let own = rank(module).unwrap_or_else(|| panic!("module {module} has no rank: add it to the table"));
    let others = named(text).into_iter().filter(|m| m != module && rank(m).is_some_and(|r| r >= own));
    others.map(|m| format!("{module} must not use {m}")).collect()
}

#[test]
fn modules_use_lower_ranks_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for path in sources(&src) {
        let module = path.strip_prefix(&src).unwrap().components().next().unwrap().as_os_str().to_string_lossy().replace(".rs", "");
        if module == "lib" || module == "main" {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        wrong.extend(violations(&module, &text).into_iter().map(|w| format!("{}: {w}", path.display())));
        if text.contains("wgpu::") && !path.starts_with(src.join("engine/gpu")) {
            wrong.push(format!("{}: only engine/gpu may name wgpu", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_violation_is_noticed() {
    assert_eq!(violations("tensor", "use crate::{Error, engine::Mat};\nuse crate::error::Kind;").len(), 1);
    assert_eq!(violations("model", "crate::text::Corpus").len(), 1);
    assert!(violations("calib", "use crate::model::Block; use crate::Result;").is_empty());
}
