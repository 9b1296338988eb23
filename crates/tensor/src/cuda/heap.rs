//! Which parts of an address range are taken: best fit, split and joined again. Knows nothing of a device.

use std::collections::{BTreeMap, BTreeSet};

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

/// A range that grows at its end. The same calls give the same offsets.
#[derive(Debug, Default)]
pub(crate) struct Heap {
    /// Offset to length of what is free.
    free: BTreeMap<usize, usize>,
    /// (length, offset) of the same, to find the smallest that fits.
    by_size: BTreeSet<(usize, usize)>,
    /// Bytes of the range so far.
    end: usize,
}

impl Heap {
    /// The smallest free part that holds `bytes`, or new bytes at the end.
    pub(crate) fn take(&mut self, bytes: usize) -> Span {
        let len = bytes.max(1).next_multiple_of(ALIGN);
        if let Some(&(size, offset)) = self.by_size.range((len, 0)..).next() {
            self.remove(offset, size);
            if size > len {
                self.insert(offset + len, size - len);
            }
            return Span { offset, len };
        }
        // What is free at the end needs only the rest.
        let offset = match self.free.last_key_value() {
            Some((&offset, &size)) if offset + size == self.end => {
                self.remove(offset, size);
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
            self.remove(before, size);
            (offset, len) = (before, len + size);
        }
        if let Some(&size) = self.free.get(&(offset + len)) {
            self.remove(offset + len, size);
            len += size;
        }
        self.insert(offset, len);
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
            self.remove(offset, size);
            let kept = end.saturating_sub(offset);
            if kept > 0 {
                self.insert(offset, kept);
            }
            self.end = offset + kept;
        }
    }

    /// Whether all of `span` is free.
    pub(crate) fn is_free(&self, span: Span) -> bool {
        let found = self.free.range(..=span.offset).next_back();
        found.is_some_and(|(&offset, &size)| offset + size >= span.offset + span.len)
    }

    fn insert(&mut self, offset: usize, len: usize) {
        self.free.insert(offset, len);
        self.by_size.insert((len, offset));
    }

    fn remove(&mut self, offset: usize, len: usize) {
        self.free.remove(&offset);
        self.by_size.remove(&(len, offset));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_join_and_the_smallest_that_fits_is_taken() {
        let mut heap = Heap::default();
        let spans: Vec<Span> = [1000, 300, 5000, 300].map(|bytes| heap.take(bytes)).into();
        assert_eq!(spans[1], Span { offset: 1024, len: 512 });
        heap.give(spans[2]);
        heap.give(spans[0]);
        assert_eq!(heap.take(900).offset, 0, "1024 fits better than 5120");
        heap.give(spans[1]);
        assert_eq!(heap.take(5500).offset, 1024, "joined with its neighbour");
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
        fn taken_parts_never_overlap_and_all_comes_back(ops in proptest::collection::vec((1usize..20_000, 0usize..8), 1..200)) {
            let mut heap = Heap::default();
            let mut held: Vec<Span> = Vec::new();
            for (bytes, drop) in ops {
                let span = heap.take(bytes);
                prop_assert!(span.len >= bytes && span.offset % ALIGN == 0 && span.offset + span.len <= heap.end());
                prop_assert!(held.iter().all(|other| span.offset + span.len <= other.offset || other.offset + other.len <= span.offset));
                prop_assert!(!heap.is_free(span));
                held.push(span);
                if drop < held.len() {
                    heap.give(held.swap_remove(drop));
                }
            }
            for span in held {
                heap.give(span);
            }
            let all = Span { offset: 0, len: heap.end() };
            prop_assert!(heap.is_free(all));
        }
    }
}
