//! A linear layer: frozen base, optional adapter.

use nibble_autograd::{Kept, Leaf, Param, ParamGrads, ParamStore, ParamStoreBuilder, Saved, Tape, Var, VarId, ops};
use nibble_tensor::{
    DType, Device, HostPool, HostWeight, Result, Rng, Tensor, Weight,
    ops::{
        glu::Activation,
        linear::{self, Dropout, Gated, Part, PartGrads},
        rms_norm::Config as NormConfig,
    },
};

/// The base of a linear layer.
#[derive(Clone, Debug)]
// A model has a few hundred of these, almost all of the larger kind.
#[allow(clippy::large_enum_variant)]
pub enum Base {
    /// As loaded, in any format.
    Frozen(Weight),
    /// As loaded, with its codes in host memory but while the layer runs.
    OnHost(HostWeight),
    /// Trained whole, without an adapter's help.
    Trained(Param),
}

/// A trained update of a linear layer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Adapter {
    /// Low-rank.
    Lora(Lora),
}

/// ΔW = s B A.
#[derive(Clone, Debug)]
pub struct Lora {
    /// A [R, in].
    pub a: Param,
    /// B [out, R].
    pub b: Param,
    /// s: α / r, or α / √r.
    pub scale: f32,
    /// Probability of dropping an element of the adapter's input.
    pub dropout: f32,
}

/// y = x W₀ᵀ + b + s · dropout(x) Aᵀ Bᵀ.
#[derive(Clone, Debug)]
pub struct Linear {
    /// The module's path in the Hugging Face model, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// W₀ [out, in].
    pub base: Base,
    /// `[out]`.
    pub bias: Option<Leaf>,
    /// The update, if this layer has one.
    pub adapter: Option<Adapter>,
}

impl Linear {
    /// A frozen layer without an adapter.
    #[must_use]
    pub fn new(path: impl Into<String>, weight: Weight, bias: Option<Tensor>) -> Self {
        Self { path: path.into(), base: Base::Frozen(weight), bias: bias.map(Leaf::Frozen), adapter: None }
    }

    /// (out, in).
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        let shape = match &self.base {
            Base::Frozen(weight) => weight.shape(),
            Base::OnHost(weight) => weight.shape(),
            Base::Trained(param) => param.shape,
        };
        (shape.dims()[0], shape.dims()[1])
    }

    /// Trains the base and the bias whole, under their names in the checkpoint.
    ///
    /// # Errors
    /// When the base cannot be widened to f32.
    pub fn train_base(&mut self, builder: &mut ParamStoreBuilder) -> Result<()> {
        if let Base::Frozen(weight) = &self.base {
            let param = builder.add(format!("{}.weight", self.path), weight.shape(), weight.to_f32_vec()?);
            self.base = Base::Trained(param);
        }
        if let Some(Leaf::Frozen(bias)) = &self.bias {
            let param = builder.add(format!("{}.bias", self.path), bias.shape(), bias.to_f32_vec()?);
            self.bias = Some(Leaf::Param(param));
        }
        Ok(())
    }

    /// Moves the codes of a 4-bit base to host memory; other bases stay.
    ///
    /// # Errors
    /// When the host has no memory to lock.
    pub fn send_base(self, pool: &HostPool) -> Result<Self> {
        let base = match self.base {
            Base::Frozen(weight) => HostWeight::send(pool, weight)?.map_or_else(Base::Frozen, Base::OnHost),
            base => base,
        };
        Ok(Self { base, ..self })
    }

    /// The base's codes, if they are on the host.
    #[must_use]
    pub fn host_base(&self) -> Option<&HostWeight> {
        match &self.base {
            Base::OnHost(weight) => Some(weight),
            _ => None,
        }
    }

    /// Bytes of the device that the frozen base takes.
    #[must_use]
    pub fn base_bytes(&self) -> usize {
        match &self.base {
            Base::Frozen(weight) => weight.bytes(),
            Base::OnHost(weight) => weight.device_bytes(),
            Base::Trained(_) => 0,
        }
    }

    /// R of the adapter; 0 without one.
    #[must_use]
    pub fn rank(&self) -> usize {
        match &self.adapter {
            Some(Adapter::Lora(lora)) => lora.a.shape.rows(),
            None => 0,
        }
    }

    /// y for x [T, in]: [T, out]. `dropout` is the stream of this call's masks; nothing in evaluation.
    ///
    /// # Errors
    /// As [`linear::forward`].
    pub fn forward<'m>(&'m self, tape: &mut Tape<'m>, x: Var, dropout: Option<Rng>) -> Result<Var> {
        let [y] = forward_fused(tape, [self], x, dropout)?;
        Ok(y)
    }

    /// Whether the result of a gated unit that this layer reads, of `tokens` rows, is made again in the backward pass at next to no
    /// cost.
    #[must_use]
    pub fn makes_gated_again(&self, device: Device, dtype: DType, tokens: usize, activation: Activation) -> bool {
        let frozen = !matches!(&self.base, Base::Trained(_) | Base::Frozen(Weight::Dense(_)));
        let rank = match &self.adapter {
            Some(Adapter::Lora(lora)) if lora.dropout == 0.0 && frozen => lora.a.shape.rows(),
            _ => 0,
        };
        let (outputs, inputs) = self.sizes();
        linear::makes_gated_again(device, dtype, [tokens, inputs, outputs], rank, activation)
    }

    fn part(&self, params: &ParamStore, dtype: DType, dropout: Option<Rng>) -> Result<Part> {
        let operand = |param: &Param| params.operand(&Leaf::Param(param.clone()), dtype);
        let weight = match &self.base {
            Base::Frozen(weight) => weight.clone(),
            Base::OnHost(weight) => weight.get()?,
            Base::Trained(param) => Weight::Dense(operand(param)?),
        };
        let bias = self.bias.as_ref().map(|bias| params.value(bias)).transpose()?;
        let adapter = match &self.adapter {
            None => None,
            Some(Adapter::Lora(lora)) => Some(linear::Adapter {
                a: operand(&lora.a)?,
                b: operand(&lora.b)?,
                scale: lora.scale,
                dropout: dropout.filter(|_| lora.dropout > 0.0).map(|rng| Dropout { p: lora.dropout, rng }),
            }),
        };
        Ok(Part { weight, bias, adapter })
    }

    /// Whether anything of it trains.
    #[must_use]
    pub fn trains(&self) -> bool {
        self.trained().iter().any(Option::is_some)
    }

    /// Trained values in the order base, bias, A, B; `None` where there is none.
    fn trained(&self) -> [Option<&Param>; 4] {
        let base = match &self.base {
            Base::Frozen(_) | Base::OnHost(_) => None,
            Base::Trained(param) => Some(param),
        };
        let (a, b) = match &self.adapter {
            None => (None, None),
            Some(Adapter::Lora(lora)) => (Some(&lora.a), Some(&lora.b)),
        };
        [base, self.bias.as_ref().and_then(Leaf::param), a, b]
    }
}

/// The layers that share an input, as one op: one gradient of x, one decoding of each base.
///
/// # Errors
/// As [`linear::forward`].
pub fn forward_fused<'m, const N: usize>(
    tape: &mut Tape<'m>,
    layers: [&'m Linear; N],
    x: Var,
    dropout: Option<Rng>,
) -> Result<[Var; N]> {
    let parts = parts(tape, layers, x.tensor().dtype(), dropout)?;
    let (x, input, id) = tape.save(x, layers.iter().any(|layer| layer.trains()))?;
    let (ys, saved) = linear::forward(&x, &parts)?;
    drop(x);
    Ok(record(tape, layers, outputs(ys), input, id, parts, saved))
}

/// (x + a, the layers over its norm) of x and a [T, in]: [T, in], and [T, out] of each layer; of x alone without `a`.
///
/// # Errors
/// As [`linear::behind_norm`].
pub fn forward_behind_norm<'m, const N: usize>(
    tape: &mut Tape<'m>,
    x: Var,
    a: Option<Var>,
    (norm, config): (&Leaf, NormConfig),
    layers: [&'m Linear; N],
    dropout: Option<Rng>,
) -> Result<(Var, [Var; N])> {
    let a = match a {
        Some(a) if !tape.is_recording() => a,
        a => {
            let [x, h] = normed(tape, x, a, norm, config)?;
            return Ok((x, forward_fused(tape, layers, h, dropout)?));
        }
    };
    let parts = parts(tape, layers, x.tensor().dtype(), dropout)?;
    let weight = tape.params().value(norm)?;
    let (r, ys) = linear::behind_norm(x.into_tensor(), a.into_tensor(), &weight, config, &parts)?;
    Ok((Var::from(r), outputs(ys).map(Var::from)))
}

/// (x + a, the layers around a gated unit over its norm), [T, in] and [T, out]: [`forward_gated`] of RMSNorm(x + a), or of RMSNorm(x)
/// without `a`.
///
/// # Errors
/// As [`linear::gated_behind_norm`].
pub fn forward_gated_behind_norm<'m>(
    tape: &mut Tape<'m>,
    x: Var,
    a: Option<Var>,
    (norm, config): (&Leaf, NormConfig),
    [gate, up, down]: [&'m Linear; 3],
    activation: Activation,
    dropout: [Option<Rng>; 2],
) -> Result<[Var; 2]> {
    let a = match a {
        Some(a) if !tape.is_recording() => a,
        a => {
            let [x, h] = normed(tape, x, a, norm, config)?;
            return Ok([x, forward_gated(tape, [gate, up, down], h, activation, dropout)?]);
        }
    };
    let dtype = x.tensor().dtype();
    let (before, behind) = (parts(tape, [gate, up], dtype, dropout[0])?, parts(tape, [down], dtype, dropout[1])?);
    let weight = tape.params().value(norm)?;
    let (x, a) = (x.into_tensor(), a.into_tensor());
    let (r, y) = linear::gated_behind_norm(x, a, &weight, config, &before, activation, &behind)?;
    Ok([r, y].map(Var::from))
}

/// The residual stream with `a` added, and its norm.
fn normed(tape: &mut Tape<'_>, x: Var, a: Option<Var>, norm: &Leaf, config: NormConfig) -> Result<[Var; 2]> {
    match a {
        Some(a) => ops::residual_rms_norm(tape, x, a, norm, config),
        None => ops::fork_rms_norm(tape, x, norm, config),
    }
}

fn outputs<const N: usize>(ys: Vec<Tensor>) -> [Tensor; N] {
    let mut ys = ys.into_iter();
    // invariant: the op gives one output a part, and there are N parts
    std::array::from_fn(|_| ys.next().expect("one output a part"))
}

/// The layers around a gated unit: down(act(gate(x)) · up(x)). `dropout` are the streams of the masks before the gated unit, and behind it.
///
/// # Errors
/// As [`linear::forward`].
pub fn forward_gated<'m>(
    tape: &mut Tape<'m>,
    [gate, up, down]: [&'m Linear; 3],
    x: Var,
    activation: Activation,
    dropout: [Option<Rng>; 2],
) -> Result<Var> {
    let layers = [gate, up];
    let parts = parts(tape, layers, x.tensor().dtype(), dropout[0])?;
    let (x, input, id) = tape.save(x, layers.iter().any(|layer| layer.trains()))?;
    let (Gated { gate, up, y }, saved) = linear::forward_gated(&x, &parts, activation)?;
    drop(x);
    let operands = record(tape, layers, [gate, up], input, id, parts, saved);
    behind_gate(tape, down, operands, y, activation, dropout[1])
}

/// The layer behind a gated unit, with the unit's own backward.
fn behind_gate<'m>(
    tape: &mut Tape<'m>,
    down: &'m Linear,
    [gate, up]: [Var; 2],
    y: Tensor,
    activation: Activation,
    dropout: Option<Rng>,
) -> Result<Var> {
    let parts = parts(tape, [down], y.dtype(), dropout)?;
    let ((gate, gate_id), (up, up_id)) = (gate.into_parts(), up.into_parts());
    let upstream = gate_id.is_some() || up_id.is_some();
    let recorded = upstream || down.trains();
    // Its backward comes next where this is a second run: y itself is kept, and nobody reads the result.
    let replays = tape.is_replaying();
    // Where nothing upstream trains there are no gradients of gate and up, beside which y would be made again.
    let again = upstream
        && (tape.is_recomputing() || down.makes_gated_again(gate.device(), gate.dtype(), gate.shape().rows(), activation));
    let (gate, up) = (tape.keep(&gate, upstream)?, tape.keep(&up, upstream)?);
    let kept = match (replays, again) {
        (true, _) => Some(Kept::here(&y)),
        (false, true) => None,
        (false, false) => Some(tape.keep(&y, recorded)?),
    };
    let operands = upstream.then_some([gate, up]);
    let (a, saved) = if replays {
        (Tensor::empty(y.arena(), y.dtype(), [0])?, linear::forward_unread(&y, &parts)?)
    } else {
        let (mut ys, saved) = linear::forward(&y, &parts)?;
        // invariant: one output a part
        (ys.pop().expect("one output a part"), saved)
    };
    drop(y);
    let trained = [down.trained().map(Option::<&Param>::cloned)];
    let [a] = tape.record([gate_id, up_id], [a], down.trains(), move |[da], grads| {
        let (mut grads, y) = (part_grads(&trained, grads)?, kept.map(Kept::get).transpose()?);
        let Some([gate, up]) = operands else {
            if let Some(y) = y {
                linear::backward(&[da], y, &saved, &parts, grads, false)?;
            }
            return Ok([None, None]);
        };
        // The last to be kept is the first to be there again.
        let (up, gate) = (up.get()?, gate.get()?);
        // invariant: one entry a layer
        let grads = grads.pop().expect("one entry a layer");
        let (dgate, dup) = linear::backward_gated(&da, [gate, up], y, activation, &saved, &parts[0], grads)?;
        Ok([Some(dgate), Some(dup)])
    });
    Ok(a)
}

/// The layers with the masks of this call.
fn parts<'m, const N: usize>(tape: &Tape<'m>, layers: [&'m Linear; N], dtype: DType, dropout: Option<Rng>) -> Result<Vec<Part>> {
    let params = tape.params();
    layers.iter().enumerate().map(|(i, layer)| layer.part(params, dtype, dropout.map(|rng| rng.stream(i as u64)))).collect()
}

fn record<'m, const N: usize>(
    tape: &mut Tape<'m>,
    layers: [&'m Linear; N],
    outputs: [Tensor; N],
    input: Saved,
    id: Option<VarId>,
    parts: Vec<Part>,
    saved: linear::Saved,
) -> [Var; N] {
    let trains = layers.iter().any(|layer| layer.trains());
    let trained = layers.map(|layer| layer.trained().map(Option::<&Param>::cloned));
    tape.record([id], outputs, trains, move |dys, grads| {
        let (grads, x) = (part_grads(&trained, grads)?, input.get()?);
        Ok([linear::backward(&dys, x, &saved, &parts, grads, id.is_some())?])
    })
}

/// Hands each part the gradients of its trained values, in the order of [`Linear::trained`].
fn part_grads<'g>(trained: &[[Option<Param>; 4]], grads: &'g mut ParamGrads) -> Result<Vec<PartGrads<'g>>> {
    let wanted: Vec<&Param> = trained.iter().flatten().flatten().collect();
    let mut views = grads.get_mut(&wanted)?.into_iter();
    let mut next = |param: &Option<Param>| param.as_ref().and_then(|_| views.next());
    Ok(trained
        .iter()
        .map(|[base, bias, a, b]| PartGrads { weight: next(base), bias: next(bias), adapter: next(a).zip(next(b)) })
        .collect())
}
