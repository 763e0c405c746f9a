//! /etc/resolv.conf while we run: others write it too, and what they wrote last is what comes back after us.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::settle::Settled;
use super::{Applied, Done, HostError, Step};
use crate::platform::imp::resolv_conf;
use crate::platform::resolver::{DnsPlan, nameservers};
use crate::platform::undo::{OldFile, Undo};

/// Whoever replaces the file may leave it empty or away for a moment: so long it is not taken at its word.
const UNFINISHED: Duration = Duration::from_millis(300);
/// As long as its author has it open, up to so long.
const UNFINISHED_IF_OPEN: Duration = Duration::from_secs(10);

impl Applied {
    /// The file behind a link that we wrote over: what happens to it may make ours needless.
    #[must_use]
    pub fn behind_link(&self) -> Option<PathBuf> {
        match self.rewritten()? {
            (_, OldFile::Link(target)) => Some(Path::new(resolv_conf::PATH).parent()?.join(target)),
            (_, OldFile::Missing | OldFile::File { .. }) => None,
        }
    }

    /// What others have in /etc/resolv.conf, or had before we wrote over it. What we know of an older content is forgotten
    /// where somebody has replaced ours: theirs is the later will.
    pub(super) fn resolver_of_others(&mut self, settled: &mut Settled) -> Result<Option<String>, HostError> {
        let path = Path::new(resolv_conf::PATH);
        let Some((ours, old)) = self.rewritten() else { return Ok(resolv_conf::read(path)) };
        if resolv_conf::is_ours(path, ours) {
            return Ok(resolv_conf::text_of(path, old));
        }
        let mut void = Vec::new();
        self.done.retain(|done| match done {
            Done::Change(id, Undo::ResolvConf { .. }) => {
                void.extend(*id);
                false
            }
            Done::Change(..) | Done::Firewall(_) | Done::Resolved => true,
        });
        self.journal.lock().void(&void)?;
        settled.warnings.push(format!("somebody has replaced {}: that is what will be there after us", path.display()));
        Ok(resolv_conf::read(path))
    }

    /// Whether somebody may be at work on the file: it names nobody, and has not done so for long.
    pub(super) fn resolver_is_unfinished(&mut self, text: Option<&str>, settled: &mut Settled) -> bool {
        let names_nobody = text.is_none_or(|text| nameservers(text).is_empty());
        if !names_nobody || self.rewritten().is_some() {
            self.settling.bare_since = None;
            return false;
        }
        let since = *self.settling.bare_since.get_or_insert_with(Instant::now);
        let waited = since.elapsed();
        let left = UNFINISHED.saturating_sub(waited);
        let is_open = || waited < UNFINISHED_IF_OPEN && resolv_conf::is_being_written(Path::new(resolv_conf::PATH));
        if left.is_zero() && !is_open() {
            return false;
        }
        settled.again = Some(if left.is_zero() { UNFINISHED } else { left });
        true
    }

    /// What is planned while somebody may be at work on the file.
    pub(super) fn resolver_meanwhile(&self) -> DnsPlan {
        match &self.plan.dns {
            told @ DnsPlan::Resolved { .. } => told.clone(),
            DnsPlan::Untouched | DnsPlan::Rewrite { .. } => DnsPlan::Untouched,
        }
    }

    /// How a rewriting will be undone, if that is not on record yet: the record tells what we write, and so is new with each
    /// text. What it puts back is what was there before all of ours.
    pub(super) fn new_rewriting(&self, step: &Step) -> Vec<Undo> {
        let DnsPlan::Rewrite { text, .. } = &self.plan.dns else { return Vec::new() };
        match self.rewritten() {
            Some((ours, _)) if ours == text => Vec::new(),
            Some((_, old)) => {
                let path = Path::new(resolv_conf::PATH).to_owned();
                vec![Undo::ResolvConf { path, ours: text.clone(), old: old.clone() }]
            }
            None => self.undos(step),
        }
    }

    /// Whether somebody has replaced what we wrote since it was looked at: what they want is to be read before it is written
    /// over.
    pub(super) fn is_overtaken(&self) -> bool {
        self.rewritten().is_some_and(|(ours, _)| !resolv_conf::is_ours(Path::new(resolv_conf::PATH), ours))
    }

    /// What we wrote, and what was there.
    fn rewritten(&self) -> Option<(&String, &OldFile)> {
        self.done.iter().find_map(|done| match done {
            Done::Change(_, Undo::ResolvConf { ours, old, .. }) => Some((ours, old)),
            Done::Change(..) | Done::Firewall(_) | Done::Resolved => None,
        })
    }
}
