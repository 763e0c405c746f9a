//! Whether a start would come to anything: what it would refuse, before somebody tries.

use super::super::finding::Finding;
use super::super::record::Record;

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let Some(start) = &record.start else { return Vec::new() };
    if start.refused.is_empty() {
        let fine = "a start would find what it needs: the device's name, addresses and ports are free";
        return start.stub.iter().map(|words| Finding::fine(words.clone())).chain([Finding::fine(fine)]).collect();
    }
    start.refused.iter().map(|why| told(why)).collect()
}

/// A refusal, with its own advice where it brings some: behind the first semicolon or full stop.
fn told(why: &str) -> Finding {
    let why = why.trim_end_matches(" Nothing was changed").trim_end_matches('.');
    let (what, advice) = match [why.find("; "), why.find(". "), why.find(": install")].into_iter().flatten().min() {
        Some(at) => (&why[..at], why[at + 2..].to_owned()),
        None => (why, "see `tunproxy check`, and correct the profile".to_owned()),
    };
    Finding::problem(format!("a start would be refused: {what}"), advice)
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running, warnings};
    use super::super::super::record::Start;
    use super::*;
    use crate::platform::PlanError;

    fn refused(why: &str) -> Finding {
        let start = Start { refused: vec![why.to_owned()], ..Start::default() };
        only_problem(&check(&crate::app::doctor::record::Record { start: Some(start), ..quiet() })).unwrap().clone()
    }

    #[test]
    fn a_start_that_would_do_is_fine_and_nobody_asks_while_a_run_is_there() {
        assert!(only_problem(&check(&quiet())).is_none());
        assert!(check(&running()).is_empty());
    }

    #[test]
    fn a_stub_whose_questions_would_come_to_us_is_told_of_before_the_start() {
        let start = Start { stub: Some("the nameserver is a program".to_owned()), ..Start::default() };
        let found = check(&crate::app::doctor::record::Record { start: Some(start), ..quiet() });
        assert!(warnings(&found).is_empty());
        assert_eq!(found[0].what, "the nameserver is a program");
    }

    #[test]
    fn what_a_start_says_is_said_before_it_with_what_to_do() {
        let taken = refused(&PlanError::NameTaken("up0".to_owned()).to_string());
        assert_eq!(taken.what, "a start would be refused: the interface up0 exists already");
        assert!(taken.advice.starts_with("choose another name (tun.device)"), "{taken:?}");
        let no_nft = refused(&PlanError::NoKillSwitch("nft: not found".to_owned()).to_string());
        assert!(no_nft.what.ends_with("tun.kill-switch cannot be had without nftables (nft: not found)"), "{no_nft:?}");
        assert!(no_nft.advice.starts_with("install it") && !no_nft.advice.contains("changed"), "{no_nft:?}");
        assert!(refused("dns.listen: cannot listen on [::]:53; is another").what.contains("cannot listen on [::]:53"));
        assert!(!refused("no numbers are free").advice.is_empty());
    }
}
