//! Who may use the proxy ports: `allow-lan`, `bind-address`, `authentication` and their kin.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::outbound::base64;
use crate::profile::Listen;

/// One entry of `authentication`.
#[derive(Clone, PartialEq, Eq)]
pub struct User {
    name: String,
    password: String,
    /// The credentials of HTTP's basic authentication, without padding.
    basic: String,
}

impl User {
    /// A user and their password.
    #[must_use]
    pub fn new(name: &str, password: &str) -> Self {
        let basic = base64(format!("{name}:{password}").as_bytes()).trim_end_matches('=').to_owned();
        Self { name: name.to_owned(), password: password.to_owned(), basic }
    }
}

impl std::fmt::Debug for User {
    /// Passwords stay out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("User").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Who may connect, from where, and with which password.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Access {
    /// `allow-lan`: whether others than this host may connect.
    pub allow_lan: bool,
    /// `bind-address`, which counts only with `allow-lan`; None is `*`, every address.
    pub bind: Option<IpAddr>,
    /// `authentication`; nobody is asked if it is empty.
    pub users: Vec<User>,
    /// `skip-auth-prefixes`: clients that are not asked.
    pub skip_auth: Vec<IpNet>,
    /// `lan-allowed-ips`; everybody if it is empty.
    pub lan_allowed: Vec<IpNet>,
    /// `lan-disallowed-ips`; stronger than `lan_allowed`.
    pub lan_disallowed: Vec<IpNet>,
}

impl From<&Listen> for Access {
    fn from(listen: &Listen) -> Self {
        Self {
            allow_lan: listen.allow_lan,
            bind: listen.bind_address,
            users: listen.authentication.iter().map(|known| User::new(&known.user, &known.password)).collect(),
            skip_auth: listen.skip_auth_prefixes.clone(),
            lan_allowed: listen.lan_allowed_ips.clone(),
            lan_disallowed: listen.lan_disallowed_ips.clone(),
        }
    }
}

impl Access {
    /// The addresses to listen on. The second one is left out where the host has no IPv6.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        match (self.allow_lan, self.bind) {
            (false, _) => vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)],
            (true, None) => vec![IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
            (true, Some(ip)) => vec![ip],
        }
    }

    /// Whether a client at `ip` may connect at all. This host itself always may.
    #[must_use]
    pub fn admits(&self, ip: IpAddr) -> bool {
        let within = |list: &[IpNet]| list.iter().any(|prefix| prefix.contains(&ip));
        ip.is_loopback()
            || (!within(&self.lan_disallowed) && (self.lan_allowed.is_empty() || within(&self.lan_allowed)))
    }

    /// Whether a client at `ip` must say who it is.
    #[must_use]
    pub fn asks(&self, ip: IpAddr) -> bool {
        !self.users.is_empty() && !self.skip_auth.iter().any(|prefix| prefix.contains(&ip))
    }

    /// Whether name and password are those of a user.
    #[must_use]
    pub fn knows(&self, name: &[u8], password: &[u8]) -> bool {
        // Not `any`: how long it takes tells nobody which user was nearly right.
        self.users.iter().fold(false, |known, user| {
            known | (same(user.name.as_bytes(), name) & same(user.password.as_bytes(), password))
        })
    }

    /// Whether `credentials` (RFC 7617, what follows the word `Basic`) are those of a user.
    #[must_use]
    pub fn knows_basic(&self, credentials: &str) -> bool {
        let given = credentials.trim().trim_end_matches('=');
        self.users.iter().fold(false, |known, user| known | same(user.basic.as_bytes(), given.as_bytes()))
    }
}

/// Compares in a time that depends on the lengths alone.
fn same(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0, |differences, (x, y)| differences | (x ^ y));
    a.len() == b.len() && std::hint::black_box(differences) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn prefixes(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn without_allow_lan_only_loopback_is_bound() {
        let access = Access { bind: Some(ip("192.0.2.1")), ..Access::default() };
        assert_eq!(access.addresses(), [ip("127.0.0.1"), ip("::1")]);
        let open = Access { allow_lan: true, ..access };
        assert_eq!(open.addresses(), [ip("192.0.2.1")]);
        let any = Access { bind: None, ..open };
        assert_eq!(any.addresses(), [ip("0.0.0.0"), ip("::")]);
    }

    #[test]
    fn what_is_disallowed_is_stronger_and_this_host_always_may() {
        let access = Access {
            lan_allowed: prefixes(&["192.168.0.0/16", "fd00::/8"]),
            lan_disallowed: prefixes(&["192.168.7.0/24"]),
            ..Access::default()
        };
        for (client, admitted) in
            [("192.168.1.1", true), ("192.168.7.1", false), ("10.0.0.1", false), ("fd00::1", true), ("127.0.0.1", true)]
        {
            assert_eq!(access.admits(ip(client)), admitted, "{client}");
        }
        assert!(Access::default().admits(ip("203.0.113.1")));
    }

    #[test]
    fn users_are_known_by_name_and_password_together() {
        let users = vec![User::new("me", "pass:word"), User::new("you", "")];
        let access = Access { users, skip_auth: prefixes(&["127.0.0.0/8"]), ..Access::default() };
        assert!(access.asks(ip("192.0.2.1")) && !access.asks(ip("127.0.0.1")));
        assert!(!Access::default().asks(ip("192.0.2.1")));
        for (name, password, known) in [
            ("me", "pass:word", true),
            ("you", "", true),
            ("me", "", false),
            ("you", "pass:word", false),
            ("m", "", false),
        ] {
            assert_eq!(access.knows(name.as_bytes(), password.as_bytes()), known, "{name}");
            assert_eq!(access.knows_basic(&base64(format!("{name}:{password}").as_bytes())), known, "{name}");
        }
        assert!(!access.knows_basic(""));
        assert!(!format!("{access:?}").contains("word"));
    }
}
