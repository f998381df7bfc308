//! Reads the command line and hands over.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use butterflyvit::config::{self, Command};
use butterflyvit::{commands, serve};

/// A wrong flag, or something that is needed at start is broken.
const CANNOT_START: u8 = 2;

/// A setting of glibc's allocator, which reads it before `main`. Left alone, the first photo to be freed raises the size
/// from which memory goes back to the system at once, and later ones stay in a heap per thread that does not shrink:
/// `loadtests/load.py photos` shows a third more at the peak.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ALLOCATOR: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "131072");

/// Starts the program over with [`ALLOCATOR`], unless it is there. Where that is impossible it goes on as it is.
fn ensure_environment() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    if let (None, Ok(program)) = (std::env::var_os(ALLOCATOR.0), std::env::current_exe()) {
        use std::os::unix::process::CommandExt;
        let mut arguments = std::env::args_os();
        let mut again = std::process::Command::new(program);
        again.arg0(arguments.next().unwrap_or_default()).args(arguments).env(ALLOCATOR.0, ALLOCATOR.1);
        drop(again.exec());
    }
}

fn main() -> ExitCode {
    ensure_environment();
    let cli = match config::parse(std::env::args_os()) {
        Ok(cli) => cli,
        // Help and version are "errors" of clap's that are no failure.
        Err(error) if !error.use_stderr() => {
            return if error.print().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        Err(error) => return refuse(config::one_line(&error)),
    };
    let result = match cli.command {
        None => serve::run(&cli.serve),
        Some(Command::Serve(args)) => serve::run(&args),
        Some(Command::Classify(args)) => return finish(commands::classify::run(&args)),
        Some(Command::Inspect(args)) => return finish(commands::inspect::run(&args)),
        Some(Command::Bench(args)) => return finish(commands::bench::run(&args)),
        Some(Command::Healthcheck(args)) => return commands::healthcheck::run(&args),
    };
    finish(result.map(|()| ExitCode::SUCCESS))
}

fn finish(result: Result<ExitCode, String>) -> ExitCode {
    result.unwrap_or_else(refuse)
}

/// One line on standard error that names what is wrong.
fn refuse(reason: String) -> ExitCode {
    eprintln!("butterflyvit: {}", reason.replace('\n', " "));
    ExitCode::from(CANNOT_START)
}
