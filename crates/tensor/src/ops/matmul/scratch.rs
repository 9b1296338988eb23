//! Buffers that a thread keeps between calls, so that a steady step allocates nothing.

use std::cell::Cell;

/// A cache line; vectors of it start on one.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// What a buffer is for. Buffers of different roles are in use at the same time.
#[derive(Clone, Copy)]
pub(super) enum Role {
    /// Packed panels of `a`.
    A,
    /// Packed panels of `b`.
    B,
    /// Sums that are not written to `c` directly.
    Stage,
    /// Decoded runs on their way into panels.
    Run,
}

thread_local! {
    static SLOTS: [Cell<Vec<Line>>; 4] = const { [const { Cell::new(Vec::new()) }; 4] };
}

/// Runs `f` with a buffer of `len` floats with arbitrary contents, aligned to a cache line.
///
/// The buffer is taken out of its slot meanwhile: where the thread waits inside `f` and runs another task that asks
/// for the same role, that task gets a buffer of its own.
pub(super) fn with<R>(role: Role, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut lines = SLOTS.with(|slots| slots[role as usize].take());
    let needed = len.div_ceil(16);
    if lines.len() < needed {
        lines.resize(needed, Line([0.0; 16]));
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut lines)[..len]);
    SLOTS.with(|slots| {
        let slot = &slots[role as usize];
        let other = slot.take();
        slot.set(if other.len() > lines.len() { other } else { lines });
    });
    result
}
