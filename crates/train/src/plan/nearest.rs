//! The nearest run that fits, of one that does not.

use nibble_model::Checkpointing;
use nibble_optim::OptimizerName;

use super::{Document, MODES, Setup, can_stream, fewest_on_host};
use crate::Result;

/// Below this many tokens documents are not cut.
const SHORTEST: usize = 128;

/// A run that fits, and how it differs from the one that was asked for.
#[derive(Clone, Debug)]
pub struct Nearest {
    /// The run.
    pub setup: Setup,
    /// How many micro-batches take the place of one.
    pub parts: usize,
    /// What longer documents are cut to.
    pub max_length: Option<usize>,
}

/// The first run that fits, of those near `setup`: other kinds of checkpointing, then smaller micro-batches (more of them a
/// step), then weights on the host, then an optimizer with 8-bit states, then shorter documents. `batch`: documents of a micro-batch as the
/// command line counts them; `blocks`: those whose weights can wait on the host, none on the processor.
///
/// # Errors
/// What `fits` returns.
pub fn nearest(setup: &Setup, batch: usize, blocks: usize, fits: impl Fn(&Setup) -> Result<bool>) -> Result<Option<Nearest>> {
    let longest = setup.longest();
    let lengths = std::iter::successors(Some(longest), |length| Some(length / 2)).take_while(|&n| n == longest || n >= SHORTEST);
    for length in lengths {
        let max_length = (length < longest).then_some(length);
        for optim in optimizers(setup.train.optim) {
            let parts = || std::iter::successors(Some(1), |parts| Some(2 * parts)).take_while(|&parts| parts <= batch);
            let tried = |parts, checkpointing| {
                let mut tried = setup.clone();
                tried.documents = part(&setup.documents, parts, length);
                tried.evaluation = part(&setup.evaluation, parts, length);
                (tried.train.optim, tried.train.checkpointing) = (optim, checkpointing);
                tried
            };
            let kinds = savings(setup.train.checkpointing);
            for parts in parts() {
                for &kind in &kinds {
                    let setup = tried(parts, kind);
                    if fits(&setup)? {
                        return Ok(Some(Nearest { setup, parts, max_length }));
                    }
                }
            }
            // What keeps the least has the fewest weights cross the link.
            let Some(&least) = kinds.last().filter(|_| can_stream(setup)) else { continue };
            for parts in parts() {
                let setup = tried(parts, least);
                if let Some(count) = fewest_on_host(blocks, |count| fits(&setup.with_blocks_on_host(count)))? {
                    return Ok(Some(Nearest { setup: setup.with_blocks_on_host(count), parts, max_length }));
                }
            }
        }
    }
    Ok(None)
}

/// The kinds of checkpointing that keep no more than `wanted`.
fn savings(wanted: Checkpointing) -> Vec<Checkpointing> {
    match MODES.iter().position(|(_, mode)| *mode == wanted) {
        Some(first) => MODES[first..].iter().map(|(_, mode)| *mode).collect(),
        None => vec![wanted],
    }
}

/// `wanted`, and Adam's 8-bit variant if it is Adam in 32 bits.
fn optimizers(wanted: OptimizerName) -> Vec<OptimizerName> {
    match wanted {
        OptimizerName::AdamWTorch | OptimizerName::AdamWTorchFused | OptimizerName::AdamWBnb32bit => {
            vec![wanted, OptimizerName::AdamW8bit]
        }
        _ => vec![wanted],
    }
}

/// The longest documents of a micro-batch that is one of `parts`, cut to `length`.
fn part(documents: &[Document], parts: usize, length: usize) -> Vec<Document> {
    let cut = |document: &Document| Document { tokens: document.tokens.min(length), learned: document.learned.min(length - 1) };
    let mut sorted: Vec<Document> = documents.iter().map(cut).collect();
    sorted.sort_by_key(|document| std::cmp::Reverse(document.tokens));
    sorted.truncate(documents.len().div_ceil(parts));
    sorted
}
