//! `butterflyvit-trainer`: from arguments to [`butterflyvit_trainer::commands`], and to an exit code.

#![forbid(unsafe_code)]

mod restart;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use butterflyvit_trainer::cli::{Cli, Command, LoopArgs};
use butterflyvit_trainer::stop::{Ended, Stop};
use butterflyvit_trainer::{commands, encode, import};
use clap::Parser;

/// Training allocates and frees tensors of megabytes all the time; the system's allocator returns each to the kernel
/// and has it zeroed again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// As shells count a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

/// Settings of libraries that they read from the environment once, before `main`: candle asks the environment itself for
/// the threads, and mimalloc's binding names no option for the other. candle and `gemm` split small operations over
/// rayon's threads, where a run is faster with a thread per shard and nothing below; and the allocator must not give
/// back memory that the next step asks for again.
const ENVIRONMENT: [(&str, &str); 2] = [("RAYON_NUM_THREADS", "1"), ("MIMALLOC_PURGE_DELAY", "-1")];

fn main() -> ExitCode {
    // By now the allocator has read its settings.
    #[cfg(unix)]
    if let Err(error) = restart::with_environment(&ENVIRONMENT) {
        eprintln!("warning: training will be slow: the program cannot be started over: {error}");
    }
    match run(&Cli::parse()) {
        Ok(Ended::Interrupted) => ExitCode::from(INTERRUPTED),
        Ok(Ended::Finished | Ended::OutOfTime) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<Ended> {
    match &cli.command {
        Command::Init(args) => commands::init(args)?,
        Command::Train(args) => return commands::train(args, &stop_early(&args.run)?),
        Command::Specialise(args) => return commands::specialise(args, &stop_early(&args.run)?),
        Command::Compare(args) => return commands::compare(args, &stop_early(&args.run)?),
        Command::Export(args) => commands::export(args)?,
        Command::Evaluate(args) => commands::evaluate(args)?,
        Command::Encode(args) => encode::run(args)?,
        Command::Calibrate(args) => commands::calibrate(args)?,
        Command::Import(args) => import::run(args)?,
        Command::Logits(args) => commands::logits(args)?,
        Command::Speed(args) => commands::speed(args)?,
    }
    Ok(Ended::Finished)
}

/// What the first Ctrl-C (or SIGTERM) ends, or the time limit; the second one ends the program at once.
fn stop_early(args: &LoopArgs) -> Result<Stop> {
    let asked = Arc::new(AtomicBool::new(false));
    let flag = asked.clone();
    let handler = move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        eprintln!("\nstopping, with a checkpoint of what is trained; once more to stop without");
    };
    ctrlc::set_handler(handler).context("listening for Ctrl-C")?;
    Ok(Stop::new(asked, args.limit_seconds.map(Duration::from_secs)))
}
