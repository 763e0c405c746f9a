//! Single changes as the command lines of ip(8), sysctl(8) and a shell.

use std::fmt::Write;

use super::routing::{Family, Ports, Route, RouteKind, Rule, RuleAction};
use super::undo::{OldFile, Undo};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP_V6: u8 = 58;

/// The command that does `act` ("add", "delete") to a route.
pub(super) fn route(act: &str, route: &Route) -> String {
    let family = family(Family::of(&route.to));
    let to = match route.to.prefix_len() {
        0 => "default".to_owned(),
        _ => route.to.to_string(),
    };
    let (kind, way, pace) = match &route.kind {
        RouteKind::Device(device) if route.to.addr().is_ipv4() => {
            ("", format!(" dev {device} scope global"), " congctl reno")
        }
        RouteKind::Device(device) => ("", format!(" dev {device}"), " congctl reno"),
        RouteKind::Throw => ("throw ", String::new(), ""),
        RouteKind::Unreachable => ("unreachable ", String::new(), ""),
    };
    let (table, metric) = (route.table, route.metric);
    format!("ip {family} route {act} {kind}{to}{way} table {table} metric {metric}{pace} protocol kernel")
}

/// The command that does `act` ("add", "delete") to a rule.
#[must_use]
pub fn rule(act: &str, rule: &Rule) -> String {
    let mut line = format!("ip {} rule {act} priority {}", family(rule.family), rule.priority);
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            // Writing to a String cannot fail.
            let _ = write!(line, " {name} {value}");
        }
    };
    add("from", rule.from.map(|net| net.to_string()));
    add("to", rule.to.map(|net| net.to_string()));
    add("fwmark", rule.mark.map(|it| format!("{:#x}/{:#x}", it.mark, it.mask)));
    add("iif", rule.iif.clone());
    add("oif", rule.oif.clone());
    add("uidrange", rule.uids.map(|(first, last)| format!("{first}-{last}")));
    add("ipproto", rule.protocol.map(protocol));
    add("sport", rule.source_ports.map(ports));
    add("dport", rule.destination_ports.map(ports));
    match rule.action {
        RuleAction::Lookup(table) => add("lookup", Some(table.to_string())),
        RuleAction::Goto(priority) => add("goto", Some(priority.to_string())),
        RuleAction::Nop => line.push_str(" nop"),
        RuleAction::UNREACHABLE => line.push_str(" unreachable"),
        // Never one of ours.
        RuleAction::Other(number) => add("action", Some(number.to_string())),
    }
    if let Some(length) = rule.suppress_prefix_length {
        let _ = write!(line, " suppress_prefixlength {length}");
    }
    line + " protocol kernel"
}

/// A kernel parameter as sysctl(8) names it. A dot in an interface's name has to be told from one that separates.
#[must_use]
pub fn parameter(path: &str) -> String {
    if path.contains('.') { path.to_owned() } else { path.replace('/', ".") }
}

/// The command that carries out an inverse.
pub(super) fn put_back(undo: &Undo) -> String {
    match undo {
        Undo::Rule(it) => rule("delete", it),
        Undo::Route(it) => route("delete", it),
        Undo::Address { device, address } => format!("ip address delete {address} dev {device}"),
        Undo::Table(table) => {
            let name = &table.name;
            format!("nft delete table inet {name}; nft delete table arp {name}")
        }
        Undo::Sysctl { path, old, .. } => format!("sysctl -w {}={old}", parameter(path)),
        Undo::ResolvConf { path, old, .. } => {
            let path = path.display();
            match old {
                OldFile::Missing => format!("rm {path}"),
                OldFile::Link(target) => format!("ln --symbolic --force --no-dereference {target} {path}"),
                OldFile::File { content, .. } => write_file(&path.to_string(), &String::from_utf8_lossy(content)),
            }
        }
    }
}

/// The command that makes `text` the content of a file, byte for byte.
pub(super) fn write_file(path: &str, text: &str) -> String {
    let text = text.replace('\\', "\\\\").replace('%', "%%").replace('\'', "'\\''").replace('\n', "\\n");
    format!("printf '{text}' > {path}")
}

fn family(family: Family) -> &'static str {
    match family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    }
}

/// A transport protocol as ip(8) prints it.
#[must_use]
pub fn protocol(number: u8) -> String {
    match number {
        ICMP => "icmp".to_owned(),
        TCP => "tcp".to_owned(),
        UDP => "udp".to_owned(),
        ICMP_V6 => "ipv6-icmp".to_owned(),
        other => other.to_string(),
    }
}

/// A range of ports as ip(8) prints it: a single one by itself.
#[must_use]
pub fn ports(Ports { first, last }: Ports) -> String {
    if first == last { first.to_string() } else { format!("{first}-{last}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_to_a_file_comes_out_of_a_shell_byte_for_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for text in ["", "nameserver fe80::1%eth0\n# it's \\n 100 %\n", "no end", "\n\n"] {
            let command = write_file(&path.display().to_string(), text);
            assert!(!command.contains('\n'), "{command}");
            let status = std::process::Command::new("sh").args(["-ec", &command]).status().unwrap();
            assert!(status.success(), "{command}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "{command}");
        }
    }
}
