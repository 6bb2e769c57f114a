//! Who watches a block's forward pass: collectors of statistics, which record launches of their own as activations come by.

use super::forward::Batch;
use crate::engine::{Elem, Mat, Recording};
use crate::model::Input;

/// Attention's operands, just before its scores are made. n_tok is `batch.n_tok()`; sequences lie one after the other.
#[derive(Clone, Copy, Debug)]
pub struct AttentionPoint<E: Elem> {
    pub batch: Batch,
    /// The input of the three projections, [n_tok, d_model].
    pub a: Mat<E>,
    /// After the rotary embedding, [n_tok, n_head · d_head].
    pub q: Mat<f32>,
    /// After the rotary embedding, [n_tok, n_kv · d_head].
    pub k: Mat<f32>,
    /// [n_tok, n_kv · d_head].
    pub v: Mat<f32>,
    /// What scores are multiplied by, 1 / √d_head.
    pub scale: f32,
}

/// Sees activations while they are on the device. What an observer cannot record it reports with [`Recording::fail`].
pub trait Observer<E: Elem> {
    /// Rows of an input of linears, [n, width]: all of a batch, of hidden units as many at a time as fit a buffer.
    fn input(&mut self, rec: &mut Recording<'_>, input: Input, x: Mat<E>) {
        let _ = (rec, input, x);
    }

    fn attention(&mut self, rec: &mut Recording<'_>, point: &AttentionPoint<E>) {
        let _ = (rec, point);
    }

    /// The residual stream of a batch, [n_tok, d_model]: before the input of each linear whose output is added to it.
    fn residual(&mut self, rec: &mut Recording<'_>, x: Mat<f32>) {
        let _ = (rec, x);
    }
}

/// Sees nothing.
impl<E: Elem> Observer<E> for () {}

/// Both see everything, the first one first.
impl<E: Elem, A: Observer<E>, B: Observer<E>> Observer<E> for (A, B) {
    fn input(&mut self, rec: &mut Recording<'_>, input: Input, x: Mat<E>) {
        self.0.input(rec, input, x);
        self.1.input(rec, input, x);
    }

    fn attention(&mut self, rec: &mut Recording<'_>, point: &AttentionPoint<E>) {
        self.0.attention(rec, point);
        self.1.attention(rec, point);
    }

    fn residual(&mut self, rec: &mut Recording<'_>, x: Mat<f32>) {
        self.0.residual(rec, x);
        self.1.residual(rec, x);
    }
}

impl<E: Elem, T: Observer<E> + ?Sized> Observer<E> for &mut T {
    fn input(&mut self, rec: &mut Recording<'_>, input: Input, x: Mat<E>) {
        (**self).input(rec, input, x);
    }

    fn attention(&mut self, rec: &mut Recording<'_>, point: &AttentionPoint<E>) {
        (**self).attention(rec, point);
    }

    fn residual(&mut self, rec: &mut Recording<'_>, x: Mat<f32>) {
        (**self).residual(rec, x);
    }
}
