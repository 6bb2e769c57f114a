//! Counts the instructions of AMD machine code as LLVM's disassembler prints it: `BB7:` starts a basic block, everything else that
//! is indented is one instruction.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Instructions by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Multiply-adds. Packed ones, dot products and what RDNA3 issues in pairs count once: they take one issue slot.
    pub fma: usize,
    /// All vector instructions, multiply-adds included.
    pub vector: usize,
    pub scalar: usize,
    /// Reads of workgroup memory, of at most 128 bits each.
    pub local_reads: usize,
    pub local_writes: usize,
    pub loads: usize,
    pub stores: usize,
    pub barriers: usize,
}

impl Counts {
    pub fn of(assembly: &str) -> Self {
        Self::of_lines(assembly.lines())
    }

    /// Of the loop without a loop inside that has the most multiply-adds, or vector instructions where there are none; zeros without a loop.
    pub fn of_hot_loop(assembly: &str) -> Self {
        let lines: Vec<&str> = assembly.lines().collect();
        let counts = innermost_loops(&lines).into_iter().map(|lines_of| Self::of_lines(lines[lines_of].iter().copied()));
        counts.max_by_key(|c| (c.fma, c.vector)).unwrap_or_default()
    }

    fn of_lines<'a>(lines: impl Iterator<Item = &'a str>) -> Self {
        let mut counts = Self::default();
        for name in lines.filter(|l| l.starts_with(char::is_whitespace)).filter_map(|l| l.split_whitespace().next()) {
            counts.add(name);
        }
        counts
    }

    fn add(&mut self, name: &str) {
        let is = |prefixes: &[&str]| prefixes.iter().any(|p| name.starts_with(p));
        self.fma += usize::from(is(&["v_fma", "v_pk_fma", "v_dot", "v_dual_fma"]));
        self.vector += usize::from(is(&["v_"]));
        self.scalar += usize::from(is(&["s_"]));
        self.local_reads += usize::from(is(&["ds_read", "ds_load"]));
        self.local_writes += usize::from(is(&["ds_write", "ds_store"]));
        self.loads += usize::from(is(&["buffer_load", "global_load", "scratch_load"]));
        self.stores += usize::from(is(&["buffer_store", "global_store", "scratch_store"]));
        self.barriers += usize::from(is(&["s_barrier"]));
    }

    /// Hundredths of the vector instructions that are multiply-adds.
    pub fn fma_percent(&self) -> f64 {
        100.0 * self.fma as f64 / self.vector.max(1) as f64
    }

    /// Reads of workgroup memory for 16 multiply-adds; zero where there are none of these.
    pub fn reads_per_16_fmas(&self) -> f64 {
        if self.fma == 0 { 0.0 } else { 16.0 * self.local_reads as f64 / self.fma as f64 }
    }
}

/// Lines of the loops that hold no other loop: from the label that a branch leads back to, to that branch.
fn innermost_loops(lines: &[&str]) -> Vec<Range<usize>> {
    let label = |name: &str| lines.iter().position(|l| l.strip_suffix(':') == Some(name));
    let back = lines.iter().enumerate().filter_map(|(i, line)| {
        let mut words = line.split_whitespace();
        words.next().filter(|word| word.starts_with("s_branch") || word.starts_with("s_cbranch"))?;
        let start = label(words.next()?)?;
        (start < i).then_some(start..i + 1)
    });
    let loops: Vec<_> = back.collect();
    let inside = |a: &Range<usize>, b: &Range<usize>| b.start <= a.start && a.end <= b.end && a != b;
    loops.iter().filter(|l| !loops.iter().any(|other| inside(other, l))).cloned().collect()
}
