//! From flags as typed to what a run uses. Nothing is read from disk here.

use nibble_data::{LoaderOptions, Packer};
use nibble_lora::{AdapterConfig, TargetModules};
use nibble_model::Checkpointing;
use nibble_optim::{Paging, ScheduleName};
use nibble_tensor::Device;
use nibble_train::TrainConfig;

use crate::{
    args::{GradientCheckpointing, OffloadWeights, TrainArgs},
    base::Precision,
    error::{CliError, Result},
};

/// Rank of an adapter, unless asked otherwise.
const DEFAULT_R: usize = 16;
/// Its alpha.
const DEFAULT_ALPHA: f64 = 32.0;
/// Documents of a forward pass.
const DEFAULT_BATCH: usize = 8;

/// What a run uses.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Settings {
    /// How the model is held.
    pub(crate) precision: Precision,
    /// The adapter to make; none: the one that `--adapter` names.
    pub(crate) adapter: Option<AdapterConfig>,
    /// The loop.
    pub(crate) config: TrainConfig,
    /// The order and grouping of examples, once the longest of a pack is known.
    pub(crate) loader: Loader,
    /// The most memory that tensors may take, in bytes.
    pub(crate) memory_limit: Option<usize>,
    /// Blocks whose weights wait on the host.
    pub(crate) offload_weights: OffloadWeights,
}

/// How examples are grouped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loader {
    /// Documents, or packs of `max_length` tokens.
    pub(crate) batch_size: usize,
    /// Whether those are packs.
    pub(crate) packing: bool,
    /// Whether each epoch has its own order.
    pub(crate) shuffle: bool,
    /// The seed of the order.
    pub(crate) seed: u64,
}

impl Loader {
    /// With `max_length` tokens in a pack. Documents of a stream need no padding and do not see each other, so several packs
    /// of a forward pass are one larger pack.
    pub(crate) fn options(self, max_length: usize) -> LoaderOptions {
        let packer = if self.packing {
            Packer::BestFitDecreasing { budget: self.batch_size.saturating_mul(max_length) }
        } else {
            Packer::Documents { batch_size: self.batch_size }
        };
        LoaderOptions { packer, seed: self.seed, shuffle: self.shuffle }
    }
}

impl Settings {
    /// # Errors
    /// Flags that contradict each other, or would do nothing.
    pub(crate) fn from_args(args: &TrainArgs) -> Result<Self> {
        refuse_idle_flags(args)?;
        let packing = args.data.packing;
        let loader = Loader {
            batch_size: args.per_device_train_batch_size.unwrap_or(if packing { 1 } else { DEFAULT_BATCH }),
            packing,
            shuffle: !args.data.no_shuffle,
            seed: args.seed,
        };
        let config = train_config(args, loader.batch_size);
        // A schedule or an optimizer that cannot be is said before anything is read.
        config.schedule(1)?;
        config.optimizer()?;
        let precision = Precision::from_args(&args.precision)?;
        config.check_paging(precision.device, precision.compute_dtype)?;
        if !matches!(args.data.offload_weights, OffloadWeights::Auto | OffloadWeights::Blocks(0)) {
            let idle = [(precision.quant.is_none(), "--quant none"), (precision.device == Device::Cpu, "--device cpu")];
            if let Some((_, with)) = idle.into_iter().find(|(idle, _)| *idle) {
                return Err(CliError::NoEffect { flag: "--offload-weights", with });
            }
        }
        Ok(Self {
            precision,
            adapter: if args.adapter.is_some() { None } else { Some(adapter_config(args)) },
            config,
            loader,
            memory_limit: args.data.memory_limit,
            offload_weights: args.data.offload_weights,
        })
    }
}

fn refuse_idle_flags(args: &TrainArgs) -> Result<()> {
    let lora = &args.lora;
    let given = [
        ("--lora-r", lora.lora_r.is_some()),
        ("--lora-alpha", lora.lora_alpha.is_some()),
        ("--lora-dropout", lora.lora_dropout.is_some()),
        ("--use-rslora", lora.use_rslora),
        ("--target-modules", lora.target_modules.is_some()),
        ("--exclude-modules", lora.exclude_modules.is_some()),
        ("--modules-to-save", !lora.modules_to_save.is_empty()),
        ("--layers-to-transform", !lora.layers_to_transform.is_empty()),
    ];
    let flags: Vec<_> = given.into_iter().filter_map(|(flag, given)| given.then_some(flag)).collect();
    if let Some(adapter) = args.adapter.clone().filter(|_| !flags.is_empty()) {
        return Err(CliError::AdapterFlags { flags, adapter });
    }
    if !args.optim.is_paged() {
        let given = [
            ("--optim-device-memory", args.optim_device_memory.is_some()),
            ("--optim-page-file", args.optim_page_file.is_some()),
            ("--optim-page-masters", args.optim_page_masters),
        ];
        if let Some((flag, _)) = given.into_iter().find(|(_, given)| *given) {
            return Err(CliError::NotPaged { flag, optim: args.optim });
        }
    }
    let with = "--lr-scheduler-type constant";
    if args.lr_scheduler_type == ScheduleName::Constant {
        if args.warmup_steps.is_some() {
            return Err(CliError::NoEffect { flag: "--warmup-steps", with });
        }
        if args.warmup_ratio.is_some() {
            return Err(CliError::NoEffect { flag: "--warmup-ratio", with });
        }
    }
    Ok(())
}

fn adapter_config(args: &TrainArgs) -> AdapterConfig {
    let lora = &args.lora;
    let layers = &lora.layers_to_transform;
    AdapterConfig {
        r: lora.lora_r.unwrap_or(DEFAULT_R),
        lora_alpha: lora.lora_alpha.unwrap_or(DEFAULT_ALPHA),
        lora_dropout: lora.lora_dropout.unwrap_or(0.0),
        use_rslora: lora.use_rslora,
        target_modules: Some(modules(lora.target_modules.as_deref().unwrap_or(TargetModules::ALL_LINEAR))),
        exclude_modules: lora.exclude_modules.as_deref().map(modules),
        modules_to_save: (!lora.modules_to_save.is_empty()).then(|| lora.modules_to_save.clone()),
        // The type of a list of layers has no public name; its JSON has.
        layers_to_transform: (!layers.is_empty()).then(|| serde_json::from_value(layers.clone().into()).ok()).flatten(),
        ..AdapterConfig::default()
    }
}

/// Names with commas between, unless it is `all-linear` or has a character that only regular expressions have.
pub(in crate::commands) fn modules(text: &str) -> TargetModules {
    let is_pattern =
        text == TargetModules::ALL_LINEAR || text.contains(['*', '+', '?', '(', ')', '[', ']', '{', '}', '|', '^', '$', '\\']);
    if is_pattern {
        return TargetModules::Pattern(text.to_owned());
    }
    TargetModules::Names(text.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

fn train_config(args: &TrainArgs, batch_size: usize) -> TrainConfig {
    TrainConfig {
        num_train_epochs: args.num_train_epochs.unwrap_or(3.0),
        max_steps: args.max_steps,
        gradient_accumulation_steps: args.gradient_accumulation_steps,
        learning_rate: args.learning_rate,
        lr_scheduler_type: args.lr_scheduler_type,
        lr_scheduler_kwargs: args.lr_scheduler_kwargs,
        warmup_steps: args.warmup_steps.unwrap_or(0),
        warmup_ratio: args.warmup_ratio.unwrap_or(0.0),
        weight_decay: args.weight_decay,
        max_grad_norm: args.max_grad_norm,
        optim: args.optim,
        optim_args: args.optim_args.clone(),
        optim_paging: Paging {
            device_memory: args.optim_device_memory,
            file: args.optim_page_file.clone(),
            masters: args.optim_page_masters,
            ..Paging::default()
        },
        checkpointing: match args.gradient_checkpointing {
            GradientCheckpointing::None => Checkpointing::None,
            GradientCheckpointing::Selective => Checkpointing::Selective,
            GradientCheckpointing::Full => Checkpointing::Full,
            GradientCheckpointing::Offload => Checkpointing::Offload,
            GradientCheckpointing::Auto => Checkpointing::Auto,
        },
        seed: args.seed,
        logging_steps: args.logging_steps,
        eval_steps: args.eval_steps,
        eval_batch_size: args.per_device_eval_batch_size.unwrap_or(batch_size),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use nibble_optim::ScheduleOptions;

    use super::*;
    use crate::args::{Cli, Command};

    fn args(flags: &str) -> TrainArgs {
        let line = format!("nibble train --model m --data d --output o {flags}");
        match Cli::try_parse_from(line.split_whitespace()).unwrap().command {
            Some(Command::Train(args)) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn settings(flags: &str) -> Result<Settings> {
        Settings::from_args(&args(flags))
    }

    #[test]
    fn a_schedule_takes_its_own_options_and_no_other() {
        let options =
            settings("--lr-scheduler-type cosine_with_min_lr --lr-scheduler-kwargs {\"min_lr_rate\":0.1}").unwrap().config;
        assert_eq!(options.lr_scheduler_kwargs.min_lr_rate, Some(0.1));
        assert!(settings("--lr-scheduler-type cosine_with_min_lr").is_err());
        assert!(settings("--lr-scheduler-kwargs {\"power\":2}").is_err());
    }

    #[test]
    fn an_optimizer_takes_its_own_arguments_and_pages_if_it_has_any() {
        let error = |flags| settings(flags).unwrap_err().to_string();
        assert!(error("--optim lion_8bit --optim-args eps=1").contains("takes no argument `eps`"));
        assert!(error("--optim adamw_8bit --optim-device-memory 1GiB").contains("--optim-device-memory"));
        assert!(error("--optim adamw_8bit --optim-page-file f").contains("--optim-page-file"));
        assert!(settings("--optim adafactor --optim-args clip_threshold=2").is_ok());
    }

    #[test]
    fn pages_that_cannot_be_are_refused_before_anything_is_read() {
        let error = |flags| settings(&format!("--device cpu --optim paged_adamw_8bit {flags}")).unwrap_err().to_string();
        assert!(error("--optim-device-memory 1GiB").contains("optim_page_file"));
        assert!(error("--optim-page-masters").contains("optim_page_masters"));
        assert!(error("--optim-page-masters --optim-page-file f").contains("optim_page_masters"));
        assert!(settings("--device cpu --optim paged_adamw_8bit --optim-device-memory 1GiB --optim-page-file f").is_ok());
    }

    #[test]
    fn every_training_flag_reaches_the_config() {
        let flags = "--max-steps 7 --gradient-accumulation-steps 3 --lr 0.5 --lr-scheduler-type cosine --warmup-steps 2 \
                     --weight-decay 0.25 --max-grad-norm 0.3 --optim paged_adamw_8bit --optim-args betas=0.9,0.95 \
                     --optim-device-memory 1KiB --optim-page-file pages --optim-page-masters --gradient-checkpointing --seed 9 --logging-steps 4 \
                     --eval-data e --eval-steps 5 --per-device-eval-batch-size 6";
        // Pages of all kinds at once are for no device.
        let config = train_config(&args(flags), 1);
        let expected = TrainConfig {
            num_train_epochs: 3.0,
            max_steps: Some(7),
            gradient_accumulation_steps: 3,
            learning_rate: 0.5,
            lr_scheduler_type: ScheduleName::Cosine,
            lr_scheduler_kwargs: ScheduleOptions::default(),
            warmup_steps: 2,
            warmup_ratio: 0.0,
            weight_decay: 0.25,
            max_grad_norm: 0.3,
            optim: nibble_optim::OptimizerName::PagedAdamW8bit,
            optim_args: "betas=0.9,0.95".to_owned(),
            optim_paging: Paging { device_memory: Some(1024), file: Some("pages".into()), masters: true, page: None },
            checkpointing: Checkpointing::Full,
            seed: 9,
            logging_steps: 4,
            eval_steps: Some(5),
            eval_batch_size: 6,
        };
        assert_eq!(config, expected);
        let other = settings("--num-train-epochs 0.5 --warmup-ratio 0.1").unwrap().config;
        assert_eq!((other.num_train_epochs, other.warmup_ratio, other.max_steps), (0.5, 0.1, None));
    }

    #[test]
    fn an_evaluation_takes_as_many_documents_as_a_step_unless_asked() {
        let size = |flags: &str| settings(&format!("--eval-data e {flags}")).unwrap().config.eval_batch_size;
        assert_eq!((size(""), size("--batch-size 1"), size("--packing")), (DEFAULT_BATCH, 1, 1));
        assert_eq!(size("--batch-size 1 --per-device-eval-batch-size 4"), 4);
    }

    #[test]
    fn every_adapter_flag_reaches_the_adapter() {
        let flags = "--lora-r 4 --lora-alpha 6 --lora-dropout 0.1 --use-rslora --target-modules q_proj,v_proj \
                     --exclude-modules .*\\.0\\..* --modules-to-save lm_head,embed_tokens --layers-to-transform 1,2";
        let adapter = settings(flags).unwrap().adapter.unwrap();
        assert_eq!((adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.use_rslora), (4, 6.0, 0.1, true));
        assert_eq!(adapter.target_modules, Some(TargetModules::Names(vec!["q_proj".into(), "v_proj".into()])));
        assert_eq!(adapter.exclude_modules, Some(TargetModules::Pattern(".*\\.0\\..*".into())));
        assert_eq!(adapter.modules_to_save, Some(vec!["lm_head".into(), "embed_tokens".into()]));
        assert_eq!(adapter.layers_to_transform.unwrap().as_slice(), [1, 2]);
        let default = settings("").unwrap().adapter.unwrap();
        assert_eq!(default.target_modules, Some(TargetModules::Pattern("all-linear".into())));
        assert_eq!((default.r, default.lora_alpha), (16, 32.0));
    }

    #[test]
    fn packs_of_a_batch_are_one_budget() {
        let loader = |flags| settings(flags).unwrap().loader.options(100);
        assert_eq!(loader("").packer, Packer::Documents { batch_size: 8 });
        assert_eq!(loader("--packing").packer, Packer::BestFitDecreasing { budget: 100 });
        assert_eq!(loader("--packing --batch-size 4").packer, Packer::BestFitDecreasing { budget: 400 });
        let LoaderOptions { seed, shuffle, .. } = loader("--no-shuffle --seed 7");
        assert_eq!((seed, shuffle), (7, false));
    }

    #[test]
    fn an_adapters_own_config_wins_and_flags_against_it_are_all_named() {
        assert_eq!(settings("--adapter a").unwrap().adapter, None);
        let error = settings("--adapter a --lora-r 4 --use-rslora").unwrap_err().to_string();
        assert!(error.contains("`--lora-r`, `--use-rslora`"), "{error}");
    }

    #[test]
    fn weights_wait_on_the_host_for_a_gpu_and_in_4_bits() {
        for flags in ["--device cpu --offload-weights 2", "--device cpu --quant none --offload-weights 2"] {
            assert!(settings(flags).unwrap_err().to_string().contains("`--offload-weights`"));
        }
        let offload = |flags| settings(flags).unwrap().offload_weights;
        assert_eq!(offload("--device cpu"), OffloadWeights::Auto);
        assert_eq!(offload("--device cpu --offload-weights none"), OffloadWeights::Blocks(0));
        let line = "nibble train --model m --data d --output o --offload-weights some";
        assert!(Cli::try_parse_from(line.split_whitespace()).is_err());
    }

    #[test]
    fn a_warmup_that_the_schedule_does_not_have_is_refused() {
        assert!(settings("--lr-scheduler-type constant --warmup-steps 3").is_err());
        assert!(settings("--lr-scheduler-type constant_with_warmup --warmup-steps 3").is_ok());
    }
}
