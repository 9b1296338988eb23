//! What a merge did, in numbers.

use nibble_nf4::{Format, QuantConfig};

use super::tensors::Measured;
use crate::{
    args::{MergeArgs, MergeBase, MergeDtype},
    ui,
};

/// Says it.
pub(super) fn say(measured: &Measured, args: &MergeArgs, quant: Option<QuantConfig>, unties: bool) {
    ui::fact("update", format_args!("||dW|| / ||W|| = {} over {} layers", percent(measured.relative_update()), measured.layers));
    if let Some(surviving) = measured.surviving() {
        let (changed, updated) = (ui::count(measured.changed), ui::count(measured.updated));
        ui::fact(
            "rounding",
            format_args!(
                "{} of the update is in the result, {changed} of {updated} weights moved; rounding error {} of the update",
                percent(surviving),
                percent(measured.relative_rounding())
            ),
        );
        if surviving < 0.5 {
            ui::warn("most of the update was rounded away: write it with `--dtype f32`, or keep the adapter beside the model");
        }
    } else if measured.layers > 0 {
        ui::warn("the update is zero: the adapter has not been trained");
    }
    if let Some(quant) = quant {
        say_base(measured, args.base, quant);
    }
    if unties {
        ui::fact("untied", "embedding and head are two tensors now (tie_word_embeddings: false)");
    }
    if args.dtype == MergeDtype::F16 {
        ui::fact("dtype", "f16 holds numbers up to 65504; activations of models made for bf16 may be larger");
    }
}

fn say_base(measured: &Measured, base: MergeBase, quant: QuantConfig) {
    let format = match quant.format {
        Format::Nf4 => "nf4",
        Format::Fp4 => "fp4",
    };
    let gap = percent(measured.relative_quantization());
    match base {
        MergeBase::Original => {
            ui::fact("base", format_args!("original weights; the {format} ones differ by ||W - dequant(W)|| / ||W|| = {gap}"));
            ui::fact(
                "note",
                format_args!(
                    "an adapter trained beside {format} weights has not seen the original ones: compare `nibble eval` of both \
                 (`--base dequantized` merges into what was trained; `--quant none` if the base was not quantised)"
                ),
            );
        }
        MergeBase::Dequantized => {
            ui::fact("base", format_args!("{format} weights, dequantised; the original ones differ by {gap}"));
        }
    }
}

fn percent(part: f64) -> String {
    format!("{:.2} %", 100.0 * part)
}
