//! The kernel registry: one line per shader, and what the files it names are for.
//!
//! `"NAME.wgsl" with "LIB.wgsl" fn NAME<E> [TUNING = DEFAULT | OTHER](p: Params, binding: Access<Scalar>, ...)`: `shaders/lib/LIB.wgsl` goes
//! in front of the shader, `E` is the operand type that the prelude chooses (f32 or f16), `Stored` are weights as a checkpoint stores them.
//! Calling `kernels::NAME(&mut rec, ...)` records a launch.
//!
//! `or NEEDS "FILE.wgsl" with "LIB.wgsl" [TUNING = DEFAULT]` behind it is a variant for adapters that have what it needs: subgroups of a
//! least size, or cooperative matrices.

use super::kernel::kernels;

mod gemm;
pub(crate) mod math;
mod noise;
mod simd;
mod sparse;
pub(crate) mod stored;

kernels! {
    /// Hidden states of token ids: rows of the embedding table.
    "embed.wgsl" fn embed(p: EmbedParams, ids: Read<u32>, table: Read<Stored>, out: ReadWrite<f32>);
    /// out = x / rms(x) · gain.
    "rms_norm.wgsl" with "place.wgsl" with "total.wgsl" fn rms_norm<E>(p: RmsNormParams, x: Read<f32>, gain: Read<f32>, out: ReadWrite<E>)
        or subgroups(4) "rms_norm.wgsl" with "place_subgroups.wgsl" with "total_subgroups.wgsl";
    /// out = (x − mean) / std · gain + bias.
    "layer_norm.wgsl" with "place.wgsl" with "total.wgsl" fn layer_norm<E>(p: LayerNormParams, x: Read<f32>, gain: Read<f32>, bias: Read<f32>, out: ReadWrite<E>)
        or subgroups(4) "layer_norm.wgsl" with "place_subgroups.wgsl" with "total_subgroups.wgsl";
    /// C = alpha A Wᵀ + bias + beta C, weights read as stored; batched by strides.
    "matmul_nt.wgsl" with "matmul_nt.wgsl" with "store.wgsl" fn matmul_nt<E> [TILE_N = 128 | 64, TILE_M = 64 | 128](p: MatmulNtParams, a: Read<E>, w: Read<Stored>, bias: Read<f32>, c: ReadWrite<f32>)
        or matrices(16, F16, 29696) "matmul_nt_matrices.wgsl" with "matmul_nt.wgsl" with "store.wgsl" with "place_subgroups.wgsl" with "matrices_16.wgsl" [TILE_N = 128, TILE_M = 128]
        or matrices(8, F32, 13568) "matmul_nt_matrices.wgsl" with "matmul_nt.wgsl" with "store.wgsl" with "place_subgroups.wgsl" with "matrices_8.wgsl" [TILE_N = 64, TILE_M = 64];
    /// C = alpha A B + beta C.
    "matmul_nn.wgsl" with "store.wgsl" fn matmul_nn<E> [TILE_N = 128 | 64, TILE_M = 64 | 128](p: MatmulNnParams, a: Read<f32>, b: Read<E>, c: ReadWrite<f32>);
    /// C = alpha Aᵀ B + beta C, batched by strides: cross moments, moments of heads, weight gradients.
    "matmul_tn.wgsl" with "store.wgsl" fn matmul_tn<E> [TILE_N = 128 | 64, TILE_M = 64 | 128](p: MatmulTnParams, a: Read<f32>, b: Read<E>, c: ReadWrite<f32>);
    /// Rotary position embedding in place, half-split layout.
    "rope.wgsl" fn rope(p: RopeParams, cos: Read<f32>, sin: Read<f32>, x: ReadWrite<f32>);
    /// Causal softmax attention with grouped queries, scores never in memory.
    "attention.wgsl" fn attention<E>(p: AttentionParams, q: Read<f32>, k: Read<f32>, v: Read<f32>, out: ReadWrite<E>);
    /// Rows of causal softmax weights of one head.
    "attention_weights.wgsl" fn attention_weights(p: AttentionWeightsParams, q: Read<f32>, k: Read<f32>, out: ReadWrite<f32>);
    /// Gradient of attention with respect to its queries, and the row statistics that the other half reads.
    "attention_backward_q.wgsl" fn attention_backward_q(p: AttentionBackwardQParams, q: Read<f32>, k: Read<f32>, v: Read<f32>, dout: Read<f32>, dq: ReadWrite<f32>, statistics: ReadWrite<f32>);
    /// Gradient of attention with respect to its keys and values.
    "attention_backward_kv.wgsl" fn attention_backward_kv(p: AttentionBackwardKvParams, q: Read<f32>, k: Read<f32>, v: Read<f32>, dout: Read<f32>, statistics: Read<f32>, dk: ReadWrite<f32>, dv: ReadWrite<f32>);
    /// out = silu(gate) · up.
    "swiglu.wgsl" fn swiglu<E>(p: SwigluParams, gate: Read<f32>, up: Read<f32>, out: ReadWrite<E>);
    /// out[r, j] = source[r, j] · row[r] · column[j], widened to f32.
    "rescale.wgsl" fn rescale(p: RescaleParams, row: Read<f32>, column: Read<f32>, source: Read<Stored>, out: ReadWrite<f32>);
    /// out[j] += sum of a · b over the rows of column j.
    "column_dot.wgsl" fn column_dot(p: ColumnDotParams, a: Read<f32>, b: Read<f32>, out: ReadWrite<f32>);
    /// One iteration of AdaRound: gradient, Adam, and the error of the softly rounded weights.
    "adaround_step.wgsl" fn adaround_step(p: AdaroundStepParams, start: Read<f32>, wanted: Read<f32>, scale: Read<f32>, zero: Read<f32>, v: ReadWrite<f32>, moment: ReadWrite<f32>, square: ReadWrite<f32>, e: ReadWrite<f32>);
    /// y += alpha x: the residual add, and differences.
    "axpy.wgsl" fn axpy(p: AxpyParams, x: Read<f32>, y: ReadWrite<f32>);
    /// x = a x + b many times: what a device can do in registers.
    "multiply_add.wgsl" fn multiply_add(p: MultiplyAddParams, x: ReadWrite<f32>);
    /// Running softmax statistics of a chunk of the vocabulary.
    "cross_entropy.wgsl" with "place.wgsl" with "total.wgsl" fn cross_entropy(p: CrossEntropyParams, logits: Read<f32>, targets: Read<u32>, state: ReadWrite<f32>)
        or subgroups(4) "cross_entropy.wgsl" with "place_subgroups.wgsl" with "total_subgroups.wgsl";
    /// Running statistics of the divergence between two models over a chunk of the vocabulary.
    "kl_divergence.wgsl" fn kl_divergence(p: KlDivergenceParams, logits: Read<f32>, reference: Read<f32>, state: ReadWrite<f32>);
    /// G += Xᵀ X, lower triangle.
    "gram.wgsl" fn gram<E> [TILE = 64 | 128](p: GramParams, x: Read<E>, g: ReadWrite<f32>);
    /// to[:, j] = source[:, order[j]], widened to f32.
    "gather_columns.wgsl" fn gather_columns(p: GatherColumnsParams, order: Read<u32>, source: Read<Stored>, to: ReadWrite<f32>);
    /// Nearest codes on a grid, and the values they stand for.
    "quantize.wgsl" fn quantize(p: QuantizeParams, w: Read<f32>, scale: Read<f32>, zero: Read<f32>, codes: ReadWrite<u32>, w_hat: ReadWrite<f32>);
    /// Weights of each row that lie nearly in the middle between two codes.
    "near_ties.wgsl" fn near_ties(p: NearTiesParams, value: Read<f32>, scale: Read<f32>, zero: Read<f32>, ties: ReadWrite<u32>);
    /// The values that codes stand for.
    "dequantize.wgsl" fn dequantize(p: DequantizeParams, codes: Read<u32>, scale: Read<f32>, zero: Read<f32>, w_hat: ReadWrite<f32>);
    /// The best grids per row and group out of a list of clip ratios, by the diagonally weighted error.
    "scale_search.wgsl" with "stored.wgsl" with "ranks.wgsl" with "ranked.wgsl" fn scale_search(p: ScaleSearchParams, w: Read<f32>, weight: Read<f32>, scale: ReadWrite<f32>, zero: ReadWrite<f32>, loss: ReadWrite<f32>)
        or subgroups(1) "scale_search.wgsl" with "stored.wgsl" with "ranks.wgsl" with "ranked_subgroups.wgsl";
    /// The best grids with stored minima per row and group, by the diagonally weighted error.
    "minimum_search.wgsl" with "stored.wgsl" with "ranks.wgsl" with "ranked.wgsl" fn minimum_search(p: MinimumSearchParams, w: Read<f32>, weight: Read<f32>, scale: ReadWrite<f32>, zero: ReadWrite<f32>, loss: ReadWrite<f32>)
        or subgroups(1) "minimum_search.wgsl" with "stored.wgsl" with "ranks.wgsl" with "ranked_subgroups.wgsl";
    /// Free grids to grids of two levels: the best steps of every super-block, and everything rounded to whole numbers of them.
    "step_search.wgsl" with "stored.wgsl" fn step_search(p: StepSearchParams, w: Read<f32>, weight: Read<f32>, scale: ReadWrite<f32>, zero: ReadWrite<f32>, steps: ReadWrite<f32>);
    /// out[r, g] = sum of a · b over the columns of group g.
    "row_dot.wgsl" with "place.wgsl" with "total.wgsl" fn row_dot(p: RowDotParams, a: Read<f32>, b: Read<f32>, out: ReadWrite<f32>)
        or subgroups(4) "row_dot.wgsl" with "place_subgroups.wgsl" with "total_subgroups.wgsl";
    /// GPTQ's column sweep inside one block of columns.
    "gptq_sweep.wgsl" fn gptq_sweep(p: GptqSweepParams, u: Read<f32>, order: Read<u32>, scale: Read<f32>, zero: Read<f32>, w: ReadWrite<f32>, err: ReadWrite<f32>);
    /// GPTQ's column sweep inside one block of columns, the rows of a head coupled.
    "gptq_sweep_heads.wgsl" with "gptq_sweep_heads.wgsl" fn gptq_sweep_heads(p: GptqSweepHeadsParams, u: Read<f32>, v: Read<f32>, order: Read<u32>, scale: Read<f32>, zero: Read<f32>, w: ReadWrite<f32>, err: ReadWrite<f32>)
        or subgroups(1) "gptq_sweep_heads_subgroups.wgsl" with "gptq_sweep_heads.wgsl" with "place_subgroups.wgsl";
    /// Coordinate descent inside one block of columns, rows independent.
    "descent_block.wgsl" fn descent_block(p: DescentBlockParams, h: Read<f32>, scale: Read<f32>, heat: Read<f32>, m: Read<f32>, codes: ReadWrite<u32>, change: ReadWrite<f32>, moves: ReadWrite<u32>);
    /// Coordinate descent inside one block of columns, the rows of a head coupled.
    "descent_heads.wgsl" with "place.wgsl" with "first.wgsl" fn descent_heads(p: DescentHeadsParams, g: Read<f32>, h: Read<f32>, scale: Read<f32>, heat: Read<f32>, t: Read<f32>, codes: ReadWrite<u32>, change: ReadWrite<f32>, moves: ReadWrite<u32>)
        or subgroups(4) "descent_heads.wgsl" with "place_subgroups.wgsl" with "first_subgroups.wgsl";
    /// The best scale of every row for fixed codes.
    "scale_refit.wgsl" with "stored.wgsl" fn scale_refit(p: ScaleRefitParams, u: Read<f32>, uh: Read<f32>, steps: Read<f32>, scale: ReadWrite<f32>, m: ReadWrite<f32>);
    /// The best scale and minimum of every row for fixed codes.
    "minimum_refit.wgsl" with "stored.wgsl" fn minimum_refit(p: MinimumRefitParams, q: Read<f32>, qh: Read<f32>, h: Read<f32>, steps: Read<f32>, scale: ReadWrite<f32>, zero: ReadWrite<f32>, m: ReadWrite<f32>);
    /// Replaces the rows that were picked.
    "select_rows.wgsl" fn select_rows(p: SelectRowsParams, pick: Read<u32>, source: Read<u32>, to: ReadWrite<u32>);
    /// Codes to a dense little-endian bit stream per row.
    "pack_bits.wgsl" fn pack_bits(p: PackBitsParams, codes: Read<u32>, packed: ReadWrite<u32>);
    /// The reverse of `pack_bits`.
    "unpack_bits.wgsl" fn unpack_bits(p: UnpackBitsParams, packed: Read<u32>, codes: ReadWrite<u32>);
}
