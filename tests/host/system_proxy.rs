//! The listening ports: alone, beside the TUN, and agreeing with it flow for flow.

use std::io::{ErrorKind, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use super::support::client::act_in;
use super::support::sites::{NAME, V4, V6};
use super::support::topology::{HOST_V4, HOST_V6};
use super::support::tunproxy::{Place, Said, Tunproxy};
use super::support::{Sites, Topology, run};

fn profile(more: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
mixed-port: 7890
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['DOMAIN,{NAME},DIRECT', 'DST-PORT,81,REJECT', 'IP-CIDR,203.0.113.0/24,DIRECT', 'MATCH,DIRECT']
{more}
"
    ))
}

fn curl(lab: &Topology, proxy: &str, url: &str) -> Said {
    let proxy = if proxy.is_empty() { vec![] } else { vec!["-p", "-x", proxy] };
    Said::of(lab.host.command("curl").args(["-sSg", "--connect-timeout", "20"]).args(proxy).arg(url))
}

#[test]
fn every_kind_of_client_gets_through_the_mixed_port() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let _tunproxy = profile("port: 7891\nsocks-port: 7892").start(&lab.host);
        for proxy in [
            "socks5h://127.0.0.1:7890",
            "socks5://127.0.0.1:7890",
            "socks4a://127.0.0.1:7890",
            "http://127.0.0.1:7890",
            "http://127.0.0.1:7891",
            "socks5h://127.0.0.1:7892",
        ] {
            for site in [NAME, V4] {
                let said = curl(&lab, proxy, &format!("http://{site}/m"));
                assert!(said.stdout.contains(&format!("host={site} path=/m client=")), "{proxy}: {said:?}");
                // A name has both families, and whoever looks it up may take either.
                let ours = if site == NAME { &[HOST_V4, HOST_V6][..] } else { &[HOST_V4] };
                assert!(ours.iter().any(|host| said.stdout.contains(&format!("client={host}\n"))), "{said:?}");
            }
        }
        let said = curl(&lab, "socks5h://127.0.0.1:7890", &format!("http://{V6}/m"));
        assert!(said.stdout.contains(&format!("host={V6} path=/m client={HOST_V6}")), "{said:?}");
    });
}

#[test]
fn a_plain_http_proxy_request_is_carried_without_connect() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let _tunproxy = profile("").start(&lab.host);
        let url = format!("http://{NAME}/absolute");
        let said = Said::of(lab.host.command("curl").args(["-sS", "-x", "http://127.0.0.1:7890", &url]));
        assert!(said.stdout.contains(&format!("host={NAME} path=/absolute")), "{said:?}");
    });
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_request_is_missed_though_its_upstream_takes_nothing() {
    run(&[], || {
        let lab = Topology::desktop();
        let deaf = format!("{V4}:8080");
        let _server = lab.sites.tcp(deaf.parse().unwrap(), async |_stream, _| std::future::pending().await);
        let tunproxy = profile("").start(&lab.host);
        let leave = || {
            lab.host.enter(move || {
                let mut client = TcpStream::connect("127.0.0.1:7890").unwrap();
                write!(client, "POST http://{deaf}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
                    .unwrap();
                client.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
                let full = std::iter::repeat_with(|| client.write(&[0; 1 << 16])).find_map(Result::err);
                assert_eq!(full.map(|error| error.kind()), Some(ErrorKind::WouldBlock));
                socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
            });
        };
        tunproxy.line_after(leave, &["203.0.113", ":8080", "reset by the client"]);
    });
}

#[test]
fn datagrams_are_relayed_for_socks5_clients() {
    run(&[], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let _tunproxy = profile("").start(&lab.host);
        for site in [V4, V6] {
            let outcome = act_in(&lab.host, &format!("relay 127.0.0.1:7890 {site}:7 hello"));
            assert_eq!(outcome, Ok("hello".to_owned()), "{site}");
        }
        assert_eq!(sites.datagrams.all().len(), 2);
    });
}

#[test]
fn a_client_may_come_back_from_the_same_port() {
    run(&[], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let tunproxy = profile("").start(&lab.host);
        for word in ["one", "two", "three"] {
            let relay = || act_in(&lab.host, &format!("relay 127.0.0.1:7890 {V4}:7 {word} 4567"));
            let length = word.len();
            // The line comes with the end of the association, not minutes later.
            let words = [&format!("destination={V4}:7"), &*format!("up={length} down={length} "), "outcome=closed"];
            assert_eq!(tunproxy.line_after(relay, &words).0, Ok(word.to_owned()));
        }
        assert_eq!(sites.datagrams.all().len(), 3);
    });
}

#[test]
fn clients_need_the_credentials_of_the_profile() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let _tunproxy = profile("authentication: ['ann:secret']").start(&lab.host);
        let url = format!("http://{V4}/a");
        for scheme in ["http", "socks5h"] {
            let known = curl(&lab, &format!("{scheme}://ann:secret@127.0.0.1:7890"), &url);
            assert!(known.stdout.contains("path=/a"), "{scheme}: {known:?}");
            for stranger in ["", "ann:wrong@"] {
                let said = curl(&lab, &format!("{scheme}://{stranger}127.0.0.1:7890"), &url);
                assert!(matches!(said.code, Some(56 | 97)), "407, or no method that is accepted: {said:?}");
            }
        }
    });
}

#[test]
fn others_get_in_only_if_the_profile_allows_the_lan() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        for (more, outcome) in [
            ("allow-lan: false", Err("ECONNREFUSED".to_owned())),
            ("allow-lan: true", Ok(String::new())),
            ("allow-lan: true\nbind-address: 127.0.0.1", Err("ECONNREFUSED".to_owned())),
        ] {
            let tunproxy = profile(more).start(&lab.host);
            assert_eq!(act_in(&lab.gateway, &format!("connect {HOST_V4}:7890")), outcome, "{more}");
            assert_eq!(act_in(&lab.host, "connect 127.0.0.1:7890"), Ok(String::new()), "{more}");
            assert!(tunproxy.stop().success());
        }
    });
}

#[test]
fn the_tun_and_the_ports_agree_flow_for_flow() {
    run(&["curl", "/dev/net/tun"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("tun: { enable: true, auto-route: true, dns-hijack: ['any:53'] }").start(&lab.host);
        for (url, rule, outbound, code) in [
            (format!("http://{NAME}/"), "DOMAIN", "DIRECT", 0),
            (format!("http://{V4}/"), "IP-CIDR", "DIRECT", 0),
            (format!("http://{V6}/"), "MATCH", "DIRECT", 0),
            (format!("http://{V4}:81/"), "DST-PORT", "REJECT", 7),
        ] {
            let by_tun = flow(&tunproxy, || curl(&lab, "", &url), rule, outbound);
            let by_port = flow(&tunproxy, || curl(&lab, "socks5h://127.0.0.1:7890", &url), rule, outbound);
            assert_eq!(by_tun.code, Some(code), "{url}: {by_tun:?}");
            assert_eq!(by_tun.stdout, by_port.stdout, "{url}");
            assert_eq!(by_port.succeeded(), by_tun.succeeded(), "{url}: {by_port:?}");
        }
    });
}

/// Asks, and holds the flow's line against the rule and the outbound it should name.
fn flow(tunproxy: &Tunproxy, ask: impl FnOnce() -> Said, rule: &str, outbound: &str) -> Said {
    tunproxy.line_after(ask, &[rule, outbound]).0
}
