//! Names that no nameserver is asked about: RFC 6761 (special use), 7686 (onion), 9462 (resolver discovery).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What we answer ourselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Special {
    /// The loopback addresses.
    Loopback,
    /// NXDOMAIN.
    NoSuchName,
    /// NODATA.
    NoData,
    /// The reverse name of an address; its PTR may be ours to answer.
    Reverse(IpAddr),
}

/// The local meaning of `name` (lower-case, no trailing dot), if it has one.
pub(super) fn of(name: &str) -> Option<Special> {
    match name.rsplit_once('.').map_or(name, |(_, top)| top) {
        "localhost" => Some(Special::Loopback),
        "invalid" => Some(Special::NoSuchName),
        // An answer would send the client to our nameserver's own encrypted service, past us.
        "arpa" if name == "resolver.arpa" || name.ends_with(".resolver.arpa") => Some(Special::NoData),
        "arpa" => reverse(name).map(Special::Reverse),
        _ => None,
    }
}

/// Whether `name` is of Tor: never to be asked on the public network, but well worth handing to a proxy by name.
pub(super) fn is_onion(name: &str) -> bool {
    name == "onion" || name.ends_with(".onion")
}

/// Whether `name` is asked for to learn how the network translates IPv4 (RFC 7050): what it has there is the answer, and
/// nothing connects to it.
pub(super) fn is_of_the_network(name: &str) -> bool {
    name == "ipv4only.arpa"
}

/// Whether `wire` (lower case) is a name as home networks give them: a single label, or below a domain that the public network
/// does not have (RFC 6762 appendix G, 8375, and what routers and DHCP servers take).
pub(super) fn is_of_home(wire: &[u8]) -> bool {
    let single = wire.first().is_some_and(|length| wire.len() == 2 + usize::from(*length));
    let tops: [&[u8]; 8] = [
        b"\x03lan\0",
        b"\x05local\0",
        b"\x04home\0",
        b"\x08internal\0",
        b"\x08intranet\0",
        b"\x04corp\0",
        b"\x07private\0",
        b"\x04home\x04arpa\0",
    ];
    single && wire.len() > 2 || tops.iter().any(|top| wire.ends_with(top))
}

/// Whether only a nameserver of the local network can know the name of `ip` (RFC 6303, 8375).
pub(super) fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            let shared = a == 100 && (64..128).contains(&b);
            ip.is_private() || ip.is_link_local() || ip.is_loopback() || ip.is_unspecified() || shared
        }
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_unicast_link_local() || ip.is_loopback() || ip.is_unspecified(),
    }
}

/// The address whose complete reverse name `name` is (RFC 1035 section 3.5, RFC 3596 section 2.5).
fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(labels) = name.strip_suffix(".in-addr.arpa") {
        let mut octets = [0; 4];
        let mut labels = labels.split('.');
        for octet in octets.iter_mut().rev() {
            let label = labels.next()?;
            // "+1" and "01" parse as numbers, but are no octets.
            *octet = label.parse().ok().filter(|octet: &u8| octet.to_string() == label)?;
        }
        return labels.next().is_none().then(|| Ipv4Addr::from(octets).into());
    }
    let labels = name.strip_suffix(".ip6.arpa")?;
    let mut bits = 0u128;
    let mut count = 0;
    for label in labels.rsplit('.') {
        let &[digit] = label.as_bytes() else { return None };
        bits = bits << 4 | u128::from(char::from(digit).to_digit(16)?);
        count += 1;
    }
    (count == 32).then(|| Ipv6Addr::from_bits(bits).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reverse_name(ip: IpAddr) -> String {
        match ip {
            IpAddr::V4(ip) => {
                let [a, b, c, d] = ip.octets();
                format!("{d}.{c}.{b}.{a}.in-addr.arpa")
            }
            IpAddr::V6(ip) => {
                let digits = format!("{:032x}", ip.to_bits());
                digits.chars().rev().map(|digit| format!("{digit}.")).collect::<String>() + "ip6.arpa"
            }
        }
    }

    proptest! {
        #[test]
        fn every_address_is_found_in_its_reverse_name(ip: IpAddr) {
            prop_assert_eq!(of(&reverse_name(ip)), Some(Special::Reverse(ip)));
        }
    }

    #[test]
    fn a_zone_above_addresses_is_not_an_address() {
        for name in [
            "168.192.in-addr.arpa",
            "1.2.3.4.5.in-addr.arpa",
            "+1.2.3.4.in-addr.arpa",
            "01.2.3.4.in-addr.arpa",
            "256.2.3.4.in-addr.arpa",
            "8.b.d.0.1.0.0.2.ip6.arpa",
            "ipv4only.arpa",
            "in-addr.arpa",
            "g.ip6.arpa",
        ] {
            assert_eq!(of(name), None, "{name}");
        }
    }

    #[test]
    fn names_of_home_networks_are_told_by_their_top() {
        for name in ["\x03nas\0", "\x03nas\x03lan\0", "\x03lan\0", "\x01a\x02tv\x04home\x04arpa\0"] {
            assert!(is_of_home(name.as_bytes()), "{name:?}");
        }
        for name in ["\0", "\x03www\x07example\0", "\x04wlan\x02de\0", "\x03www\x04wlan\0", "\x04arpa\x02eu\0"] {
            assert!(!is_of_home(name.as_bytes()), "{name:?}");
        }
    }

    #[test]
    fn special_names_are_told_apart_from_names_that_end_alike() {
        assert_eq!(of("localhost"), Some(Special::Loopback));
        assert_eq!(of("a.localhost"), Some(Special::Loopback));
        assert_eq!(of("x.invalid"), Some(Special::NoSuchName));
        assert_eq!(of("_dns.resolver.arpa"), Some(Special::NoData));
        assert_eq!(of("mylocalhost"), None);
        assert_eq!(of("localhost.example"), None);
        assert!(is_onion("a.onion") && !is_onion("grownonion"));
    }
}
