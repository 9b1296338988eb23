//! The plan as a page: complete in one file, without scripts; bars are drawn and their numbers written beside them.

use std::fmt::Write as _;

use nibble_train::plan::{COMPONENTS, MethodPlan, Mode, SizeRow};

use super::{
    Shown, gb, gigabytes,
    sizes::{CARDS, choice},
};
use crate::ui;

/// Of [`COMPONENTS`]: told apart also by those who see fewer colours (Okabe and Ito).
const COLOURS: [&str; COMPONENTS.len()] = ["#0072b2", "#56b4e9", "#009e73", "#f0e442", "#e69f00", "#d55e00", "#999999"];
const WIDTH: f64 = 640.0;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}\
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;margin:.5rem 0}\
th,td{padding:.25rem .75rem;text-align:right;border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}\
th{white-space:nowrap}th:first-child,td:first-child{text-align:left}.no{color:#777}pre{background:#f4f4f4;padding:.75rem;white-space:pre-wrap}\
.key span{display:inline-block;margin-right:1rem}.key i{display:inline-block;width:.8em;height:.8em;margin-right:.3em;border:1px solid #555}\
figure{margin:.5rem 0}svg text{font:13px system-ui,sans-serif;fill:#222}";

/// The page of a model's plan.
pub(super) fn page(shown: &Shown) -> String {
    let request = &shown.request;
    let mut body = format!(
        "<h1>{}</h1><p>{}. {}, {}, of which {} for tensors. {} × {} tokens in {}, rank {} on {}, {}.</p>",
        escape(&shown.model),
        escape(&shown.describe),
        escape(shown.gpu.name),
        gigabytes(shown.gpu.memory()),
        gigabytes(shown.room),
        request.batch,
        request.length,
        request.load.compute_dtype,
        request.adapter.r,
        escape(&shown.target_modules),
        request.train.optim
    );
    body.push_str(&key());
    for method in &shown.methods {
        body.push_str(&section(shown, method));
    }
    if shown.gpu.tflops > 0.0 {
        body.push_str(
            "<p>Tokens a second are an estimate, from the GPU's data sheet and the share of it that was measured on an H200.</p>",
        );
    }
    document(&format!("Training {}", shown.model), &body)
}

/// The page of the table of sizes.
pub(super) fn sizes(rows: &[SizeRow], length: usize) -> String {
    let heads = CARDS.map(|card| format!("<th>{card} GB</th>")).concat();
    let row = |row: &SizeRow| {
        let cells = CARDS.map(|card| format!("<td>{}</td>", choice(row, card))).concat();
        format!("<tr><td>{}</td>{cells}</tr>", row.name)
    };
    let body = format!(
        "<h1>What fits which GPU</h1><p>The method that trains the most: one document of {length} tokens, full checkpointing, bf16, \
         AdamW with f32 states, adapters of rank 16 on all linear layers.</p><table><tr><th>model</th>{heads}</tr>{}</table>",
        rows.iter().map(row).collect::<String>()
    );
    document("What fits which GPU", &body)
}

fn document(title: &str, body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n",
        escape(title)
    )
}

fn key() -> String {
    let entry = |(colour, name): (&str, &str)| format!("<span><i style=\"background:{colour}\"></i>{name}</span>");
    format!("<p class=\"key\">{}</p>", COLOURS.into_iter().zip(COMPONENTS).map(entry).collect::<String>())
}

fn section(shown: &Shown, method: &MethodPlan) -> String {
    let (mode, fits) = shown.mode(method);
    let name = method.method.name();
    let says = if fits { format!("fits with checkpointing <b>{}</b>", mode.label()) } else { "does not fit".to_owned() };
    let bars: String = method.modes.iter().map(|mode| figure(shown, mode)).collect();
    let command = shown.command(method.method, mode).filter(|_| fits);
    let command = command.map_or_else(String::new, |command| format!("<pre>{}</pre>", escape(&command)));
    format!("<h2>{name}: {says}</h2>{bars}{}{command}", table(shown, method))
}

/// One bar: the line is the end of the memory.
fn figure(shown: &Shown, mode: &Mode) -> String {
    let most = shown.room.max(mode.footprint.peak).max(1) as f64;
    let scale = WIDTH / most;
    let mut x = 0.0;
    let mut parts = String::new();
    for ((bytes, colour), name) in mode.footprint.components().into_iter().zip(COLOURS).zip(COMPONENTS) {
        let width = bytes as f64 * scale;
        let _ = write!(
            parts,
            "<rect x=\"{x:.1}\" y=\"4\" width=\"{width:.1}\" height=\"20\" fill=\"{colour}\"><title>{name}: {}</title></rect>",
            gigabytes(bytes)
        );
        x += width;
    }
    let (end, label) = (shown.room as f64 * scale, format!("{} {}", mode.label(), gigabytes(mode.footprint.peak)));
    format!(
        "<figure><svg viewBox=\"-120 0 880 28\" width=\"100%\" role=\"img\" aria-label=\"{label}\"><text x=\"-120\" y=\"19\">{}</text>\
         <rect x=\"0\" y=\"4\" width=\"{WIDTH}\" height=\"20\" fill=\"#eee\"/>{parts}\
         <line x1=\"{end:.1}\" x2=\"{end:.1}\" y1=\"0\" y2=\"28\" stroke=\"#000\" stroke-width=\"2\"/>\
         <text x=\"{:.1}\" y=\"19\">{}</text></svg></figure>",
        mode.label(),
        WIDTH + 10.0,
        gigabytes(mode.footprint.peak)
    )
}

fn table(shown: &Shown, method: &MethodPlan) -> String {
    let (mut rows, mut costs) = (String::new(), String::new());
    for mode in &method.modes {
        let number = |n: Option<usize>| n.map_or_else(|| "–".to_owned(), ui::count);
        let class = if mode.footprint.device <= shown.room { "" } else { " class=\"no\"" };
        let beyond = if mode.longest.is_some_and(|longest| longest > shown.positions) { "*" } else { "" };
        let (peak, longest, batch) = (gb(mode.footprint.peak), number(mode.longest), number(mode.batch));
        let rate = number(mode.tokens_per_second.map(|rate| rate.round() as usize));
        let _ = write!(
            rows,
            "<tr{class}><td>{}</td><td>{peak}</td><td>{longest}{beyond}</td><td>{batch}</td><td>{rate}</td></tr>",
            mode.label()
        );
        if let Some(streamed) = &mode.streamed {
            let _ = write!(costs, "<p>{}: {}</p>", mode.label(), super::cost(streamed));
        }
    }
    format!(
        "<table><tr><th>checkpointing</th><th>peak GB</th><th>longest context</th><th>batch at {}</th><th>tokens/s</th></tr>{rows}</table>{costs}\
         <p class=\"no\">* beyond the {} positions that the model was made for</p>",
        shown.request.length,
        ui::count(shown.positions)
    )
}

/// Text inside HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_the_page() {
        assert_eq!(escape("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
    }
}
