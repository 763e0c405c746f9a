//! A LAN behind the host: its clients are carried as the host itself is.

use super::support::client::{Session, act_in};
use super::support::peers::Peers;
use super::support::sites::{BULK, NAME, V4, V6};
use super::support::topology::{CLIENT_V4, CLIENT_V6, HOST_LAN_V4, HOST_LAN_V6};
use super::support::tunproxy::{Place, Said};
use super::support::{Dump, Sites, Topology, peers::digest::of_pattern, run};

const TUN: &str = "/dev/net/tun";

fn profile(rules: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, auto-forward: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: [{rules}]
"
    ))
}

fn both_rp_filters(test: impl Fn(Topology)) {
    for value in ["0", "1"] {
        test(Topology::with_lan().rp_filter(value));
    }
}

#[test]
fn a_client_is_carried_by_name_and_by_address() {
    run(&["curl", TUN], || {
        both_rp_filters(|lab| {
            let _sites = Sites::open(&lab);
            let tunproxy = profile("'DOMAIN,www.example.test,DIRECT', 'MATCH,DIRECT'").start(&lab.host);
            for (host, rule) in [(NAME, "DOMAIN"), (V4, "MATCH"), (V6, "MATCH")] {
                let url = format!("http://{host}/g");
                let curl = || Said::of(lab.client().command("curl").args(["-sSg", "--connect-timeout", "20", &url]));
                let (said, _line) = tunproxy.line_after(curl, &[rule, "DIRECT"]);
                assert!(said.stdout.contains(&format!("host={host} path=/g")), "{said:?}\n{}", tunproxy.output());
                let client = [CLIENT_V4, CLIENT_V6].iter().any(|ip| said.stdout.contains(&format!("client={ip}\n")));
                assert!(!client, "the flow ends in us and starts from the host: {said:?}");
            }
            for site in [NAME, V4, V6] {
                assert_eq!(act_in(lab.client(), &format!("datagram {site}:7 x")), Ok("x".to_owned()), "{site}");
            }
        });
    });
}

#[test]
fn a_client_sees_refusals_and_closed_halves_as_they_are() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let tunproxy = profile("'DST-PORT,82,REJECT', 'MATCH,DIRECT'").start(&lab.host);
        tunproxy.assert_carries(lab.client());
        for site in [V4, V6] {
            for port in [81, 82] {
                let outcome = act_in(lab.client(), &format!("connect {site}:{port}"));
                assert_eq!(outcome, Err("ECONNREFUSED".to_owned()), "{site}:{port}");
            }
            for direction in ["up", "down", "both"] {
                let outcome = act_in(lab.client(), &format!("{direction} {site}:9000 {BULK}"));
                assert_eq!(outcome, Ok(of_pattern(BULK)), "{direction} {site}");
            }
        }
    });
}

#[test]
fn a_client_gets_its_names_from_the_lan_address_and_from_nobody_else() {
    run(&["dig", TUN], || {
        let lab = Topology::with_lan();
        let sites = Sites::open(&lab);
        let _tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        for server in [HOST_LAN_V4, "203.0.113.53", "2001:db8:1::53"] {
            for transport in ["+notcp", "+tcp"] {
                let words = ["+short", "+tries=1", transport, &format!("@{server}"), NAME, "A"];
                let answer = lab.client().run("dig", &words);
                assert!(answer.starts_with("198.18."), "{server} {transport}: {answer}");
            }
        }
        assert_eq!(sites.dns.queries.all(), Vec::<String>::new());
    });
}

#[test]
fn rules_tell_one_client_from_the_rest() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let rules =
            format!("'SRC-IP-CIDR,{CLIENT_V4}/32,REJECT', 'SRC-IP-CIDR,{CLIENT_V6}/128,REJECT', 'MATCH,DIRECT'");
        let _tunproxy = profile(&rules).start(&lab.host);
        for site in [V4, V6] {
            assert_eq!(act_in(lab.client(), &format!("connect {site}:80")), Err("ECONNREFUSED".to_owned()), "{site}");
            assert_eq!(act_in(&lab.host, &format!("connect {site}:80")), Ok(String::new()), "{site}");
        }
    });
}

#[test]
fn the_lan_itself_is_reached_as_before() {
    run(&[TUN], || {
        both_rp_filters(|lab| {
            let _sites = Sites::open(&lab);
            let (at_client, at_host) = (Peers::new(lab.client()), Peers::new(&lab.host));
            let listen = |peers: &Peers, address: &str| peers.tcp_echo(address.parse().unwrap());
            let _printers = [listen(&at_client, "0.0.0.0:9100"), listen(&at_client, "[::]:9100")];
            let _services = [listen(&at_host, "0.0.0.0:445"), listen(&at_host, "[::]:445")];
            let outside =
                |to: String| Session::open(&lab.internet, "203.0.113.50:0".parse().unwrap(), to.parse().unwrap());
            let mut published = outside(format!("{CLIENT_V4}:9100"));
            let tunproxy = profile("'MATCH,REJECT'").start(&lab.host);
            tunproxy.assert_carries(&lab.host);
            tunproxy.assert_carries(lab.client());
            for printer in [CLIENT_V4.to_owned(), format!("[{CLIENT_V6}]")] {
                assert_eq!(act_in(&lab.host, &format!("ask {printer}:9100 x")), Ok("x".to_owned()), "{printer}");
            }
            for service in [HOST_LAN_V4.to_owned(), format!("[{HOST_LAN_V6}]")] {
                assert_eq!(act_in(lab.client(), &format!("ask {service}:445 x")), Ok("x".to_owned()), "{service}");
            }
            assert_eq!(published.alive().map(drop), Ok(()), "a session into the LAN, older than the run");
        });
    });
}

#[test]
fn forwarding_is_switched_on_for_the_run_and_back_after_it() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        lab.host.sysctl("net.ipv4.ip_forward", "0");
        lab.host.sysctl("net.ipv6.conf.all.forwarding", "0");
        let before = Dump::take(&lab.host);
        let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
        for site in [V4, V6] {
            assert_eq!(act_in(lab.client(), &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
        }
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
        let place = profile("'MATCH,DIRECT'").start(&lab.host).kill();
        place.clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_chain_that_drops_what_is_forwarded_is_named_by_start_and_check() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        lab.host.nft("add table ip filter");
        lab.host.nft("add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }");
        // It answers no names: forwarding alone makes it a gateway.
        let place = Place::new("tun: { enable: true, auto-forward: true }\nrules: ['MATCH,DIRECT']\n");
        let wanted = "nft insert rule ip filter FORWARD iifname tunproxy0 accept";
        let checked = place.check(&lab.host);
        assert!(checked.succeeded() && checked.stdout.contains(wanted), "{checked:?}");
        let tunproxy = place.start(&lab.host);
        tunproxy.line(wanted);
        assert!(tunproxy.stop().success());
        let desktop = Place::new("tun: { enable: true }\nrules: ['MATCH,DIRECT']\n").check(&lab.host);
        assert!(desktop.succeeded() && !desktop.stdout.contains("FORWARD"), "{desktop:?}");
    });
}

#[test]
fn a_nameserver_for_everybody_is_warned_of_once_with_the_address_to_use_instead() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let warnings = |listen: &str| {
            let place = Place::new(&format!(
                "tun: {{ enable: true }}\ndns: {{ enable: true, listen: '{listen}', nameserver: [192.168.1.1] }}\nrules: ['MATCH,DIRECT']\n"
            ));
            let examined = place.look(&lab.host, "doctor", &[]).stdout;
            let tunproxy = place.start(&lab.host);
            let said = tunproxy.output();
            assert!(tunproxy.stop().success());
            [said, examined].map(|text| {
                let lines: Vec<&str> = text.lines().collect();
                let at = lines.iter().position(|line| line.contains("open resolver"));
                assert!(lines.iter().filter(|line| line.contains("open resolver")).count() <= 1, "{text}");
                // What to do stands behind it, or on the next line.
                at.map(|at| lines[at..(at + 2).min(lines.len())].concat())
            })
        };
        for every in [":53", "0.0.0.0:53", "[::]:53"] {
            for warning in warnings(every) {
                let warning = warning.unwrap_or_else(|| panic!("{every}: no warning"));
                assert!(warning.contains(&format!("`{HOST_LAN_V4}:53`")), "{every}: {warning}");
            }
        }
        for one in ["127.0.0.1:53", &format!("{HOST_LAN_V4}:53")] {
            assert_eq!(warnings(one), [None, None], "{one}");
        }
    });
}
