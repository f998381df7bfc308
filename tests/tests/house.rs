//! The plan of the house: no file imports in a circle, no room imports a room above it.
//!
//! A room is a module of a crate's `lib.rs`, a file or a folder. An import is a path in a `use`, an expression or a
//! macro. A name that a module passes on (`pub use`) counts for the file that defines it. A file may import from the
//! `mod.rs` that it is a part of: the two are one idea. Test code may import anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use system_tests::server::root;

/// The rooms of a crate from the highest to the lowest. Rooms of one line import each other, but not in a circle.
type Rooms = &'static [&'static [&'static str]];

const MODEL_CORE: Rooms = &[
    &["bench", "footprint"],
    &["engine"],
    &["error", "familiarity", "routing_map"],
    &["artifact", "random_weights"],
    &["weights"],
    &["image", "config", "random", "projection"],
    &["kernels"],
];
const TRAINING: Rooms = &[
    &["step"],
    &["losses", "optimizer"],
    &["vit"],
    &["layers"],
    &["parameters"],
    &["ops", "quantize"],
    &["matmul", "shards"],
];
const TEACHING: Rooms =
    &[&["calibrate", "fit"], &["report", "statistics", "temperature"], &["examples", "folds", "logistic", "spread"]];
const SERVER: Rooms = &[
    &["main", "serve", "commands"],
    &["logging", "config"],
    &["net"],
    &["http"],
    &["app"],
    &["cameras"],
    &["classify"],
    &["fitting"],
    &["examples"],
    &["compute", "sets", "admission"],
    &["keys", "made_key", "statistics", "metrics", "lifecycle", "memory", "routing_map", "verdict"],
    &["pages", "repeats", "sentence", "threads", "units"],
];

/// Libraries with the rooms that may name them.
type Libraries = &'static [(&'static str, &'static [&'static str])];

const SERVER_LIBRARIES: Libraries =
    &[("axum", &["http", "net"]), ("hyper", &["http", "net", "cameras"]), ("rumqttc", &["cameras"])];

/// A module's name: its parts from below the crate; none for `lib.rs`.
type Name = Vec<String>;

struct Import {
    line: usize,
    /// From below the crate, or from a library's name.
    path: Name,
    /// The name under which a `pub use` passes it on.
    passed_on_as: Option<String>,
    is_library: bool,
}

struct Module {
    file: PathBuf,
    imports: Vec<Import>,
}

type Modules = BTreeMap<Name, Module>;

/// Every breach of the rules in the sources below `src`, as `FILE:LINE: RULE`.
fn breaches(src: &Path, rooms: Rooms, libraries: Libraries) -> Vec<String> {
    let modules = read(src);
    let mut found = Vec::new();
    let (mut files, mut houses) = (Graph::new(), Graph::new());
    for (name, module) in &modules {
        let room = name.first().cloned().unwrap_or_else(|| "lib".to_owned());
        let place = |import: &Import| format!("{}:{}", module.file.display(), import.line);
        let rank = |room: &str| rooms.iter().position(|rank| rank.contains(&room));
        if !rooms.is_empty() && name.len() == 1 && rank(&room).is_none() && room != "main" {
            found.push(format!("{}:1: the room {room} is in no rank", module.file.display()));
        }
        for import in &module.imports {
            if import.is_library {
                let allowed = libraries.iter().find(|(library, _)| *library == import.path[0]);
                if let Some((library, only)) = allowed.filter(|(_, only)| !only.contains(&room.as_str())) {
                    found.push(format!("{}: only {} may name {library}", place(import), only.join(" and ")));
                }
                continue;
            }
            if import.passed_on_as.is_some() {
                continue;
            }
            let definer = definer(&modules, &import.path);
            let other = definer.first().cloned().unwrap_or_else(|| "lib".to_owned());
            if rank(&other).is_some_and(|other| rank(&room).is_some_and(|room| other < room)) {
                found.push(format!("{}: the room {room} imports {other}, a room above", place(import)));
            }
            if other != room {
                houses.entry(vec![room.clone()]).or_default().entry(vec![other]).or_insert_with(|| place(import));
            }
            if !name.starts_with(&definer) {
                files.entry(name.clone()).or_default().entry(definer).or_insert_with(|| place(import));
            }
        }
    }
    found.extend(circles(&files).map(|(place, to)| format!("{place}: a circle of files through {to}")));
    found.extend(circles(&houses).map(|(place, to)| format!("{place}: a circle of rooms through {to}")));
    found
}

/// What imports what, and where first.
type Graph = BTreeMap<Name, BTreeMap<Name, String>>;

/// The imports that lie on a circle: where, and of what.
fn circles(graph: &Graph) -> impl Iterator<Item = (&str, String)> {
    let leads_to = |from: &Name, goal: &Name| {
        let (mut seen, mut open) = (BTreeSet::from([from]), vec![from]);
        while let Some(next) = open.pop() {
            open.extend(graph.get(next).into_iter().flatten().map(|(to, _)| to).filter(|to| seen.insert(to)));
        }
        seen.contains(goal)
    };
    let imports = graph.iter().flat_map(|(from, to)| to.iter().map(move |(to, place)| (from, to, place)));
    let circular = imports.filter(move |(from, to, _)| leads_to(to, from));
    circular.map(|(_, to, place)| (place.as_str(), to.join("::")))
}

/// Reads every source file below a folder `src`.
fn read(src: &Path) -> Modules {
    let (mut folders, mut files) = (vec![src.to_path_buf()], BTreeMap::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("an entry of the folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let inside = path.strip_prefix(src).expect("found below src").with_extension("");
                let mut name: Name = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
                if matches!(name.last().map(String::as_str), Some("mod" | "lib")) {
                    name.pop();
                }
                files.insert(name, path);
            }
        }
    }
    let names: BTreeSet<Name> = files.keys().cloned().collect();
    let mut only_tests = Vec::new();
    let module = |(name, file): (Name, PathBuf)| {
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let tokens = text.parse().unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let mut reader = Reader { module: &name, names: &names, imports: Vec::new(), only_tests: Vec::new() };
        reader.read(tokens);
        only_tests.extend(reader.only_tests);
        let imports = reader.imports;
        (name, Module { file, imports })
    };
    let mut modules: Modules = files.into_iter().map(module).collect();
    modules.retain(|name, _| !only_tests.iter().any(|tests| name.starts_with(tests)));
    modules
}

/// The module that defines what a path names.
fn definer(modules: &Modules, path: &[String]) -> Name {
    let length = (0..=path.len()).rev().find(|&length| modules.contains_key(&path[..length])).unwrap_or(0);
    let (module, rest) = path.split_at(length);
    let passes_on = |import: &&Import| {
        !import.is_library && import.passed_on_as.as_ref().is_some_and(|name| name == "*" || Some(name) == rest.first())
    };
    match modules.get(module).and_then(|module| module.imports.iter().find(passes_on)) {
        Some(import) if import.path != path => definer(modules, &import.path),
        _ => module.to_vec(),
    }
}

/// Finds the imports of one module.
struct Reader<'a> {
    module: &'a [String],
    names: &'a BTreeSet<Name>,
    imports: Vec<Import>,
    /// Modules that `#[cfg(test)] mod NAME;` declares.
    only_tests: Vec<Name>,
}

impl Reader<'_> {
    fn read(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at: usize = 0;
        while let Some(token) = tokens.get(at) {
            let before = |back: usize| at.checked_sub(back).map(|at| tokens[at].to_string()).unwrap_or_default();
            match token {
                TokenTree::Group(group) if before(1) == "#" && is_test(group.stream()) => {
                    // The item ends with its block or its semicolon.
                    let ends = |token: &TokenTree| match token {
                        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
                        token => token.to_string() == ";",
                    };
                    let length = tokens[at..].iter().position(ends).unwrap_or(tokens.len());
                    let item = &tokens[at..tokens.len().min(at + length)];
                    if let [.., word, name] = item
                        && word.to_string() == "mod"
                    {
                        self.only_tests.push([self.module, &[name.to_string()]].concat());
                    }
                    at += length;
                }
                TokenTree::Group(group) => self.read(group.stream()),
                TokenTree::Ident(_) if before(1) == "use" => {
                    let is_public = before(2) == "pub" || before(3) == "pub";
                    self.path(&tokens, &mut at, &[], Some(is_public));
                    continue;
                }
                TokenTree::Ident(_) if before(1) != ":" && is_colon(&tokens, at + 1) => {
                    self.path(&tokens, &mut at, &[], None);
                    continue;
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// Takes the path that begins at a token, and every path of a group in braces.
    fn path(&mut self, tokens: &[TokenTree], at: &mut usize, before: &[String], used: Option<bool>) {
        let mut path = before.to_vec();
        let line = tokens[*at].span().start().line;
        loop {
            match tokens.get(*at) {
                Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                    let inside: Vec<TokenTree> = group.stream().into_iter().collect();
                    let mut inner = 0;
                    while inner < inside.len() {
                        self.path(&inside, &mut inner, &path, used);
                        inner += 1;
                    }
                    *at += 1;
                    return;
                }
                Some(token @ (TokenTree::Ident(_) | TokenTree::Punct(_))) => path.push(token.to_string()),
                _ => break,
            }
            *at += 1;
            if !is_colon(tokens, *at) {
                break;
            }
            *at += 2;
        }
        let renamed = tokens.get(*at).filter(|token| token.to_string() == "as").and(tokens.get(*at + 1));
        let name = renamed.map(ToString::to_string).or(path.last().cloned());
        *at += if renamed.is_some() { 2 } else { 0 };
        let (is_library, path) = self.absolute(&path);
        self.imports.push(Import { line, path, passed_on_as: name.filter(|_| used == Some(true)), is_library });
    }

    /// A path from below the crate, or `true` and a path from a library.
    fn absolute(&self, path: &[String]) -> (bool, Name) {
        let ups = path.iter().take_while(|part| *part == "super").count();
        let parent = &self.module[..self.module.len().saturating_sub(ups)];
        let mut absolute = match path[0].as_str() {
            "crate" => path[1..].to_vec(),
            "super" => [parent, &path[ups..]].concat(),
            "self" => [self.module, &path[1..]].concat(),
            first if self.names.contains(&[self.module, &[first.to_owned()]].concat()) => [self.module, path].concat(),
            _ => return (true, path.to_vec()),
        };
        absolute.retain(|part| part != "self");
        (false, absolute)
    }
}

fn is_colon(tokens: &[TokenTree], at: usize) -> bool {
    let is = |at: usize| tokens.get(at).is_some_and(|token| token.to_string() == ":");
    is(at) && is(at + 1)
}

/// Whether an attribute says `cfg(test)` or `cfg(all(test, ..))`.
fn is_test(attribute: TokenStream) -> bool {
    let text = attribute.to_string().replace(' ', "");
    text.starts_with("cfg(") && text.contains("test") && !text.contains("not(test")
}

#[test]
fn no_room_imports_a_room_above_it() {
    // Of every crate of the workspace, so that a new one is not forgotten; those without ranks may have no circles.
    let workspace = fs::read_to_string(root().join("Cargo.toml")).expect("the workspace");
    let members = workspace.lines().find_map(|line| line.strip_prefix("members = ")).expect("its members");
    let members: Vec<String> = serde_json::from_str(members).expect("a list of names");
    assert!(members.len() > 4, "{members:?}");
    let check = |name: &String| {
        let (rooms, libraries): (Rooms, Libraries) = match name.as_str() {
            "model-core" => (MODEL_CORE, &[]),
            "teaching" => (TEACHING, &[]),
            "training" => (TRAINING, &[]),
            "server" => (SERVER, SERVER_LIBRARIES),
            _ => (&[], &[]),
        };
        breaches(&root().join(name).join("src"), rooms, libraries)
    };
    let found: Vec<String> = members.iter().flat_map(check).collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

/// Writes a crate of made-up files, and returns the breaches with the paths of files shortened to their names.
fn breaches_of(files: &[(&str, &str)]) -> Vec<String> {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("a file in a folder")).expect("a folder");
        fs::write(path, text).expect("a file");
    }
    let rooms: Rooms = &[&["http"], &["app"], &["sets", "compute"], &["keys"]];
    let found = breaches(folder.path(), rooms, &[("axum", &["http"])]);
    let folder = format!("{}/", folder.path().display());
    found.iter().map(|breach| breach.replace(&folder, "")).collect()
}

#[test]
fn an_offender_is_named_with_file_line_and_rule() {
    struct Case {
        files: &'static [(&'static str, &'static str)],
        breaches: &'static [&'static str],
    }
    let cases = [
        Case {
            files: &[
                ("sets/mod.rs", "mod a; mod b;\nuse a::A;"),
                ("sets/a.rs", "use super::b::B;"),
                ("sets/b.rs", "\n\nuse super::a;"),
            ],
            breaches: &[
                "sets/a.rs:1: a circle of files through sets::b",
                "sets/b.rs:3: a circle of files through sets::a",
            ],
        },
        Case {
            files: &[
                ("sets.rs", "use std::{fs, io};\nuse crate::{keys, http::{self, App as A}};"),
                ("http.rs", ""),
                ("keys.rs", ""),
            ],
            breaches: &["sets.rs:2: the room sets imports http, a room above"; 2],
        },
        Case {
            files: &[("keys.rs", "fn f() {\n  g(vec![crate::app::App::new()])\n}"), ("app/mod.rs", "")],
            breaches: &["keys.rs:2: the room keys imports app, a room above"],
        },
        Case {
            files: &[("sets.rs", "use crate::compute::run;"), ("compute.rs", "pub fn run() { crate::sets::load() }")],
            breaches: &[
                "compute.rs:1: a circle of files through sets",
                "sets.rs:1: a circle of files through compute",
                "compute.rs:1: a circle of rooms through sets",
                "sets.rs:1: a circle of rooms through compute",
            ],
        },
        Case {
            files: &[
                ("sets/mod.rs", "mod store;\npub use store::Store;"),
                ("sets/store.rs", "use crate::app::App;"),
                ("app.rs", "use crate::sets::Store;"),
            ],
            breaches: &[
                "sets/store.rs:1: the room sets imports app, a room above",
                "app.rs:1: a circle of files through sets::store",
                "sets/store.rs:1: a circle of files through app",
                "app.rs:1: a circle of rooms through sets",
                "sets/store.rs:1: a circle of rooms through app",
            ],
        },
        Case {
            files: &[("app.rs", "fn f() -> axum::Router { todo!() }"), ("attic.rs", "")],
            breaches: &["app.rs:1: only http may name axum", "attic.rs:1: the room attic is in no rank"],
        },
    ];
    for case in cases {
        assert_eq!(breaches_of(case.files), case.breaches, "{:?}", case.files);
    }
}

#[test]
fn a_house_in_order_passes() {
    let files = [
        ("lib.rs", "pub mod http; pub mod app; mod sets;"),
        ("http.rs", "use axum::Router;\nuse crate::app::{self, App};\nuse crate::sets::Store;"),
        ("app.rs", "// use crate::http;\nconst TEXT: &str = \"crate::http::X\";\nuse crate::sets::*;"),
        ("sets/mod.rs", "mod store;\npub use store::{Store, open as reopen};\n#[cfg(test)]\nmod tests;"),
        (
            "sets/store.rs",
            "use crate::keys::Key;\n#[cfg(test)]\nmod t {\n use super::super::reopen;\n use crate::http; }",
        ),
        ("sets/tests.rs", "use crate::http;"),
        ("keys.rs", ""),
    ];
    assert_eq!(breaches_of(&files), [""; 0]);
}
