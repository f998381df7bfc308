//! Reads the command line and hands over.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use butterflyvit::config::{self, Command};
use butterflyvit::sentence::sentence;
use butterflyvit::{commands, logging, serve};

/// A wrong flag, or something that is needed at start is broken.
const CANNOT_START: u8 = 2;

fn main() -> ExitCode {
    let cli = match config::parse(std::env::args_os()) {
        Ok(cli) => cli,
        // Help and version are "errors" of clap's that are no failure.
        Err(error) if !error.use_stderr() => {
            return if error.print().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        Err(error) => return refuse(config::one_line(&error)),
    };
    let result = match cli.command {
        None => serve::run(&cli.serve).map(|()| ExitCode::SUCCESS),
        Some(Command::Serve(args)) => serve::run(&args).map(|()| ExitCode::SUCCESS),
        Some(Command::Classify(args)) => commands::classify::run(&args),
        Some(Command::Teach(args)) => commands::teach::run(&args),
        Some(Command::Inspect(args)) => commands::inspect::run(&args),
        Some(Command::Bench(args)) => commands::bench::run(&args),
        Some(Command::AdminKey(args)) => commands::admin_key::run(&args),
        Some(Command::Healthcheck(args)) => return commands::healthcheck::run(&args),
    };
    result.unwrap_or_else(|error| refuse(sentence(&error)))
}

/// One line on standard error that names what is wrong.
fn refuse(reason: String) -> ExitCode {
    logging::complain(format!("butterflyvit: {}", reason.replace('\n', " ")));
    ExitCode::from(CANNOT_START)
}
