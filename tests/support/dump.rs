//! The state of a host in words, to be compared before and after.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, io};

use super::Netns;

/// Everything `tunproxy` could change on a host, section by section.
///
/// Byte for byte what the tools print, but for life times that count down and counters that traffic moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dump(BTreeMap<&'static str, String>);

/// What is asked of the tools.
const QUESTIONS: &[(&str, &str)] = &[
    ("ip -d addr", "-d addr"),
    ("ip -d -4 rule", "-d -4 rule"),
    ("ip -d -6 rule", "-d -6 rule"),
    ("ip -d -4 route show table all", "-d -4 route show table all"),
    ("ip -d -6 route show table all", "-d -6 route show table all"),
];

/// The sysctls that decide how packets of this namespace go.
const SYSCTLS: &[&str] = &["ipv4/conf", "ipv6/conf", "ipv4/ip_forward", "ipv4/ping_group_range"];

/// How long the kernel may take to make up its mind about a fresh IPv6 address.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until no IPv6 address is tentative, and each has its route: the kernel says so a moment later even where it
/// detects no duplicates, and adds the route then.
fn await_addresses(ns: &Netns) {
    let start = Instant::now();
    while let Some(waiting) = unsettled(ns) {
        assert!(start.elapsed() < PATIENCE, "the kernel is not done with {waiting}");
        std::thread::yield_now();
    }
}

/// An IPv6 address that the kernel is still at work on.
fn unsettled(ns: &Netns) -> Option<String> {
    let addresses = ns.ip("-6 -o addr show up");
    let routes = ns.ip("-6 route show table local");
    let is_settled = |line: &&str| {
        let address = line.split_whitespace().nth(3).and_then(|net| net.split('/').next()).unwrap_or_default();
        !line.contains(" tentative") && routes.lines().any(|route| route.starts_with(&format!("local {address} ")))
    };
    addresses.lines().find(|line| !is_settled(line)).map(str::to_owned)
}

impl Dump {
    /// Reads the state of `ns` and of `/etc/resolv.conf`.
    ///
    /// # Panics
    /// If a tool fails.
    pub(crate) fn take(ns: &Netns) -> Self {
        await_addresses(ns);
        let mut sections: BTreeMap<_, _> =
            QUESTIONS.iter().map(|(title, words)| (*title, settled(&ns.ip(words)))).collect();
        sections.insert("nft list ruleset", settled(&ns.nft("list ruleset")));
        sections.insert("sysctl", ns.enter(sysctls));
        sections.insert("/etc/resolv.conf", resolv_conf());
        Self(sections)
    }

    /// The lines of `later` that are not here, marked `+`, and those that are only here, marked `-`; empty if equal.
    pub(crate) fn diff(&self, later: &Self) -> String {
        let mut diff = String::new();
        for (title, before) in &self.0 {
            let after = later.0.get(title).map_or("", String::as_str);
            if before == after {
                continue;
            }
            let _ = writeln!(diff, "{title}:");
            let (gone, come) = (only_in(before, after), only_in(after, before));
            for (sign, lines) in [('-', &gone), ('+', &come)] {
                for line in lines {
                    let _ = writeln!(diff, "  {sign} {line}");
                }
            }
            if gone.is_empty() && come.is_empty() {
                let _ = writeln!(diff, "  the same lines in another order, or other line ends");
            }
        }
        diff
    }

    /// Fails unless `later` is equal to this.
    ///
    /// # Panics
    /// With the difference.
    pub(crate) fn assert_same(&self, later: &Self) {
        assert!(self == later, "the host is not as it was:\n{}", self.diff(later));
    }
}

/// The lines of `one` that `other` does not have as often.
fn only_in<'a>(one: &'a str, other: &'a str) -> Vec<&'a str> {
    let mut others: Vec<&str> = other.lines().collect();
    let is_missing = |line: &&str| match others.iter().position(|other| other == line) {
        Some(at) => {
            others.swap_remove(at);
            false
        }
        None => true,
    };
    one.lines().filter(is_missing).collect()
}

/// Words before a number that changes by itself: life times in seconds, counters, the timers of a bridge.
const RESTLESS: &[&str] = &[
    "valid_lft",
    "preferred_lft",
    "expires",
    "packets",
    "bytes",
    "hello_timer",
    "tcn_timer",
    "topology_change_timer",
    "gc_timer",
    "hold_timer",
    "message_age_timer",
    "forward_delay_timer",
];

/// Puts a star for every number that changes by itself.
fn settled(text: &str) -> String {
    text.split_inclusive('\n').map(settled_line).collect()
}

fn settled_line(line: &str) -> String {
    let mut before = "";
    let mut words = Vec::new();
    for word in line.split(' ') {
        let number = word.bytes().next().is_some_and(|byte| byte.is_ascii_digit());
        let restless = RESTLESS.contains(&before) && number;
        // Timers are set in columns.
        while restless && words.last().is_some_and(String::is_empty) {
            words.pop();
        }
        words.push(if restless {
            word.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').to_owned()
        } else {
            word.to_owned()
        });
        if restless {
            words.last_mut().expect("just pushed").insert(0, '*');
        }
        before = if word.is_empty() { before } else { word.trim_start() };
    }
    words.join(" ")
}

fn sysctls() -> String {
    let mut lines = Vec::new();
    for root in SYSCTLS {
        walk(&Path::new("/proc/sys/net").join(root), &mut lines);
    }
    lines.sort();
    lines.concat()
}

fn walk(path: &Path, lines: &mut Vec<String>) {
    if let Ok(entries) = fs::read_dir(path) {
        for entry in entries.flatten() {
            walk(&entry.path(), lines);
        }
    } else {
        let value = fs::read_to_string(path).unwrap_or_else(|error| format!("({})\n", error.kind()));
        lines.push(format!("{} = {value}", path.display()));
    }
}

fn resolv_conf() -> String {
    let path = Path::new("/etc/resolv.conf");
    let target = match fs::read_link(path) {
        Ok(target) => target.display().to_string(),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => "a file".to_owned(),
        Err(error) => error.to_string(),
    };
    let content = fs::read_to_string(path).unwrap_or_else(|error| error.to_string());
    format!("link: {target}\n{content}")
}
