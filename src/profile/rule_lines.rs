//! `rules:`, line by line.

use ipnet::IpNet;

use super::decode::mismatch;
use super::nearest::nearest;
use super::node::{Node, Place, Value};
use super::report::Report;
use super::routes::Names;
use crate::rules::{Line, NOT_YET, NotYet, Rule, RuleError, TYPES, parse};

/// A rule and where it stands.
#[derive(Debug, Clone)]
pub struct PlacedRule {
    /// The rule.
    pub rule: Rule,
    /// Where.
    pub place: Place,
    /// Its key path, as in `rules[7]`.
    pub path: String,
}

/// A rule that is left out.
struct LeftOut<'a> {
    node: &'a Node,
    path: String,
    rule: NotYet,
}

/// The rules that work. Wrong ones are errors; those of types that are not built yet are left out with a warning that
/// says what happens to their flows instead.
pub(super) fn read(items: &[Node], names: &mut Names, report: &mut Report) -> Vec<PlacedRule> {
    let mut rules = Vec::with_capacity(items.len());
    let mut left_out = Vec::new();
    for (index, node) in items.iter().enumerate() {
        let path = format!("rules[{index}]");
        let Some(text) = node.text() else {
            mismatch(node, &path, report, "a rule such as DOMAIN-SUFFIX,example.com,DIRECT");
            continue;
        };
        match parse(text) {
            Ok(Line::Rule(rule)) => {
                check_target(&rule.target, node, &path, names, report);
                for ignored in &rule.ignored {
                    let message = format!("the parameter `{ignored}` has no effect on {} and is ignored", rule.kind);
                    report
                        .warn_once(spot(node, ignored), &*path, message)
                        .hint("parameters are `no-resolve` and `src`");
                }
                warn_of_host_bits(&rule, node, &path, report);
                let rule = Rule { line: node.place.at.line, ..rule };
                rules.push(PlacedRule { rule, place: node.place, path });
            }
            Ok(Line::NotYet(rule)) => {
                // SUB-RULE names a list of rules, not an outbound.
                if rule.kind != "SUB-RULE" {
                    check_target(&rule.target, node, &path, names, report);
                }
                left_out.push(LeftOut { node, path, rule });
            }
            Err(error) => refuse(&error, node, &path, names, report),
        }
    }
    warn_left_out(&left_out, &rules, report);
    rules
}

/// A prefix that names one address and means them all: as in mihomo, the bits behind the prefix do not count.
fn warn_of_host_bits(rule: &Rule, node: &Node, path: &str, report: &mut Report) {
    let of_prefixes = rule.kind.contains("IP-CIDR");
    let Some(net) = rule.payload.parse::<IpNet>().ok().filter(|net| of_prefixes && *net != net.trunc()) else { return };
    let (whole, alone) = (net.trunc(), IpNet::from(net.addr()));
    report
        .warn_once(spot(node, &rule.payload), path, format!("`{}` stands for all of {whole}", rule.payload))
        .hint(format!("write {whole} if that is meant, or {alone} for this one address"));
}

fn check_target(target: &str, node: &Node, path: &str, names: &mut Names, report: &mut Report) {
    if !names.has(target) {
        names.undefined(target, spot(node, target), path, report);
    }
}

fn refuse(error: &RuleError, node: &Node, path: &str, names: &mut Names, report: &mut Report) {
    match error {
        RuleError::Shape => {
            let diagnostic = report.error(node, path, format!("{error}, found {}", node.found()));
            if node.text().is_some_and(|text| !text.contains(',')) {
                diagnostic.hint("inside `[ ]` a rule needs quotes, because its commas would end it");
            }
        }
        RuleError::UnknownType(kind) => {
            let diagnostic = report.error(spot(node, kind), path, error.to_string());
            let known = TYPES.iter().map(|known| known.name).chain(NOT_YET.iter().copied());
            diagnostic.hint(match nearest(kind, known) {
                Some(name) => format!("did you mean `{name}`?"),
                None => {
                    let names: Vec<&str> = TYPES.iter().map(|known| known.name).collect();
                    format!("the types are {}", names.join(", "))
                }
            });
        }
        RuleError::Payload { payload, why, target, .. } => {
            check_target(target, node, path, names, report);
            let place = spot(node, payload);
            let diagnostic = if why.harmless {
                report.warn(place, path, format!("this rule matches nothing: {error}"))
            } else {
                report.error(place, path, error.to_string())
            };
            if let Some(hint) = why.hint {
                diagnostic.hint(hint);
            }
        }
    }
}

/// A rule that is left out must not send a flow DIRECT unnoticed, so the warning says where its flows end.
fn warn_left_out(left_out: &[LeftOut<'_>], rules: &[PlacedRule], report: &mut Report) {
    let last = rules.iter().map(|placed| &placed.rule).find(|rule| rule.kind == "MATCH" && &*rule.target != "PASS");
    let end = last.map_or("DIRECT", |rule| &rule.target);
    let because = last.map_or("because no rule takes everything".to_owned(), |rule| format!("by line {}", rule.line));
    for LeftOut { node, path, rule } in left_out {
        let NotYet { kind, target } = rule;
        let message = format!(
            "{kind} has no effect yet and the rule is left out: its flows go on to the rules below, \
             and what none of those takes goes to {end} {because}"
        );
        let diagnostic = report.warn_once(spot(node, kind), path, message);
        if end == "DIRECT" && target != "DIRECT" {
            diagnostic.hint(format!(
                "flows meant for `{target}` may leave DIRECT; to be safe end the rules with `MATCH,` and a proxy, \
                 or name the destinations with DOMAIN-SUFFIX and IP-CIDR"
            ));
        }
    }
}

/// The field of the rule that reads `part`, the last one if there are several; the whole rule where that cannot be
/// told from the text as written.
fn spot(node: &Node, part: &str) -> Place {
    let whole = node.place;
    let Value::Scalar(scalar) = &node.value else { return whole };
    let width = |text: &str| u32::try_from(text.chars().count()).unwrap_or(u32::MAX);
    let quote = match whole.at.length.checked_sub(width(&scalar.text)) {
        Some(0) => 0,
        Some(2) if scalar.quoted => 1,
        _ => return whole,
    };
    let mut column = whole.at.column + quote;
    let mut found = None;
    for field in scalar.text.split(',') {
        let trimmed = field.trim();
        if trimmed.eq_ignore_ascii_case(part) && !part.is_empty() {
            found = Some(column + width(&field[..field.len() - field.trim_start().len()]));
        }
        column += width(field) + 1;
    }
    match found {
        Some(column) if whole.origin.is_none() => {
            let mut place = whole;
            place.at.column = column;
            place.at.length = width(part);
            place
        }
        _ => whole,
    }
}
