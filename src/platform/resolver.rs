//! What to do about the host's own resolver settings: nothing, wherever hijacking port 53 is enough.

use std::borrow::Cow;
use std::fmt::Write;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The plan for the host's resolver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DnsPlan {
    /// Nothing changes: questions to these nameservers come through the TUN, or a stub's questions upstream do.
    Untouched,
    /// systemd-resolved is told that the TUN's link answers every name. Its own memory of a link dies with the link.
    Resolved {
        /// The TUN's DNS addresses.
        servers: Vec<IpAddr>,
    },
    /// /etc/resolv.conf is rewritten, because its nameservers would be asked past the TUN or there are none.
    Rewrite {
        /// Why.
        reason: Cow<'static, str>,
        /// What will stand in it.
        text: String,
    },
}

/// Decides from the text of /etc/resolv.conf (`None`: no such file) what is to be done.
pub(super) fn plan(resolv_conf: Option<&str>, resolved: bool, servers: &[IpAddr]) -> DnsPlan {
    if servers.is_empty() {
        return DnsPlan::Untouched;
    }
    let found: Vec<&str> = resolv_conf.map(nameservers).unwrap_or_default();
    let reason = match resolv_conf {
        None => "there is no /etc/resolv.conf",
        Some(_) if found.is_empty() => "it names no nameserver",
        Some(_) if !found.iter().any(|server| can_be_asked(server)) => "it names no nameserver that can be asked",
        // A link-local address binds the question to its link, which no rule of ours moves.
        Some(_) if found.iter().any(|server| is_link_local(server)) => "a nameserver has a link-local address",
        // The stub may speak TLS upstream, or answer from a link's own servers: it has to be told.
        Some(_) if resolved && found.iter().any(|server| is_stub(server)) => {
            return DnsPlan::Resolved { servers: servers.to_vec() };
        }
        Some(_) => return DnsPlan::Untouched,
    };
    DnsPlan::Rewrite { reason: reason.into(), text: rewritten(resolv_conf.unwrap_or_default(), servers) }
}

/// The nameservers of a resolv.conf, as written (resolv.conf(5)).
#[must_use]
pub fn nameservers(text: &str) -> Vec<&str> {
    text.lines()
        .filter(|line| first_word(line) == "nameserver")
        .filter_map(|line| line.split_whitespace().nth(1))
        .collect()
}

/// Whether `server` is an address; programs pass over whatever else stands there.
#[must_use]
pub fn can_be_asked(server: &str) -> bool {
    let address = server.split('%').next().unwrap_or_default();
    // The short forms of inet_aton(3) are read as well: 127.1.
    let short = || {
        let numbers: Option<Vec<u32>> = address.split('.').map(|part| part.parse().ok()).collect();
        numbers.is_some_and(|numbers| numbers.len() < 4 && numbers.iter().rev().skip(1).all(|number| *number < 256))
    };
    address.parse::<IpAddr>().is_ok() || short()
}

fn is_link_local(server: &str) -> bool {
    let address = server.split('%').next().unwrap_or_default();
    server.contains('%') || matches!(address.parse(), Ok(IpAddr::V6(ip)) if ip.is_unicast_link_local())
}

/// systemd-resolved listens on these two (systemd-resolved.service(8)).
fn is_stub(server: &str) -> bool {
    matches!(server, "127.0.0.53" | "127.0.0.54")
}

fn rewritten(old: &str, servers: &[IpAddr]) -> String {
    let mut text = String::from("# Written by tunproxy while it runs; the former content comes back when it stops.\n");
    for server in servers.iter().take(3) {
        // glibc reads the first three (MAXNS).
        let _ = writeln!(text, "nameserver {server}");
    }
    let keep = |line: &&str| ["search", "domain", "options", "sortlist"].contains(&first_word(line));
    for line in old.lines().filter(keep) {
        let _ = writeln!(text, "{line}");
    }
    text
}

fn first_word(line: &str) -> &str {
    line.split_whitespace().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(text: Option<&str>) -> DnsPlan {
        plan(text, false, &["198.18.0.2".parse().unwrap(), "fdfe:dcba:9877::2".parse().unwrap()])
    }

    #[test]
    fn ordinary_nameservers_and_loopback_stubs_are_left_alone() {
        for text in [
            "nameserver 192.168.1.1\n",
            "# comment\noptions edns0\nnameserver 2001:4860:4860::8888",
            "nameserver 127.0.0.53\n",
            "nameserver 127.0.0.1",
            "nameserver 127.1",
            "nameserver 999.1.1.1\nnameserver 9.9.9.9",
            // A cloud's resolver: IPv4 has no scopes, so the rule for port 53 takes it.
            "nameserver 169.254.169.254\n",
        ] {
            assert_eq!(planned(Some(text)), DnsPlan::Untouched, "{text}");
        }
    }

    #[test]
    fn link_local_missing_and_empty_resolvers_are_replaced() {
        for text in [
            None,
            Some(""),
            Some("# nothing\nsearch lan\n"),
            Some("nameserver 999.1.1.1\nnameserver router.lan"),
            Some("nameserver fe80::1%eth0\nnameserver 9.9.9.9"),
        ] {
            assert!(matches!(planned(text), DnsPlan::Rewrite { .. }), "{text:?}");
        }
        assert!(matches!(planned(Some("nameserver fe80::1")), DnsPlan::Rewrite { .. }));
    }

    #[test]
    fn what_is_rewritten_keeps_search_list_and_options() {
        let DnsPlan::Rewrite { text, .. } =
            planned(Some("search lan home\nnameserver fe80::1%eth0\noptions ndots:2\n"))
        else {
            panic!("not rewritten")
        };
        assert!(
            text.ends_with("nameserver 198.18.0.2\nnameserver fdfe:dcba:9877::2\nsearch lan home\noptions ndots:2\n")
        );
    }

    #[test]
    fn a_running_resolved_is_told_only_where_programs_ask_its_stub() {
        let servers: [IpAddr; 1] = ["198.18.0.2".parse().unwrap()];
        let told = DnsPlan::Resolved { servers: servers.to_vec() };
        assert_eq!(plan(Some("nameserver 127.0.0.53\n"), true, &servers), told);
        assert_eq!(plan(Some("nameserver 9.9.9.9\n"), true, &servers), DnsPlan::Untouched);
    }

    #[test]
    fn without_an_address_that_answers_nothing_is_changed() {
        assert_eq!(plan(None, true, &[]), DnsPlan::Untouched);
    }
}
