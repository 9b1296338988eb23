//! Trained values: one flat buffer, and one of gradients beside it.

use std::sync::Arc;

use nibble_tensor::{Arena, DType, Device, Owner, Result, Shape, Tensor, TensorMut};

/// A trained tensor: its place in the flat buffer of a [`ParamStore`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// The name it is saved under.
    pub name: Arc<str>,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Sizes.
    pub shape: Shape,
}

/// A value an op reads: frozen memory, or a trained parameter.
#[derive(Clone, Debug)]
pub enum Leaf {
    /// Part of the frozen base.
    Frozen(Tensor),
    /// Trained.
    Param(Param),
}

impl Leaf {
    /// The parameter, if this is one.
    #[must_use]
    pub fn param(&self) -> Option<&Param> {
        match self {
            Self::Frozen(_) => None,
            Self::Param(param) => Some(param),
        }
    }

    /// Sizes.
    #[must_use]
    pub fn shape(&self) -> Shape {
        match self {
            Self::Frozen(tensor) => tensor.shape(),
            Self::Param(param) => param.shape,
        }
    }
}

/// All trained values in one flat f32 buffer, so that the optimizer, the gradient norm and saving are each one pass over one
/// slice.
#[derive(Debug)]
pub struct ParamStore {
    data: Tensor,
    /// The same values in the type that a GPU multiplies in, as of the last [`ParamStore::prepare`].
    copy: Option<Tensor>,
    /// Where `data` is of 16 bits, the values that it is rounded from, as of the last [`ParamStore::set_masters`].
    masters: Option<Tensor>,
    params: Vec<Param>,
}

/// Collects parameters and their first values, then lays them out.
#[derive(Debug, Default)]
pub struct ParamStoreBuilder {
    /// Values so far: what follows them is zero.
    data: Vec<f32>,
    len: usize,
    params: Vec<Param>,
}

impl ParamStoreBuilder {
    /// Adds a parameter whose first values are `values` (as many as `shape` says; what is missing is zero).
    pub fn add(&mut self, name: impl Into<Arc<str>>, shape: impl Into<Shape>, values: Vec<f32>) -> Param {
        let param = Param { name: name.into(), offset: self.len, shape: shape.into() };
        self.len += param.shape.numel();
        if self.data.is_empty() && param.offset == 0 {
            self.data = values;
        } else if !values.is_empty() {
            self.data.resize(param.offset, 0.0);
            self.data.extend_from_slice(&values);
        }
        self.params.push(param.clone());
        param
    }

    /// Lays the parameters out on the arena's device.
    ///
    /// # Errors
    /// [`nibble_tensor::Error::OutOfMemory`].
    pub fn build(mut self, arena: &Arena) -> Result<ParamStore> {
        let _scope = arena.scope(Owner::Trained);
        let data = if self.data.is_empty() {
            Tensor::zeros(arena, DType::F32, [self.len])?
        } else {
            self.data.resize(self.len, 0.0);
            Tensor::from_slice(arena, &self.data, [self.len])?
        };
        Ok(ParamStore { data, copy: None, masters: None, params: self.params })
    }
}

impl ParamStore {
    /// A store without parameters, for inference.
    ///
    /// # Errors
    /// [`nibble_tensor::Error::OutOfMemory`].
    pub fn empty(arena: &Arena) -> Result<Self> {
        ParamStoreBuilder::default().build(arena)
    }

    /// The parameters in the order of the buffer.
    #[must_use]
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// Number of trained values.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.data.numel()
    }

    /// The flat buffer, F32 `[numel]`; of 16 bits after [`ParamStore::hand_over`].
    #[must_use]
    pub fn data(&self) -> &Tensor {
        &self.data
    }

    /// The flat buffer for the optimizer; [`ParamStore::prepare`] after it has written.
    pub fn data_mut(&mut self) -> &mut Tensor {
        self.masters = None;
        &mut self.data
    }

    /// The values in f32, copied to the host.
    ///
    /// # Errors
    /// [`nibble_tensor::Error::DType`] when they have been handed over, and not been set since.
    pub fn values(&self) -> Result<Vec<f32>> {
        self.masters.as_ref().unwrap_or(&self.data).to_vec::<f32>()
    }

    /// Gives the f32 values away and goes on with a copy of them in `dtype`, which whoever has the values keeps up to date.
    ///
    /// # Errors
    /// [`nibble_tensor::Error::DType`] unless `dtype` has 16 bits, [`nibble_tensor::Error::OutOfMemory`].
    pub fn hand_over(&mut self, dtype: DType) -> Result<Tensor> {
        if !matches!(dtype, DType::Bf16 | DType::F16) {
            let expected = "bfloat16 or float16";
            return Err(nibble_tensor::Error::DType { op: "hand_over", operand: "copy", expected, found: dtype });
        }
        let _scope = self.data.arena().scope(Owner::Trained);
        let copy = match self.copy.take() {
            Some(copy) if copy.dtype() == dtype => copy,
            _ => self.data.to_dtype(dtype)?,
        };
        Ok(std::mem::replace(&mut self.data, copy))
    }

    /// After [`ParamStore::hand_over`]: the values as they are now, until [`ParamStore::data_mut`] lets them change.
    pub fn set_masters(&mut self, values: Tensor) {
        self.masters = Some(values);
    }

    /// Makes the values ready for products with activations of `dtype`: on a GPU, a copy of all of them in that type.
    ///
    /// # Errors
    /// [`nibble_tensor::Error::OutOfMemory`].
    pub fn prepare(&mut self, dtype: DType) -> Result<()> {
        if self.data.device() == Device::Cpu || self.data.dtype() != DType::F32 || dtype == DType::F32 || self.numel() == 0 {
            self.copy = None;
            return Ok(());
        }
        match &mut self.copy {
            Some(copy) if copy.dtype() == dtype => self.data.convert_into(copy),
            _ => {
                let _scope = self.data.arena().scope(Owner::Trained);
                self.copy = Some(self.data.to_dtype(dtype)?);
                Ok(())
            }
        }
    }

    /// A view of a leaf's value for products with activations of `dtype`: the prepared copy where there is one.
    ///
    /// # Errors
    /// When the parameter is not of this store.
    pub fn operand(&self, leaf: &Leaf, dtype: DType) -> Result<Tensor> {
        match (leaf, &self.copy) {
            (Leaf::Param(param), Some(copy)) if copy.dtype() == dtype => copy.view(param.offset, param.shape),
            _ => self.value(leaf),
        }
    }

    /// A view of one parameter.
    ///
    /// # Errors
    /// When the parameter is not of this store.
    pub fn get(&self, param: &Param) -> Result<Tensor> {
        self.data.view(param.offset, param.shape)
    }

    /// A view of a leaf's value.
    ///
    /// # Errors
    /// When the parameter is not of this store.
    pub fn value(&self, leaf: &Leaf) -> Result<Tensor> {
        match leaf {
            Leaf::Frozen(tensor) => Ok(tensor.clone()),
            Leaf::Param(param) => self.get(param),
        }
    }

    /// Zero gradients in this store's layout.
    ///
    /// # Errors
    /// [`nibble_tensor::Error::OutOfMemory`].
    pub fn zero_grads(&self) -> Result<ParamGrads> {
        let _scope = self.data.arena().scope(Owner::Gradients);
        Ok(ParamGrads { flat: Tensor::zeros(self.data.arena(), DType::F32, [self.data.numel()])? })
    }
}

/// Gradients of all parameters, in the layout of their [`ParamStore`].
#[derive(Debug)]
pub struct ParamGrads {
    flat: Tensor,
}

impl ParamGrads {
    /// The flat buffer, F32 `[numel]`.
    #[must_use]
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Sets all to zero.
    ///
    /// # Errors
    /// When a view of the buffer lives.
    pub fn zero(&mut self) -> Result<()> {
        self.flat.set_zero()
    }

    /// A view of one parameter's gradient.
    ///
    /// # Errors
    /// When the parameter is not of this layout.
    pub fn get(&self, param: &Param) -> Result<Tensor> {
        self.flat.view(param.offset, param.shape)
    }

    /// Gradients of several different parameters, to be added to at the same time.
    ///
    /// # Errors
    /// When two are the same or one is not of this layout.
    pub fn get_mut(&mut self, params: &[&Param]) -> Result<Vec<TensorMut<'_>>> {
        let parts: Vec<_> = params.iter().map(|param| (param.offset, param.shape)).collect();
        self.flat.views_mut(&parts)
    }

    /// The gradient of a leaf, or nothing when it is frozen.
    ///
    /// # Errors
    /// When the parameter is not of this layout.
    pub fn leaf_mut(&mut self, param: Option<&Param>) -> Result<Option<TensorMut<'_>>> {
        match param {
            None => Ok(None),
            Some(param) => Ok(self.get_mut(&[param])?.pop()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_handed_over_leave_a_rounded_copy_and_come_back_for_saving() {
        let arena = Arena::new(Device::Cpu);
        let mut builder = ParamStoreBuilder::default();
        let param = builder.add("a", [2], vec![1.0, 1.001]);
        let mut store = builder.build(&arena).unwrap();
        assert!(store.hand_over(DType::F32).is_err());
        let values = store.hand_over(DType::Bf16).unwrap();
        assert_eq!(values.to_vec::<f32>().unwrap(), [1.0, 1.001]);
        let leaf = Leaf::Param(param);
        assert_eq!(store.operand(&leaf, DType::Bf16).unwrap().to_f32_vec().unwrap(), [1.0, 1.0]);
        assert_eq!((store.numel(), store.zero_grads().unwrap().flat().dtype()), (2, DType::F32));
        assert!(store.values().is_err(), "rounded values are not saved as if they were whole");
        store.set_masters(values);
        assert_eq!(store.values().unwrap(), [1.0, 1.001]);
        store.data_mut();
        assert!(store.values().is_err());
    }
}
