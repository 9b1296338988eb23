//! What a run on a GPU leaves with the host, in memory that is locked for it: neither swapped nor lent to others.

use nibble_train::plan::{HostBytes, Place, footprint};

use super::memory::Planned;
use crate::error::{CliError, Result};

impl Planned {
    /// Whether the host has the memory that the run leaves with it; `available` where the system tells.
    ///
    /// # Errors
    /// [`CliError::HostDoesNotFit`].
    pub(super) fn check_host(&self, available: Option<usize>) -> Result<()> {
        let (Place::Gpu(gpu), Some(room)) = (self.place(), available) else { return Ok(()) };
        // What the device has decides how much stays on it. A run that is a little too large for it is somebody else's concern.
        let device = gpu.device(self.room()?.unwrap_or(usize::MAX));
        let held = match footprint(&self.model, &device, &self.setup) {
            Ok(found) => found.host,
            Err(error) if error.is_out_of_memory() => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if held.total() <= room {
            return Ok(());
        }
        let HostBytes { weights, activations, optimizer } = held;
        let all = [("weights of blocks", weights), ("activations", activations), ("pages of the optimizer", optimizer)];
        let mut owners: Vec<(String, usize)> =
            all.into_iter().filter(|(_, bytes)| *bytes > 0).map(|(name, bytes)| (name.to_owned(), bytes)).collect();
        owners.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        Err(CliError::HostDoesNotFit { needed: held.total(), room, owners })
    }
}

#[cfg(test)]
mod tests {
    use nibble_data::{LoaderOptions, Packer};
    use nibble_lora::{AdapterConfig, TargetModules};
    use nibble_model::{Checkpointing, LoadOptions, config::ModelConfig};
    use nibble_nf4::QuantConfig;
    use nibble_optim::{OptimizerName, Paging};
    use nibble_tensor::{DType, Device, cuda::CudaDevice};
    use nibble_train::{
        TrainConfig,
        plan::{self, Document, Gpu, Setup},
    };

    use super::*;

    /// Two documents of 4,096 tokens on a card of 80 GiB.
    fn planned(model: &ModelConfig) -> Planned {
        let target_modules = Some(TargetModules::Pattern(TargetModules::ALL_LINEAR.to_owned()));
        let quant = Some(QuantConfig::default());
        let setup = Setup {
            load: LoadOptions { quant, compute_dtype: DType::Bf16, max_positions: 4096, blocks_on_host: 0 },
            adapter: Some(AdapterConfig { r: 16, target_modules, ..AdapterConfig::default() }),
            documents: vec![Document { tokens: 4096, learned: 4095 }; 2],
            evaluation: Vec::new(),
            train: TrainConfig { checkpointing: Checkpointing::Full, ..TrainConfig::default() },
        };
        let device = Device::Cuda(CudaDevice::dry(&Gpu::of_memory(0).device(80 << 30)));
        let loader = LoaderOptions { packer: Packer::Documents { batch_size: 2 }, seed: 0, shuffle: false };
        let adapter = AdapterConfig::default();
        Planned { model: model.clone(), setup, adapter, loader, batch: 2, accumulation: 1, device, memory_limit: None }
    }

    #[test]
    fn a_run_that_leaves_nothing_with_the_host_needs_none_of_it() {
        let model = plan::named_size("7B").unwrap().unwrap();
        planned(&model).check_host(Some(0)).unwrap();
    }

    #[test]
    fn what_waits_on_the_host_is_counted_by_what_it_is() {
        let model = plan::named_size("7B").unwrap().unwrap();
        let needs = |change: &dyn Fn(&mut Setup)| {
            let mut planned = planned(&model);
            change(&mut planned.setup);
            match planned.check_host(Some(0)) {
                Err(CliError::HostDoesNotFit { needed, room: 0, owners }) => {
                    planned.check_host(Some(needed)).unwrap();
                    assert!(planned.check_host(Some(needed - 1)).is_err());
                    planned.check_host(None).unwrap();
                    (owners[0].0.clone(), needed, owners.len())
                }
                other => panic!("{other:?}"),
            }
        };
        // A block's input, in 16 bits.
        let inputs = model.num_hidden_layers * 2 * 4096 * model.hidden_size * 2;
        let (name, needed, _) = needs(&|setup| setup.train.checkpointing = Checkpointing::Offload);
        assert!(name == "activations" && (inputs..inputs + inputs / 4).contains(&needed), "{needed} of {inputs}");
        let (name, four, _) = needs(&|setup| setup.load.blocks_on_host = 4);
        let (_, eight, _) = needs(&|setup| setup.load.blocks_on_host = 8);
        assert_eq!((name.as_str(), eight), ("weights of blocks", 2 * four));
        let paged = |setup: &mut Setup| {
            setup.train.optim = OptimizerName::PagedAdamW32bit;
            setup.train.optim_paging = Paging { device_memory: Some(32 << 20), ..Paging::default() };
        };
        assert_eq!(needs(&paged).0, "pages of the optimizer");
        let both = |setup: &mut Setup| {
            paged(setup);
            setup.load.blocks_on_host = 4;
        };
        assert_eq!(needs(&both).2, 2);
    }
}
