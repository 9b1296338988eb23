//! Where the documents of a packed stream begin.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{Arena, Error, Result, Tensor};

/// The layout of a stream of T tokens that holds documents one after another, without padding.
#[derive(Clone, Debug)]
pub struct Documents {
    /// Offsets on the host: `[0, len0, len0 + len1, ..., T]`.
    cu_seqlens: Arc<[u32]>,
    /// U32 [T]: the position of each token within its document (for rope).
    positions: Tensor,
    /// U32 [documents + 1]: the offsets where the kernels read them.
    offsets: Tensor,
    /// The highest position.
    last_position: usize,
    orders: Arc<Mutex<Vec<Order>>>,
}

/// A window, and the tables of the order in which tiles are worked on.
type Order = (u32, [Tensor; 3]);

impl Documents {
    /// From the offsets of the documents, ending with T. A document may be empty: streams of as many documents run the same kernels.
    ///
    /// # Errors
    /// [`Error::Argument`] when they do not begin with 0, decrease, or hold no token.
    pub fn new(arena: &Arena, cu_seqlens: &[u32]) -> Result<Self> {
        check(cu_seqlens)?;
        Self::build(arena, cu_seqlens, &positions(cu_seqlens))
    }

    fn build(arena: &Arena, cu_seqlens: &[u32], positions: &[u32]) -> Result<Self> {
        Ok(Self {
            cu_seqlens: cu_seqlens.into(),
            positions: Tensor::from_slice(arena, positions, [positions.len()])?,
            offsets: Tensor::from_slice(arena, cu_seqlens, [cu_seqlens.len()])?,
            last_position: positions.iter().copied().max().unwrap_or(0) as usize,
            orders: Arc::default(),
        })
    }

    /// One document of `len` tokens whose first token has position `start` (a continuation of cached tokens).
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty document.
    pub fn continuation(arena: &Arena, start: usize, len: usize) -> Result<Self> {
        if len == 0 {
            return Err(Error::Argument { op: "documents", argument: "len", expected: "at least 1", found: 0 });
        }
        let positions: Vec<u32> = (start as u32..(start + len) as u32).collect();
        Self::build(arena, &[0, len as u32], &positions)
    }

    /// Other documents in the same memory: as many of them, of as many tokens together.
    ///
    /// # Errors
    /// [`Error::Argument`] when the offsets do not fit, [`Error::Shared`] when a step still reads these.
    pub fn update(&mut self, cu_seqlens: &[u32]) -> Result<()> {
        check(cu_seqlens)?;
        let positions = positions(cu_seqlens);
        self.positions.write(&positions)?;
        self.offsets.write(cu_seqlens)?;
        self.cu_seqlens = cu_seqlens.into();
        self.orders = Arc::default();
        self.last_position = positions.iter().copied().max().unwrap_or(0) as usize;
        Ok(())
    }

    /// The same documents for one step: what its layers share is made once, and gone with it.
    #[must_use]
    pub fn for_step(&self) -> Self {
        Self { orders: Arc::default(), ..self.clone() }
    }

    /// Tables that attention's layers share, by window; made by the first that asks.
    pub(crate) fn order(&self, window: u32, make: impl FnOnce() -> Result<[Tensor; 3]>) -> Result<[Tensor; 3]> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, tables)) = orders.iter().find(|(held, _)| *held == window) {
            return Ok(tables.clone());
        }
        let tables = make()?;
        orders.push((window, tables.clone()));
        Ok(tables)
    }

    /// T.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.positions.numel()
    }

    /// Offsets `[0, ..., T]`.
    #[must_use]
    pub fn cu_seqlens(&self) -> &[u32] {
        &self.cu_seqlens
    }

    /// The highest position of a token: one less than the rows of rope's table that are needed.
    #[must_use]
    pub fn last_position(&self) -> usize {
        self.last_position
    }

    /// U32 [documents + 1], on the device.
    pub(crate) fn offsets(&self) -> &Tensor {
        &self.offsets
    }

    /// U32 `[T]`.
    #[must_use]
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// The token ranges of the documents.
    #[must_use]
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = std::ops::Range<usize>> + '_ {
        self.cu_seqlens.windows(2).map(|pair| pair[0] as usize..pair[1] as usize)
    }
}

fn check(cu_seqlens: &[u32]) -> Result<()> {
    let fail =
        |expected, found: u32| Error::Argument { op: "documents", argument: "cu_seqlens", expected, found: found as usize };
    match cu_seqlens {
        [0, _, ..] => {}
        [first, ..] => return Err(fail("a list that begins with 0 and has an end", *first)),
        [] => return Err(fail("a list that begins with 0 and has an end", 0)),
    }
    match cu_seqlens.windows(2).find(|pair| pair[0] > pair[1]) {
        Some(pair) => Err(fail("a list that does not decrease", pair[1])),
        None if cu_seqlens.ends_with(&[0]) => Err(fail("a list that ends with the number of tokens, at least 1", 0)),
        None => Ok(()),
    }
}

fn positions(cu_seqlens: &[u32]) -> Vec<u32> {
    cu_seqlens.windows(2).flat_map(|pair| 0..pair[1] - pair[0]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::samples::arena;

    #[test]
    fn positions_restart_with_each_document() {
        let documents = Documents::new(&arena(), &[0, 3, 3, 5, 5]).unwrap();
        assert_eq!(documents.positions().to_vec::<u32>().unwrap(), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn offsets_must_begin_with_zero_hold_a_token_and_not_decrease() {
        let arena = arena();
        for bad in [&[][..], &[0], &[1, 2], &[0, 0], &[0, 3, 1]] {
            assert!(Documents::new(&arena, bad).is_err(), "{bad:?}");
        }
    }
}
