//! Reads the imports of this crate: no room imports from a room above it, no file imports in a circle, and only two rooms
//! know HTTP. Imports of tests are not looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The rooms from top to bottom. A room may import from those below it.
const ROOMS: [&str; 20] = [
    "serve",
    "commands",
    "logging",
    "config",
    "net",
    "http",
    "app",
    "classify",
    "compute",
    "sets",
    "admission",
    "metrics",
    "statistics",
    "keys",
    "lifecycle",
    "memory",
    "routing_map",
    "sentence",
    "threads",
    "units",
];
/// The rooms that may name the libraries of HTTP.
const HTTP: [&str; 2] = ["net", "http"];

/// A module's path below the crate, as `["sets", "registry", "load"]`.
type Module = Vec<String>;

/// A module that names another: the importing file, the line, and the module that is imported.
struct Import {
    from: Module,
    place: String,
    to: Module,
}

/// The files of modules that are not for tests, with their code: test modules and comments are blank.
fn sources() -> BTreeMap<Module, (PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut files) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    let text = |path: &PathBuf| std::fs::read_to_string(path).unwrap();
    let only_tests: BTreeSet<PathBuf> = files.iter().flat_map(|path| test_files(path, &text(path))).collect();
    let kept = files.into_iter().filter(|path| !only_tests.contains(path) && !path.ends_with("src/main.rs"));
    kept.map(|path| {
        let relative = path.strip_prefix(&root).unwrap().with_extension("");
        let mut module: Module = relative.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        module.retain(|part| part != "mod" && part != "lib");
        let code = code(&text(&path));
        (module, (path, code))
    })
    .collect()
}

/// The files of modules that `path` declares for tests only.
fn test_files(path: &Path, text: &str) -> Vec<PathBuf> {
    let declared = text.split("#[cfg(test)]\nmod ").skip(1).filter_map(|rest| rest.split_once(';'));
    declared.map(|(name, _)| path.with_file_name(format!("{name}.rs"))).collect()
}

/// The text with as many lines, but without comments and without what is compiled for tests only.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let mut lines = Vec::new();
    let mut is_test = false;
    for line in text.lines() {
        let starts_test = line.trim() == "#[cfg(test)]";
        lines.push(if is_test || starts_test || line.trim_start().starts_with("//") { "" } else { line });
        is_test = starts_test;
    }
    lines.join("\n")
}

/// Every path that `text` begins with, `a::{b, c::d}` being two of them. Stops at the first character that belongs to none.
fn paths(text: &str) -> Vec<Module> {
    let text = text.trim_start();
    if let Some(list) = text.strip_prefix('{') {
        let (mut depth, mut start, mut found) = (0, 0, Vec::new());
        for (i, character) in list.char_indices() {
            match character {
                '{' => depth += 1,
                ',' | '}' if depth == 0 => {
                    found.extend(paths(&list[start..i]));
                    start = i + 1;
                    if character == '}' {
                        break;
                    }
                }
                '}' => depth -= 1,
                _ => {}
            }
        }
        return found;
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    match rest.strip_prefix("::").map(paths).filter(|tails| !tails.is_empty()) {
        Some(tails) => tails.into_iter().map(|tail| [vec![name.to_owned()], tail].concat()).collect(),
        None if name.is_empty() => Vec::new(),
        None => vec![vec![name.to_owned()]],
    }
}

fn imports(sources: &BTreeMap<Module, (PathBuf, String)>) -> Vec<Import> {
    let mut imports = Vec::new();
    for (from, (file, code)) in sources {
        let children = sources.keys().filter(|module| module.len() == from.len() + 1 && module.starts_with(from));
        let mut roots: Vec<(&str, Module)> =
            children.map(|module| (module[from.len()].as_str(), from.clone())).collect();
        roots.extend([("crate", Vec::new()), ("super", from[..from.len().saturating_sub(1)].to_vec())]);
        for (root, base) in roots {
            for (at, _) in code.match_indices(&format!("{root}::")) {
                if code[..at].ends_with(|c: char| c.is_alphanumeric() || "_:".contains(c)) {
                    continue;
                }
                for path in paths(&code[at..]) {
                    let ups = path.iter().take_while(|name| *name == "super").count();
                    let names = path.iter().skip(ups.max(usize::from(root == "crate")));
                    let base = &base[..base.len().saturating_sub(ups.saturating_sub(1))];
                    let mut to: Module = base.iter().chain(names).cloned().collect();
                    while !sources.contains_key(&to) {
                        to.pop();
                    }
                    let line = code[..at].matches('\n').count() + 1;
                    imports.push(Import { from: from.clone(), place: format!("{}:{line}", file.display()), to });
                }
            }
        }
    }
    imports.retain(|import| import.from != import.to);
    imports
}

fn room(module: &[String]) -> Option<usize> {
    let name = module.first()?;
    let room = ROOMS.iter().position(|room| room == name);
    assert!(room.is_some(), "`{name}` is in no room: give it a place in ROOMS and in the table of lib.rs");
    room
}

#[test]
fn no_room_imports_from_a_room_above_it() {
    for Import { from, place, to } in imports(&sources()) {
        assert!(!to.is_empty() || from.is_empty(), "{place}: imports from lib.rs, which is above every room");
        if let (Some(here), Some(there)) = (room(&from), room(&to)) {
            assert!(here <= there, "{place}: {} imports from {}, a room above it", ROOMS[here], to.join("::"));
        }
    }
}

#[test]
fn no_file_imports_in_a_circle() {
    let sources = sources();
    let imports = imports(&sources);
    // What is in no circle goes: files that import none of those left, and files that none of those left imports.
    let mut left: BTreeSet<&Module> = sources.keys().collect();
    loop {
        let inside: Vec<&Import> =
            imports.iter().filter(|import| left.contains(&import.from) && left.contains(&import.to)).collect();
        let (before, imported) = (left.len(), inside.iter().map(|import| &import.to).collect::<BTreeSet<_>>());
        let importing: BTreeSet<&Module> = inside.iter().map(|import| &import.from).collect();
        left.retain(|module| imported.contains(module) && importing.contains(module));
        if left.len() == before {
            break;
        }
    }
    let places = imports.iter().filter(|import| left.contains(&import.from) && left.contains(&import.to));
    let places: BTreeSet<String> =
        places.map(|import| format!("{}: imports {}", import.place, import.to.join("::"))).collect();
    assert!(
        left.is_empty(),
        "these imports lead back to their own files:\n{}",
        places.into_iter().collect::<Vec<_>>().join("\n")
    );
}

#[test]
fn only_two_rooms_know_http() {
    for (module, (file, code)) in sources() {
        let knows = ["axum", "hyper"].into_iter().find(|library| code.contains(&format!("{library}::")));
        let may = module.first().is_none_or(|room| HTTP.contains(&room.as_str()));
        assert!(
            may || knows.is_none(),
            "{}: names {}, which only {HTTP:?} may",
            file.display(),
            knows.unwrap_or_default()
        );
    }
}

#[test]
fn the_reader_of_imports_sees_what_they_mean() {
    let found = |text: &str| paths(text).iter().map(|path| path.join("::")).collect::<Vec<_>>();
    assert_eq!(
        found("crate::a::{self, b::C, d::{E, F}};"),
        ["crate::a::self", "crate::a::b::C", "crate::a::d::E", "crate::a::d::F"]
    );
    assert_eq!(found("super::super::a::B<C>"), ["super::super::a::B"]);
    assert_eq!(code("a\n// b\n#[cfg(test)]\nuse c;\nd\n#[cfg(test)]\nmod tests {\n}"), "a\n\n\n\nd");
}
