//! The tape.

use nibble_tensor::{DType, Result, Shape, Tensor};

use crate::{Kept, Offload, ParamGrads, ParamStore, again::Again};

/// The place of an activation's gradient on its tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VarId(usize);

/// An activation: move-only, consumed by the one op that uses it.
pub struct Var {
    tensor: Tensor,
    id: Option<VarId>,
    again: Option<Again>,
}

/// An op's input kept for its backward, or how to make it again.
pub struct Saved(How);

enum How {
    Kept(Kept),
    Again(Again),
}

impl Saved {
    /// The value, made again if it was not kept.
    ///
    /// # Errors
    /// What making it again returns.
    pub fn get(self) -> Result<Tensor> {
        match self.0 {
            How::Kept(kept) => kept.get(),
            How::Again(again) => again.make(),
        }
    }
}

impl std::fmt::Debug for Var {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Var").field("tensor", &self.tensor).field("id", &self.id).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Saved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self.0, How::Kept(_)) { "Saved::Kept" } else { "Saved::Again" })
    }
}

impl Var {
    /// The value.
    #[must_use]
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Where its gradient goes; nothing when nothing upstream trains.
    #[must_use]
    pub fn id(&self) -> Option<VarId> {
        self.id
    }

    /// The value, ending the variable.
    #[must_use]
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }

    /// Value and place, for an op that records itself.
    #[must_use]
    pub fn into_parts(self) -> (Tensor, Option<VarId>) {
        (self.tensor, self.id)
    }

    /// The same variable, with how to make its value again.
    pub(crate) fn made_by(self, again: Again) -> Self {
        Self { again: Some(again), ..self }
    }
}

impl From<Tensor> for Var {
    /// A value nothing upstream of which trains.
    fn from(tensor: Tensor) -> Self {
        Self { tensor, id: None, again: None }
    }
}

/// Takes the gradients of an op's outputs, hands on those of its inputs.
type Backward<'m> = Box<dyn FnOnce(&mut Slots, &mut ParamGrads) -> Result<()> + 'm>;

/// One place a variable, filled when its consumer has run backward.
type Slots = Vec<Option<Tensor>>;

/// Recorded backwards of one forward pass.
///
/// `'m` is the borrow of the model and its parameters: they cannot change while a tape lives, and may again as soon as
/// [`Tape::backward`] has consumed it.
pub struct Tape<'m> {
    params: &'m ParamStore,
    nodes: Vec<Backward<'m>>,
    variables: usize,
    recording: bool,
    recomputing: bool,
    /// Whether this is a checkpointed function's second run.
    replaying: bool,
    offload: Option<Offload>,
}

impl std::fmt::Debug for Tape<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tape").field("nodes", &self.nodes.len()).field("recording", &self.recording).finish_non_exhaustive()
    }
}

impl<'m> Tape<'m> {
    /// A tape that records, for training.
    #[must_use]
    pub fn new(params: &'m ParamStore) -> Self {
        Self { params, nodes: Vec::new(), variables: 0, recording: true, recomputing: false, replaying: false, offload: None }
    }

    /// A tape that records nothing, for inference.
    #[must_use]
    pub fn inference(params: &'m ParamStore) -> Self {
        Self { recording: false, ..Self::new(params) }
    }

    /// Whether outputs of cheap ops (norms, activations) are made again in backward instead of kept by the op that reads them.
    pub fn set_recomputing(&mut self, recomputing: bool) {
        self.recomputing = recomputing;
    }

    /// Whether outputs of cheap ops are made again in backward.
    #[must_use]
    pub fn is_recomputing(&self) -> bool {
        self.recording && self.recomputing
    }

    /// Where ops recorded from here on keep what their backwards need: on the host, or on the device.
    pub fn set_offload(&mut self, offload: Option<Offload>) {
        self.offload = offload;
    }

    /// Whether a checkpointed function runs here for the second time: nobody reads the values of its outputs.
    #[must_use]
    pub fn is_replaying(&self) -> bool {
        self.replaying
    }

    /// Keeps a value for the backward of an op; `recorded` says whether that op will be.
    ///
    /// # Errors
    /// What sending it to the host returns.
    pub fn keep(&self, tensor: &Tensor, recorded: bool) -> Result<Kept> {
        Kept::by(self.offload.as_ref().filter(|_| self.recording && recorded), tensor)
    }

    /// A variable's value, what to keep of it for a backward, and its place: for an op that can do with a value made again.
    ///
    /// # Errors
    /// As [`Tape::keep`].
    pub fn save(&self, var: Var, recorded: bool) -> Result<(Tensor, Saved, Option<VarId>)> {
        let how = match var.again {
            Some(again) => How::Again(again),
            None => How::Kept(self.keep(&var.tensor, recorded || var.id.is_some())?),
        };
        Ok((var.tensor, Saved(how), var.id))
    }

    /// The trained values that ops on this tape read.
    #[must_use]
    pub fn params(&self) -> &'m ParamStore {
        self.params
    }

    /// Whether backwards are kept.
    #[must_use]
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// A variable whose gradient [`Tape::backward`] returns.
    pub fn input(&mut self, tensor: Tensor) -> Var {
        let id = self.recording.then(|| self.next_id());
        Var { tensor, id, again: None }
    }

    fn next_id(&mut self) -> VarId {
        self.variables += 1;
        VarId(self.variables - 1)
    }

    /// Makes an op's outputs variables and keeps its backward.
    ///
    /// `trains` says whether the op itself reads a trained parameter. `backward` is given the gradients of the outputs
    /// (zeros for one that nobody used) and the parameters' gradients to add to, and returns the gradients of the inputs
    /// (`None` where [`Option<VarId>`] was).
    pub fn record<const N: usize, const M: usize>(
        &mut self,
        inputs: [Option<VarId>; N],
        outputs: [Tensor; M],
        trains: bool,
        backward: impl FnOnce([Tensor; M], &mut ParamGrads) -> Result<[Option<Tensor>; N]> + 'm,
    ) -> [Var; M] {
        if !self.recording || !(trains || inputs.iter().any(Option::is_some)) {
            return outputs.map(Var::from);
        }
        let templates: [(Shape, DType); M] = std::array::from_fn(|i| (outputs[i].shape(), outputs[i].dtype()));
        let arena = outputs.first().map(|output| output.arena().clone());
        let outputs = outputs.map(|tensor| Var { tensor, id: Some(self.next_id()), again: None });
        let ids: [Option<VarId>; M] = std::array::from_fn(|i| outputs[i].id);
        self.nodes.push(Box::new(move |slots, grads| {
            let mut found: [Option<Tensor>; M] = ids.map(|id| id.and_then(|id| slots[id.0].take()));
            let Some(arena) = arena.filter(|_| found.iter().any(Option::is_some)) else { return Ok(()) };
            for (slot, (shape, dtype)) in found.iter_mut().zip(templates) {
                if slot.is_none() {
                    *slot = Some(Tensor::zeros(&arena, dtype, shape)?);
                }
            }
            // invariant: the loop above filled each place
            let outputs = found.map(|slot| slot.expect("filled"));
            for (id, gradient) in inputs.into_iter().zip(backward(outputs, grads)?) {
                if let Some(id) = id {
                    slots[id.0] = gradient;
                }
            }
            Ok(())
        }));
        outputs
    }

    /// Runs `f` without keeping what it saves, and again in the backward pass: memory for the inputs alone, time for a
    /// second forward. The gradients are bitwise those of running `f` on this tape. `trains` says whether `f` reads a trained
    /// parameter; where it does not and nothing upstream trains, nothing is kept or run again.
    ///
    /// # Errors
    /// What `f` returns.
    pub fn checkpoint<const N: usize, const M: usize>(
        &mut self,
        inputs: [Var; N],
        trains: bool,
        f: impl Fn(&mut Tape<'m>, [Var; N]) -> Result<[Var; M]> + 'm,
    ) -> Result<[Var; M]> {
        let params = self.params;
        if !self.recording {
            return f(self, inputs);
        }
        let ids: [Option<VarId>; N] = std::array::from_fn(|i| inputs[i].id);
        let recorded = trains || ids.iter().any(Option::is_some);
        let kept = inputs.iter().map(|input| self.keep(&input.tensor, recorded)).collect::<Result<Vec<_>>>()?;
        let values = inputs.map(|input| Var::from(input.tensor));
        let outputs = f(&mut Tape::inference(params), values)?.map(Var::into_tensor);
        Ok(self.record(ids, outputs, trains, move |gradients, grads| {
            let mut scratch = Self { replaying: true, ..Tape::new(params) };
            let mut inputs = Vec::with_capacity(N);
            for (kept, id) in kept.into_iter().zip(ids) {
                let tensor = kept.get()?;
                inputs.push(if id.is_some() { scratch.input(tensor) } else { Var::from(tensor) });
            }
            let mut inputs = inputs.into_iter();
            // invariant: one was kept for each of the N inputs
            let inputs: [Var; N] = std::array::from_fn(|_| inputs.next().expect("N inputs"));
            let inner: [Option<VarId>; N] = std::array::from_fn(|i| inputs[i].id);
            let outputs = f(&mut scratch, inputs)?;
            scratch.backward(outputs, gradients, inner, grads)
        }))
    }

    /// Runs the backwards in reverse, each consumed with what it saved, from the gradients of `outputs`; adds to `grads` and
    /// returns the gradients of `inputs` (made by [`Tape::input`]).
    ///
    /// # Errors
    /// What an op's backward returns.
    pub fn backward<const N: usize, const M: usize>(
        self,
        outputs: [Var; M],
        gradients: [Tensor; M],
        inputs: [Option<VarId>; N],
        grads: &mut ParamGrads,
    ) -> Result<[Option<Tensor>; N]> {
        let mut slots: Slots = vec![None; self.variables];
        for (output, gradient) in outputs.into_iter().zip(gradients) {
            if let Some(id) = output.id {
                slots[id.0] = Some(gradient);
            }
        }
        for node in self.nodes.into_iter().rev() {
            node(&mut slots, grads)?;
        }
        Ok(inputs.map(|id| id.and_then(|id| slots[id.0].take())))
    }
}

#[cfg(test)]
mod tests {
    use nibble_tensor::{Arena, Device};

    use super::*;
    use crate::ParamStoreBuilder;

    /// y = p x for a trained scalar p: dx = p dy, dp += Σ x dy.
    fn scale(tape: &mut Tape<'_>, x: Var) -> Result<Var> {
        let params = tape.params();
        let param = params.params()[0].clone();
        let p = params.get(&param)?.as_slice::<f32>()?[0];
        let (x, id) = x.into_parts();
        let y: Vec<f32> = x.as_slice::<f32>()?.iter().map(|x| p * x).collect();
        let y = Tensor::from_slice(x.arena(), &y, x.shape())?;
        let [y] = tape.record([id], [y], true, move |[dy], grads| {
            let dy = dy.as_slice::<f32>()?;
            let sum: f32 = x.as_slice::<f32>()?.iter().zip(dy).map(|(x, dy)| x * dy).sum();
            grads.get_mut(&[&param])?[0].as_mut_slice::<f32>()?[0] += sum;
            let dx: Vec<f32> = dy.iter().map(|dy| p * dy).collect();
            Ok([Some(Tensor::from_slice(x.arena(), &dx, x.shape())?)])
        });
        Ok(y)
    }

    fn store(value: f32) -> ParamStore {
        let mut builder = ParamStoreBuilder::default();
        builder.add("p", [1], vec![value]);
        builder.build(&Arena::new(Device::Cpu)).unwrap()
    }

    fn vector(params: &ParamStore, values: &[f32]) -> Tensor {
        Tensor::from_slice(params.data().arena(), values, [values.len()]).unwrap()
    }

    /// d(p³ Σx) for p = 2, x = (1, 2): dx = 8, dp = 3 p² Σx = 36.
    fn cubed(checkpointed: bool) -> (Vec<f32>, Vec<f32>) {
        let params = store(2.0);
        let mut grads = params.zero_grads().unwrap();
        let mut tape = Tape::new(&params);
        let x = tape.input(vector(&params, &[1.0, 2.0]));
        let inputs = [x.id()];
        let y = scale(&mut tape, x).unwrap();
        let twice = |tape: &mut Tape<'_>, [y]: [Var; 1]| {
            let y = scale(tape, y)?;
            Ok([scale(tape, y)?])
        };
        let [y] = if checkpointed { tape.checkpoint([y], true, twice).unwrap() } else { twice(&mut tape, [y]).unwrap() };
        let ones = vector(&params, &[1.0, 1.0]);
        let [dx] = tape.backward([y], [ones], inputs, &mut grads).unwrap();
        (dx.unwrap().to_f32_vec().unwrap(), grads.flat().to_f32_vec().unwrap())
    }

    #[test]
    fn gradients_follow_the_chain_rule_and_parameters_accumulate() {
        assert_eq!(cubed(false), (vec![8.0, 8.0], vec![36.0]));
    }

    #[test]
    fn a_checkpoint_gives_the_same_gradients() {
        assert_eq!(cubed(true), cubed(false));
    }

    #[test]
    fn what_nothing_trains_on_is_not_recorded() {
        let params = store(2.0);
        let mut tape = Tape::new(&params);
        let x = Var::from(vector(&params, &[1.0]));
        let [y] = tape.record([x.id()], [x.into_tensor()], false, |_, _| unreachable!("not kept"));
        assert!(y.id().is_none() && tape.nodes.is_empty());
        let [z] = tape.checkpoint([y], false, |_, [y]| Ok([y])).unwrap();
        assert!(z.id().is_none() && tape.nodes.is_empty());
        let mut inference = Tape::inference(&params);
        let y = scale(&mut inference, Var::from(vector(&params, &[1.0]))).unwrap();
        assert!(y.id().is_none() && inference.nodes.is_empty());
    }

    #[test]
    fn an_output_nobody_used_has_a_zero_gradient() {
        let params = store(2.0);
        let mut grads = params.zero_grads().unwrap();
        let mut tape = Tape::new(&params);
        let x = tape.input(vector(&params, &[3.0]));
        let (x, id) = x.into_parts();
        let [a, _unused] = tape.record([id], [x.clone(), x], false, |[da, db], _| {
            assert_eq!(db.to_f32_vec()?, [0.0]);
            Ok([Some(da)])
        });
        let [dx] = tape.backward([a], [vector(&params, &[5.0])], [id], &mut grads).unwrap();
        assert_eq!(dx.unwrap().to_f32_vec().unwrap(), [5.0]);
    }

    #[test]
    fn activations_are_freed_as_backward_goes() {
        let params = store(1.0);
        let arena = params.data().arena().clone();
        let mut grads = params.zero_grads().unwrap();
        let idle = arena.stats().live;
        let mut tape = Tape::new(&params);
        let mut y = tape.input(vector(&params, &[1.0; 1024]));
        for _ in 0..50 {
            y = scale(&mut tape, y).unwrap();
        }
        let ones = vector(&params, &[1.0; 1024]);
        let (held, one) = (arena.stats().live, 4096);
        assert_eq!(held - idle, 52 * one);
        arena.reset_peak();
        tape.backward([y], [ones], [], &mut grads).unwrap();
        assert!(arena.stats().peak <= held + 2 * one, "{:?}", arena.stats());
        assert_eq!(arena.stats().live, idle);
    }
}
