//! The flat buffer cut into runs with and without weight decay.

use std::ops::Range;

use nibble_tensor::Tensor;

use crate::{Error, Result};

/// A run of neighbouring parameters that are all decayed, or all not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) range: Range<usize>,
    pub(crate) decayed: bool,
}

impl Run {
    /// The run's part of a flat tensor.
    pub(crate) fn view(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.view(self.range.start, [self.range.len()])?)
    }

    /// `weight_decay` where it applies, else 0.
    pub(crate) fn decay(&self, weight_decay: f64) -> f64 {
        if self.decayed { weight_decay } else { 0.0 }
    }
}

/// The runs that cover `0 .. len`, given where there is no decay (in any order, overlapping or not).
pub(crate) fn runs(len: usize, no_decay: &[Range<usize>]) -> Result<Vec<Run>> {
    if let Some(&Range { start, end }) = no_decay.iter().find(|range| range.start > range.end || range.end > len) {
        return Err(Error::NoDecayRange { start, end, len });
    }
    let mut sorted: Vec<_> = no_decay.iter().filter(|range| !range.is_empty()).cloned().collect();
    sorted.sort_by_key(|range| range.start);
    let mut runs: Vec<Run> = Vec::new();
    let mut done = 0;
    for range in sorted {
        if range.start > done {
            runs.push(Run { range: done..range.start, decayed: true });
        }
        match runs.last_mut() {
            Some(last) if !last.decayed => last.range.end = last.range.end.max(range.end),
            _ => runs.push(Run { range: range.clone(), decayed: false }),
        }
        done = done.max(range.end);
    }
    if done < len {
        runs.push(Run { range: done..len, decayed: true });
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_each_parameter_once() {
        // The last case is two ranges that overlap, out of order, and an empty one.
        let cases: [&[(usize, usize)]; 6] =
            [&[], &[(0, 10)], &[(0, 3), (3, 5)], &[(2, 4)], &[(8, 10)], &[(5, 9), (2, 6), (7, 7)]];
        for case in cases {
            let no_decay: Vec<_> = case.iter().map(|&(start, end)| start..end).collect();
            let runs = runs(10, &no_decay).unwrap();
            let covered: Vec<(usize, bool)> = runs.iter().flat_map(|run| run.range.clone().map(|i| (i, run.decayed))).collect();
            let want: Vec<_> = (0..10).map(|i| (i, !no_decay.iter().any(|range| range.contains(&i)))).collect();
            assert_eq!(covered, want, "{no_decay:?}");
            assert!(runs.windows(2).all(|pair| pair[0].decayed != pair[1].decayed), "{runs:?}");
        }
    }

    #[test]
    fn ranges_beyond_the_parameters_are_refused() {
        assert_eq!(runs(4, &[0..1, 3..5]).unwrap_err().to_string(), "no_decay: range 3..5 is not within the 4 parameters");
    }
}
