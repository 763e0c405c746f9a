//! What the profile switches as a whole: the mode, and IPv6.

use super::support::client::act_in;
use super::support::peers::proxy::Door;
use super::support::sites::{NAME, V4, V6};
use super::support::topology::{CLIENT_V4, HOST_LAN_V4};
use super::support::tunproxy::Place;
use super::support::{Capture, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";

fn with_mode(mode: &str, proxies: &str) -> Place {
    Place::new(&format!(
        "
mode: {mode}
ipv6: true
log-level: info
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
{proxies}
rules: ['MATCH,REJECT']
"
    ))
}

#[test]
fn mode_direct_asks_no_rule() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = with_mode("direct", "");
        for site in [NAME, V4, V6] {
            let said = place.exec(&lab.host, "curl", &["-sSg", &format!("http://{site}/")]);
            assert!(said.stdout.contains(&format!("host={site}")), "{said:?}");
            assert!(said.stderr.contains("rule=\"mode: direct\" outbound=\"DIRECT\""), "{said:?}");
        }
        assert_eq!(with_mode("rule", "").act(&lab.host, &format!("connect {V4}:80")), Err("ECONNREFUSED".to_owned()));
    });
}

#[test]
fn mode_global_sends_everything_where_its_group_says() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let door = Door::knowing(&[(NAME, V4)]);
        let _proxy = lab.sites.socks5("203.0.113.3:1080".parse().unwrap(), door.clone());
        let up = "proxies: [{ name: up, type: socks5, server: 203.0.113.3, port: 1080 }]";
        let global = format!("{up}\nproxy-groups: [{{ name: GLOBAL, type: select, proxies: [up, DIRECT] }}]");
        let said = with_mode("global", &global).exec(&lab.host, "curl", &["-sS", &format!("http://{NAME}/")]);
        assert!(said.stdout.contains(&format!("host={NAME} path=/ client=203.0.113")), "{said:?}");
        assert!(said.stderr.contains("rule=\"mode: global\"") && said.stderr.contains("GLOBAL -> up"), "{said:?}");
        assert_eq!(door.requests.all(), [format!("tcp {NAME}:80")]);
    });
}

fn without_ipv6() -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: false
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
    ))
}

#[test]
fn without_ipv6_it_is_refused_at_once_and_none_of_it_leaves() {
    run(&["dig", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let mut capture = Capture::start(&lab.host, "eth0");
        capture.prove(|mark| {
            assert_eq!(act_in(&lab.host, &format!("datagram {V6}:7 {mark}")), Ok(mark.to_owned()));
        });
        let tunproxy = without_ipv6().start(&lab.host);
        let to_site = |packets: Vec<super::support::packet::Packet>| {
            let wanted: std::net::IpAddr = "2001:db8:1::10".parse().unwrap();
            packets.iter().filter(|packet| packet.ip.is_some_and(|ip| ip.destination.ip() == wanted)).count()
        };
        let already = to_site(capture.packets());
        for ns in [&lab.host, lab.client()] {
            assert_eq!(act_in(ns, &format!("connect {V6}:80")), Err("ENETUNREACH".to_owned()), "{}", tunproxy.output());
            assert_eq!(act_in(ns, &format!("datagram {V6}:7 x")), Err("ECONNREFUSED".to_owned()), "{}", ns.name());
            assert_eq!(act_in(ns, &format!("ask {V4}:7 x")), Ok("x".to_owned()));
            assert_eq!(act_in(ns, &format!("ask {NAME}:7 x")), Ok("x".to_owned()));
            let answer = ns.run("dig", &["+short", &format!("@{HOST_LAN_V4}"), NAME, "AAAA"]);
            assert_eq!(answer, "", "a name has no address that leads nowhere");
        }
        assert_eq!(to_site(capture.packets()), already, "IPv6 that left the host");
        assert!(tunproxy.stop().success());
        assert_eq!(act_in(&lab.host, &format!("ask {V6}:7 x")), Ok("x".to_owned()), "IPv6 is back");
        assert_eq!(act_in(lab.client(), &format!("ask {V6}:7 x")), Ok("x".to_owned()), "{CLIENT_V4} too");
    });
}
