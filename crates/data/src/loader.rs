//! Batches in a deterministic order, and the place to go on from.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::batch::Batch;
use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::pack::Packer;
use crate::rng::{Sampler, Xoshiro256};

/// What determines the order of batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoaderOptions {
    /// How examples become micro-batches.
    pub packer: Packer,
    /// The seed of the order.
    pub seed: u64,
    /// `false` keeps the file's order in every epoch.
    pub shuffle: bool,
}

/// A place between two batches: everything that a resumed run needs to go on with the same batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderState {
    /// The epoch, from 0.
    pub epoch: usize,
    /// Batches of the epoch already handed out.
    pub index: usize,
    /// Batches an epoch has: a resumed run with other data or another packing is told so.
    pub batches_per_epoch: usize,
}

/// Hands out a dataset's micro-batches, epoch after epoch.
///
/// The batches of an epoch depend on the data, the options and the epoch's number alone, so a position is two numbers.
#[derive(Debug, Clone)]
pub struct DataLoader {
    dataset: Arc<Dataset>,
    lengths: Vec<usize>,
    options: LoaderOptions,
    epoch: usize,
    index: usize,
    groups: Vec<Vec<usize>>,
}

impl DataLoader {
    /// Starts at the first batch of epoch 0.
    ///
    /// # Errors
    /// As [`Packer::pack`], and [`Error::Empty`] for a dataset without examples.
    pub fn new(dataset: Arc<Dataset>, options: LoaderOptions) -> Result<Self> {
        if dataset.examples().is_empty() {
            return Err(Error::Empty { path: None });
        }
        let lengths: Vec<usize> = dataset.examples().iter().map(|e| e.tokens.len()).collect();
        let groups = group(&lengths, options, 0)?;
        Ok(Self { dataset, lengths, options, epoch: 0, index: 0, groups })
    }

    /// How many micro-batches an epoch has; the same in every epoch.
    #[must_use]
    pub fn batches_per_epoch(&self) -> usize {
        self.groups.len()
    }

    /// What determines the order.
    #[must_use]
    pub fn options(&self) -> LoaderOptions {
        self.options
    }

    /// The dataset.
    #[must_use]
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// The next micro-batch; after the last one of an epoch comes the first one of the next.
    ///
    /// # Errors
    /// As [`Packer::pack`], which succeeded for this data before.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let indices = self.next_indices()?;
        Ok(Batch::from_examples(indices.iter().map(|&i| &self.dataset.examples()[i])))
    }

    /// The examples of the next micro-batch, as indices into [`Dataset::examples`].
    ///
    /// # Errors
    /// As [`DataLoader::next_batch`].
    pub fn next_indices(&mut self) -> Result<Vec<usize>> {
        if self.index == self.groups.len() {
            self.go_to(self.epoch + 1, 0)?;
        }
        self.index += 1;
        Ok(self.groups[self.index - 1].clone())
    }

    /// The place before the next batch.
    #[must_use]
    pub fn state(&self) -> LoaderState {
        LoaderState { epoch: self.epoch, index: self.index, batches_per_epoch: self.groups.len() }
    }

    /// Goes to a saved place.
    ///
    /// # Errors
    /// [`Error::ResumePosition`] if an epoch of this data and packing has another number of batches.
    pub fn resume(&mut self, state: LoaderState) -> Result<()> {
        let batches_per_epoch = self.groups.len();
        if state.batches_per_epoch != batches_per_epoch || state.index > batches_per_epoch {
            let (saved, index) = (state.batches_per_epoch, state.index);
            return Err(Error::ResumePosition { batches_per_epoch, saved, index });
        }
        self.go_to(state.epoch, state.index)
    }

    fn go_to(&mut self, epoch: usize, index: usize) -> Result<()> {
        self.groups = group(&self.lengths, self.options, epoch)?;
        (self.epoch, self.index) = (epoch, index);
        Ok(())
    }
}

fn group(lengths: &[usize], options: LoaderOptions, epoch: usize) -> Result<Vec<Vec<usize>>> {
    let LoaderOptions { packer, seed, shuffle } = options;
    let order = Sampler { seed, shuffle }.order(epoch, lengths.len());
    let mut groups = packer.pack(&order, lengths)?;
    if shuffle && matches!(packer, Packer::BestFitDecreasing { .. }) {
        // Packs come out longest document first: without this an epoch would go from long to short texts.
        Xoshiro256::new(!seed, epoch as u64).shuffle(&mut groups);
    }
    Ok(groups)
}
