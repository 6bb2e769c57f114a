use super::attention_backward_q::{Problem, Shape, shapes, sum};
use super::{Case, Want};
use aespa_gpu::engine::kernels::{self, attention_backward_kv::AttentionBackwardKvParams};

pub fn cases() -> Vec<Case> {
    shapes().into_iter().flat_map(|shape| [case(shape, 1.0), case(shape, 30.0)]).collect()
}

fn case(shape: Shape, sharp: f32) -> Case {
    Case::new(format!("{shape:?}, sharpness {sharp}"), move |io| {
        let problem = Problem::new(io, shape, sharp);
        let Shape { n_seq, seq_len, n_head, n_kv, d_head } = shape;
        let tokens = n_seq * seq_len;
        let statistics = problem.rows.iter().flat_map(|row| [row.log_norm.value as f32, row.delta.value as f32]).collect();
        let statistics = io.upload(statistics);
        let dk = io.output::<f32>("dk", tokens * problem.ld_kv);
        let dv = io.output::<f32>("dv", tokens * problem.ld_kv);
        let p = AttentionBackwardKvParams {
            n_seq: n_seq as u32,
            seq_len: seq_len as u32,
            n_head: n_head as u32,
            n_kv: n_kv as u32,
            d_head: d_head as u32,
            ld_q: problem.ld_q as u32,
            ld_kv: problem.ld_kv as u32,
            scale: problem.scale,
        };
        let [q, k, v, dout] = problem.buffers;
        kernels::attention_backward_kv(&mut io.rec, p, q, k, v, dout, statistics, dk.buffer, dv.buffer);
        // Every query head of the group and every query that sees the key.
        let want = |is_key: bool, token: usize, column: usize| -> Want {
            let (kv, e, group) = (column / d_head, column % d_head, n_head / n_kv);
            let end = (token / seq_len + 1) * seq_len;
            let queries = (kv * group..(kv + 1) * group).flat_map(|head| (token..end).map(move |query| (head, query)));
            sum(queries.map(|(head, query)| {
                let row = &problem.rows[query * n_head + head];
                let factors = if is_key { &row.slopes } else { &row.weights };
                (factors[token % seq_len], problem.q_at(if is_key { 0 } else { 3 }, query, head, e))
            }))
            .want()
        };
        io.expect_matrix(dk, n_kv * d_head, problem.ld_kv, |token, column| want(true, token, column));
        io.expect_matrix(dv, n_kv * d_head, problem.ld_kv, |token, column| want(false, token, column));
    })
}
