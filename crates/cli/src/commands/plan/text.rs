//! The plan on a terminal: bars are letters, so that they need no colour.

use std::fmt::{Display, Formatter, Result};

use nibble_train::plan::{COMPONENTS, Footprint, MOST_TOKENS, Method, MethodPlan, Mode};

use super::{Shown, gb, gigabytes};
use crate::ui;

/// Of [`COMPONENTS`].
pub(super) const LETTERS: [char; COMPONENTS.len()] = ['B', 'E', 'T', 'G', 'O', 'A', 'S'];
/// Letters of a bar that is as long as the memory.
const WIDTH: usize = 50;

/// A plan to be read.
pub(super) struct Text<'a>(pub(super) &'a Shown);

impl Display for Text<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self(shown) = self;
        head(f, shown)?;
        components(f, shown)?;
        bars(f, shown)?;
        for method in &shown.methods {
            modes(f, shown, method)?;
        }
        if shown.gpu.tflops > 0.0 {
            writeln!(f, "\ntokens/s: an estimate, from the GPU's data sheet and the share of it that was measured on an H200")?;
        }
        commands(f, shown)
    }
}

fn head(f: &mut Formatter<'_>, shown: &Shown) -> Result {
    let request = &shown.request;
    writeln!(f, "{:<10} {} ({})", "model", shown.model, shown.describe)?;
    let (memory, room) = (gigabytes(shown.gpu.memory()), gigabytes(shown.room));
    writeln!(f, "{:<10} {}, {memory}, of which {room} for tensors", "gpu", shown.gpu.name)?;
    writeln!(
        f,
        "{:<10} {} x {} tokens in {}, rank {} on {}, {}\n",
        "step",
        request.batch,
        request.length,
        request.load.compute_dtype,
        request.adapter.r,
        shown.target_modules,
        request.train.optim
    )
}

fn components(f: &mut Formatter<'_>, shown: &Shown) -> Result {
    let columns: Vec<_> = shown.methods.iter().map(|method| (method.method, shown.mode(method))).collect();
    let row = |f: &mut Formatter<'_>, name: &str, cell: &dyn Fn(Method, &Mode, bool) -> String| {
        write!(f, "{name:<22}")?;
        for (method, (mode, fits)) in &columns {
            write!(f, "{:>16}", cell(*method, mode, *fits))?;
        }
        writeln!(f)
    };
    row(f, "GB at the peak", &|method, _, _| method.name().to_owned())?;
    for (i, name) in COMPONENTS.iter().enumerate() {
        row(f, name, &|_, mode, _| gb(mode.footprint.components()[i]))?;
    }
    row(f, "all", &|_, mode, _| gb(mode.footprint.peak))?;
    row(f, "with checkpointing", &|_, mode, _| mode.label())?;
    row(f, "", &|_, _, fits| if fits { "fits" } else { "too large" }.to_owned())?;
    writeln!(f)
}

fn bars(f: &mut Formatter<'_>, shown: &Shown) -> Result {
    for method in &shown.methods {
        let (mode, _) = shown.mode(method);
        writeln!(f, "{:<6} |{} {}", method.method.name(), bar(&mode.footprint, shown.room), gigabytes(mode.footprint.peak))?;
    }
    let legend: Vec<String> = LETTERS.iter().zip(COMPONENTS).map(|(letter, name)| format!("{letter} {name}")).collect();
    writeln!(f, "        {}, . free, > beyond the memory", legend.join(", "))
}

/// `BBBEETGOAA.....|`: as long as `room` is; what is larger ends with `>`.
fn bar(footprint: &Footprint, room: usize) -> String {
    let mut bar = String::new();
    let (mut sum, scale) = (0, room.max(1) as f64 / WIDTH as f64);
    for (bytes, letter) in footprint.components().into_iter().zip(LETTERS) {
        sum += bytes;
        let end = ((sum as f64 / scale).round() as usize).min(WIDTH);
        // What is there at all is seen, if only as one letter.
        let count = end.saturating_sub(bar.len()).max(usize::from(bytes as f64 > scale / 8.0 && bar.len() < WIDTH));
        bar.extend(std::iter::repeat_n(letter, count));
    }
    if footprint.device > room {
        bar.truncate(WIDTH - 1);
        return format!("{bar:.<width$}>", width = WIDTH - 1);
    }
    format!("{bar:.<WIDTH$}|")
}

fn modes(f: &mut Formatter<'_>, shown: &Shown, method: &MethodPlan) -> Result {
    writeln!(f, "\n{} by checkpointing", method.method.name())?;
    let batch = format!("batch at {}", shown.request.length);
    writeln!(f, "{:<16}{:>10}{:>18}{batch:>16}{:>12}", "", "peak GB", "longest context", "tokens/s")?;
    for mode in &method.modes {
        let batch = mode.batch.map_or_else(|| "-".to_owned(), ui::count);
        let rate = mode.tokens_per_second.map_or_else(|| "-".to_owned(), |rate| ui::count(rate.round() as usize));
        let (peak, longest) = (gb(mode.footprint.peak), longest(mode, shown.positions));
        writeln!(f, "{:<16}{peak:>10}{longest:>18}{batch:>16}{rate:>12}", mode.label())?;
    }
    for mode in &method.modes {
        if let Some(streamed) = &mode.streamed {
            writeln!(f, "{}: {}", mode.label(), super::cost(streamed))?;
        }
    }
    let beyond = method.modes.iter().any(|mode| mode.longest.is_some_and(|longest| longest > shown.positions));
    if beyond {
        writeln!(f, "* beyond the {} positions that the model was made for", ui::count(shown.positions))?;
    }
    Ok(())
}

/// `12,345`, with a star beyond the model's positions.
fn longest(mode: &Mode, positions: usize) -> String {
    match mode.longest {
        None => "-".to_owned(),
        Some(tokens) => {
            let more = if tokens >= MOST_TOKENS { ">" } else { "" };
            format!("{more}{}{}", ui::count(tokens), if tokens > positions { "*" } else { "" })
        }
    }
}

fn commands(f: &mut Formatter<'_>, shown: &Shown) -> Result {
    for method in &shown.methods {
        let (mode, fits) = shown.mode(method);
        if let Some(command) = shown.command(method.method, mode).filter(|_| fits) {
            writeln!(f, "\n{}:\n{command}", method.method.name())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nibble_tensor::Owner;

    use super::*;

    #[test]
    fn a_bar_is_as_long_as_the_memory_and_shows_what_is_small() {
        let owners = vec![(Owner::BaseWeights, 600), (Owner::Gradients, 10), (Owner::Activations("glu"), 200)];
        let footprint = Footprint { peak: 810, device: 810, owners, trained: 1, ..Footprint::default() };
        let fits = bar(&footprint, 1000);
        assert_eq!(fits, format!("{}G{}{}|", "B".repeat(30), "A".repeat(10), ".".repeat(9)));
        let larger = bar(&footprint, 700);
        assert!(larger.len() == WIDTH && larger.ends_with("A>"), "{larger}");
    }
}
