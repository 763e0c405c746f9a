//! A port scanner that is not ours sees through us what it sees without us.

use super::support::peers::{Peer, Record};
use super::support::sites::{V4, V6};
use super::support::topology::HOST_LAN_V4;
use super::support::tunproxy::{Place, Said};
use super::support::{Netns, Topology, run};

const TUN: &str = "/dev/net/tun";

/// Ports of both protocols: open, closed, filtered in silence, and refused by a firewall that says so.
const PORTS: &str = "3000-3019";
/// How the firewall of the sites takes them; everything else is open where it is a multiple of seven, or closed.
const FIREWALL: [&str; 4] = [
    "meta l4proto { tcp, udp } th dport 3010-3011 drop",
    "meta l4proto { tcp, udp } th dport 3012 reject with icmpx type admin-prohibited",
    "meta l4proto { tcp, udp } th dport 3013 reject with icmpx type host-unreachable",
    // Of a TCP connection that failed, a program, as we are one to the system, does not learn whether RST or this ended it.
    "udp dport 3015 reject with icmpx type port-unreachable",
];

fn open_sites(lab: &Topology) -> Vec<Peer> {
    lab.internet.nft("add table inet filter");
    lab.internet.nft("add chain inet filter input { type filter hook input priority 0; policy accept; }");
    FIREWALL.iter().for_each(|rule| drop(lab.internet.nft(&format!("add rule inet filter input {rule}"))));
    // An error comes from the address that was asked, and not from another of that host.
    lab.internet.address("lo", &["203.0.113.10/32", "2001:db8:1::10/128"]);
    // Closed ports of UDP are known by their ICMP alone.
    lab.internet.sysctl("net.ipv4.icmp_ratelimit", "0");
    lab.internet.sysctl("net.ipv4.icmp_msgs_per_sec", "10000");
    lab.internet.sysctl("net.ipv4.icmp_msgs_burst", "1000");
    lab.internet.sysctl("net.ipv6.icmp.ratelimit", "0");
    let ports = (3000..3020).filter(|port| port % 7 == 0 || *port == 3000);
    let at = |host: &str, port: u16| format!("{host}:{port}").parse().expect("an address");
    let pairs = ports.flat_map(|port| [V4, V6].map(|host| at(host, port)));
    pairs.flat_map(|at| [lab.sites.tcp_echo(at), lab.sites.udp_echo(at, &Record::default())]).collect()
}

/// The reason that nmap gives. Which kind of unreachable it was, but for a port of UDP, is lost: a program learns an
/// error's number, and that is one for several kinds (`icmp_err_convert` of Linux).
fn why(reason: &str) -> &str {
    let unreachable = reason != "port-unreach" && ["unreach", "prohibited"].iter().any(|word| reason.ends_with(word));
    if unreachable { "unreachable" } else { reason }
}

/// What nmap says of each port, with the reason: `3000/tcp open syn-ack`.
fn nmap(ns: &Netns, kind: &str, site: &str) -> Vec<String> {
    let mut command = ns.command("nmap");
    // An error that comes while the system is still sending the SYN is told to the caller with the next, after a second.
    command.args(["-n", "-Pn", "--reason", "--min-rtt-timeout", "3s", "--initial-rtt-timeout", "3s"]);
    command.args(["--max-retries", "1", "--min-parallelism", "20", kind, "-p", PORTS]);
    if site.starts_with('[') {
        command.arg("-6");
    }
    let said = Said::of(command.arg(site.trim_matches(['[', ']'])));
    assert!(said.succeeded(), "{said:?}");
    let port = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let of_a_port = words.first().is_some_and(|word| word.ends_with("/tcp") || word.ends_with("/udp"));
        // The name of the service says nothing, and neither does the time to live.
        (of_a_port && words.len() >= 4).then(|| format!("{} {} {}", words[0], words[1], why(words[3])))
    };
    said.stdout.lines().filter_map(port).collect()
}

/// All three kinds of scan of both families, by the host and by its LAN.
fn scan_everything(lab: &Topology) -> Vec<(String, Vec<String>)> {
    std::thread::scope(|scope| {
        let mut scans = Vec::new();
        for ns in [&lab.host, lab.client()] {
            for kind in ["-sT", "-sS", "-sU"] {
                for site in [V4, V6] {
                    let what = format!("{kind} of {site} by {}", ns.name());
                    scans.push((what, scope.spawn(move || nmap(ns, kind, site))));
                }
            }
        }
        scans.into_iter().map(|(what, scan)| (what, scan.join().expect("a scan"))).collect()
    })
}

#[test]
fn nmap_reports_of_open_closed_and_filtered_ports_what_it_reports_without_us() {
    run(&["nmap", TUN], || {
        let lab = Topology::with_lan();
        let _open = open_sites(&lab);
        let truth = scan_everything(&lab);
        for (what, ports) in &truth {
            let states = if what.starts_with("-sU") {
                ["open udp-response", "closed port-unreach", "open|filtered no-response", "filtered unreachable"]
            } else {
                ["open syn-ack", "closed ", "filtered no-response", "filtered unreachable"]
            };
            assert_eq!(ports.len(), 20, "{what}: {ports:#?}");
            for state in states {
                assert!(ports.iter().any(|port| port.contains(state)), "{what} has nothing {state}: {ports:#?}");
            }
        }
        let tunproxy = Place::new(&format!(
            "
ipv6: true
log-level: info
tun: {{ enable: true }}
dns: {{ enable: true, listen: '{HOST_LAN_V4}:53', enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
rules: ['MATCH,DIRECT']
"
        ))
        .start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        for ((what, through_us), (_, truth)) in scan_everything(&lab).iter().zip(&truth) {
            assert_eq!(through_us, truth, "{what}\n{}", tunproxy.output());
        }
    });
}
