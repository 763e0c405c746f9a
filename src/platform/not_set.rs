//! Kernel parameters that could not be set, in words: what that costs.

use super::plan::Sysctl;
use super::words::parameter;

/// The parameters `wanted` with their values, and what it costs that they have others.
#[must_use]
pub fn not_set(wanted: &[&Sysctl]) -> String {
    let settings: Vec<String> = wanted.iter().map(|it| format!("{}={}", parameter(&it.path), it.value)).collect();
    let costs: Vec<&str> = wanted.iter().filter_map(|it| cost(it)).collect();
    format!("{}. What that costs: {}", settings.join(", "), costs.join("; "))
}

fn cost(parameter: &Sysctl) -> Option<&'static str> {
    match parameter.path.rsplit('/').next()? {
        "src_valid_mark" if parameter.of_tun => Some(
            "where the reverse-path filter of the TUN is strict (rp_filter=1), answers to sockets that are bound to another \
             address are dropped",
        ),
        "src_valid_mark" => Some("port forwards that come in by that uplink are dropped"),
        "accept_local" => Some(
            "what programs of this host send each other by way of tunproxy, from one of its addresses to \
                                another, is dropped",
        ),
        "disable_ipv6" => Some("the TUN has no IPv6"),
        "ip_forward" => Some("other hosts get no further over IPv4"),
        "forwarding" => Some("other hosts get no further over IPv6"),
        "accept_ra" => Some("that uplink loses its advertised default route when this host begins to forward"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_parameter_is_named_with_what_it_is_for() {
        let sysctl = |path: &str, of_tun| Sysctl { path: path.to_owned(), value: "1".to_owned(), of_tun };
        let wanted = [sysctl("net/ipv4/conf/tun7/accept_local", true), sysctl("net/ipv4/ip_forward", false)];
        let told = not_set(&wanted.iter().collect::<Vec<_>>());
        assert!(
            told.starts_with("net.ipv4.conf.tun7.accept_local=1, net.ipv4.ip_forward=1. What that costs: "),
            "{told}"
        );
        assert!(told.ends_with("; other hosts get no further over IPv4"), "{told}");
    }
}
