//! When an IPv6 address receives. The kernel adds the local route of a new address on a work queue (`addrconf_dad_work`),
//! even where it looks for no duplicates: what arrives before that, an answer to the command's first datagram for
//! instance, is lost.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use ipnet::IpNet;

/// The work queue of a busy machine may lag; one that lags longer loses a datagram, no more.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks.
const LOOK: Duration = Duration::from_micros(200);
/// `RTF_LOCAL` (`linux/ipv6_route.h`).
const LOCAL: u32 = 0x8000_0000;

/// Waits until every IPv6 address among `addresses` receives in this network namespace.
pub(super) fn wait_for(addresses: &[IpNet]) {
    let wanted: Vec<Ipv6Addr> = addresses
        .iter()
        .filter_map(|net| match net.addr() {
            IpAddr::V6(address) => Some(address),
            IpAddr::V4(_) => None,
        })
        .collect();
    let start = Instant::now();
    while !receives(&fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default(), &wanted) {
        if start.elapsed() >= PATIENCE {
            return;
        }
        std::thread::sleep(LOOK);
    }
}

/// Whether `table`, the text of /proc/net/ipv6_route, has a local route for each of `wanted`.
fn receives(table: &str, wanted: &[Ipv6Addr]) -> bool {
    wanted.iter().all(|address| {
        let address = format!("{:032x}", u128::from(*address));
        table.lines().any(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let local = |flags: &&str| u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & LOCAL != 0);
            fields.first() == Some(&address.as_str())
                && fields.get(1) == Some(&"80")
                && fields.get(8).is_some_and(local)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_receives_once_its_local_route_is_there() {
        let prefix = "fdfedcba987600000000000000000000 7e 00000000000000000000000000000000 00 \
                      00000000000000000000000000000000 00000100 00000001 00000000 00000001     tun0\n";
        let local = "fdfedcba987600000000000000000001 80 00000000000000000000000000000000 00 \
                     00000000000000000000000000000000 00000000 00000002 00000000 80200001     tun0\n";
        let unicast = local.replace("80200001", "00000001");
        let wanted = ["fdfe:dcba:9876::1".parse().unwrap()];
        assert!(receives(&format!("{prefix}{local}"), &wanted));
        assert!(!receives(&format!("{prefix}{unicast}"), &wanted));
        assert!(!receives(prefix, &wanted) && !receives("", &wanted) && !receives("\n", &wanted));
        assert!(receives("", &[]), "without IPv6 there is nothing to wait for");
    }
}
