//! Programs in Python that the tests run: clients, browsers and checkers nobody here wrote.

use std::path::PathBuf;
use std::process::Command;

use crate::server::root;

/// A program of `target/venv`, started in `tests/`; `None` when it is missing, which is an error under CI.
/// `tests/run.sh` makes the folder.
pub fn program(name: &str) -> Option<Command> {
    let path = path(name);
    if !path.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing", path.display());
        eprintln!("skipped: {} is missing; tests/run.sh makes it", path.display());
        return None;
    }
    let mut command = Command::new(path);
    command.current_dir(root().join("tests"));
    Some(command)
}

fn path(name: &str) -> PathBuf {
    root().join("target/venv/bin").join(name)
}

/// Runs a program to its end, shows what it says, and asserts that it succeeds.
pub fn succeed(command: &mut Command) {
    let output = command.output().expect("the program runs");
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{said}\n{complained}");
    println!("{said}");
}
