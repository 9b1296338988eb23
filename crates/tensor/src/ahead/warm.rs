//! Widened weights that free memory still holds.
//!
//! The memory of a matrix goes back when its product is done, with a note of what it holds. Who asks for the same weights before the
//! memory is taken for something else gets it as it is: what backward widened for the next pass forward, what a block that is run again
//! widened for its backward. Such memory is free like any other: others are placed as if nothing were in it, from the start on.
//! So that little of it is written over, a matrix that will be asked for by the next pass has a place of its own, as far at the end as
//! possible; where little memory is free until its product is done, by the passes before of as many tokens, or the place is not free, it
//! lies anywhere like others and is not found again. A place that was not free once is given up: so passes that are alike come to leave
//! the same matrices in the same places, where a captured step needs to find what it found when it was captured ([`Captured`]).

use std::collections::{BTreeMap, HashMap, HashSet};

use super::request::{Identity, WeakRequest};
use crate::cuda::{DeviceHeap, Span};

/// Requests between which a matrix may be found within a pass: a block that is run again, and its backward.
const SOON: usize = 8;
/// Little memory is free where it is less than so many times the matrix.
const PLENTY: usize = 4;

/// What free memory of an arena holds.
#[derive(Debug, Default)]
pub(crate) struct Warm {
    matrices: HashMap<Identity, Matrix>,
    /// The place of each; none once it was not free.
    places: HashMap<Identity, Option<Span>>,
    /// All places there are, offset to length.
    occupied: BTreeMap<usize, usize>,
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
    /// A pass over so many tokens begins.
    pub(super) fn begin(&mut self, tokens: usize) {
        self.turns.begin(tokens);
    }

    /// The pass ends.
    pub(super) fn end(&mut self) {
        self.turns.on = false;
    }

    /// Weights are asked for.
    pub(super) fn note(&mut self, identity: &Identity) {
        self.turns.now.push(identity.clone());
    }

    /// Somebody took `span`, of which nothing is left, and so much is free.
    pub(crate) fn taken(&mut self, span: Span, free: usize) {
        self.forget(&[span]);
        self.turns.taken(free);
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

    /// Takes the memory of a matrix that holds what is asked for.
    pub(crate) fn take(&mut self, heap: &DeviceHeap, request: &WeakRequest) -> Option<Span> {
        if !self.has(request) {
            return None;
        }
        let Matrix { span, holds, before } = self.matrices.remove(&request.identity)?;
        heap.take_within(|heap| heap.take_at(span))?;
        if let Some(found) = self.recording.as_mut().filter(|_| before) {
            found.push(Found { holds, span });
        }
        Some(span)
    }

    /// Whether it is what was asked for last.
    pub(super) fn is_last(&self, request: &WeakRequest) -> bool {
        self.turns.now.last() == Some(&request.identity)
    }

    /// Takes memory for a matrix that is widened afresh where it may be found again, for the request that is on or, `foreseen`, for the next;
    /// none for one that may lie anywhere.
    pub(super) fn place(&mut self, heap: &DeviceHeap, identity: &Identity, bytes: usize, foreseen: bool) -> Option<Span> {
        if self.turns.again(identity, foreseen) == Again::Later || self.turns.free_soon() < PLENTY * bytes {
            return None;
        }
        let Some(place) = self.places.get_mut(identity) else {
            let span = heap.take_within(|heap| heap.take_last(bytes, &self.occupied))?;
            self.places.insert(identity.clone(), Some(span));
            self.occupied.insert(span.offset, span.len);
            return Some(span);
        };
        let span = (*place)?;
        let taken = heap.take_within(|heap| heap.take_at(span));
        if taken.is_none() {
            self.occupied.remove(&span.offset);
            *place = None;
        }
        taken
    }

    /// Notes what free memory holds.
    pub(crate) fn put(&mut self, holds: WeakRequest, span: Span) {
        let kept = match self.turns.again(&holds.identity, false) {
            Again::Soon => true,
            Again::NextPass => self.places.get(&holds.identity) == Some(&Some(span)),
            Again::Later => false,
        };
        if kept {
            self.matrices.insert(holds.identity.clone(), Matrix { span, holds, before: false });
        }
    }

    /// Forgets what lies in any of `spans`, which others write.
    pub(crate) fn forget(&mut self, spans: &[Span]) {
        self.matrices.retain(|_, matrix| !spans.iter().any(|span| span.overlaps(matrix.span)));
    }

    /// A step begins that is captured and does not run. It finds no weight whose codes may be gone when it is to be widened again.
    pub(crate) fn record(&mut self) {
        self.matrices.retain(|_, matrix| matrix.holds.is_whole());
        self.matrices.values_mut().for_each(|matrix| matrix.before = true);
        self.recording = Some(Vec::new());
    }

    /// What the step found and leaves. As nothing of it ran, there is what it found.
    pub(crate) fn recorded(&mut self, heap: &DeviceHeap) -> Captured {
        let found = self.recording.take().unwrap_or_default();
        let new = self.matrices.extract_if(|_, matrix| !matrix.before);
        let left = new.map(|(_, Matrix { span, holds, .. })| Found { holds, span }).collect();
        let free = |found: &&Found| heap.all_free(&[found.span]);
        self.insert(found.iter().filter(free));
        Captured { found, left }
    }

    /// Whether a matrix is there.
    pub(crate) fn is_there(&self, found: &Found) -> bool {
        let matrix = self.matrices.get(&found.holds.identity);
        matrix.is_some_and(|matrix| matrix.span == found.span && matrix.holds.is_of(&found.holds))
    }

    /// A captured step ran: what it wrote over is gone, what it leaves is there.
    pub(crate) fn ran(&mut self, written: &[Span], captured: &Captured) {
        self.forget(written);
        self.insert(captured.left.iter());
    }

    fn insert<'a>(&mut self, all: impl Iterator<Item = &'a Found>) {
        let matrix = |found: &Found| Matrix { span: found.span, holds: found.holds.clone(), before: false };
        self.matrices.extend(all.map(|found| (found.holds.identity.clone(), matrix(found))));
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

/// When weights are asked for, by what the pass before asked for; and how much is free meanwhile.
#[derive(Debug, Default)]
struct Turns {
    /// Whether a pass runs.
    on: bool,
    /// What the pass that runs has asked for.
    now: Vec<Identity>,
    /// The turns of each in the pass before.
    before: HashMap<Identity, Vec<usize>>,
    /// The least that was free between a turn and the next, in any pass.
    least_free: Vec<usize>,
    /// Tokens of the longest pass.
    longest: usize,
}

impl Turns {
    /// Nothing is known of a pass that is longer than all before.
    fn begin(&mut self, tokens: usize) {
        self.on = true;
        self.before.clear();
        for (turn, identity) in self.now.drain(..).enumerate().filter(|_| tokens <= self.longest) {
            self.before.entry(identity).or_default().push(turn);
        }
        self.longest = self.longest.max(tokens);
    }

    fn taken(&mut self, free: usize) {
        if !self.on {
            return;
        }
        let turn = self.now.len();
        if self.least_free.len() <= turn {
            self.least_free.resize(turn + 1, usize::MAX);
        }
        self.least_free[turn] = self.least_free[turn].min(free);
    }

    /// The least that is free from before the request that is on or comes next until after it.
    fn free_soon(&self) -> usize {
        let now = self.now.len();
        self.least_free.iter().take(now + 3).skip(now.saturating_sub(1)).copied().min().unwrap_or(0)
    }

    /// When `identity` is asked for again after the request that is on or, `foreseen`, after the next.
    fn again(&self, identity: &Identity, foreseen: bool) -> Again {
        let next = self.now.len() + usize::from(foreseen);
        let Some(turns) = self.before.get(identity) else { return Again::Later };
        match turns.iter().find(|&&turn| turn >= next) {
            None => Again::NextPass,
            Some(turn) if turn - next < SOON => Again::Soon,
            Some(_) => Again::Later,
        }
    }
}
