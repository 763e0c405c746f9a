//! The unit that the project ships, read as systemd reads it (systemd.syntax(7)), as far as it goes there.

use std::path::{Path, PathBuf};

/// A unit file's directives, in order.
#[derive(Debug)]
pub(crate) struct Unit(Vec<(String, String, String)>);

impl Unit {
    /// packaging/systemd/tunproxy.service.
    ///
    /// # Panics
    /// If it is not there, or a line of it is none of a unit file.
    pub(crate) fn shipped() -> Self {
        let path = packaging("systemd/tunproxy.service");
        Self::read(&std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    /// # Panics
    /// If a line is none of a unit file.
    pub(crate) fn read(text: &str) -> Self {
        let mut section = String::new();
        let mut directives = Vec::new();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';'])) {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                name.clone_into(&mut section);
                continue;
            }
            let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("no directive: {line}"));
            directives.push((section.clone(), key.trim().to_owned(), value.trim().to_owned()));
        }
        Self(directives)
    }

    /// Every value of `key`, in order.
    pub(crate) fn all(&self, key: &str) -> Vec<&str> {
        self.0.iter().filter(|(_, name, _)| name == key).map(|(_, _, value)| value.as_str()).collect()
    }

    /// The value of `key`, which stands there once.
    ///
    /// # Panics
    /// If it does not.
    pub(crate) fn one(&self, key: &str) -> &str {
        let [value] = self.all(key)[..] else { panic!("{key}= stands there {} times", self.all(key).len()) };
        value
    }

    /// The words of the one value of `key`.
    pub(crate) fn words(&self, key: &str) -> Vec<&str> {
        self.one(key).split_whitespace().collect()
    }

    /// Section and key of each directive.
    pub(crate) fn keys(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(section, key, _)| (section.as_str(), key.as_str()))
    }
}

/// A file of packaging/.
pub(crate) fn packaging(below: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(below)
}
