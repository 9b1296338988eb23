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

/// A stream that knows how its last work entered, and which kernel it was, if one.
pub(super) struct Queue {
    stream: sys::CUstream,
    last: Mutex<(Order, Option<usize>)>,
}

/// A stream while something is enqueued.
pub(super) struct Entered<'a> {
    pub(super) stream: sys::CUstream,
    /// How what is before entered.
    pub(super) before: Order,
    /// Whether that is the same kernel.
    pub(super) again: bool,
    _last: MutexGuard<'a, (Order, Option<usize>)>,
}

impl Queue {
    pub(super) fn new(stream: sys::CUstream) -> Self {
        Self { stream, last: (Order::Strict, None).into() }
    }

    /// The stream, for work of that order, a kernel by its number. Others wait to enter until the result is dropped: what is before
    /// stays there.
    pub(super) fn enter(&self, order: Order, kernel: Option<usize>) -> Entered<'_> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, kernel_before) = std::mem::replace(&mut *last, (order, kernel));
        Entered { stream: self.stream, before, again: kernel.is_some() && kernel == kernel_before, _last: last }
    }
}

#[cfg(test)]
mod tests {
    use super::{Order, Queue};

    #[test]
    fn work_knows_what_entered_before_it() {
        let queue = Queue::new(std::ptr::null_mut());
        let work = [
            (Order::Early, Some(1)),
            (Order::Early, Some(1)),
            (Order::Strict, None),
            (Order::Early, Some(1)),
            (Order::Early, Some(2)),
        ];
        let before = work.map(|(order, kernel)| {
            let entered = queue.enter(order, kernel);
            (entered.before, entered.again)
        });
        let expected = [Order::Strict, Order::Early, Order::Early, Order::Strict, Order::Early];
        assert_eq!(before.map(|before| before.0), expected);
        assert_eq!(before.map(|before| before.1), [false, true, false, false, false]);
    }
}
