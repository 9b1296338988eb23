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
    /// Whether both have a byte.
    pub(crate) fn overlaps(self, other: Self) -> bool {
        self.offset < other.offset + other.len && other.offset < self.offset + self.len
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
    /// Those of them that are taken.
    taken: usize,
}

impl Heap {
    /// As far at the end as `bytes` are free beside the parts of `but`, offset to length.
    pub(crate) fn take_last(&mut self, bytes: usize, but: &BTreeMap<usize, usize>) -> Option<Span> {
        let len = length(bytes);
        let ends_at = |offset: usize, size: usize| {
            let mut end = offset + size;
            for (&other, &other_len) in but.range(..end).rev() {
                if other + other_len <= offset || end >= other + other_len + len {
                    break;
                }
                end = end.min(other);
            }
            (end >= offset + len).then_some(end)
        };
        let find = |(&offset, &size): (&usize, &usize)| {
            let end = ends_at(offset, size)?;
            Some((Span { offset: end - len, len }, Span { offset, len: size }))
        };
        let (span, part) = self.free.iter().rev().find_map(find)?;
        Some(self.cut(span, part))
    }

    /// A part, if all of it is free.
    pub(crate) fn take_at(&mut self, span: Span) -> Option<Span> {
        let (&offset, &len) = self.free.range(..=span.offset).next_back()?;
        (offset + len >= span.offset + span.len).then_some(())?;
        Some(self.cut(span, Span { offset, len }))
    }

    /// The first free part that holds `bytes`, or new bytes at the end.
    pub(crate) fn take(&mut self, bytes: usize) -> Span {
        let len = length(bytes);
        if let Some((&offset, &size)) = self.free.iter().find(|&(_, &size)| size >= len) {
            return self.cut(Span { offset, len }, Span { offset, len: size });
        }
        // What is free at the end needs only the rest.
        let offset = match self.free.last_key_value() {
            Some((&offset, &size)) if offset + size == self.end => {
                self.free.remove(&offset);
                offset
            }
            _ => self.end,
        };
        self.end = offset + len;
        self.taken += len;
        Span { offset, len }
    }

    /// Gives a part back.
    pub(crate) fn give(&mut self, span: Span) {
        let (mut offset, mut len) = (span.offset, span.len);
        self.taken -= len;
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

    /// Whether all of `span` is free.
    pub(crate) fn is_free(&self, span: Span) -> bool {
        let found = self.free.range(..=span.offset).next_back();
        found.is_some_and(|(&offset, &size)| offset + size >= span.offset + span.len)
    }

    /// Free bytes.
    pub(crate) fn free(&self) -> usize {
        self.end - self.taken
    }

    /// `span`, of `part`, which is free.
    fn cut(&mut self, span: Span, part: Span) -> Span {
        self.free.remove(&part.offset);
        self.taken += span.len;
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
        let (none, mut but) = (BTreeMap::new(), BTreeMap::new());
        let last = heap.take_last(1024, &none).unwrap();
        assert_eq!(last, spans[2], "the last that holds it");
        assert_eq!(heap.take_at(last), None);
        assert_eq!(heap.take_last(600, &none).unwrap().offset, 4096 - 768, "its end");
        // 0 .. 3328 and 5632 .. 6144 are free.
        but.extend([(5632, 512), (3072, 256), (1024, 1280)]);
        assert_eq!(heap.take_last(512, &but).unwrap().offset, 2560);
        assert_eq!(heap.take_last(512, &but).unwrap().offset, 512);
        let middle = Span { offset: 1024, len: 1024 };
        assert!(heap.is_free(middle) && heap.free() == 3328 + 512 - 1024);
        assert_eq!(heap.take_at(middle), Some(middle));
        assert_eq!(heap.take_at(middle), None);
        assert_eq!(heap.take_last(1024, &none), None);
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
                    1 => heap.take_last(bytes, &BTreeMap::new()),
                    2 => heap.take_last(bytes, &BTreeMap::from([(last.offset, last.len)])),
                    _ => heap.take_at(last),
                };
                prop_assert!(heap.end() == end && (how != 2 || within.is_none_or(|span| !span.overlaps(last))));
                let span = within.unwrap_or_else(|| heap.take(bytes));
                prop_assert!(within.is_some() && how == 3 || span.len >= bytes && span.offset % ALIGN == 0 && span.offset + span.len <= heap.end());
                prop_assert!(held.iter().all(|other| span.offset + span.len <= other.offset || other.offset + other.len <= span.offset));
                prop_assert!(!heap.is_free(span));
                held.push(span);
                prop_assert_eq!(heap.end() - heap.free(), held.iter().map(|span| span.len).sum::<usize>());
                if drop < held.len() {
                    last = held.swap_remove(drop);
                    heap.give(last);
                }
            }
            for span in held {
                heap.give(span);
            }
            let all = Span { offset: 0, len: heap.end() };
            prop_assert!(heap.free() == heap.end() && heap.is_free(all));
        }
    }
}
