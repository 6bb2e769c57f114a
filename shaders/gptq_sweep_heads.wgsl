// GPTQ's column sweep inside a block where the rows of a head are coupled (BoA, Kim et al., ICML 2025): H⁻¹ = Uᵀ U, G⁻¹ = Vᵀ V.
// Column after column, and inside a column row after row:
//   q_r = clamp(round(w_r / s) + z, 0, max_code);  w_r' −= (w_r − ŵ_r) V_rr' / V_rr for r' > r;
// then e = (w at the column's start − ŵ) / U_jj; w_k −= e U_jk for the later columns k of the block.
//
// w [n_head d_head, cols] in quantization order, columns col0 .. col0 + width (at most 16) are swept and replaced by the weights as they
// were when they were rounded; u: their rows of the factor; v [n_head d_head, d_head], upper triangular; order maps a position to the
// original column, which decides the group; err [rows, err_col + width] for the product W −= err U.
//
// One workgroup of 128 threads per head (d_head at most 128), a thread owns a row. W is staged through a tile of 128 x 16 in workgroup
// memory (10 KiB in all); a column's slot holds W until it is done and e afterwards, so a thread gathers w_j − Σ_k e_k U_kj from its own
// row. Inside a column one row after the other is rounded and its feedback passed on through workgroup memory, in two places by turns:
// one barrier per weight of a column.
//
// Cost: d_head width (width + 8 + d_head) flops a head, 12 bytes a weight; the limit is the chain of d_head width barriers, each with a
// division and a rounding: some 150 thousand cycles a launch for heads of 64 rows, heads in parallel.

// (w_r − ŵ_r) / V_rr of even and odd rows.
var<workgroup> feedback: array<f32, 2>;

@compute @workgroup_size(128)
fn gptq_sweep_heads(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let head = group.y * groups.x + group.x;
    if head >= p.n_head {
        return;
    }
    let row0 = head * p.d_head;
    let alive = thread < p.d_head;

    stage(thread, row0);
    let mine = min(thread, p.d_head - 1u);
    let row = row0 + mine;
    let own = thread * TILE_LD;
    let diagonal = v[row * p.ld_v + mine];
    for (var j = 0u; j < p.width; j++) {
        let start = start_of(own, j);
        // The order is data, so it is not trusted.
        let at = row * p.n_group + min(order[p.col0 + j] / p.group, p.n_group - 1u);
        let s = scale[at];
        let z = zero[at];
        var current = start;
        var value = 0.0;
        for (var r = 0u; r < p.d_head; r++) {
            if thread == r {
                let whole = round(z);
                let q = clamp(round(current / s + (z - whole)) + whole, 0.0, f32(p.max_code));
                value = s * (q - z);
                w[row * p.ld + p.col0 + j] = current;
                feedback[r % 2u] = (current - value) / diagonal;
            }
            workgroupBarrier();
            if alive && thread > r {
                current -= feedback[r % 2u] * v[(row0 + r) * p.ld_v + mine];
            }
        }
        tile[own + j] = (start - value) / u_block[j * WIDTH + j];
    }
    store_errors(thread, row0);
}
