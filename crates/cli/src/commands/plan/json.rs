//! The plan for programs.

use nibble_train::plan::{COMPONENTS, MethodPlan, Mode, Streamed};
use serde_json::{Map, Value, json};

use super::Shown;

/// One JSON object; sizes are bytes.
pub(super) fn of(shown: &Shown) -> String {
    let request = &shown.request;
    let value = json!({
        "model": { "name": shown.model, "parameters": shown.parameters, "max_position_embeddings": shown.positions },
        "gpu": { "name": shown.gpu.name, "memory": shown.gpu.memory(), "room": shown.room },
        "step": {
            "batch_size": request.batch, "max_length": request.length, "lora_r": request.adapter.r,
            "target_modules": shown.target_modules, "optim": request.train.optim.as_str(),
            "compute_dtype": request.load.compute_dtype.to_string(),
        },
        "methods": shown.methods.iter().map(|plan| method(shown, plan)).collect::<Vec<_>>(),
    });
    serde_json::to_string_pretty(&value).unwrap_or_default()
}

fn method(shown: &Shown, plan: &MethodPlan) -> Value {
    let (best, fits) = shown.mode(plan);
    json!({
        "name": plan.method.name(),
        "fits": fits,
        "checkpointing": best.name,
        "offload_weights": best.streamed.map_or(0, |streamed| streamed.blocks),
        "command": shown.command(plan.method, best).filter(|_| fits),
        "modes": plan.modes.iter().map(|mode| of_mode(mode, shown.room)).collect::<Vec<_>>(),
    })
}

fn of_mode(mode: &Mode, room: usize) -> Value {
    let found = &mode.footprint;
    let components: Map<String, Value> =
        COMPONENTS.iter().zip(found.components()).map(|(name, bytes)| (name.replace(' ', "_"), bytes.into())).collect();
    let streamed = |of: fn(Streamed) -> Value| mode.streamed.map(of);
    json!({
        "checkpointing": mode.name,
        "offload_weights": streamed(|streamed| streamed.blocks.into()).unwrap_or(0.into()),
        "host_weights": streamed(|streamed| streamed.host_bytes.into()),
        "link_bytes_per_step": streamed(|streamed| streamed.step_bytes.into()),
        "link_seconds_per_step": streamed(|streamed| streamed.link_seconds.into()),
        "fits": found.device <= room,
        "peak": found.peak,
        "device": found.device,
        "components": components,
        "trained_parameters": found.trained,
        "longest_context": mode.longest,
        "largest_batch": mode.batch,
        "tokens_per_second": mode.tokens_per_second.map(f64::round),
    })
}
