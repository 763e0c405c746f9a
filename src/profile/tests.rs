use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::rules::{NOT_YET, TYPES};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn good(text: &str) -> Profile {
    let (profile, report) = read("p.yaml", text.as_bytes());
    assert!(!report.has_errors(), "{report}");
    profile.unwrap()
}

fn said(text: &str) -> String {
    read("p.yaml", text.as_bytes()).1.to_string()
}

fn yaml_files(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|ending| ending == "yaml")).collect();
    files.sort();
    assert!(!files.is_empty(), "no profiles in {}", folder.display());
    files
}

/// Each profile in tests/fixtures/bad has its messages beside it. `BLESS=1` writes them anew, to be read in the diff.
#[test]
fn every_kind_of_bad_input_gets_its_message() {
    for path in yaml_files(&root().join("tests/fixtures/bad")) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let (_, report) = read(name, &fs::read(&path).unwrap());
        let expected = path.with_extension("txt");
        if std::env::var_os("BLESS").is_some() {
            fs::write(&expected, report.to_string()).unwrap();
        }
        assert_eq!(report.to_string(), fs::read_to_string(&expected).unwrap_or_default(), "{name}");
        for diagnostic in report.diagnostics() {
            assert!(diagnostic.place.at.line > 0 && diagnostic.place.at.column > 0, "{name}: {diagnostic:?}");
        }
    }
}
