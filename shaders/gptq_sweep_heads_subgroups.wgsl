// GPTQ's column sweep inside a block where the rows of a head are coupled, as in gptq_sweep_heads.wgsl, by subgroups.
//
// The rows of a head are rounded one after the other, each with the feedback of those before. There that is a barrier per row; here
// a subgroup has as many consecutive rows as it has lanes: among them feedback goes from lane to lane, and only when all are done does it go to
// the rows after them, through workgroup memory. Each row subtracts the same products in the same order as there, so results do not differ.
// Which threads share a subgroup is the driver's choice: a thread's row follows from its subgroup and lane, whatever its index.
//
// Cost: as there, with d_head / lanes barriers a column instead of d_head: for heads of 64 rows two (32 lanes) or one (64), so what is left
// of the chain is d_head width times a division, a rounding, a shuffle and a multiply-add: about half of its 150 thousand cycles. Memory of
// a workgroup: 0.5 KiB more.

// (w_r − ŵ_r) / V_rr.
var<workgroup> feedback: array<f32, THREADS>;

@compute @workgroup_size(128)
fn gptq_sweep_heads(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    place: Place,
) {
    let head = group.y * groups.x + group.x;
    if head >= p.n_head {
        return;
    }
    let thread = place.thread;
    let row0 = head * p.d_head;

    stage(thread, row0);
    // Rows past the end repeat the last; none of what they compute is kept.
    let lanes = place.lanes;
    let first = place.subgroup * lanes;
    let slot = first + place.lane;
    let mine = min(slot, p.d_head - 1u);
    let alive = slot < p.d_head;
    let row = row0 + mine;
    let own = slot * TILE_LD;
    let diagonal = v[row * p.ld_v + mine];
    for (var j = 0u; j < p.width; j++) {
        let start = start_of(own, j);
        // The order is data, so it is not trusted.
        let at = row * p.n_group + min(order[p.col0 + j] / p.group, p.n_group - 1u);
        let s = scale[at];
        let z = zero[at];
        var current = start;
        var value = 0.0;
        let whole = round(z);
        for (var done = 0u; done < p.d_head; done += lanes) {
            if first == done {
                for (var i = 0u; i < min(lanes, p.d_head - done); i++) {
                    // All lanes round, so that lane i's feedback can be shuffled; that of lanes before i is no longer needed.
                    let q = clamp(round(current / s + (z - whole)) + whole, 0.0, f32(p.max_code));
                    let own_value = s * (q - z);
                    let own_feedback = (current - own_value) / diagonal;
                    let passed = subgroupShuffle(own_feedback, i);
                    if place.lane == i {
                        value = own_value;
                        w[row * p.ld + p.col0 + j] = current;
                        feedback[slot] = own_feedback;
                    }
                    if place.lane > i {
                        current -= passed * v[(row0 + done + i) * p.ld_v + mine];
                    }
                }
            }
            workgroupBarrier();
            if alive && first > done {
                for (var r = done; r < done + lanes; r++) {
                    current -= feedback[r] * v[(row0 + r) * p.ld_v + mine];
                }
            }
        }
        tile[own + j] = (start - value) / u_block[j * WIDTH + j];
    }
    store_errors(thread, row0);
}
