//! The order of batches: deterministic, complete, resumable.

mod common;

use std::sync::Arc;

use common::tiny;
use nibble_data::{Batch, DataLoader, Dataset, DatasetOptions, Error, IGNORE_INDEX, LoaderOptions, Packer};
use proptest::prelude::*;
use serde_json::json;

/// Documents of these lengths; document i is filled with token i.
fn dataset(lengths: &[usize]) -> Arc<Dataset> {
    let tokenizer = tiny();
    let template = tokenizer.chat_template(None).unwrap();
    let rows = lengths.iter().enumerate().map(|(i, &n)| json!({ "input_ids": vec![i; n] }));
    Arc::new(Dataset::from_rows(rows, &tokenizer, &template, &DatasetOptions::default()).unwrap())
}

fn loader(lengths: &[usize], packer: Packer, shuffle: bool) -> DataLoader {
    DataLoader::new(dataset(lengths), LoaderOptions { packer, seed: 3, shuffle }).unwrap()
}

fn take(loader: &mut DataLoader, n: usize) -> Vec<Batch> {
    (0..n).map(|_| loader.next_batch().unwrap()).collect()
}

const LENGTHS: [usize; 9] = [3, 8, 2, 5, 5, 7, 2, 4, 6];

#[test]
fn without_shuffling_batches_follow_the_file_in_every_epoch() {
    let mut loader = loader(&LENGTHS, Packer::Documents { batch_size: 4 }, false);
    assert_eq!(loader.batches_per_epoch(), 3);
    let got: Vec<_> = (0..4).map(|_| loader.next_indices().unwrap()).collect();
    assert_eq!(got, [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8], vec![0, 1, 2, 3]]);
}

#[test]
fn an_epoch_has_every_example_once_in_an_order_of_its_own() {
    for packer in [Packer::Documents { batch_size: 2 }, Packer::BestFitDecreasing { budget: 10 }] {
        let mut loader = loader(&LENGTHS, packer, true);
        let n = loader.batches_per_epoch();
        let mut epochs = Vec::new();
        for _ in 0..3 {
            let order: Vec<usize> = (0..n).flat_map(|_| loader.next_indices().unwrap()).collect();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..LENGTHS.len()).collect::<Vec<_>>());
            epochs.push(order);
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2] && epochs[0] != epochs[2]);
    }
}

#[test]
fn a_resumed_loader_goes_on_with_the_same_batches() {
    for packer in [Packer::Documents { batch_size: 2 }, Packer::BestFitDecreasing { budget: 10 }] {
        let mut whole = loader(&LENGTHS, packer, true);
        let n = whole.batches_per_epoch();
        let all = take(&mut whole, 3 * n);
        for done in 0..2 * n {
            let mut first = loader(&LENGTHS, packer, true);
            assert_eq!(take(&mut first, done), all[..done]);
            let saved = serde_json::to_string(&first.state()).unwrap();
            let mut second = loader(&LENGTHS, packer, true);
            second.resume(serde_json::from_str(&saved).unwrap()).unwrap();
            assert_eq!(take(&mut second, 3 * n - done), all[done..]);
        }
    }
}

#[test]
fn resuming_on_other_data_is_refused() {
    let saved = loader(&LENGTHS, Packer::Documents { batch_size: 2 }, true).state();
    let mut other = loader(&LENGTHS[..4], Packer::Documents { batch_size: 2 }, true);
    let error = other.resume(saved).unwrap_err();
    assert_eq!(error.to_string(), "resume data: expected 2 batches an epoch, found batch 0 of 5");
    let past = nibble_data::LoaderState { index: 3, ..other.state() };
    assert!(matches!(other.resume(past), Err(Error::ResumePosition { .. })));
}

proptest! {
    #[test]
    fn documents_in_a_batch_never_see_each_other(lengths in prop::collection::vec(2_usize..20, 1..40)) {
        let set = dataset(&lengths);
        let indices: Vec<usize> = (0..lengths.len()).collect();
        let batch = set.batch(&indices);
        prop_assert_eq!(batch.len(), lengths.iter().sum::<usize>());
        prop_assert_eq!((batch.tokens.len(), batch.labels.len()), (batch.positions.len(), batch.len()));
        prop_assert_eq!(batch.documents(), lengths.len());
        for (i, window) in batch.cu_seqlens.windows(2).enumerate() {
            let document = window[0] as usize..window[1] as usize;
            prop_assert!(batch.tokens[document.clone()].iter().all(|&t| t as usize == i));
            prop_assert!(batch.positions[document.clone()].iter().copied().eq(0..document.len() as u32));
            let (last, learned) = batch.labels[document].split_last().unwrap();
            prop_assert_eq!(*last, IGNORE_INDEX);
            // Each label is the next token of the same document.
            prop_assert!(learned.iter().all(|&l| l as usize == i));
        }
        prop_assert_eq!(batch.label_count(), batch.len() - batch.documents());
    }
}
