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

use crate::{Kept, Leaf, ParamGrads, Tape, Var, again::Again};

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
    let (o, lse) = attention::forward_with_room(&q, &k, &v, documents, config, linear::room(&q))?;
    let recorded = [q_id, k_id, v_id].iter().any(Option::is_some);
    let documents = documents.clone();
    let [q, k, v, saved] =
        [tape.keep(&q, recorded)?, tape.keep(&k, recorded)?, tape.keep(&v, recorded)?, tape.keep(&o, recorded)?];
    let [o] = tape.record([q_id, k_id, v_id], [o], false, move |[d_o], _| {
        let (o, v, k, q) = (saved.get()?, v.get()?, k.get()?, q.get()?);
        let (dq, dk, dv) = match gradients {
            Gradients::Apart => attention::backward(&d_o, &q, &k, &v, &o, &lse, &documents, config)?,
            Gradients::SideBySide => {
                attention::backward_side_by_side(&d_o, &q, &k, &v, &o, &lse, &documents, config, linear::room(&q))?
            }
        };
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
