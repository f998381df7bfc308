//! Writes the manual pages and the completions for bash, zsh and fish that packages carry into a folder:
//!
//!     cargo run --example manual -- FOLDER

use butterflyvit::config::Cli;
use clap::CommandFactory;
use clap_complete::Shell;

fn main() -> std::io::Result<()> {
    let Some(folder) = std::env::args_os().nth(1) else { panic!("usage: manual FOLDER") };
    std::fs::create_dir_all(&folder)?;
    clap_mangen::generate_to(Cli::command(), &folder)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "butterflyvit", &folder)?;
    }
    Ok(())
}
