//! Which parts of an address range are taken: first fit, split and joined again. Knows nothing of a device.

use std::collections::BTreeMap;

/// What offsets and sizes are multiples of: the widest access of a kernel, twice.
pub(crate) const ALIGN: usize = 256;

/// A part of the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// First byte.
    pub(crate) offset: usize,
    /// Bytes, a multiple of [`ALIGN`].
    pub(crate) len: usize,
}

impl Span {
    /// Bytes that both have.
    pub(crate) fn shared(self, other: Self) -> usize {
        let end = (self.offset + self.len).min(other.offset + other.len);
        end.saturating_sub(self.offset.max(other.offset))
    }
}

/// The bytes that a part of at least so many takes.
fn length(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGN)
}

/// A range that grows at its end. The same calls give the same offsets.
#[derive(Debug, Default)]
pub(crate) struct Heap {
    /// Offset to length of what is free.
    free: BTreeMap<usize, usize>,
    /// Bytes of the range so far.
    end: usize,
}

impl Heap {
    /// The first free part that holds `bytes`.
    pub(crate) fn take_free(&mut self, bytes: usize) -> Option<Span> {
        let len = length(bytes);
        let (&offset, &size) = self.free.iter().find(|&(_, &size)| size >= len)?;
        Some(self.cut(Span { offset, len }, Span { offset, len: size }))
    }

    /// The last free part of just `bytes`, else the end of the last that holds them.
    pub(crate) fn take_last(&mut self, bytes: usize) -> Option<Span> {
        let len = length(bytes);
        let last = |fits: fn(usize, usize) -> bool| self.free.iter().rev().find(|&(_, &size)| fits(size, len));
        let (&offset, &size) = last(|size, len| size == len).or_else(|| last(|size, len| size >= len))?;
        Some(self.cut(Span { offset: offset + size - len, len }, Span { offset, len: size }))
    }

    /// A part, if all of it is free.
    pub(crate) fn take_at(&mut self, span: Span) -> Option<Span> {
        let (&offset, &len) = self.free.range(..=span.offset).next_back()?;
        (offset + len >= span.offset + span.len).then_some(())?;
        Some(self.cut(span, Span { offset, len }))
    }

    /// The first free part that holds `bytes`, or new bytes at the end.
    pub(crate) fn take(&mut self, bytes: usize) -> Span {
        if let Some(span) = self.take_free(bytes) {
            return span;
        }
        let len = length(bytes);
        // What is free at the end needs only the rest.
        let offset = match self.free.last_key_value() {
            Some((&offset, &size)) if offset + size == self.end => {
                self.free.remove(&offset);
                offset
            }
            _ => self.end,
        };
        self.end = offset + len;
        Span { offset, len }
    }

    /// Gives a part back.
    pub(crate) fn give(&mut self, span: Span) {
        let (mut offset, mut len) = (span.offset, span.len);
        if let Some((&before, &size)) = self.free.range(..offset).next_back()
            && before + size == offset
        {
            self.free.remove(&before);
            (offset, len) = (before, len + size);
        }
        if let Some(size) = self.free.remove(&(offset + len)) {
            len += size;
        }
        self.free.insert(offset, len);
    }

    /// Bytes of the range so far, free ones included.
    pub(crate) fn end(&self) -> usize {
        self.end
    }

    /// Takes back what [`Heap::take`] added at the end when there is no memory for it.
    pub(crate) fn shrink(&mut self, end: usize) {
        while let Some((&offset, &size)) = self.free.last_key_value()
            && offset + size == self.end
            && self.end > end
        {
            self.free.remove(&offset);
            let kept = end.saturating_sub(offset);
            if kept > 0 {
                self.free.insert(offset, kept);
            }
            self.end = offset + kept;
        }
    }

    /// How many bytes of `span` are free.
    pub(crate) fn free_within(&self, span: Span) -> usize {
        let before = self.free.range(..span.offset).next_back();
        let parts = before.into_iter().chain(self.free.range(span.offset..span.offset + span.len));
        parts.map(|(&offset, &len)| span.shared(Span { offset, len })).sum()
    }

    /// `span`, of `part`, which is free.
    fn cut(&mut self, span: Span, part: Span) -> Span {
        self.free.remove(&part.offset);
        let (before, after) = (span.offset - part.offset, part.offset + part.len - span.offset - span.len);
        if before > 0 {
            self.free.insert(part.offset, before);
        }
        if after > 0 {
            self.free.insert(span.offset + span.len, after);
        }
        span
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_join_and_the_first_that_fits_is_taken() {
        let mut heap = Heap::default();
        let spans: Vec<Span> = [1000, 300, 5000, 300].map(|bytes| heap.take(bytes)).into();
        assert_eq!(spans[1], Span { offset: 1024, len: 512 });
        heap.give(spans[2]);
        heap.give(spans[0]);
        assert_eq!(heap.take(900).offset, 0);
        heap.give(spans[1]);
        assert_eq!(heap.take(5500).offset, 1024, "joined with its neighbour");
    }

    #[test]
    fn a_part_can_be_taken_from_the_end_or_where_it_was() {
        let mut heap = Heap::default();
        let spans: Vec<Span> = [4096, 256, 1024, 256, 512].map(|bytes| heap.take(bytes)).into();
        for i in [0, 2, 4] {
            heap.give(spans[i]);
        }
        let last = heap.take_last(1024).unwrap();
        assert_eq!(last, spans[2], "the last that holds it");
        assert_eq!(heap.take_last(600).unwrap().offset, 4096 - 768, "its end");
        assert_eq!(heap.take_at(last), None);
        heap.give(last);
        assert_eq!(heap.take_last(512), Some(spans[4]), "no other is cut for what fits");
        heap.take_at(last).unwrap();
        let middle = Span { offset: 1024, len: 1024 };
        assert_eq!(heap.take_at(middle), Some(middle));
        assert_eq!(heap.take_at(middle), None);
        assert_eq!(heap.free_within(Span { offset: 0, len: 4096 }), 4096 - 768 - 1024);
        assert_eq!(heap.take_free(4096), None);
    }

    #[test]
    fn free_bytes_at_the_end_count_when_it_grows() {
        let mut heap = Heap::default();
        let span = heap.take(1024);
        heap.give(span);
        assert_eq!(heap.take(4096), Span { offset: 0, len: 4096 });
        assert_eq!(heap.end(), 4096);
    }

    proptest! {
        #[test]
        fn taken_parts_never_overlap_and_all_comes_back(ops in proptest::collection::vec((1usize..20_000, 0usize..8, 0..4), 1..200)) {
            let mut heap = Heap::default();
            let mut held: Vec<Span> = Vec::new();
            let mut last = Span { offset: 0, len: ALIGN };
            for (bytes, drop, how) in ops {
                let end = heap.end();
                let within = match how {
                    0 => None,
                    1 => heap.take_free(bytes),
                    2 => heap.take_last(bytes),
                    _ => heap.take_at(last).filter(|span| *span == last),
                };
                prop_assert_eq!(heap.end(), end);
                let span = within.unwrap_or_else(|| heap.take(bytes));
                prop_assert!(within.is_some() && how == 3 || span.len >= bytes && span.offset % ALIGN == 0 && span.offset + span.len <= heap.end());
                prop_assert!(held.iter().all(|other| span.offset + span.len <= other.offset || other.offset + other.len <= span.offset));
                prop_assert_eq!(heap.free_within(span), 0);
                held.push(span);
                if drop < held.len() {
                    last = held.swap_remove(drop);
                    heap.give(last);
                }
            }
            for span in held {
                heap.give(span);
            }
            prop_assert_eq!(heap.free_within(Span { offset: 0, len: heap.end() }), heap.end());
        }
    }
}
