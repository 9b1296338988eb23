//! The binary `nibble`: a command line into a config, and what happens onto the screen.
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0 done, 3 out of memory, 2 another
//! error that is the caller's to solve, 101 a defect of this program, 130 ended by Ctrl-C (after saving, where there was something to save).

#![forbid(unsafe_code)]

mod args;
mod assets;
mod base;
mod commands;
mod dataset;
mod env;
mod error;
mod machine;
mod output;
mod source;
mod ui;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use args::{Cli, Command};
use commands::{doctor, eval, generate, merge, plan, quickstart, train};
use error::Result;

/// How a command ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It did all of it.
    Done,
    /// Ctrl-C ended it; what there was is saved.
    Interrupted,
}

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        let at = info.location().map_or_else(String::new, |location| format!(" at {}:{}", location.file(), location.line()));
        let text = info.payload_as_str().unwrap_or("panic").replace('\n', " ");
        ui::say(format_args!("internal error: {text}{at}; please report"));
        // From any thread: a defect must not be waited for by the others.
        std::process::exit(101);
    }));
    let cli = Cli::parse();
    let ended = match &cli.command {
        Some(command) => run(command),
        None => ui::line(Cli::command().render_long_help().ansi()).map(|()| Ending::Done),
    };
    match ended {
        Ok(Ending::Done) => ExitCode::SUCCESS,
        Ok(Ending::Interrupted) => ExitCode::from(130),
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            ui::say(format_args!("error: {error}"));
            if let Some(hint) = error.hint() {
                ui::say(format_args!("hint: {hint}"));
            }
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(command: &Command) -> Result<Ending> {
    match command {
        Command::Train(args) => train::run(args),
        Command::Quickstart(args) => quickstart::run(args),
        Command::Generate(args) => generate::run(args).map(|()| Ending::Done),
        Command::Eval(args) => eval::run(args).map(|()| Ending::Done),
        Command::Plan(args) => plan::run(args).map(|()| Ending::Done),
        Command::Merge(args) => merge::run(args).map(|()| Ending::Done),
        Command::Doctor(args) => doctor::run(args).map(|()| Ending::Done),
    }
}
