//! Upstream proxies behind TLS: pinned, unchecked, and not to be trusted.

use std::net::SocketAddr;

use super::support::peers::digest::of_pattern;
use super::support::peers::proxy::Door;
use super::support::peers::tls::Identity;
use super::support::sites::{NAME, V4};
use super::support::tunproxy::Place;
use super::support::{Sites, Topology, run};

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 3], port))
}

/// Everything to the proxy on this port, with these keys.
fn through(kind: &str, port: u16, trust: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
log-level: info
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
proxies: [{{ name: up, type: {kind}, server: 203.0.113.3, port: {port}, tls: true, udp: true, {trust} }}]
rules: ['MATCH,up']
"
    ))
}

#[test]
fn proxies_behind_tls_carry_streams_and_datagrams() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let door = Door::knowing(&[(NAME, V4)]);
        let identity = Identity::new(&["proxy.example.test"]);
        let _plain = [lab.sites.socks5(at(1080), door.clone()), lab.sites.http_proxy(at(8080), door.clone())];
        let _tls = [(1080, 1443), (8080, 8443)]
            .map(|(plain, outer)| lab.sites.tls_in_front_of(at(plain), at(outer), &identity));
        let pinned = format!("fingerprint: '{}'", identity.fingerprint);
        for (kind, port) in [("socks5", 1443), ("http", 8443)] {
            for trust in [pinned.as_str(), "skip-cert-verify: true, sni: proxy.example.test"] {
                let place = through(kind, port, trust);
                let said = place.exec(&lab.host, "curl", &["-sS", &format!("http://{NAME}/tls")]);
                assert!(said.stdout.contains(&format!("host={NAME} path=/tls client=203.0.113")), "{kind}: {said:?}");
                for direction in ["up", "down", "both"] {
                    let outcome = place.act(&lab.host, &format!("{direction} {V4}:9000 5000000"));
                    assert_eq!(outcome, Ok(of_pattern(5_000_000)), "{kind}, {trust}, {direction}");
                }
            }
        }
        let place = through("socks5", 1443, &pinned);
        assert_eq!(place.act(&lab.host, &format!("datagram {V4}:7 hello")), Ok("hello".to_owned()));
        assert_eq!(sites.datagrams.count(|from| from.starts_with("192.168.")), 0, "not directly");
        assert_eq!(door.requests.count(|request| request.starts_with("udp ")), 1);
    });
}

#[test]
fn a_proxy_whose_certificate_is_not_the_right_one_carries_nothing_and_says_why() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let door = Door::default();
        let identity = Identity::new(&["proxy.example.test"]);
        let _plain = [lab.sites.socks5(at(1080), door.clone()), lab.sites.http_proxy(at(8080), door.clone())];
        let _tls = [(1080, 1443), (8080, 8443)]
            .map(|(plain, outer)| lab.sites.tls_in_front_of(at(plain), at(outer), &identity));
        let another = format!("fingerprint: '{}'", "00".repeat(32));
        for (kind, port) in [("socks5", 1443), ("http", 8443)] {
            // Nobody vouches for a certificate that signs itself.
            for trust in ["sni: proxy.example.test", &another] {
                let script = format!("! curl -sS http://{V4}/ && echo refused");
                let said = through(kind, port, trust).exec(&lab.host, "sh", &["-c", &script]);
                assert!(said.stdout.contains("refused"), "{kind}, {trust}: {said:?}");
                assert!(said.stderr.to_lowercase().contains("certificate"), "{kind}, {trust}: {said:?}");
            }
        }
        // A server without TLS where the profile wants it.
        let said =
            through("socks5", 1080, "skip-cert-verify: true").exec(&lab.host, "curl", &[&format!("http://{V4}/")]);
        assert!(!said.succeeded(), "{said:?}");
        assert_eq!(door.requests.all(), Vec::<String>::new());
    });
}
