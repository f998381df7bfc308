//! Starting the program over with settings that its libraries read before `main`.

/// Starts this program over with each `(name, value)` of `settings` that its environment lacks. Returns where there
/// is nothing to set.
///
/// # Errors
/// The program cannot be started over, and goes on as it is. That is so of a program under an emulator that the kernel
/// does not know of.
#[cfg(unix)]
pub(crate) fn with_environment(settings: &[(&str, &str)]) -> std::io::Result<()> {
    use std::ffi::{CString, OsString};
    use std::os::unix::ffi::OsStringExt;

    let missing: Vec<_> = settings.iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let c_string = |text: OsString| CString::new(text.into_vec()).map_err(std::io::Error::from);
    let program = c_string(std::env::current_exe()?.into())?;
    let arguments: Vec<_> = std::env::args_os().map(c_string).collect::<Result<_, _>>()?;
    let inherited = std::env::vars_os();
    let added = missing.into_iter().map(|&(name, value)| (name.into(), value.into()));
    let environment: Vec<_> = inherited
        .chain(added)
        .map(|(mut entry, value)| {
            entry.push("=");
            entry.push(value);
            c_string(entry)
        })
        .collect::<Result<_, _>>()?;
    // Not `std::os::unix::process::CommandExt::exec`: what the kernel cannot run, glibc hands to the shell there.
    match nix::unistd::execve(&program, &arguments, &environment) {
        Ok(never) => match never {},
        Err(error) => Err(error.into()),
    }
}
