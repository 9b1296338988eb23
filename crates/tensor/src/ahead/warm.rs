//! Widened weights that free memory still holds.
//!
//! A matrix whose product is done goes back with a note of what it holds. Until its memory is needed for something else, who asks for the
//! same weights gets it as it is: what backward widened for the next pass forward, what a block that is run again widened for its
//! backward. Such memory is free: it does not count as held, and the device is asked for more only when all of it is forgotten, first the
//! matrix whose turn is last by the pass before. What the same pass needs much later, as what forward widens for backward, is not kept.
//!
//! For the next pass a matrix is kept in its place, the end of what is free when it is first kept, away from what a forward pass leaves for
//! backward; or not at all, once its place was not free when it was widened. So passes that are alike come to leave the same matrices in
//! the same places, where a captured step needs to find what it found when it was captured ([`Captured`]).

use std::collections::{HashMap, HashSet};

use super::request::{Identity, WeakRequest};
use crate::cuda::{DeviceHeap, Span};

/// Requests between which a matrix is kept within a pass: a block that is run again, and its backward.
const SOON: usize = 8;

/// What free memory of an arena holds.
#[derive(Debug, Default)]
pub(crate) struct Warm {
    matrices: HashMap<Identity, Matrix>,
    /// Where each is kept; nowhere once that was not free.
    places: HashMap<Identity, Option<Span>>,
    turns: Turns,
    /// What was found by a step that is being captured.
    recording: Option<Vec<Found>>,
}

#[derive(Debug)]
struct Matrix {
    span: Span,
    holds: WeakRequest,
    /// From before the step that is being captured.
    before: bool,
}

/// A matrix and where it is.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) holds: WeakRequest,
    pub(crate) span: Span,
}

/// What a captured step finds and what it leaves.
#[derive(Debug, Default)]
pub(crate) struct Captured {
    pub(crate) found: Vec<Found>,
    left: Vec<Found>,
}

impl Captured {
    /// Whether a step finds what the one before leaves, but for a few.
    pub(crate) fn is_settled(&self) -> bool {
        let found: HashSet<&Identity> = self.found.iter().map(|found| &found.holds.identity).collect();
        let both = self.left.iter().filter(|left| found.contains(&left.holds.identity)).count();
        found.len().max(self.left.len()) - both <= both / 16
    }
}

impl Warm {
    /// A pass begins.
    pub(super) fn begin(&mut self) {
        self.turns.begin();
    }

    /// Weights are asked for.
    pub(super) fn note(&mut self, identity: &Identity) {
        self.turns.now.push(identity.clone());
    }

    pub(super) fn has(&self, request: &WeakRequest) -> bool {
        self.matrices.get(&request.identity).is_some_and(|matrix| matrix.holds.is_of(request))
    }

    /// Where the matrices are, in order.
    #[cfg(test)]
    pub(super) fn spans(&self) -> Vec<Span> {
        let mut spans: Vec<Span> = self.matrices.values().map(|matrix| matrix.span).collect();
        spans.sort_unstable_by_key(|span| span.offset);
        spans
    }

    /// The memory of a matrix that holds what is asked for; it is the caller's.
    pub(crate) fn take(&mut self, heap: &DeviceHeap, request: &WeakRequest) -> Option<Span> {
        if !self.has(request) {
            return None;
        }
        let Matrix { span, holds, before } = self.matrices.remove(&request.identity)?;
        heap.note(span);
        if let Some(found) = self.recording.as_mut().filter(|_| before) {
            found.push(Found { holds, span });
        }
        Some(span)
    }

    /// Memory for a matrix that is widened afresh: its place; none for one that may lie anywhere.
    pub(crate) fn place(&mut self, heap: &DeviceHeap, identity: &Identity, bytes: usize) -> Option<Span> {
        if self.turns.again(identity) == Again::Later {
            return None;
        }
        let Some(place) = self.places.get_mut(identity) else { return heap.take_within(|heap| heap.take_last(bytes)) };
        *place = place.and_then(|span| heap.take_within(|heap| heap.take_at(span)));
        *place
    }

    /// Memory that nobody holds any more, with what it holds.
    pub(crate) fn put(&mut self, heap: &DeviceHeap, holds: WeakRequest, span: Span) {
        let kept = match self.turns.again(&holds.identity) {
            Again::Soon => true,
            Again::NextPass => *self.places.entry(holds.identity.clone()).or_insert(Some(span)) == Some(span),
            Again::Later => false,
        };
        if kept && !self.matrices.contains_key(&holds.identity) {
            self.matrices.insert(holds.identity.clone(), Matrix { span, holds, before: false });
        } else {
            heap.give(span);
        }
    }

    /// Forgets the matrix that is needed last, for its memory.
    pub(crate) fn forget(&mut self) -> Option<Span> {
        let last = self.matrices.iter().max_by_key(|(identity, matrix)| {
            let turn = if matrix.holds.is_alive() { self.turns.until(identity) } else { usize::MAX };
            (turn, matrix.span.offset)
        });
        let identity = last?.0.clone();
        self.matrices.remove(&identity).map(|matrix| matrix.span)
    }

    /// A step begins that is captured and does not run.
    pub(crate) fn record(&mut self) {
        self.matrices.values_mut().for_each(|matrix| matrix.before = true);
        self.recording = Some(Vec::new());
    }

    /// What the step found and leaves. As nothing of it ran, there is what it found.
    pub(crate) fn recorded(&mut self, heap: &DeviceHeap) -> Captured {
        let found = self.recording.take().unwrap_or_default();
        let new = self.matrices.extract_if(|_, matrix| !matrix.before);
        let left: Vec<Found> = new.map(|(_, Matrix { span, holds, .. })| Found { holds, span }).collect();
        for left in &left {
            heap.give(left.span);
        }
        self.insert(heap, &found);
        Captured { found, left }
    }

    /// Whether `spans` are nobody's.
    pub(crate) fn all_free(&self, heap: &DeviceHeap, spans: &[Span]) -> bool {
        let warm = |span: Span| self.matrices.values().map(|matrix| matrix.span.shared(span)).sum::<usize>();
        spans.iter().all(|&span| heap.free_within(span) + warm(span) == span.len)
    }

    /// Whether a matrix is there.
    pub(crate) fn is_there(&self, found: &Found) -> bool {
        self.matrices
            .get(&found.holds.identity)
            .is_some_and(|matrix| matrix.span == found.span && matrix.holds.is_of(&found.holds))
    }

    /// A captured step ran: what it wrote over is gone, what it leaves is there.
    pub(crate) fn ran(&mut self, heap: &DeviceHeap, written: &[Span], captured: &Captured) {
        self.forget_within(heap, written);
        self.insert(heap, &captured.left);
    }

    /// Forgets what lies in any of `spans`.
    pub(crate) fn forget_within(&mut self, heap: &DeviceHeap, spans: &[Span]) {
        let gone = self.matrices.extract_if(|_, matrix| spans.iter().any(|span| span.shared(matrix.span) > 0));
        gone.for_each(|(_, matrix)| heap.give(matrix.span));
    }

    fn insert(&mut self, heap: &DeviceHeap, all: &[Found]) {
        for Found { holds, span } in all {
            if !self.matrices.contains_key(&holds.identity) && heap.take_within(|heap| heap.take_at(*span)).is_some() {
                self.matrices.insert(holds.identity.clone(), Matrix { span: *span, holds: holds.clone(), before: false });
            }
        }
    }
}

/// When weights are asked for again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    /// In this pass, before [`SOON`] others.
    Soon,
    /// In the next pass and not in this one.
    NextPass,
    /// Later in this pass, or never as far as is known.
    Later,
}

/// When weights are asked for, by what the pass before asked for.
#[derive(Debug, Default)]
struct Turns {
    /// Of the pass that runs.
    now: Vec<Identity>,
    /// Of the one before: the turns of each, and how many there were.
    before: HashMap<Identity, Vec<usize>>,
    len: usize,
}

impl Turns {
    fn begin(&mut self) {
        self.before.clear();
        self.len = self.now.len();
        for (turn, identity) in self.now.drain(..).enumerate() {
            self.before.entry(identity).or_default().push(turn);
        }
    }

    /// When `identity` is asked for again after the request that is on or comes next.
    fn again(&self, identity: &Identity) -> Again {
        let now = self.now.len();
        let Some(turns) = self.before.get(identity) else { return Again::Later };
        match turns.iter().find(|&&turn| turn > now) {
            None => Again::NextPass,
            Some(turn) if turn - now < SOON => Again::Soon,
            Some(_) => Again::Later,
        }
    }

    /// How many requests come before the next for `identity`.
    fn until(&self, identity: &Identity) -> usize {
        let (now, turns) = (self.now.len(), self.before.get(identity).map(Vec::as_slice).unwrap_or_default());
        let next = turns.iter().find(|&&turn| turn >= now).copied();
        let in_another = || turns.first().map(|first| self.len.max(now) + first);
        next.or_else(in_another).map_or(usize::MAX - 1, |turn| turn - now)
    }
}
