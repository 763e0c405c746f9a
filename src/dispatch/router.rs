//! The router decides where a flow goes. It holds no lock and looks nothing up: what it lacks it names.

use std::collections::HashMap;

use crate::outbound::Index;
use crate::profile::Mode;
use crate::rules::{Lookup, Match, Rule};
use crate::session::{FactKind, Session};

/// What the router says of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// A rule applies.
    Send {
        /// The outbound.
        target: Index,
        /// The index of the rule.
        rule: usize,
    },
    /// The mode decides and no rule is asked: `global` sends to GLOBAL, `direct` to DIRECT.
    Forced {
        /// The mode.
        mode: Mode,
        /// The outbound.
        target: Index,
    },
    /// A rule lacks this fact. Put it into the session, or that it failed, and ask again with the same `from`.
    Needs(FactKind),
    /// No rule applies; as in mihomo the flow goes DIRECT.
    Default,
}

/// A rule or the mode names a target that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no proxy or group named `{0}`")]
pub struct UnknownTarget(pub String);

/// The rules in the order of the profile, their targets resolved. Replaced whole when the profile changes.
///
/// Domain rules are found through hash tables, so that a profile with a hundred thousand of them costs a flow as
/// many look-ups as its name has labels; all others are asked in turn. The result is that of asking every rule.
#[derive(Debug)]
pub struct Router {
    forced: Option<(Mode, Index)>,
    rules: Vec<Rule>,
    targets: Vec<Index>,
    names: ByName,
    suffixes: ByName,
    /// The rules that must be asked, ascending.
    asked: Vec<usize>,
}

/// Name -> the rules for it, ascending.
type ByName = HashMap<Box<str>, Vec<usize>, foldhash::fast::RandomState>;

impl Router {
    /// Builds the router for `mode`; `target` gives the index of a proxy, a group or a built-in target by its name.
    ///
    /// # Errors
    /// A rule, or the mode, names a target that `target` does not know.
    pub fn new(
        mode: Mode,
        rules: Vec<Rule>,
        mut target: impl FnMut(&str) -> Option<Index>,
    ) -> Result<Self, UnknownTarget> {
        let mut known = |name: &str| target(name).ok_or_else(|| UnknownTarget(name.to_owned()));
        let forced = match mode {
            Mode::Rule => None,
            Mode::Global => Some((mode, known("GLOBAL")?)),
            Mode::Direct => Some((mode, known("DIRECT")?)),
        };
        let targets = rules.iter().map(|rule| known(&rule.target)).collect::<Result<_, _>>()?;
        let (mut names, mut suffixes, mut asked) = (ByName::default(), ByName::default(), Vec::new());
        for (index, rule) in rules.iter().enumerate() {
            match rule.matcher.lookup() {
                Some(Lookup::Name(name)) => names.entry(name.into()).or_default().push(index),
                Some(Lookup::Suffix(apex)) => suffixes.entry(apex.into()).or_default().push(index),
                None => asked.push(index),
            }
        }
        Ok(Self { forced, rules, targets, names, suffixes, asked })
    }

    /// The first rule from index `from` on that applies to `session`.
    ///
    /// The caller begins with 0. It goes on with `rule + 1` where mihomo passes a matched rule over: the target is
    /// PASS, or the flow is UDP and the target carries none.
    #[must_use]
    pub fn decide(&self, session: &Session, from: usize) -> Decision {
        if let Some((mode, target)) = self.forced {
            return Decision::Forced { mode, target };
        }
        let indexed = self.first_by_name(session, from);
        let start = self.asked.partition_point(|&rule| rule < from);
        for &rule in &self.asked[start..] {
            if indexed.is_some_and(|found| found < rule) {
                break;
            }
            match self.rules[rule].matcher.matches(session) {
                Match::Match => return self.send(rule),
                Match::Needs(fact) => return Decision::Needs(fact),
                Match::Miss => {}
            }
        }
        indexed.map_or(Decision::Default, |rule| self.send(rule))
    }

    /// The rule at an index that [`decide`](Self::decide) returned: its text and line are for the log.
    #[must_use]
    pub fn rule(&self, index: usize) -> Option<&Rule> {
        self.rules.get(index)
    }

    /// All rules in order.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    fn send(&self, rule: usize) -> Decision {
        Decision::Send { target: self.targets[rule], rule }
    }

    fn first_by_name(&self, session: &Session, from: usize) -> Option<usize> {
        let name = session.name()?.as_str();
        let below = |(dot, _)| &name[dot + 1..];
        let suffixes = std::iter::once(name).chain(name.match_indices('.').map(below));
        suffixes.filter_map(|suffix| first(&self.suffixes, suffix, from)).chain(first(&self.names, name, from)).min()
    }
}

/// The first rule for `name` at or after `from`.
fn first(index: &ByName, name: &str, from: usize) -> Option<usize> {
    let rules = index.get(name)?;
    rules.get(rules.partition_point(|&rule| rule < from)).copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rules::tests::session;
    use crate::rules::{Line, parse};
    use crate::session::{Fact, Network};

    fn rules(lines: &[String]) -> Vec<Rule> {
        lines
            .iter()
            .map(|line| match parse(line) {
                Ok(Line::Rule(rule)) => rule,
                other => panic!("{line}: {other:?}"),
            })
            .collect()
    }

    fn router(mode: Mode, lines: &[&str]) -> Router {
        let lines: Vec<String> = lines.iter().map(ToString::to_string).collect();
        Router::new(mode, rules(&lines), target).unwrap()
    }

    fn target(name: &str) -> Option<Index> {
        ["DIRECT", "GLOBAL", "a", "b", "c"].iter().position(|known| *known == name).map(Index)
    }

    /// What the rules mean: each is asked in turn.
    fn oracle(rules: &[Rule], session: &Session, from: usize) -> Decision {
        for (rule, asked) in rules.iter().enumerate().skip(from) {
            match asked.matcher.matches(session) {
                Match::Match => return Decision::Send { target: target(&asked.target).unwrap(), rule },
                Match::Needs(fact) => return Decision::Needs(fact),
                Match::Miss => {}
            }
        }
        Decision::Default
    }

    #[test]
    fn the_first_rule_that_applies_wins() {
        let router = router(
            Mode::Rule,
            &["DST-PORT,22,a", "DOMAIN-SUFFIX,example.com,b", "DOMAIN,www.example.com,c", "MATCH,DIRECT"],
        );
        assert_eq!(router.decide(&session("www.example.com", 22), 0), Decision::Send { target: Index(2), rule: 0 });
        assert_eq!(router.decide(&session("www.example.com", 443), 0), Decision::Send { target: Index(3), rule: 1 });
        assert_eq!(router.decide(&session("www.example.com", 443), 2), Decision::Send { target: Index(4), rule: 2 });
        assert_eq!(router.decide(&session("www.example.com", 443), 3), Decision::Send { target: Index(0), rule: 3 });
        assert_eq!(router.decide(&session("www.example.com", 443), 4), Decision::Default);
        assert_eq!(&*router.rule(2).unwrap().text, "DOMAIN,www.example.com,c");
    }

    #[test]
    fn a_look_up_is_asked_for_only_when_no_earlier_rule_decides() {
        let router = router(Mode::Rule, &["DOMAIN,a.example,a", "IP-CIDR,192.0.2.0/24,b", "DOMAIN,b.example,c"]);
        assert_eq!(router.decide(&session("a.example", 1), 0), Decision::Send { target: Index(2), rule: 0 });
        let asked = session("b.example", 1);
        assert_eq!(router.decide(&asked, 0), Decision::Needs(FactKind::Ip));
        let failed = Session { resolved: Fact::Failed, ..asked.clone() };
        assert_eq!(router.decide(&failed, 0), Decision::Send { target: Index(4), rule: 2 });
        let known = Session { resolved: Fact::Known([192, 0, 2, 1].into()), ..asked };
        assert_eq!(router.decide(&known, 0), Decision::Send { target: Index(3), rule: 1 });
    }

    #[test]
    fn the_modes_global_and_direct_ask_no_rule() {
        let session = session("example.com", 1);
        assert_eq!(
            router(Mode::Global, &["MATCH,a"]).decide(&session, 0),
            Decision::Forced { mode: Mode::Global, target: Index(1) }
        );
        assert_eq!(
            router(Mode::Direct, &["MATCH,a"]).decide(&session, 0),
            Decision::Forced { mode: Mode::Direct, target: Index(0) }
        );
    }

    #[test]
    fn a_target_that_nobody_knows_is_an_error() {
        let error = Router::new(Mode::Rule, rules(&["MATCH,nowhere".to_owned()]), target).unwrap_err();
        assert_eq!(error, UnknownTarget("nowhere".to_owned()));
        assert!(Router::new(Mode::Global, Vec::new(), |_| None).is_err());
    }

    fn line() -> impl Strategy<Value = String> {
        let name = "([xy]\\.){0,2}[xy]";
        let condition = prop_oneof![
            name.prop_map(|name| format!("DOMAIN,{name}")),
            name.prop_map(|name| format!("DOMAIN-SUFFIX,{name}")),
            "[xy.]{1,2}".prop_map(|part| format!("DOMAIN-KEYWORD,{part}")),
            (0..4u8).prop_map(|third| format!("IP-CIDR,192.0.{third}.0/24")),
            (1..4u16).prop_map(|port| format!("DST-PORT,{port}")),
            Just("NETWORK,udp".to_owned()),
        ];
        (condition, "[abc]", any::<bool>()).prop_map(|(condition, target, quiet)| {
            format!("{condition},{target}{}", if quiet { ",no-resolve" } else { "" })
        })
    }

    fn any_session() -> impl Strategy<Value = Session> {
        let host = prop_oneof!["([xy]\\.){0,2}[xy]", "192\\.0\\.[0-3]\\.1"];
        let resolved = prop_oneof![
            Just(Fact::Unknown),
            Just(Fact::Failed),
            (0..4u8).prop_map(|third| Fact::Known([192, 0, third, 1].into())),
        ];
        (host, 1..4u16, resolved, any::<bool>()).prop_map(|(host, port, resolved, udp)| Session {
            network: if udp { Network::Udp } else { Network::Tcp },
            resolved,
            ..session(&host, port)
        })
    }

    proptest! {
        #[test]
        fn the_index_decides_as_asking_every_rule_would(
            lines in proptest::collection::vec(line(), 0..24), session in any_session(), from in 0..30usize,
        ) {
            let rules = rules(&lines);
            let router = Router::new(Mode::Rule, rules.clone(), target).unwrap();
            prop_assert_eq!(router.decide(&session, from), oracle(&rules, &session, from));
        }
    }
}
