//! Differentiable wrappers of the fused ops: each calls `forward`, and records `backward` with what it needs.

use nibble_tensor::{
    DType, Result, Tensor,
    ops::{
        Documents, attention, embedding, linear,
        lm_head_loss::{self, Labels},
        residual,
        rms_norm::{self, Config as NormConfig},
        rope::{self, RopeTable},
    },
};

use crate::{Kept, Leaf, ParamGrads, Tape, Var, VarId, again::Again};

/// Rows of `table` [V, C] for `tokens` U32 `[T]`, times `scale`, in `dtype`: [T, C].
///
/// # Errors
/// [`nibble_tensor::Error::TokenOutOfRange`], [`nibble_tensor::Error::OutOfMemory`].
pub fn embedding(tape: &mut Tape<'_>, table: &Leaf, tokens: &Tensor, scale: f32, dtype: DType) -> Result<Var> {
    let y = embedding::forward(&tape.params().value(table)?, tokens, scale, dtype)?;
    let (param, tokens) = (table.param().cloned(), tokens.clone());
    let [y] = tape.record([], [y], param.is_some(), move |[dy], grads| {
        if let Some(dtable) = grads.leaf_mut(param.as_ref())? {
            embedding::backward(&dy, &tokens, scale, dtable)?;
        }
        Ok([])
    });
    Ok(y)
}

/// RMSNorm over the last size; see [`mod@rms_norm`].
///
/// # Errors
/// [`nibble_tensor::Error::Shape`], [`nibble_tensor::Error::OutOfMemory`].
pub fn rms_norm(tape: &mut Tape<'_>, x: Var, weight: &Leaf, config: NormConfig) -> Result<Var> {
    let w = tape.params().value(weight)?;
    let (x, id) = x.into_parts();
    let (y, inv_rms) = rms_norm::forward(&x, &w, config)?;
    let param = weight.param().cloned();
    let kept = tape.keep(&x, id.is_some() || param.is_some())?;
    drop(x);
    let [y] = tape.record([id], [y], param.is_some(), move |[dy], grads| {
        Ok([Some(rms_norm::backward(&dy, &kept.get()?, &w, &inv_rms, config, grads.leaf_mut(param.as_ref())?)?)])
    });
    Ok(y)
}

/// h = RMSNorm(x) where the residual stream begins: gives x on, and h.
///
/// # Errors
/// [`nibble_tensor::Error::Shape`], [`nibble_tensor::Error::OutOfMemory`].
pub fn fork_rms_norm(tape: &mut Tape<'_>, x: Var, weight: &Leaf, config: NormConfig) -> Result<[Var; 2]> {
    let w = tape.params().value(weight)?;
    let (x, id) = x.into_parts();
    let (h, inv_rms) = rms_norm::forward_with_room(&x, &w, config, linear::room(&x))?;
    let param = weight.param().cloned();
    let kept = tape.keep(&x, id.is_some() || param.is_some())?;
    let again = tape.is_recomputing().then(|| norm_again(&kept, &w, config));
    let [x, h] = tape.record([id], [x, h], param.is_some(), move |[dx, dh], grads| {
        let dx = rms_norm::residual_backward(dx, &dh, &kept.get()?, &w, &inv_rms, config, grads.leaf_mut(param.as_ref())?)?;
        Ok([Some(dx)])
    });
    Ok([x, with(h, again)])
}

/// The norm of a kept residual stream, made again.
fn norm_again(r: &Kept, w: &Tensor, config: NormConfig) -> Again {
    let (r, w) = (r.clone(), w.clone());
    Again::new(move || Ok(rms_norm::forward(&r.get()?, &w, config)?.0))
}

fn with(var: Var, again: Option<Again>) -> Var {
    match again {
        Some(again) => var.made_by(again),
        None => var,
    }
}

/// r = x + a, h = RMSNorm(r): the residual stream goes on as `r`, the next layer reads `h`.
///
/// # Errors
/// [`nibble_tensor::Error::Shape`], [`nibble_tensor::Error::OutOfMemory`].
pub fn residual_rms_norm(tape: &mut Tape<'_>, x: Var, a: Var, weight: &Leaf, config: NormConfig) -> Result<[Var; 2]> {
    let w = tape.params().value(weight)?;
    let ((x, x_id), (a, a_id)) = (x.into_parts(), a.into_parts());
    let (r, h, inv_rms) = rms_norm::residual_forward_with_room(&x, a, &w, config, linear::room(&x))?;
    drop(x);
    let param = weight.param().cloned();
    let kept = tape.keep(&r, x_id.is_some() || a_id.is_some() || param.is_some())?;
    let again = tape.is_recomputing().then(|| norm_again(&kept, &w, config));
    let [r, h] = tape.record([x_id, a_id], [r, h], param.is_some(), move |[dr, dh], grads| {
        let dx = rms_norm::residual_backward(dr, &dh, &kept.get()?, &w, &inv_rms, config, grads.leaf_mut(param.as_ref())?)?;
        Ok([Some(dx.clone()), Some(dx)])
    });
    Ok([r, with(h, again)])
}

/// x + a: the residual stream alone, where a block begins that is checkpointed.
///
/// # Errors
/// [`nibble_tensor::Error::Shape`], [`nibble_tensor::Error::OutOfMemory`].
pub fn residual(tape: &mut Tape<'_>, x: Var, a: Var) -> Result<Var> {
    let ((x, x_id), (a, a_id)) = (x.into_parts(), a.into_parts());
    let r = residual::forward(&x, a)?;
    drop(x);
    let [r] = tape.record([x_id, a_id], [r], false, move |[dr], _| Ok([Some(dr.clone()), Some(dr)]));
    Ok(r)
}

/// h = RMSNorm(x + a) where the residual stream ends.
///
/// # Errors
/// [`nibble_tensor::Error::Shape`], [`nibble_tensor::Error::OutOfMemory`].
pub fn final_rms_norm(tape: &mut Tape<'_>, x: Var, a: Var, weight: &Leaf, config: NormConfig) -> Result<Var> {
    let w = tape.params().value(weight)?;
    let ((x, x_id), (a, a_id)) = (x.into_parts(), a.into_parts());
    let (r, h, inv_rms) = rms_norm::residual_forward(&x, a, &w, config)?;
    drop(x);
    let param = weight.param().cloned();
    let [h] = tape.record([x_id, a_id], [h], param.is_some(), move |[dh], grads| {
        // The gradient of the residual stream, written over from here to its beginning: linear layers read it.
        let dweight = grads.leaf_mut(param.as_ref())?;
        let dx = rms_norm::backward_with_room(&dh, &r, &w, &inv_rms, config, dweight, linear::room(&r))?;
        Ok([Some(dx.clone()), Some(dx)])
    });
    Ok(h)
}

/// Rotary position embedding of `x` [T, H, D].
///
/// # Errors
/// [`nibble_tensor::Error::Shape`], a position beyond the table.
pub fn rope<'m>(tape: &mut Tape<'m>, x: Var, documents: &Documents, table: &'m RopeTable) -> Result<Var> {
    let (x, id) = x.into_parts();
    let positions = documents.positions().clone();
    let y = rope::forward(x, &positions, table)?;
    let [y] = tape.record([id], [y], false, move |[dy], _| Ok([Some(rope::backward(dy, &positions, table)?)]));
    Ok(y)
}

/// How an op leaves the gradients of its inputs in a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gradients {
    /// Each alone, for any op.
    Apart,
    /// The rows of all side by side, for linear layers over one input, which then make the gradient of that by one product. Ops that
    /// write their gradient over that of their output (rope) may lie between.
    SideBySide,
}

/// Causal attention within the documents of a stream: q [T, H, D], k and v [T, K, D] to [T, H, D].
///
/// # Errors
/// [`nibble_tensor::Error::Shape`], [`nibble_tensor::Error::OutOfMemory`].
pub fn attention(
    tape: &mut Tape<'_>,
    [q, k, v]: [Var; 3],
    documents: &Documents,
    config: attention::Config,
    gradients: Gradients,
) -> Result<Var> {
    let ((q, q_id), (k, k_id), (v, v_id)) = (q.into_parts(), k.into_parts(), v.into_parts());
    attend(tape, [q, k, v], [q_id, k_id, v_id], documents, None, config, gradients)
}

/// [`rope()`] of q and k, then [`attention()`]: one node, whose backward turns the gradients of q and k where the kernel makes them.
///
/// # Errors
/// As [`rope()`] and [`attention()`].
pub fn rope_attention<'m>(
    tape: &mut Tape<'m>,
    [q, k, v]: [Var; 3],
    documents: &Documents,
    table: &'m RopeTable,
    config: attention::Config,
    gradients: Gradients,
) -> Result<Var> {
    let ((q, q_id), (k, k_id), (v, v_id)) = (q.into_parts(), k.into_parts(), v.into_parts());
    let (q, k) = (rope::forward(q, documents.positions(), table)?, rope::forward(k, documents.positions(), table)?);
    attend(tape, [q, k, v], [q_id, k_id, v_id], documents, Some(table), config, gradients)
}

/// Attention of q and k as they are, which `rope` says what they were made by: the gradients are those of what it was given.
fn attend<'m>(
    tape: &mut Tape<'m>,
    [q, k, v]: [Tensor; 3],
    ids: [Option<VarId>; 3],
    documents: &Documents,
    rope: Option<&'m RopeTable>,
    config: attention::Config,
    gradients: Gradients,
) -> Result<Var> {
    let (o, lse) = attention::forward_with_room(&q, &k, &v, documents, config, linear::room(&q))?;
    let recorded = ids.iter().any(Option::is_some);
    let documents = documents.clone();
    let [q, k, v, saved] =
        [tape.keep(&q, recorded)?, tape.keep(&k, recorded)?, tape.keep(&v, recorded)?, tape.keep(&o, recorded)?];
    let [o] = tape.record(ids, [o], false, move |[d_o], _| {
        let (o, v, k, q) = (saved.get()?, v.get()?, k.get()?, q.get()?);
        let saved = attention::Saved { d_o: &d_o, q: &q, k: &k, v: &v, o: &o, lse: &lse };
        let side_by_side = (gradients == Gradients::SideBySide).then(|| linear::room(&q));
        let wanted = attention::Wanted { side_by_side, rope };
        let (dq, dk, dv) = attention::backward_to(&saved, &documents, config, wanted)?;
        Ok([Some(dq), Some(dk), Some(dv)])
    });
    Ok(o)
}

/// Other sizes over the same memory.
///
/// # Errors
/// [`nibble_tensor::Error::Shape`] when the number of elements differs.
pub fn reshape<const N: usize>(tape: &mut Tape<'_>, x: Var, shape: [usize; N]) -> Result<Var> {
    let (x, id) = x.into_parts();
    let before = x.shape();
    let y = x.reshape(shape)?;
    drop(x);
    let [y] = tape.record([id], [y], false, move |[dy], _| Ok([Some(dy.reshape(before)?)]));
    Ok(y)
}

/// A loss and the number of labels it was taken over: the end of a graph.
#[derive(Debug)]
pub struct Loss {
    /// Labelled rows.
    pub rows: usize,
    var: Var,
}

impl Loss {
    /// F32 `[1]`, on the device: Σ over labelled rows of the cross entropy, times the labels' scale.
    #[must_use]
    pub fn tensor(&self) -> &Tensor {
        self.var.tensor()
    }

    /// The value, read from the device: waits for it.
    ///
    /// # Errors
    /// What the device reports.
    pub fn value(&self) -> Result<f64> {
        Ok(self.tensor().to_f32_vec()?.iter().map(|&loss| f64::from(loss)).sum())
    }

    /// Runs the backward pass of `tape`, which recorded this loss; adds to `grads`.
    ///
    /// # Errors
    /// What an op's backward returns.
    pub fn backward(self, tape: Tape<'_>, grads: &mut ParamGrads) -> Result<()> {
        // The loss is the end: its own gradient is 1, which `lm_head_loss` has taken into account.
        let end = self.var.tensor().clone();
        tape.backward([self.var], [end], [], grads)?;
        Ok(())
    }
}

/// Output head and cross entropy over the labelled rows of `h` [T, C] with `weight` [V, C]; see [`mod@lm_head_loss`].
///
/// # Errors
/// [`nibble_tensor::Error::TokenOutOfRange`] for a label, [`nibble_tensor::Error::OutOfMemory`].
pub fn lm_head_loss(tape: &mut Tape<'_>, h: Var, weight: &Leaf, labels: &Labels, config: lm_head_loss::Config) -> Result<Loss> {
    let w = tape.params().operand(weight, h.tensor().dtype())?;
    let (h, id) = h.into_parts();
    let param = weight.param().cloned();
    let want_dh = tape.is_recording() && id.is_some();
    let output = lm_head_loss::forward(&h, &w, labels, config, want_dh)?;
    let (labels, dh) = (labels.clone(), output.dh);
    // The head's input is only needed again when the head itself trains.
    let h = param.is_some().then_some(h);
    let [var] = tape.record([id], [output.loss], param.is_some(), move |[_], grads| {
        if let (Some(h), Some(dweight)) = (h, grads.leaf_mut(param.as_ref())?) {
            lm_head_loss::backward_weight(&h, &w, &labels, config, dweight)?;
        }
        Ok([dh])
    });
    Ok(Loss { rows: output.rows, var })
}

#[cfg(test)]
mod tests {
    use nibble_tensor::{Arena, Device};

    use super::*;
    use crate::ParamStoreBuilder;

    const SIZE: usize = 6;

    /// Numbers below 1 of either sign, without a pattern that attention could not tell.
    fn numbers(seed: usize, dtype: DType, shape: [usize; 3]) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| ((i * 37 + seed * 11) as f32 * 1.7).sin()).collect();
        Tensor::from_slice(&Arena::new(Device::Cpu), &values, shape).unwrap().to_dtype(dtype).unwrap()
    }

    /// o and the gradients of what q, k and v were made of, by one op or by three.
    fn attended(one_op: bool, dtype: DType, half: usize, gradients: Gradients) -> [Vec<f32>; 4] {
        let arena = Arena::new(Device::Cpu);
        let params = ParamStoreBuilder::default().build(&arena).unwrap();
        let mut grads = params.zero_grads().unwrap();
        let documents = Documents::new(&arena, &[0, 5, 6, 9]).unwrap();
        let frequencies: Vec<f32> = (0..half).map(|i| 0.8f32.powi(i as i32)).collect();
        let table = RopeTable::new(&arena, &frequencies, 1.25, 5).unwrap();
        let config = attention::Config { scale: 0.7, window: Some(4), softcap: None };
        let mut tape = Tape::new(&params);
        let [q, k, v] = [(1, 4), (2, 2), (3, 2)].map(|(seed, heads)| tape.input(numbers(seed, dtype, [9, heads, SIZE])));
        let ids = [q.id(), k.id(), v.id()];
        let o = if one_op {
            rope_attention(&mut tape, [q, k, v], &documents, &table, config, gradients).unwrap()
        } else {
            let q = rope(&mut tape, q, &documents, &table).unwrap();
            let k = rope(&mut tape, k, &documents, &table).unwrap();
            attention(&mut tape, [q, k, v], &documents, config, gradients).unwrap()
        };
        let found = o.tensor().to_f32_vec().unwrap();
        let d_o = numbers(4, dtype, [9, 4, SIZE]);
        let [dq, dk, dv] = tape.backward([o], [d_o], ids, &mut grads).unwrap().map(|x| x.unwrap().to_f32_vec().unwrap());
        [found, dq, dk, dv]
    }

    #[test]
    fn rope_and_attention_in_one_are_the_three_ops() {
        for (dtype, half) in [(DType::F32, 3), (DType::F32, 2), (DType::Bf16, 3)] {
            for gradients in [Gradients::Apart, Gradients::SideBySide] {
                let one = attended(true, dtype, half, gradients);
                assert_eq!(one, attended(false, dtype, half, gradients), "{dtype:?} {half} {gradients:?}");
                assert!(one.iter().flatten().any(|x| x.abs() > 0.1));
            }
        }
    }

    #[test]
    fn rope_and_attention_record_nothing_where_nothing_trains() {
        let arena = Arena::new(Device::Cpu);
        let params = ParamStoreBuilder::default().build(&arena).unwrap();
        let documents = Documents::new(&arena, &[0, 9]).unwrap();
        let table = RopeTable::new(&arena, &[1.0, 0.5, 0.1], 1.0, 9).unwrap();
        let config = attention::Config { scale: 1.0, window: None, softcap: None };
        let mut tape = Tape::new(&params);
        let inputs = [4, 2, 2].map(|heads| Var::from(numbers(heads, DType::F32, [9, heads, SIZE])));
        let o = rope_attention(&mut tape, inputs, &documents, &table, config, Gradients::Apart).unwrap();
        assert!(o.id().is_none());
    }
}
