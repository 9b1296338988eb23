//! An account of memory by owner.

use std::{collections::HashMap, panic::Location};

/// What a part of a device's memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Owner {
    /// The frozen matrices of the layers, with their scales.
    BaseWeights,
    /// Embedding, head and norms, where frozen.
    Embeddings,
    /// Adapters or whatever else is trained: f32 values and their working copies.
    Trained,
    /// Gradients of what is trained.
    Gradients,
    /// The optimizer's states.
    Optimizer,
    /// Keys and values of the tokens before, in generation.
    KvCache,
    /// What an op made, by the op's file: outputs, what they keep for backward, gradients of activations.
    Activations(&'static str),
    /// Memory that lives within one call, or from a product to the next: widened weights, operands laid side by side.
    Scratch,
    /// All that is taken outside ops: inputs, tables, reports.
    Other,
    /// Recorded steps, as the driver keeps them.
    Graphs,
    /// Workspace and handles of cuBLASLt.
    Libraries,
    /// Kernels' code, and the counters and tables that they keep.
    Kernels,
    /// The driver's context, and whatever else was on the device when it was made.
    Context,
    /// Taken from the device for the arena, and between its tensors at their peak.
    Gaps,
}

impl Owner {
    /// The owner of what is taken at a place in a source: ops are one file, or folder, each.
    fn of(place: &'static Location<'static>) -> Self {
        let mut parts = place.file().rsplit(['/', '\\']);
        let file = parts.next().unwrap_or_default().trim_end_matches(".rs");
        match (parts.next(), parts.next(), parts.next()) {
            (Some("ops"), ..) => Self::Activations(file),
            // What waited on the host, on the device again.
            (Some("src"), Some("tensor"), _) if file == "host_copy" => Self::Activations(file),
            (Some(op), Some("ops"), _) | (_, Some(op), Some("ops")) => Self::Activations(op),
            _ => Self::Other,
        }
    }
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::BaseWeights => "base weights",
            Self::Embeddings => "embeddings",
            Self::Trained => "trained weights",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::KvCache => "kv cache",
            Self::Activations(op) => return write!(f, "activations: {op}"),
            Self::Scratch => "scratch",
            Self::Other => "other",
            Self::Graphs => "graphs",
            Self::Libraries => "libraries",
            Self::Kernels => "kernels",
            Self::Context => "context",
            Self::Gaps => "gaps",
        })
    }
}

/// An owner's bytes in an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerStats {
    /// Whose.
    pub owner: Owner,
    /// Held now.
    pub live: usize,
    /// The most it held at once.
    pub peak: usize,
    /// Held when all owners together held the most; these add up to the arena's peak.
    pub at_peak: usize,
}

/// Owners by the order in which they first took memory. Kept under the arena's lock: a few nanoseconds a block.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    all: Vec<OwnerStats>,
    /// Index by the address of the place.
    places: HashMap<usize, usize>,
    /// Whom everything belongs to while a scope lives.
    scope: Option<usize>,
    /// Whether what is live is the peak so far, and not noted as such yet.
    rising: bool,
}

impl Owners {
    /// Counts a block; gives the index of whom it belongs to. `rises`: all together hold more than ever before.
    pub(crate) fn take(&mut self, place: &'static Location<'static>, bytes: usize, rises: bool) -> usize {
        let index = self.scope.unwrap_or_else(|| self.at(place));
        let owner = &mut self.all[index];
        owner.live += bytes;
        owner.peak = owner.peak.max(owner.live);
        // At the same height as the peak before, that one stays.
        self.rising |= rises;
        index
    }

    pub(crate) fn give(&mut self, index: usize, bytes: usize) {
        if std::mem::take(&mut self.rising) {
            self.note_peak();
        }
        self.all[index].live -= bytes;
    }

    /// Sets the scope; gives the one before.
    pub(crate) fn enter(&mut self, owner: Owner) -> Option<usize> {
        let index = self.index(owner);
        self.scope.replace(index)
    }

    pub(crate) fn leave(&mut self, before: Option<usize>) {
        self.scope = before;
    }

    /// Starts the peaks afresh from what is live now.
    pub(crate) fn reset_peak(&mut self) {
        self.rising = false;
        self.note_peak();
        for owner in &mut self.all {
            owner.peak = owner.live;
        }
    }

    /// Those that held anything since the peaks began, in the order of [`Owner`].
    pub(crate) fn stats(&self) -> Vec<OwnerStats> {
        let mut all: Vec<OwnerStats> = self.all.iter().copied().filter(|owner| owner.peak > 0).collect();
        if self.rising {
            for owner in &mut all {
                owner.at_peak = owner.live;
            }
        }
        all.sort_by_key(|stats| stats.owner);
        all
    }

    fn note_peak(&mut self) {
        for owner in &mut self.all {
            owner.at_peak = owner.live;
        }
    }

    fn at(&mut self, place: &'static Location<'static>) -> usize {
        let key = std::ptr::from_ref(place).addr();
        if let Some(&index) = self.places.get(&key) {
            return index;
        }
        let index = self.index(Owner::of(place));
        self.places.insert(key, index);
        index
    }

    fn index(&mut self, owner: Owner) -> usize {
        self.all.iter().position(|stats| stats.owner == owner).unwrap_or_else(|| {
            self.all.push(OwnerStats { owner, live: 0, peak: 0, at_peak: 0 });
            self.all.len() - 1
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::{Arena, DType, Device, Owner, OwnerStats, Tensor, ops};

    fn bytes(arena: &Arena, n: usize) -> Tensor {
        Tensor::empty(arena, DType::U8, [n]).unwrap()
    }

    fn of(arena: &Arena, owner: Owner) -> OwnerStats {
        let none = OwnerStats { owner, live: 0, peak: 0, at_peak: 0 };
        arena.owners().into_iter().find(|stats| stats.owner == owner).unwrap_or(none)
    }

    #[test]
    fn a_block_belongs_to_the_scope_it_was_taken_in_until_it_drops() {
        let arena = Arena::new(Device::Cpu);
        let outer = arena.scope(Owner::BaseWeights);
        let weights = bytes(&arena, 640);
        let cache = {
            let _inner = arena.scope(Owner::KvCache);
            bytes(&arena, 64)
        };
        let more = bytes(&arena, 128);
        drop(outer);
        let copy = weights.to_arena(&arena).unwrap();
        assert_eq!(of(&arena, Owner::BaseWeights).live, 768);
        assert_eq!((of(&arena, Owner::KvCache).live, of(&arena, Owner::Other).live), (64, 640));
        drop((weights, more, cache, copy));
        assert!(arena.owners().iter().all(|stats| stats.live == 0));
        assert_eq!(of(&arena, Owner::BaseWeights).peak, 768);
    }

    #[test]
    fn what_an_op_takes_belongs_to_the_op() {
        let arena = Arena::new(Device::Cpu);
        let x = Tensor::from_slice(&arena, &[1.0f32; 64], [4, 16]).unwrap();
        let w = Tensor::from_slice(&arena, &[1.0f32; 16], [16]).unwrap();
        let made = ops::rms_norm::forward(&x, &w, ops::rms_norm::Config { eps: 0.0, offset: 0.0 }).unwrap();
        assert_eq!(of(&arena, Owner::Activations("rms_norm")).live, 4 * 64 + 64);
        drop(made);
        assert_eq!(of(&arena, Owner::Other).live, 4 * 64 + 64);
    }

    #[test]
    fn shares_of_the_peak_add_up_to_it_at_the_moment_it_was() {
        let arena = Arena::new(Device::Cpu);
        let scoped = |owner, n| {
            let _scope = arena.scope(owner);
            bytes(&arena, n)
        };
        let base = scoped(Owner::BaseWeights, 1024);
        let gradients = scoped(Owner::Gradients, 4096);
        let shares = |arena: &Arena| [Owner::BaseWeights, Owner::Gradients].map(|owner| of(arena, owner).at_peak);
        assert_eq!(shares(&arena), [1024, 4096], "also while it is the peak");
        drop(gradients);
        let second = scoped(Owner::BaseWeights, 3072);
        assert_eq!(shares(&arena), [1024, 4096]);
        assert_eq!(of(&arena, Owner::BaseWeights).peak, 4096);
        assert_eq!(arena.owners().iter().map(|stats| stats.at_peak).sum::<usize>(), arena.stats().peak);
        arena.reset_peak();
        assert_eq!(shares(&arena), [4096, 0]);
        drop((base, second));
        assert_eq!(shares(&arena), [4096, 0]);
    }
}
