//! `nibble eval`: loss and perplexity.

use nibble_train::{EvalStats, evaluate};

use super::generate::with_adapter;
use crate::{
    args::EvalArgs,
    base::{Base, Precision, load_options, open_adapter, warn_of_other_base},
    dataset::Reader,
    error::Result,
    ui,
};

/// # Errors
/// Whatever is wrong with the flags, the model, the adapter or the data.
pub(crate) fn run(args: &EvalArgs) -> Result<()> {
    let precision = Precision::from_args(&args.precision)?;
    let adapter = args.adapter.adapter.as_deref().map(open_adapter).transpose()?;
    let base = Base::open(&args.model.model)?;
    ui::fact("model", base.describe());
    if let Some(adapter) = &adapter {
        warn_of_other_base(adapter, base.name());
    }
    let mut reader = Reader::new(&base, args.data_format.as_deref(), args.max_length, args.train_on_prompt)?;
    let data = reader.read(&args.data)?;
    reader.report("data", &data);
    let arena = precision.arena(None)?;
    let measure = || -> Result<EvalStats> {
        let mut model = base.load(&arena, &load_options(&precision, data.summary().longest))?;
        let params = with_adapter(&mut model, adapter.as_ref(), &arena)?;
        ui::fact("compute", precision.describe());
        Ok(evaluate(&model, &params, &data, args.per_device_eval_batch_size)?)
    };
    let EvalStats { loss, perplexity, tokens } = measure().map_err(|error| error.with_owners(&arena))?;
    if args.json {
        return ui::line(serde_json::json!({ "loss": loss, "perplexity": perplexity, "tokens": tokens }));
    }
    ui::line(format_args!("loss {loss:.6}  perplexity {perplexity:.4}  tokens {tokens}"))
}
