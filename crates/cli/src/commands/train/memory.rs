//! What a run takes: planned before anything is loaded, and refused if it cannot fit.

use nibble_data::{Dataset, Example, IGNORE_INDEX, LoaderOptions, Packer};
use nibble_lora::AdapterConfig;
use nibble_model::{Checkpointing, config::ModelConfig};
use nibble_tensor::{Device, Error as TensorError};
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
pub(super) struct Planned {
    pub(super) model: ModelConfig,
    pub(super) setup: Setup,
    /// The adapter, as in the setup.
    pub(super) adapter: AdapterConfig,
    /// The order and grouping of examples.
    pub(super) loader: LoaderOptions,
    /// Documents of a micro-batch, as the command line counts them.
    pub(super) batch: usize,
    /// Micro-batches of a step.
    pub(super) accumulation: usize,
    pub(super) device: Device,
    pub(super) memory_limit: Option<usize>,
}

impl Planned {
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
        let needed = place.needed(&self.model, &least)?;
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
            nearest: self.nearest(&self.setup, room)?,
        })
    }

    /// The fewest blocks whose weights must wait on the host for the run to fit; none where that does not help, or on the processor.
    pub(super) fn blocks_on_host(&self) -> Result<usize> {
        let (place, blocks) = (self.place(), self.model.num_hidden_layers);
        let Some(room) = self.room()?.filter(|_| place != Place::Cpu && self.setup.load.quant.is_some()) else { return Ok(0) };
        let fits = |count| place.fits(&self.model, &self.setup.with_blocks_on_host(count), room);
        if fits(0)? {
            return Ok(0);
        }
        Ok(plan::fewest_on_host(blocks, fits)?.unwrap_or(0))
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

    /// The flags of the nearest run to `setup` that fits, where there is one.
    fn nearest(&self, setup: &Setup, room: usize) -> Result<Option<String>> {
        let place = self.place();
        let blocks = if place == Place::Cpu { 0 } else { self.model.num_hidden_layers };
        if let Some(flag) = self.smaller_evaluation(setup, room)? {
            return Ok(Some(flag));
        }
        let fits = |setup: &Setup| place.fits(&self.model, setup, room);
        let nearest = plan::nearest(setup, self.batch, blocks, fits)?;
        Ok(nearest.map(|nearest| self.flags(&nearest)).filter(|flags| !flags.is_empty()))
    }

    /// An error with the nearest run that fits, if it is that the device's memory ran out in this run, which was planned to take `planned`.
    pub(super) fn with_nearest(&self, mut error: CliError, planned: &Footprint) -> CliError {
        let out = error.out_of_memory().filter(|out| !matches!(out, TensorError::OutOfHostMemory { .. }));
        let Some(room) = out.map(|out| shrunk(planned.device, out)) else { return error };
        if let Some(nearest) = error.nearest_mut() {
            *nearest = self.nearest(&self.fixed(), room).unwrap_or_default();
        }
        error
    }

    /// The same with a kind of checkpointing that does not take what there is, which was not there.
    fn fixed(&self) -> Setup {
        let mut setup = self.setup.clone();
        if setup.train.checkpointing == Checkpointing::Auto {
            setup.train.checkpointing = Checkpointing::Selective;
        }
        setup
    }

    /// The flag of the largest micro-batch of an evaluation of `setup` that fits, where the steps do and the evaluation does not.
    fn smaller_evaluation(&self, setup: &Setup, room: usize) -> Result<Option<String>> {
        let fits = |documents: usize| {
            let mut setup = setup.clone();
            setup.evaluation.sort_by_key(|document| std::cmp::Reverse(document.tokens));
            setup.evaluation.truncate(documents);
            self.place().fits(&self.model, &setup, room)
        };
        let all = setup.evaluation.len();
        let sizes = std::iter::successors(Some(all / 2), |size| Some(size / 2));
        if fits(all)? || !fits(0)? {
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
        if nearest.setup.load.blocks_on_host != self.setup.load.blocks_on_host {
            flags.push(format!("--offload-weights {}", nearest.setup.load.blocks_on_host));
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

/// The room that a plan must fit into after a run that was planned to take `planned` bytes found too few: less by the share that it lacked
/// of what it had taken and asked for, and a little more, since it was not done.
fn shrunk(planned: usize, out: &TensorError) -> usize {
    const MORE: f64 = 0.97;
    let (room, wanted) = match *out {
        TensorError::OutOfMemory { requested, live, limit, .. } => (limit, live.saturating_add(requested)),
        _ => (planned, planned),
    };
    (planned.min(room) as f64 * (room as f64 / wanted.max(1) as f64).min(1.0) * MORE) as usize
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

#[cfg(test)]
mod tests {
    use nibble_lora::TargetModules;
    use nibble_model::LoadOptions;
    use nibble_nf4::QuantConfig;
    use nibble_tensor::{Arena, DType, cuda::CudaDevice};
    use nibble_train::TrainConfig;

    use super::*;

    /// A 13B model with 16 documents of 2,048 tokens on a card of so much memory.
    fn planned(model: &ModelConfig, memory: usize) -> Planned {
        let target_modules = Some(TargetModules::Pattern(TargetModules::ALL_LINEAR.to_owned()));
        let load = LoadOptions {
            quant: Some(QuantConfig::default()),
            compute_dtype: DType::Bf16,
            max_positions: 2048,
            blocks_on_host: 0,
        };
        let setup = Setup {
            load,
            adapter: Some(AdapterConfig { r: 16, target_modules, ..AdapterConfig::default() }),
            documents: vec![Document { tokens: 2048, learned: 2047 }; 16],
            evaluation: Vec::new(),
            train: TrainConfig { checkpointing: Checkpointing::Full, ..TrainConfig::default() },
        };
        let device = Device::Cuda(CudaDevice::dry(&Gpu::of_memory(0).device(memory)));
        let loader = LoaderOptions { packer: Packer::Documents { batch_size: 16 }, seed: 0, shuffle: false };
        let adapter = AdapterConfig::default();
        Planned { model: model.clone(), setup, adapter, loader, batch: 16, accumulation: 2, device, memory_limit: None }
    }

    #[test]
    fn a_refusal_on_a_gpu_names_weights_on_the_host_where_these_make_it_fit() {
        let model = plan::named_size("13B").unwrap().unwrap();
        let planned = planned(&model, 6 << 30);
        let Err(CliError::DoesNotFit { nearest: Some(flags), .. }) = planned.check() else { panic!("it fits") };
        let words: Vec<&str> = flags.split(' ').collect();
        let at = words.iter().position(|word| *word == "--offload-weights").expect("weights on the host");
        let blocks: usize = words[at + 1].parse().unwrap();
        assert!((1..=40).contains(&blocks), "{flags}");
        // As said it fits.
        let value = |flag| words.iter().position(|word| *word == flag).map(|at| words[at + 1].parse::<usize>().unwrap());
        let mut said = planned;
        said.setup.load.blocks_on_host = blocks;
        said.setup.documents.truncate(value("--batch-size").unwrap_or(16));
        assert!(flags.contains("--gradient-checkpointing offload"), "{flags}");
        said.setup.train.checkpointing = Checkpointing::Offload;
        said.check().unwrap();
    }

    #[test]
    fn blocks_are_on_the_host_only_where_that_makes_a_run_fit() {
        let model = plan::named_size("13B").unwrap().unwrap();
        let count = |memory| planned(&model, memory).blocks_on_host().unwrap();
        assert_eq!((count(80 << 30), count(2 << 30)), (0, 0));
        assert!((1..=40).contains(&count(24 << 30)));
    }

    #[test]
    fn after_memory_ran_out_what_fits_is_smaller_than_what_did_not() {
        let model = plan::named_size("13B").unwrap().unwrap();
        let mut planned = planned(&model, 80 << 30);
        // Takes what there is, so that only another kind can take less.
        planned.setup.train.checkpointing = Checkpointing::Auto;
        let held = planned.check().unwrap();
        let full = held.device;
        // An evaluation that is no larger than a step is not at fault.
        planned.setup.evaluation = planned.setup.documents.clone();
        let arena = Arena::new(Device::Cpu);
        let out = |error| CliError::Tensor(error).with_owners(&arena);
        let limit = full + full / 100;
        let in_arena = TensorError::OutOfMemory { device: "cuda:0".into(), requested: limit / 20, live: limit, limit };
        for error in [in_arena, TensorError::DriverOutOfMemory { call: "cuGraphInstantiate" }] {
            let room = shrunk(full, &error);
            assert!(room < full && room > full * 9 / 10, "{room} of {full}");
            let error = planned.with_nearest(out(error), &held);
            let hint = error.hint().unwrap();
            assert!(hint.starts_with("what fits: `--gradient-checkpointing "), "{hint}");
        }
        let other = planned.with_nearest(CliError::NoEffect { flag: "--a", with: "--b" }, &held);
        assert!(matches!(other, CliError::NoEffect { .. }));
    }
}
