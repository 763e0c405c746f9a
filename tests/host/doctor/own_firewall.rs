//! What the host's own firewall drops is blamed on it, and not on routers, nameservers or proxies.

use super::super::support::sites::V4;
use super::super::support::topology::GATEWAY_V6;
use super::super::support::tunproxy::Place;
use super::super::support::{Sites, Topology, run};
use super::{TUN, assert_one, desktop, examine, told};

#[test]
fn a_chain_that_drops_whatever_comes_in_is_named_and_the_router_is_not_blamed() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = desktop();
        lab.host.nft("add table inet adm");
        lab.host.nft("add chain inet adm input { type filter hook input priority 0; policy drop; }");
        lab.host.ip("-6 neigh flush dev eth0");
        let found = examine(&place, &lab.host);
        let problems = told(&found, "problem");
        assert!(problems.iter().all(|it| it.contains("inet adm input")), "{problems:#?}");
        let advice = "nft insert rule inet adm input iifname \"eth0\" ct state established,related accept";
        let named = |it: &&String| it.contains("drops what comes by eth0") && it.contains(advice);
        assert_eq!(problems.iter().filter(named).count(), 1, "{problems:#?}");
        let warnings = told(&found, "warning");
        assert!(warnings.iter().any(|it| it.contains("192.168.1.1 does not answer, or is not heard")), "{warnings:#?}");
        let all = [problems, warnings].concat();
        assert!(!all.iter().any(|it| it.contains("the gateway")), "{all:#?}");
        // What is advised brings all of it back, but for what is said of the TUN.
        lab.host.nft("insert rule inet adm input iifname eth0 ct state established,related accept");
        lab.host.nft("insert rule inet adm input meta l4proto ipv6-icmp accept");
        assert_one("problem", &place, &lab.host, &["drops what comes to this host by tunproxy0"]);
        // One that is not there is told again.
        lab.host.ip("-6 route replace default via 2001:db8:2::99");
        let problems = told(&examine(&place, &lab.host), "problem");
        assert!(problems.iter().any(|it| it.contains("the gateway 2001:db8:2::99 (eth0)")), "{problems:#?}");
        lab.host.ip(&format!("-6 route replace default via {GATEWAY_V6}"));
    });
}

#[test]
fn a_chain_that_lets_no_connection_out_is_named_and_the_proxies_are_not_blamed() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(&format!(
            "ipv6: true\ntun: {{ enable: true }}\n\
             dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}\n\
             proxies:\n- {{ name: mine, type: http, server: {V4}, port: 80 }}\nrules: ['MATCH,mine']\n"
        ));
        lab.host.nft("add table ip f");
        lab.host.nft("add chain ip f o { type filter hook output priority 0; }");
        lab.host.nft("add rule ip f o tcp dport != 22 drop");
        let why = "the host's own firewall drops what it sends (chain ip f o: `tcp dport != 22 drop`)";
        let look = || assert_one("problem", &place, &lab.host, &["the proxy mine", why]);
        look();
        let tunproxy = place.start(&lab.host);
        look();
        assert!(tunproxy.stop().success());
        // On its way out only the last hook sees it.
        lab.host.nft("flush chain ip f o");
        lab.host.nft("add chain ip f p { type filter hook postrouting priority 0; policy drop; }");
        lab.host.nft("add rule ip f p udp dport 53 accept");
        let words = ["the proxy mine", "(chain ip f p: `policy drop`)"];
        let problems = told(&examine(&place, &lab.host), "problem");
        assert!(problems.iter().any(|it| words.iter().all(|word| it.contains(word))), "{problems:#?}");
    });
}
