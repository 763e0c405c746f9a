//! Names: answered from the fake range, turned back into names, and stable over restarts.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::support::peers::Peers;
use super::support::peers::dns::Zone;
use super::support::sites::{NAME, zone};
use super::support::tunproxy::{Place, Said};
use super::support::{Sites, Topology, run, world};

const FAKE_IP: &str = "
mode: rule
ipv6: true
log-level: info
dns:
  enable: true
  enhanced-mode: fake-ip
  fake-ip-range: 198.18.0.1/16
  fake-ip-filter: ['real.example.test']
  nameserver: [192.168.1.1]
rules: ['DOMAIN,www.example.test,DIRECT', 'MATCH,REJECT']
";

/// Runs `dig` inside `exec` and returns its output.
fn dig(lab: &Topology, place: &Place, words: &str) -> String {
    let words: Vec<&str> = ["+tries=1", "+timeout=20"].into_iter().chain(words.split(' ')).collect();
    let said = place.exec(&lab.host, "dig", &words);
    assert!(said.succeeded(), "{words:?}: {said:?}");
    said.stdout
}

#[test]
fn curl_reaches_a_site_by_name_in_both_families() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        for family in ["-4", "-6"] {
            let said = Place::new(FAKE_IP).exec(&lab.host, "curl", &["-sS", family, &format!("http://{NAME}/n")]);
            assert!(said.stdout.contains(&format!("host={NAME} path=/n")), "{family}: {said:?}");
            let logged = said.stderr.lines().any(|line| line.contains(NAME) && line.contains("DOMAIN"));
            assert!(logged, "the rule of a name matched, so the fake address became the name: {said:?}");
        }
    });
}

#[test]
fn addresses_are_fake_short_lived_and_have_a_pointer() {
    run(&["dig"], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let place = Place::new(FAKE_IP);
        let v4: Ipv4Addr = dig(&lab, &place, &format!("+short {NAME} A")).trim().parse().unwrap();
        let v6: Ipv6Addr = dig(&lab, &place, &format!("+short {NAME} AAAA")).trim().parse().unwrap();
        assert_eq!(v4.octets()[..2], [198, 18], "{v4}");
        assert_eq!(v6.segments()[..4], [0xfdfe, 0xdcba, 0x9877, 0], "{v6}");
        let answer = dig(&lab, &place, &format!("+noall +answer {NAME} A"));
        assert_eq!(answer.split_whitespace().nth(1), Some("1"), "a TTL of one second: {answer}");
        // What one run handed out, that run knows the name of.
        for kind in ["A", "AAAA"] {
            let script = format!("dig +short -x $(dig +short {NAME} {kind})");
            let said = place.exec(&lab.host, "sh", &["-c", &script]);
            assert_eq!(said.stdout, format!("{NAME}.\n"), "{kind}: {said:?}");
        }
        assert_eq!(dig(&lab, &place, &format!("+short +tcp {NAME} A")).trim(), v4.to_string(), "over TCP too");
        assert_eq!(sites.dns.queries.all(), Vec::<String>::new(), "nobody asked the resolver for what is faked");
    });
}

#[test]
fn https_records_of_a_faked_name_are_empty_and_other_types_are_forwarded() {
    run(&["dig"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(FAKE_IP);
        let https = dig(&lab, &place, &format!("{NAME} HTTPS"));
        assert!(https.contains("status: NOERROR") && https.contains("ANSWER: 0"), "{https}");
        assert_eq!(dig(&lab, &place, &format!("+short {NAME} TXT")), "\"some words\"\n");
        assert!(dig(&lab, &place, "nobody.example.test TXT").contains("status: NXDOMAIN"));
    });
}

#[test]
fn a_filtered_name_keeps_its_real_address() {
    run(&["dig"], || {
        let lab = Topology::desktop();
        let _sites = Sites::with(&lab, zone().address("real.example.test", "203.0.113.77"));
        let place = Place::new(FAKE_IP);
        assert_eq!(dig(&lab, &place, "+short real.example.test A"), "203.0.113.77\n");
        assert!(dig(&lab, &place, &format!("+short {NAME} A")).starts_with("198.18."), "the others are faked");
    });
}

/// Eleven addresses to hand out for eight names, so that names meet on their first choice and the order in which they
/// are asked decides; only the log can know it after a restart.
const NARROW: &str = "
mode: rule
dns:
  enable: true
  listen: 127.0.0.1:5353
  enhanced-mode: fake-ip
  fake-ip-range: 198.18.0.0/28
  nameserver: [192.168.1.1]
rules: ['MATCH,DIRECT']
";

/// The addresses that the run in `lab` gives `names`, asked in this order.
fn asked(lab: &Topology, names: &[String]) -> Vec<(String, String)> {
    let ask = |name: &String| {
        let mut dig = lab.host.command("dig");
        dig.args(["+tries=1", "+timeout=20", "+short", "-p", "5353", "@127.0.0.1", name, "A"]);
        let said = Said::of(&mut dig);
        assert!(said.succeeded() && said.stdout.starts_with("198.18.0."), "{said:?}");
        (name.clone(), said.stdout.trim().to_owned())
    };
    let mut found: Vec<_> = names.iter().map(ask).collect();
    found.sort();
    found
}

#[test]
fn names_keep_their_addresses_over_a_crash_and_a_stop_whatever_is_asked_first() {
    run(&["dig"], || {
        let lab = Topology::desktop();
        let forward: Vec<String> = (0..8).map(|number| format!("n{number}.example.test")).collect();
        let backward: Vec<String> = forward.iter().rev().cloned().collect();
        let place = Place::new(NARROW);
        let first = place.start(&lab.host);
        let given = asked(&lab, &forward);
        // As a crash would: nothing is written after this.
        let place = first.kill();
        let second = place.start(&lab.host);
        assert_eq!(asked(&lab, &backward), given, "after a crash");
        assert!(second.stop().success());
        let third = place.start(&lab.host);
        assert_eq!(asked(&lab, &backward), given, "after a stop");
        assert!(third.stop().success());
        let elsewhere = Place::new(NARROW).start(&lab.host);
        assert_ne!(asked(&lab, &backward), given, "without the log the order decides");
        assert!(elsewhere.stop().success());
    });
}

#[test]
fn a_stub_on_loopback_is_asked_and_what_it_alone_knows_is_found() {
    run(&["dig"], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let at_host = Peers::new(&lab.host);
        let stub =
            at_host.dns("127.0.0.1:53".parse().unwrap(), Zone::default().address("nas.home.test", "192.168.1.7"));
        world::set_resolv_conf("nameserver 127.0.0.1 # the stub\n");
        let mut before = 0;
        for dns in
            ["enable: true, listen: '127.0.0.1:5353', nameserver: [system]", "enable: true, listen: '127.0.0.1:5353'"]
        {
            let place = Place::new(&format!("mode: direct\ndns: {{{dns}}}\n"));
            let tunproxy = place.start(&lab.host);
            let mut ask = lab.host.command("dig");
            ask.args(["+tries=1", "+timeout=20", "+short", "-p", "5353", "@127.0.0.1", "nas.home.test", "A"]);
            assert_eq!(Said::of(&mut ask).stdout, "192.168.1.7\n", "{}", tunproxy.output());
            assert!(tunproxy.stop().success());
            // A question without an answer in time is asked again.
            let asked = stub.queries.count(|query| query.ends_with("nas.home.test A"));
            assert!(asked > before, "{asked} after {before}");
            before = asked;
        }
        assert_eq!(sites.dns.queries.all(), Vec::<String>::new(), "nobody else was asked");
    });
}

#[test]
fn a_nameserver_that_appears_later_is_asked_then() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        world::set_resolv_conf("# no network yet\n");
        let place = Place::new("mode: direct\ndns: {enable: false}\nmixed-port: 7890\n");
        let tunproxy = place.start(&lab.host);
        tunproxy.line("names no nameserver");
        world::set_resolv_conf("nameserver 192.168.1.1\n");
        // The files are read again after five seconds at most, and a failure is remembered for one.
        let mut curl = lab.host.command("curl");
        curl.args([
            "-sS",
            "--retry",
            "30",
            "--retry-delay",
            "1",
            "--retry-all-errors",
            "--proxy",
            "http://127.0.0.1:7890",
        ]);
        curl.arg(format!("http://{NAME}/late"));
        let said = Said::of(&mut curl);
        assert!(said.stdout.contains(&format!("host={NAME} path=/late")), "{said:?}");
        assert!(sites.dns.queries.count(|query| query.contains(NAME)) > 0);
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_fake_address_that_nobody_was_given_is_refused() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(FAKE_IP);
        for unknown in ["198.18.77.77:80", "[fdfe:dcba:9877::7777]:80"] {
            assert_eq!(
                place.act(&lab.host, &format!("connect {unknown}")),
                Err("ECONNREFUSED".to_owned()),
                "{unknown}"
            );
        }
    });
}

#[test]
fn long_answers_are_truncated_over_udp_and_whole_over_tcp() {
    run(&["dig"], || {
        let lab = Topology::desktop();
        let long =
            (0..60).fold(Zone::default(), |zone, n| zone.text("long.example.test", &format!("text number {n:03}")));
        let _sites = Sites::with(&lab, long);
        let place = Place::new(FAKE_IP);
        place.assert_encloses(&lab.host);
        // What fits no datagram that passes every path unbroken (1232 bytes) comes whole over TCP only.
        for (edns, least, most) in [("+noedns", 400, 512), ("+bufsize=4096", 513, 1232)] {
            let cut = dig(&lab, &place, &format!("{edns} +ignore long.example.test TXT"));
            assert!(cut.contains("flags: qr tc"), "{edns}: {cut}");
            let size = cut.split("rcvd: ").nth(1).and_then(|rest| rest.trim().parse::<usize>().ok());
            assert!(size.is_some_and(|size| (least..=most).contains(&size)), "{edns}: {cut}");
        }
        assert_eq!(dig(&lab, &place, "+short long.example.test TXT").lines().count(), 60, "dig asks again over TCP");
        assert_eq!(dig(&lab, &place, "+short +tcp long.example.test TXT").lines().count(), 60);
    });
}

#[test]
fn many_clients_of_one_name_cost_one_query() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let script = format!("for n in $(seq 30); do curl -4sS http://{NAME}/$n & done; wait");
        let said = Place::new(FAKE_IP).exec(&lab.host, "sh", &["-c", &script]);
        assert_eq!(said.stdout.lines().filter(|line| line.contains(&format!("host={NAME}"))).count(), 30, "{said:?}");
        let asked = sites.dns.queries.count(|query| query.ends_with(&format!("{NAME} A")));
        assert_eq!(asked, 1, "{:?}", sites.dns.queries.all());
    });
}
