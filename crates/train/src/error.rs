//! The crate's error.

use std::path::PathBuf;

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a run could not begin or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The loss is not a number, or infinite: the weights before this step are kept.
    #[error("step {step}: the {quantity} is {value}; the step's examples come from rows {}", listed(rows))]
    NonFinite {
        /// The step, from 1.
        step: usize,
        /// `loss` or `gradient norm`.
        quantity: &'static str,
        /// NaN or an infinity.
        value: f64,
        /// Rows of the data file that the batch came from, from 1.
        rows: Vec<usize>,
    },
    /// The loss of an evaluation is not a number, or infinite.
    #[error("evaluate: the loss is {value}; the batch's examples come from rows {}", listed(rows))]
    NonFiniteEval {
        /// NaN or an infinity.
        value: f64,
        /// Rows of the data file that the batch came from, from 1.
        rows: Vec<usize>,
    },
    /// A setting that no run can have.
    #[error("train: `{option}` must be {expected}, found {found}")]
    Setting {
        /// The setting's name.
        option: &'static str,
        /// What fits.
        expected: &'static str,
        /// As given.
        found: String,
    },
    /// Nothing is trained.
    #[error("train: nothing to train: the model has no adapter and no trained module")]
    NothingTrains,
    /// The data has a document longer than the model's positions.
    #[error("train: row {row} has {tokens} tokens: expected at most {positions}, the positions the model was loaded with")]
    TooLong {
        /// Row of the data file.
        row: usize,
        /// Its tokens.
        tokens: usize,
        /// The limit.
        positions: usize,
    },
    /// A file could not be written.
    #[error("cannot write `{}`: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The data could not be batched.
    #[error(transparent)]
    Data(#[from] nibble_data::Error),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] nibble_model::Error),
    /// The adapter could not be saved.
    #[error(transparent)]
    Adapter(#[from] nibble_lora::Error),
    /// A setting of the optimizer or the schedule.
    #[error(transparent)]
    Optim(#[from] nibble_optim::Error),
    /// An op failed.
    #[error(transparent)]
    Tensor(#[from] nibble_tensor::Error),
}

impl Error {
    /// Whether there was no more memory, on the device or on the host.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        self.out_of_memory().is_some()
    }

    /// What was asked for when there was no more memory, if it is that.
    #[must_use]
    pub fn out_of_memory(&self) -> Option<&nibble_tensor::Error> {
        let (Self::Tensor(error)
        | Self::Optim(nibble_optim::Error::Tensor(error))
        | Self::Model(nibble_model::Error::Tensor(error) | nibble_model::Error::Adapter(nibble_lora::Error::Tensor(error)))
        | Self::Adapter(nibble_lora::Error::Tensor(error))) = self
        else {
            return None;
        };
        error.is_out_of_memory().then_some(error)
    }
}

fn listed(rows: &[usize]) -> String {
    rows.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}
