//! A real GPU compiler judges the kernels: Mesa's RADV compiles them for RDNA2 and RDNA3, which needs no GPU, and none may fall behind what
//! its design promises. `cargo bench --bench isa` prints the numbers behind a failure.
//!
//! Where RADV is missing this fails and says what to install, as GPU tests do without an adapter; `AESPA_ADAPTERS=none` leaves it out. RADV
//! exists on Linux only.
#![cfg(target_os = "linux")]

#[path = "common/isa/mod.rs"]
mod isa;

use isa::{Counts, FAMILIES, Job, Row};

/// Tiled products: all that takes most of a run.
const PRODUCTS: [&str; 4] = ["matmul_nn", "matmul_nt", "matmul_tn", "gram"];

/// Waves that a SIMD must hold, in the driver's unit of 32 lanes (RADV compiles compute shaders for waves of 64, which count twice). This
/// is the unit in which the limits can hold together: 16 multiply-adds per read of 128 bits take 8 x 8 sums per lane, so at least
/// 96 registers, of which a SIMD of RDNA2 holds ten sets of 32 lanes.
const WAVES: u64 = 6;
const FMA_PERCENT: f64 = 90.0;
const READS_PER_16_FMAS: f64 = 1.0;

/// What the tests start again for each chip; by itself it does nothing.
#[test]
#[ignore = "started by the other tests"]
fn child() {
    isa::child().map(drop).unwrap_or_else(|e| panic!("{e}"));
}

/// None without engines to test.
fn rows(job: &Job) -> Option<Vec<Row>> {
    if std::env::var("AESPA_ADAPTERS").is_ok_and(|adapters| adapters.eq_ignore_ascii_case("none")) {
        eprintln!("skipped: AESPA_ADAPTERS=none");
        return None;
    }
    let rows = isa::rows(&FAMILIES.map(str::to_owned), job, &["--ignored", "--exact", "child"]).unwrap_or_else(|e| panic!("{e}"));
    let kernels = if job.kernels.is_empty() { aespa_gpu::engine::kernels::KERNELS.len() } else { job.kernels.len() };
    assert!(rows.len() >= FAMILIES.len() * kernels, "{} rows", rows.len());
    Some(rows)
}

/// In what a row falls short.
fn faults(row: &Row) -> Vec<String> {
    let mut found = Vec::new();
    if row.spilled > 0 {
        found.push(format!("{} registers spilled", row.spilled));
    }
    if row.waves < WAVES {
        found.push(format!("{} waves per SIMD, {WAVES} are wanted ({} registers)", row.waves, row.vgprs));
    }
    // One thread clearing all workgroup memory, while the others wait, is what naga makes of a shader whose pipeline asks for zeros where
    // the driver has no way of its own: a write for every 16 bytes at least. Kernels have a fifth of that at most, as they write in parallel.
    if row.workgroup_memory > 0 && 2 * 16 * row.all.local_writes as u64 > row.workgroup_memory {
        found.push(format!("{} writes can clear its {} bytes of workgroup memory", row.all.local_writes, row.workgroup_memory));
    }
    if PRODUCTS.contains(&row.kernel.as_str()) {
        let (share, reads) = (row.hot.fma_percent(), row.hot.reads_per_16_fmas());
        if share < FMA_PERCENT {
            found.push(format!("{share:.1} % of the inner loop are multiply-adds, {FMA_PERCENT} % are wanted"));
        }
        // Of an inner loop without multiply-adds the share above tells.
        if reads > READS_PER_16_FMAS {
            found.push(format!("{reads:.2} reads of workgroup memory for 16 multiply-adds, {READS_PER_16_FMAS} are allowed"));
        }
    }
    found.iter().map(|fault| format!("{}: {fault}", row.name())).collect()
}

#[test]
fn kernels_keep_their_registers_and_feed_the_multipliers() {
    // Every tile that an adapter may be given, not only the default.
    let Some(rows) = rows(&Job { every_tile: true, ..Job::default() }) else { return };
    let found: Vec<_> = rows.iter().flat_map(faults).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn clearing_is_noticed() {
    let kernels = ["rms_norm", "gram"].map(str::to_owned).to_vec();
    let Some(rows) = rows(&Job { kernels, cleared: true, ..Job::default() }) else { return };
    for row in rows {
        let found = faults(&row);
        assert!(found.iter().any(|fault| fault.contains("clear")), "{}: {} writes, {found:?}", row.name(), row.all.local_writes);
    }
}

#[test]
fn the_checks_can_fail() {
    let good = Row {
        kernel: "gram".to_owned(),
        elem: "f32".to_owned(),
        stored: "-".to_owned(),
        tile: "64".to_owned(),
        family: "navi21".to_owned(),
        vgprs: 112,
        spilled: 0,
        workgroup_memory: 8192,
        waves: 8,
        inverse_throughput: 9000,
        all: Counts { local_writes: 8, ..Counts::default() },
        hot: Counts { fma: 256, vector: 258, local_reads: 16, ..Counts::default() },
    };
    assert!(faults(&good).is_empty());
    let bad = [
        ("spilled", Row { spilled: 1, ..good.clone() }),
        ("clear", Row { all: Counts { local_writes: 512, ..good.all }, ..good.clone() }),
        ("waves", Row { waves: 5, ..good.clone() }),
        ("multiply-adds, 90", Row { hot: Counts { vector: 285, ..good.hot }, ..good.clone() }),
        ("multiply-adds, 90", Row { hot: Counts::default(), ..good.clone() }),
        ("reads of workgroup", Row { hot: Counts { local_reads: 17, ..good.hot }, ..good.clone() }),
    ];
    for (says, row) in bad {
        let found = faults(&row);
        assert!(found.len() == 1 && found[0].contains(says), "{says}: {found:?}");
    }
}

/// Loops are told apart, and only the innermost one with multiply-adds counts.
#[test]
fn the_hot_loop_is_found() {
    let code = "BB0:\n\tv_fma_f32 v0, v1, v2, v3 ; d54b0000\nBB1:\n\ts_cbranch_scc1 BB4 ; bf850001\n\tv_mov_b32_e32 v1, 0\n\
                BB2:\n\tds_read_b128 v[0:3], v4\n\tv_fmac_f32_e32 v0, v1, v2\n\tv_dual_fmac_f32 v0, v1, v2 :: v_dual_fmac_f32 v3, v4, v5\n\
                \tv_add_nc_u32_e32 v1, 4, v1\n\ts_cbranch_scc0 BB2 ; bf840002\nBB3:\n\ts_branch BB1 ; bf82ffff\nBB4:\n\ts_endpgm\n";
    let hot = Counts::of_hot_loop(code);
    assert_eq!(hot, Counts { fma: 2, vector: 3, scalar: 1, local_reads: 1, ..Counts::default() });
    let all = Counts::of(code);
    assert_eq!((all.fma, all.vector, all.scalar), (3, 5, 4));
}
