//! Values that are made again in the backward pass instead of being kept.

use std::{cell::RefCell, rc::Rc};

use nibble_tensor::{Result, Tensor};

use crate::ParamGrads;

/// Makes a value again from what was saved anyway.
type Recipe = Box<dyn FnOnce() -> Result<Tensor>>;

/// What needs a value.
type Job = Box<dyn FnOnce(&Tensor, &mut ParamGrads) -> Result<()>>;

/// How a value is made again.
pub(crate) struct Again {
    recipe: Recipe,
    later: Option<Later>,
}

/// What waits for a value until its maker's own backward makes it on the way: at less cost than twice.
#[derive(Clone, Default)]
pub struct Later(Rc<RefCell<Vec<Job>>>);

impl Again {
    pub(crate) fn new(recipe: impl FnOnce() -> Result<Tensor> + 'static) -> Self {
        Self { recipe: Box::new(recipe), later: None }
    }

    /// Of a maker that runs what waits for the value.
    pub(crate) fn or_later(self, later: &Later) -> Self {
        Self { later: Some(later.clone()), ..self }
    }

    pub(crate) fn make(self) -> Result<Tensor> {
        (self.recipe)()
    }

    pub(crate) fn later(&self) -> Option<Later> {
        self.later.clone()
    }
}

impl Later {
    /// Leaves `job`, which is given the value and the gradients of the parameters.
    pub fn leave(&self, job: impl FnOnce(&Tensor, &mut ParamGrads) -> Result<()> + 'static) {
        self.0.borrow_mut().push(Box::new(job));
    }

    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// Runs what waits for the value.
    pub(crate) fn run(&self, value: &Tensor, grads: &mut ParamGrads) -> Result<()> {
        let jobs = self.0.take();
        jobs.into_iter().try_for_each(|job| job(value, grads))
    }
}

impl std::fmt::Debug for Later {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Later").field(&self.0.borrow().len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use nibble_tensor::{
        Arena, Device,
        ops::glu::{self, Activation},
    };

    use super::*;
    use crate::{ParamStoreBuilder, Tape, ops};

    #[test]
    fn what_waits_for_a_value_gets_it_from_its_makers_backward() {
        let arena = Arena::new(Device::Cpu);
        let [gate, up, dy] =
            [[1.0f32, -2.0, 0.5], [0.25, 3.0, -1.0], [1.0, 1.0, 2.0]].map(|x| Tensor::from_slice(&arena, &x, [1, 3]).unwrap());
        let params = ParamStoreBuilder::default().build(&arena).unwrap();
        let mut tape = Tape::new(&params);
        tape.set_recomputing(true);
        let (gate_var, up_var) = (tape.input(gate.clone()), tape.input(up.clone()));
        let ids = [gate_var.id(), up_var.id()];
        let y = ops::glu(&mut tape, gate_var, up_var, Activation::Silu).unwrap();
        let (y, saved, id) = tape.save(y, true).unwrap();
        let found = Rc::new(Cell::new(None));
        let reader = Rc::clone(&found);
        let [z] = tape.record([id], [y.clone()], false, move |[dz], _| {
            saved.later().unwrap().leave(move |value, _| {
                reader.set(Some(value.to_f32_vec()?));
                Ok(())
            });
            Ok([Some(dz)])
        });
        let mut grads = params.zero_grads().unwrap();
        let [dgate, dup] = tape.backward([z], [dy.clone()], ids, &mut grads).unwrap();
        assert_eq!(found.take().unwrap(), y.to_f32_vec().unwrap());
        let (expected_gate, expected_up) = glu::backward(&dy, gate, up, Activation::Silu).unwrap();
        for (found, expected) in [(dgate, expected_gate), (dup, expected_up)] {
            assert_eq!(found.unwrap().to_f32_vec().unwrap(), expected.to_f32_vec().unwrap());
        }
    }
}
