use super::{AWKWARD, Case, Want};
use aespa_gpu::engine::kernels::{self, select_rows::SelectRowsParams};

pub fn cases() -> Vec<Case> {
    AWKWARD.into_iter().map(|rows| case(rows, 24)).chain([case(6, 264), case(3, 1)]).collect()
}

fn case(rows: usize, ld: usize) -> Case {
    Case::new(format!("{rows} x {ld}"), move |io| {
        let words = |io: &mut super::Io| -> Vec<u32> { (0..rows * ld).map(|_| io.rng.next() as u32).collect() };
        let (source, before) = (words(io), words(io));
        let pick: Vec<u32> = (0..rows).map(|_| io.rng.below(3) as u32).collect();
        let (pick_buffer, source_buffer, to) = (io.upload(pick.clone()), io.upload(source.clone()), io.inout("to", before));
        let p = SelectRowsParams { rows: rows as u32, ld: ld as u32 };
        kernels::select_rows(&mut io.rec, p, pick_buffer, source_buffer, to.buffer);
        io.expect(to, |i| if pick[i / ld] != 0 { Want::Bits(source[i]) } else { Want::Same });
    })
}
