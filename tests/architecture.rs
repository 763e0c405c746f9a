//! The house keeps its own rules: who may import whom, how long a file may get, which words are no names.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Who stands left of whom: a module imports only from levels before its own, never from its neighbours on one level.
const LEVELS: &[&[&str]] = &[
    &["net", "stack"],
    &["session"],
    &["rules"],
    &["profile"],
    &["platform"],
    &["dns"],
    &["outbound"],
    &["dispatch"],
    &["inbound", "api"],
    &["app"],
    &["cli"],
    &["main"],
];

/// A file with more lines holds two ideas.
const LONGEST: usize = 500;

/// Words that say nothing of what a thing does.
const EMPTY_WORDS: &[&str] = &["manager", "handler", "helper", "helpers", "util", "utils", "common", "misc"];

/// The one file that may ask which system it is built for.
const SYSTEM_FILE: &str = "platform/mod.rs";

/// A source file: its path below `src` and its text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    /// The top module it belongs to; `lib` belongs to none.
    fn module(&self) -> &str {
        self.path.split('/').next().unwrap_or_default().trim_end_matches(".rs")
    }

    /// Its lines of code: without comments, and without what stands in string literals on one line.
    fn code(&self) -> impl Iterator<Item = (usize, String)> + '_ {
        self.text.lines().enumerate().map(|(number, line)| (number + 1, without_comment_and_strings(line)))
    }
}

fn without_comment_and_strings(line: &str) -> String {
    let (mut code, mut in_string, mut escaped) = (String::new(), false, false);
    // The one character literal that would be taken for the start of a string.
    let line = line.replace("'\"'", "''");
    let mut characters = line.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            '/' if !in_string && characters.peek() == Some(&'/') => break,
            _ if !in_string => code.push(character),
            _ => {}
        }
    }
    code
}

/// Every way in which `sources` break the rules, as `path:line: what`.
fn violations(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources {
        found.extend(imports_from_the_right(source));
        found.extend(length(source));
        found.extend(names(source));
        found.extend(systems(source));
    }
    found.extend(unlisted(sources));
    found
}

fn level(module: &str) -> Option<usize> {
    LEVELS.iter().position(|level| level.contains(&module))
}

fn imports_from_the_right(source: &Source) -> Vec<String> {
    let module = source.module();
    let Some(own) = level(module) else { return Vec::new() };
    imported_modules(source)
        .into_iter()
        .filter(|(_, other)| other != module && level(other).is_some_and(|level| level >= own))
        .map(|(line, other)| {
            format!("{}:{line}: {module} imports {other}, which does not stand to its left", source.path)
        })
        .collect()
}

/// The top modules named by paths: `crate::x`, `tunproxy::x`, a list `crate::{x::A, y}`, over many lines too; and
/// `super::x` where that leaves the top module.
fn imported_modules(source: &Source) -> BTreeSet<(usize, String)> {
    let mut found = BTreeSet::new();
    let mut text = String::new();
    let mut starts = Vec::new();
    for (_, line) in source.code() {
        starts.push(text.len());
        text.push_str(&line);
        text.push('\n');
    }
    let line_of = |at: usize| starts.partition_point(|start| *start <= at);
    for root in ["crate::", "tunproxy::"] {
        for (at, _) in text.match_indices(root) {
            // `my_crate::` is another word, and `$crate::` of a macro still ours.
            let inside_word = text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            if !inside_word {
                found.extend(first_segments(&text[at + root.len()..]).map(|name| (line_of(at), name)));
            }
        }
    }
    // One `super` in `src/x.rs` or `src/x/mod.rs` is the crate, two in `src/x/y.rs`, and so on.
    let depth = source.path.trim_end_matches("/mod.rs").split('/').count();
    let up = "super::".repeat(depth);
    for (at, _) in text.match_indices(&up) {
        let longer = text[..at].ends_with("super::") || text[at + up.len()..].starts_with("super::");
        if !longer && !is_inside_inner_module(&text[..at]) {
            found.extend(first_segments(&text[at + up.len()..]).map(|name| (line_of(at), name)));
        }
    }
    found
}

/// Whether the text so far has opened a `mod x {` that it has not closed: there `super` is the file itself.
fn is_inside_inner_module(before: &str) -> bool {
    before.match_indices("mod ").any(|(at, _)| {
        let rest = &before[at..];
        let opened = rest.find('{').is_some_and(|brace| !rest[..brace].contains(';'));
        opened && rest.matches('{').count() > rest.matches('}').count()
    })
}

/// `x` of `x::A`, or each `x` of `{x::A, y::{B, C}}`.
fn first_segments(path: &str) -> impl Iterator<Item = String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = Vec::new();
    if let Some(list) = path.strip_prefix('{') {
        let (mut depth, mut at_name) = (0, true);
        for (at, character) in list.char_indices() {
            match character {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => at_name = true,
                c if depth == 0 && at_name && !c.is_whitespace() => {
                    names.push(word(&list[at..]));
                    at_name = false;
                }
                _ => {}
            }
        }
    } else {
        names.push(word(path));
    }
    names.into_iter()
}

fn length(source: &Source) -> Option<String> {
    let lines = source.text.lines().count();
    (lines > LONGEST).then(|| format!("{}:{lines}: longer than {LONGEST} lines", source.path))
}

fn names(source: &Source) -> Vec<String> {
    let words = |name: &str| name.split(['_', '/']).map(str::to_ascii_lowercase).collect::<Vec<_>>();
    let empty = |name: &str| words(name).into_iter().find(|word| EMPTY_WORDS.contains(&word.as_str()));
    let of_file = empty(source.path.trim_end_matches(".rs")).map(|word| format!("{}:1: `{word}`", source.path));
    let inner = source.code().filter_map(|(line, code)| {
        let code = code.trim_start();
        let name = code.strip_prefix("pub ").unwrap_or(code).strip_prefix("mod ")?;
        empty(name.trim_end_matches([';', '{', ' '])).map(|word| format!("{}:{line}: `{word}`", source.path))
    });
    of_file.into_iter().chain(inner).map(|place| format!("{place} is no name: say what it does")).collect()
}

fn systems(source: &Source) -> Vec<String> {
    if source.path == SYSTEM_FILE {
        return Vec::new();
    }
    let asks = source.code().filter(|(_, code)| code.contains("target_os"));
    asks.map(|(line, _)| format!("{}:{line}: only {SYSTEM_FILE} asks for the system", source.path)).collect()
}

/// Top modules that `lib.rs` does not list, or that have no place in the order.
fn unlisted(sources: &[Source]) -> Vec<String> {
    let library = sources.iter().find(|source| source.path == "lib.rs");
    let listed: BTreeSet<String> = library
        .into_iter()
        .flat_map(Source::code)
        .filter_map(|(_, code)| Some(code.trim().strip_prefix("pub mod ")?.trim_end_matches(';').to_owned()))
        .collect();
    let modules: BTreeSet<&str> = sources.iter().map(Source::module).filter(|m| *m != "lib" && *m != "main").collect();
    let missing = modules.iter().filter(|module| !listed.contains(**module));
    let placeless = modules.iter().filter(|module| level(module).is_none());
    missing
        .map(|module| format!("lib.rs:1: {module} is not listed"))
        .chain(placeless.map(|module| format!("lib.rs:1: {module} has no place in the order of imports")))
        .collect()
}

fn sources_of_the_house() -> Vec<Source> {
    sources_below("src")
}

/// The source files in a folder of the house, with their paths below it.
fn sources_below(folder: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut folders: Vec<PathBuf> = vec![root.clone()];
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of sources").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let below = path.strip_prefix(&root).expect("below the root").display().to_string();
                sources.push(Source::new(&below, &fs::read_to_string(&path).expect("a source file")));
            }
        }
    }
    sources
}

#[test]
fn the_house_keeps_its_rules() {
    let sources = sources_of_the_house();
    assert!(sources.iter().any(|source| source.path == "lib.rs"), "no sources found: nothing was looked at");
    let found = violations(&sources);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn each_broken_rule_is_found_and_nothing_else() {
    let long = "//\n".repeat(LONGEST + 1);
    let sources = [
        Source::new(
            "lib.rs",
            "pub mod net;\npub mod rules;\npub mod dns;\npub mod platform;\npub mod util;\npub mod stack;\n",
        ),
        Source::new("main.rs", "use tunproxy::{net, rules::index, dns};\n"),
        Source::new("net.rs", "//! See crate::app.\nlet text = \"crate::app::run\";\nuse crate::stack::Flow;\n"),
        Source::new("stack/mod.rs", "use super::net::Host;\nmod tests { use super::*; }\n"),
        Source::new("rules/mod.rs", "use crate::net::Host;\nuse crate::{\n    net,\n    dns::{Pool, Cache},\n};\n"),
        Source::new("rules/domain.rs", "use super::super::app::App;\nuse super::Matcher;\n"),
        Source::new("dns/packet_helper.rs", "use crate::rules::Match;\n"),
        Source::new("platform/mod.rs", "#[cfg(target_os = \"linux\")]\nmod linux;\n"),
        Source::new("platform/socket.rs", "#[cfg(target_os = \"linux\")]\nfn mark() { crate::session::x() }\n"),
        Source::new("util.rs", &long),
        Source::new("inbound/mod.rs", ""),
    ];
    let expected = [
        "net.rs:3: net imports stack, which does not stand to its left",
        "stack/mod.rs:1: stack imports net, which does not stand to its left",
        "rules/mod.rs:2: rules imports dns, which does not stand to its left",
        "rules/domain.rs:1: rules imports app, which does not stand to its left",
        "dns/packet_helper.rs:1: `helper` is no name: say what it does",
        "platform/socket.rs:1: only platform/mod.rs asks for the system",
        "util.rs:501: longer than 500 lines",
        "util.rs:1: `util` is no name: say what it does",
        "lib.rs:5: `util` is no name: say what it does",
        "lib.rs:1: inbound is not listed",
        "lib.rs:1: util has no place in the order of imports",
    ];
    let found: BTreeSet<String> = violations(&sources).into_iter().collect();
    assert_eq!(found, expected.into_iter().map(str::to_owned).collect());
}

#[test]
fn every_house_word_has_one_place_in_the_order() {
    let all: Vec<&str> = LEVELS.concat();
    assert_eq!(all.len(), all.iter().collect::<BTreeSet<_>>().len());
}

/// The variables that tests read: words in quotation marks that begin as ours do. Those of the lab's own doing are left
/// out.
fn variables(text: &str) -> BTreeSet<&str> {
    let quoted = text.split('"').skip(1).step_by(2);
    let ours = quoted.filter(|word| word.strip_prefix("TUNPROXY_").is_some_and(|rest| !rest.is_empty()));
    let named = ours.filter(|word| word.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'));
    named.filter(|word| !["TUNPROXY_LAB", "TUNPROXY_TEST"].iter().any(|own| word.starts_with(own))).collect()
}

#[test]
fn every_variable_that_makes_tests_longer_is_told_to_contributors() {
    let told = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("CONTRIBUTING.md")).unwrap();
    let rows = told.lines().filter_map(|line| line.strip_prefix("| `TUNPROXY_")?.split('`').next());
    let rows: BTreeSet<String> = rows.map(|rest| format!("TUNPROXY_{rest}")).collect();
    let sources = sources_below("tests");
    let tests = sources.iter().filter(|source| source.path != "architecture.rs");
    let read = tests.flat_map(|source| source.text.lines().flat_map(variables)).map(str::to_owned).collect();
    assert_eq!(rows, read);
}
