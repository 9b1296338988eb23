//! The kernels' stream, and what may overlap in it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys;

/// How work stands to what is beside it in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// It begins when all before has ended, and ends before any after begins.
    Strict,
    /// A kernel that may overlap with one like it right before or after.
    Early,
}

/// A stream that knows how its last work entered.
pub(super) struct Queue {
    stream: sys::CUstream,
    last: Mutex<Order>,
}

/// A stream while something is enqueued.
pub(super) struct Entered<'a> {
    pub(super) stream: sys::CUstream,
    /// How what is before entered.
    pub(super) before: Order,
    _last: MutexGuard<'a, Order>,
}

impl Queue {
    pub(super) fn new(stream: sys::CUstream) -> Self {
        Self { stream, last: Order::Strict.into() }
    }

    /// The stream, for work of that order. Others wait to enter until the result is dropped: what is before stays there.
    pub(super) fn enter(&self, order: Order) -> Entered<'_> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *last, order);
        Entered { stream: self.stream, before, _last: last }
    }
}

#[cfg(test)]
mod tests {
    use super::{Order, Queue};

    #[test]
    fn work_knows_what_entered_before_it() {
        let queue = Queue::new(std::ptr::null_mut());
        let orders = [Order::Early, Order::Early, Order::Strict, Order::Early];
        let before = orders.map(|order| queue.enter(order).before);
        assert_eq!(before, [Order::Strict, Order::Early, Order::Early, Order::Strict]);
    }
}
