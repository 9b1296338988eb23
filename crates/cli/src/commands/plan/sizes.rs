//! Without a model: which sizes of models fit which sizes of GPUs.

use std::fmt::Write as _;

use nibble_model::LoadOptions;
use nibble_train::plan::{Method, SizeRow, size_table};
use serde_json::{Value, json};

use super::{gb, html};
use crate::{
    args::PlanArgs,
    error::{Result, io_error},
    ui,
};

/// Memory of the usual cards, in GB as they are sold (GiB).
pub(super) const CARDS: [usize; 10] = [4, 6, 8, 12, 16, 24, 32, 40, 48, 80];
/// Tokens of a document, unless asked otherwise: what every model of the table has positions for.
const LENGTH: usize = 1024;

/// Writes the table.
///
/// # Errors
/// When it cannot be written.
pub(super) fn show(load: LoadOptions, args: &PlanArgs) -> Result<()> {
    let length = args.max_length.unwrap_or(LENGTH);
    let rows = size_table(load, length)?;
    if let Some(path) = &args.html {
        std::fs::write(path, html::sizes(&rows, length)).map_err(io_error("write", path))?;
        ui::fact("page", path.display());
    }
    if args.json { ui::line(json(&rows, length)) } else { ui::write(text(&rows, length)) }
}

/// The word for a cell.
pub(super) fn choice(row: &SizeRow, gib: usize) -> &'static str {
    row.choice(gib << 30).map_or("-", Method::name)
}

fn text(rows: &[SizeRow], length: usize) -> String {
    let mut out = format!("The method that trains the most, by size of model and memory of the GPU in GB\n\n{:<6}", "");
    out.extend(CARDS.iter().map(|card| format!("{card:>7}")));
    let _ = writeln!(out, "   {:>9}{:>9}{:>9}", "QLoRA GB", "LoRA GB", "full GB");
    for row in rows {
        let _ = write!(out, "{:<6}", row.name);
        out.extend(CARDS.iter().map(|&card| format!("{:>7}", choice(row, card))));
        out.push_str("   ");
        out.extend(Method::ALL.iter().map(|&method| format!("{:>9}", gb(row.memory(method)))));
        out.push('\n');
    }
    let _ = write!(
        out,
        "\nOne document of {length} tokens, full checkpointing, bf16, AdamW with f32 states; adapters of rank 16 on all linear layers.\n\
         full: every weight is trained, with f32 values; it is shown to compare: `nibble train` trains adapters.\n\
         `nibble plan --model MODEL --gpu GPU` plans for one model.\n"
    );
    out
}

fn json(rows: &[SizeRow], length: usize) -> String {
    let row = |row: &SizeRow| {
        let needed: serde_json::Map<String, Value> =
            Method::ALL.iter().map(|&method| (method.name().to_owned(), row.memory(method).into())).collect();
        let cards: serde_json::Map<String, Value> =
            CARDS.iter().map(|&card| (card.to_string(), row.choice(card << 30).map(Method::name).into())).collect();
        json!({ "model": row.name, "memory": needed, "choice_by_gib": cards })
    };
    let value = json!({ "max_length": length, "batch_size": 1, "models": rows.iter().map(row).collect::<Vec<_>>() });
    serde_json::to_string_pretty(&value).unwrap_or_default()
}
