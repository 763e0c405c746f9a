//! The kernel's table of connections: when it is full, new ones of everybody on the host are dropped.

use super::super::finding::Finding;
use super::super::record::Record;

/// How many connections are in the table; there is none without connection tracking.
pub(in super::super) const TRACKED: &str = "net/netfilter/nf_conntrack_count";
/// How many may be.
pub(in super::super) const TRACKED_AT_MOST: &str = "net/netfilter/nf_conntrack_max";

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let number = |path| record.parameter(path).and_then(|value| value.trim().parse::<u64>().ok());
    let (Some(tracked), Some(most)) = (number(TRACKED), number(TRACKED_AT_MOST)) else { return Vec::new() };
    // 0 is no limit.
    let state = format!("the kernel tracks {tracked} connections of {most} that it may");
    let advice = format!(
        "see who floods (`sudo conntrack -L | head`), or raise it: `sudo sysctl net.netfilter.nf_conntrack_max={}`; the \
         kernel's log says `nf_conntrack: table full` for each second in which it dropped packets",
        most.saturating_mul(2)
    );
    vec![match (tracked, most) {
        (_, 0) => return Vec::new(),
        _ if tracked >= most => Finding::problem(format!("{state}: new ones of everybody are dropped"), advice),
        _ if tracked >= most / 10 * 9 => Finding::warning(format!("{state}: beyond that new ones are dropped"), advice),
        _ => Finding::fine(state),
    }]
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, warnings};
    use super::*;

    fn with(tracked: &str, most: &str) -> Vec<Finding> {
        let mut record = quiet();
        record.parameters.insert(TRACKED.to_owned(), tracked.to_owned());
        record.parameters.insert(TRACKED_AT_MOST.to_owned(), most.to_owned());
        check(&record)
    }

    #[test]
    fn a_full_table_is_a_problem_and_one_that_fills_a_warning() {
        let full = with("65536", "65536");
        assert!(only_problem(&full).unwrap().what.contains("65536 connections of 65536"), "{full:?}");
        assert!(only_problem(&with("65540", "65536")).is_some(), "confirmed and unconfirmed ones may be more");
        assert_eq!(warnings(&with("60000", "65536")).len(), 1);
        let calm = with("17", "65536");
        assert!(only_problem(&calm).is_none() && warnings(&calm).is_empty() && calm.len() == 1, "{calm:?}");
    }

    #[test]
    fn without_tracking_or_a_limit_there_is_nothing_to_say() {
        assert!(check(&quiet()).is_empty());
        assert!(with("17", "0").is_empty() && with("", "x").is_empty());
    }
}
