//! What a run takes: planned before anything is loaded, and refused if it cannot fit.

use nibble_data::{Dataset, Example, IGNORE_INDEX, LoaderOptions, Packer};
use nibble_model::{Checkpointing, config::ModelConfig};
use nibble_tensor::Device;
use nibble_train::plan::{self, COMPONENTS, Document, Footprint, Gpu, MODES, Nearest, Place, Setup};

use crate::{
    error::{CliError, Result},
    machine::available_memory,
    ui,
};

/// How much more than there is a plan may need before it is refused, on a GPU and on the processor, where plans are less exact:
/// what fits must never be.
const SLACK: (f64, f64) = (1.05, 1.15);

/// A run that is planned.
pub(super) struct Planned<'a> {
    pub(super) model: &'a ModelConfig,
    pub(super) setup: Setup,
    /// Documents of a micro-batch, as the command line counts them.
    pub(super) batch: usize,
    /// Micro-batches of a step.
    pub(super) accumulation: usize,
    pub(super) device: Device,
    pub(super) memory_limit: Option<usize>,
}

impl Planned<'_> {
    /// What it takes.
    ///
    /// # Errors
    /// [`CliError::DoesNotFit`] with what takes the memory and the nearest run that fits.
    pub(super) fn check(&self) -> Result<Footprint> {
        let place = self.place();
        // Automatic checkpointing takes what there is: it fits if what keeps the least does.
        let mut least = self.setup.clone();
        if least.train.checkpointing == Checkpointing::Auto {
            least.train.checkpointing = if place == Place::Cpu { Checkpointing::Full } else { Checkpointing::Offload };
        }
        let room = self.room()?;
        if least.train.optim.is_paged() {
            // As do pages: a few of them are on the device at once.
            least.train.optim_paging.device_memory = Some(plan::FEW_PAGES);
        }
        let needed = place.needed(self.model, &least)?;
        let Some(room) = room else { return Ok(needed) };
        let slack = if place == Place::Cpu { SLACK.1 } else { SLACK.0 };
        if needed.device as f64 <= room as f64 * slack {
            return Ok(needed);
        }
        Err(CliError::DoesNotFit {
            needed: needed.peak,
            room,
            limited: self.memory_limit == Some(room),
            owners: components(&needed),
            nearest: self.nearest(room)?,
        })
    }

    /// The fewest blocks whose weights must wait on the host for the run to fit; none where that does not help, or on the processor.
    pub(super) fn blocks_on_host(&self) -> Result<usize> {
        let (place, blocks) = (self.place(), self.model.num_hidden_layers);
        let Some(room) = self.room()?.filter(|_| place != Place::Cpu && self.setup.load.quant.is_some()) else { return Ok(0) };
        let mut setup = self.setup.clone();
        let mut fits = |count| {
            setup.load.blocks_on_host = count;
            place.fits(self.model, &setup, room)
        };
        if fits(0)? || !fits(blocks)? {
            return Ok(0);
        }
        let (mut short, mut enough) = (0, blocks);
        while enough - short > 1 {
            let middle = usize::midpoint(short, enough);
            if fits(middle)? { enough = middle } else { short = middle }
        }
        Ok(enough)
    }

    pub(super) fn place(&self) -> Place {
        match self.device {
            Device::Cuda(device) => Place::Gpu(Gpu::of_device(device.info())),
            _ => Place::Cpu,
        }
    }

    /// Bytes for tensors, where that is known.
    pub(super) fn room(&self) -> Result<Option<usize>> {
        let free = match self.device {
            Device::Cuda(device) => Some(device.free_memory()?),
            _ => available_memory(),
        };
        Ok(match (self.memory_limit, free) {
            (Some(limit), Some(free)) => Some(limit.min(free)),
            (limit, free) => limit.or(free),
        })
    }

    /// The flags of the nearest run that fits, where there is one.
    pub(super) fn nearest(&self, room: usize) -> Result<Option<String>> {
        let place = self.place();
        if let Some(flag) = self.smaller_evaluation(room)? {
            return Ok(Some(flag));
        }
        let fits = |setup: &Setup| place.fits(self.model, setup, room);
        Ok(plan::nearest(&self.setup, self.batch, fits)?.map(|nearest| self.flags(&nearest)))
    }

    /// The flag of the largest micro-batch of an evaluation that fits, where the steps do.
    fn smaller_evaluation(&self, room: usize) -> Result<Option<String>> {
        let fits = |documents: usize| {
            let mut setup = self.setup.clone();
            setup.evaluation.sort_by_key(|document| std::cmp::Reverse(document.tokens));
            setup.evaluation.truncate(documents);
            self.place().fits(self.model, &setup, room)
        };
        let sizes = std::iter::successors(Some(self.setup.evaluation.len() / 2), |size| Some(size / 2));
        if self.setup.evaluation.is_empty() || !fits(0)? {
            return Ok(None);
        }
        for size in sizes.take_while(|&size| size > 0) {
            if fits(size)? {
                return Ok(Some(format!("--per-device-eval-batch-size {size}")));
            }
        }
        Ok(None)
    }

    /// What differs, as flags.
    fn flags(&self, nearest: &Nearest) -> String {
        let mut flags = Vec::new();
        let train = &nearest.setup.train;
        if train.checkpointing != self.setup.train.checkpointing
            && let Some((name, _)) = MODES.iter().find(|(_, mode)| *mode == train.checkpointing)
        {
            flags.push(format!("--gradient-checkpointing {name}"));
        }
        if nearest.parts > 1 {
            let batch = self.batch.div_ceil(nearest.parts);
            let accumulation = self.accumulation * nearest.parts;
            flags.push(format!("--batch-size {batch} --gradient-accumulation-steps {accumulation}"));
            // Where it does not follow the batch.
            if !self.setup.evaluation.is_empty() && train.eval_batch_size != self.batch {
                flags.push(format!("--per-device-eval-batch-size {}", train.eval_batch_size.div_ceil(nearest.parts)));
            }
        }
        if train.optim != self.setup.train.optim {
            flags.push(format!("--optim {}", train.optim));
        }
        if let Some(length) = nearest.max_length {
            flags.push(format!("--max-length {length}"));
        }
        flags.join(" ")
    }
}

/// Name and bytes of what takes any.
fn components(found: &Footprint) -> Vec<(String, usize)> {
    let all = COMPONENTS.iter().zip(found.components());
    all.filter(|(_, bytes)| *bytes > 0).map(|(name, bytes)| ((*name).to_owned(), bytes)).collect()
}

/// One line about it.
pub(super) fn line(found: &Footprint) -> String {
    let parts: Vec<String> = components(found).into_iter().map(|(name, bytes)| format!("{name} {}", ui::bytes(bytes))).collect();
    format!("about {}: {}", ui::bytes(found.peak), parts.join(", "))
}

fn document(example: &Example) -> Document {
    let learned = example.labels.iter().skip(1).filter(|&&label| label != IGNORE_INDEX).count();
    Document { tokens: example.tokens.len(), learned }
}

/// The documents of the largest micro-batch of `batch_size` there is, in the order of the file.
pub(super) fn largest_in_order(data: &Dataset, batch_size: usize) -> Vec<Document> {
    let documents: Vec<Document> = data.examples().iter().map(document).filter(|document| document.tokens > 0).collect();
    let tokens = |batch: &&[Document]| batch.iter().map(|document| document.tokens).sum::<usize>();
    documents.chunks(batch_size.max(1)).max_by_key(tokens).map(<[Document]>::to_vec).unwrap_or_default()
}

/// The documents of the largest micro-batch there can be.
pub(super) fn largest_batch(data: &Dataset, loader: LoaderOptions) -> Vec<Document> {
    let mut documents: Vec<Document> = data.examples().iter().map(document).filter(|document| document.tokens > 0).collect();
    documents.sort_by_key(|document| std::cmp::Reverse(document.tokens));
    match loader.packer {
        Packer::Documents { batch_size } => documents.truncate(batch_size),
        Packer::BestFitDecreasing { budget } => {
            let mut room = budget;
            documents.retain(|document| {
                let fits = document.tokens <= room;
                room -= if fits { document.tokens } else { 0 };
                fits
            });
        }
    }
    documents
}
