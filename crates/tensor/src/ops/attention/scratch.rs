//! One buffer a thread keeps between calls, so that a steady step allocates nothing.

use std::cell::Cell;

/// A cache line; parts of the buffer begin on one.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    static BUFFER: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Calls `f` with parts of the given lengths, with arbitrary contents. A call inside `f` gets another buffer.
pub(super) fn with_parts<const N: usize, R>(lengths: [usize; N], f: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    let mut buffer = BUFFER.take();
    let lines: usize = lengths.iter().map(|len| len.div_ceil(16)).sum();
    if buffer.len() < lines {
        buffer.resize(lines, Line([0.0; 16]));
    }
    let mut rest: &mut [f32] = bytemuck::cast_slice_mut(&mut buffer);
    let result = f(lengths.map(|len| {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(len.next_multiple_of(16));
        rest = after;
        &mut part[..len]
    }));
    BUFFER.set(buffer);
    result
}
