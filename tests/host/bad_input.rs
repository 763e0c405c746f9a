//! Bad input of every kind gets one clear message, or a counted drop, and everything else goes on.

use super::support::client::act_in;
use super::support::packet::inject;
use super::support::peers::dns::Behaviour;
use super::support::sites::{NAME, V4, V6, zone};
use super::support::tunproxy::{Place, Said, binary};
use super::support::{Dump, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";

const GOOD: &str = "
mode: rule
ipv6: true
log-level: info
tun: { enable: true, auto-route: true, device: tunproxy0, dns-hijack: ['any:53'] }
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['MATCH,DIRECT']
";

/// Runs and checks a profile that must be refused in words, and holds the host against its state before.
fn refused(profile: &str, words: &[&str]) {
    let lab = Topology::desktop();
    let before = Dump::take(&lab.host);
    let place = Place::new(profile);
    for said in [place.check(&lab.host), Said::of(&mut place.run_command(&lab.host))] {
        assert_eq!(said.code, Some(1), "{said:?}");
        let message = said.stdout + &said.stderr;
        for word in words {
            assert!(message.contains(word), "`{word}` is missing in: {message}");
        }
        assert!(!message.contains("panicked"), "{message}");
    }
    before.assert_same(&Dump::take(&lab.host));
}

#[test]
fn a_profile_that_is_no_yaml_is_refused_with_line_and_column() {
    run(&[], || refused("mode: rule\nrules:\n  - 'MATCH,DIRECT\n", &["profile.yaml:"]));
}

#[test]
fn a_wrong_value_is_refused_with_its_place_key_and_what_was_expected() {
    run(&[], || {
        refused("mode: rule\nmixed-port: seventy\nrules: ['MATCH,DIRECT']\n", &["profile.yaml:2:13", "mixed-port"]);
    });
}

#[test]
fn a_missing_profile_is_refused_by_its_name() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new("");
        std::fs::remove_file(&place.profile).unwrap();
        let said = place.check(&lab.host);
        assert_eq!(said.code, Some(1));
        assert!(said.stdout.contains("profile.yaml: error: the profile cannot be read"), "{said:?}");
        let said = Said::of(&mut place.run_command(&lab.host));
        assert_eq!(said.code, Some(1));
        assert!(said.stderr.contains("profile.yaml: error: the profile cannot be read"), "{said:?}");
    });
}

#[test]
fn a_check_for_programs_is_one_object_a_line() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new("mixed-prot: 7890\nmixed-port: seventy\nrules: ['MATCH,nowhere']\n");
        let mut command = lab.host.command(binary());
        command.args(["check", "--log-format", "json", "--profile"]).arg(&place.profile);
        let said = Said::of(&mut command);
        assert_eq!(said.code, Some(1), "{said:?}");
        let objects: Vec<serde_json::Value> =
            said.stdout.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
        let places: Vec<_> =
            objects.iter().map(|it| (it["line"].as_u64(), it["path"].as_str(), it["level"].as_str())).collect();
        let expected = [
            (Some(1), Some("mixed-prot"), Some("warning")),
            (Some(2), Some("mixed-port"), Some("error")),
            (Some(3), Some("rules[0]"), Some("error")),
        ];
        assert_eq!(places, expected, "{said:?}");
        assert_eq!(objects[0]["hint"], "did you mean `mixed-port`?");
    });
}

#[test]
fn a_nameserver_that_cannot_be_found_at_the_start_is_not_replaced_by_another() {
    run(&["dig"], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        // Whoever finds names is not there; the profile's nameserver must not become anybody else.
        let place = Place::new(
            "mode: direct\ndns: {enable: true, listen: '127.0.0.1:5353', nameserver: ['tcp://dns.example.test'],
             default-nameserver: [192.168.1.99]}\n",
        );
        let tunproxy = place.start(&lab.host);
        let mut dig = lab.host.command("dig");
        dig.args(["+tries=1", "+timeout=20", "-p", "5353", "@127.0.0.1", NAME, "A"]);
        let said = Said::of(&mut dig);
        assert!(said.stdout.contains("status: SERVFAIL"), "{said:?}");
        assert_eq!(sites.dns.queries.all(), Vec::<String>::new(), "{}", tunproxy.output());
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn an_unknown_key_is_a_warning_with_the_nearest_known_one() {
    run(&[], || {
        let lab = Topology::desktop();
        let said = Place::new("mixed-prot: 7890\nrules: ['MATCH,DIRECT']\n").check(&lab.host);
        assert!(said.succeeded(), "{said:?}");
        let message = said.stdout + &said.stderr;
        assert!(message.contains("profile.yaml:1:1") && message.contains("mixed-port"), "{message}");
    });
}

#[test]
fn a_rule_to_an_outbound_that_nobody_defines_is_refused_at_its_line() {
    run(&[], || refused("mode: rule\nrules:\n  - MATCH,nowhere\n", &["profile.yaml:3:", "nowhere"]));
}

#[test]
fn groups_that_hold_each_other_are_refused_by_name() {
    let profile = "
proxy-groups:
  - { name: left, type: select, proxies: [right] }
  - { name: right, type: select, proxies: [left] }
rules: ['MATCH,left']
";
    run(&[], || refused(profile, &["left", "right", "profile.yaml:"]));
}

#[test]
fn a_port_in_use_is_named_and_the_host_untouched() {
    run(&[], || {
        let lab = Topology::desktop();
        let at_host = super::support::peers::Peers::new(&lab.host);
        let _squatter = at_host.tcp_echo("127.0.0.1:7890".parse().unwrap());
        let before = Dump::take(&lab.host);
        let place = Place::new(&format!("mixed-port: 7890{GOOD}"));
        let said = Said::of(&mut place.run_command(&lab.host));
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("7890") && said.stderr.contains("in use"), "{said:?}");
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn without_permission_the_missing_capability_and_its_command_are_named() {
    run(&["setpriv"], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let place = Place::new(GOOD);
        let full = place.run_command(&lab.host);
        let mut bare = lab.host.command("setpriv");
        bare.args(["--inh-caps=-net_admin", "--bounding-set=-net_admin"]).arg(full.get_program()).args(full.get_args());
        let said = Said::of(&mut bare);
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("CAP_NET_ADMIN") && said.stderr.contains("setcap"), "{said:?}");
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_device_name_that_is_taken_is_refused_and_left_alone() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        lab.host.ip("link add tunproxy0 type veth peer name elsewhere");
        let before = Dump::take(&lab.host);
        let said = Said::of(&mut Place::new(GOOD).run_command(&lab.host));
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("tunproxy0"), "{said:?}");
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn a_second_run_from_the_same_state_is_refused() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(GOOD);
        let first = place.start(&lab.host);
        first.assert_carries(&lab.host);
        let said = Said::of(&mut place.run_command(&lab.host));
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("another run (process ") && said.stderr.contains("--state-dir"), "{said:?}");
        let said = place.ask(&lab.host, "cleanup");
        assert_eq!(said.code, Some(1), "what is in use is not cleaned up: {said:?}");
        assert_eq!(act_in(&lab.host, &format!("ask {V4}:7 x")), Ok("x".to_owned()), "the first one works on");
        assert!(first.stop().success());
    });
}

#[test]
fn a_run_without_a_device_holds_its_state_too() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = Place::new("mixed-port: 7890\nrules: ['MATCH,DIRECT']\n");
        let first = place.start(&lab.host);
        place.rewrite("mixed-port: 7891\nrules: ['MATCH,DIRECT']\n");
        let said = Said::of(&mut place.run_command(&lab.host));
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("another run (process "), "{said:?}");
        assert!(place.ask(&lab.host, "status").succeeded(), "the first one answers");
        assert!(first.stop().success());
    });
}

#[test]
fn a_resolver_that_answers_nonsense_costs_only_the_names_it_garbles() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let garbled = zone()
            .behaviour("noise.example.test", Behaviour::Garbage(vec![0xff; 40]))
            .behaviour("short.example.test", Behaviour::Garbage(Vec::new()))
            .behaviour("mute.example.test", Behaviour::Silence)
            .behaviour("broken.example.test", Behaviour::Failure);
        let _sites = Sites::with(&lab, garbled);
        let place = Place::new(GOOD);
        place.assert_encloses(&lab.host);
        let script = format!(
            "for name in noise short mute broken; do curl -s --max-time 20 http://$name.example.test/ & done
             curl -sS http://{NAME}/fine; wait"
        );
        let said = place.exec(&lab.host, "sh", &["-c", &script]);
        assert!(said.stdout.contains(&format!("host={NAME} path=/fine")), "{said:?}");
        assert!(!said.stdout.contains("host=noise") && !said.stderr.contains("panicked"), "{said:?}");
    });
}

/// Packets that no honest host sends: heads cut off, lengths that lie, options without end, fragments without a
/// beginning, sources that cannot be, and thousands of random changes to packets that were right.
fn hostile_packets() -> Vec<Vec<u8>> {
    let syn4 = b"\x45\0\0\x28\0\x01\0\0\x40\x06\0\0\xc0\xa8\x01\x0a\xcb\0\x71\x0a\x30\x39\0\x50\0\0\0\x01\0\0\0\0\x50\x02\xff\xff\0\0\0\0";
    let udp4 = b"\x45\0\0\x20\0\x01\0\0\x40\x11\0\0\xc0\xa8\x01\x0a\xcb\0\x71\x0a\x30\x39\0\x35\0\x0c\0\0abcd";
    let udp6 = b"\x60\0\0\0\0\x0c\x11\x40\x20\x01\x0d\xb8\0\x02\0\0\0\0\0\0\0\0\0\x10\x20\x01\x0d\xb8\0\x01\0\0\0\0\0\0\0\0\0\x10\x30\x39\0\x07\0\x0c\0\0abcd";
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).expect("below a usize")
    };
    let mut packets = Vec::new();
    for good in [&syn4[..], udp4, udp6] {
        packets.extend((1..good.len()).map(|length| good[..length].to_vec()));
        for _ in 0..3000 {
            let mut bad = good.to_vec();
            for _ in 0..=random(4) {
                let at = random(bad.len());
                bad[at] = u8::try_from(random(256)).expect("below 256");
            }
            packets.push(with_header_checksum(bad.clone()));
            packets.push(bad);
        }
    }
    let mut from_loopback = udp4.to_vec();
    from_loopback[12..16].copy_from_slice(&[127, 0, 0, 1]);
    packets.push(with_header_checksum(from_loopback));
    // A loose source route (RFC 791) of no addresses.
    let mut routed = [&udp4[..20], &[131, 3, 4, 0], &udp4[20..]].concat();
    (routed[0], routed[3]) = (0x46, routed[3] + 4);
    packets.push(with_header_checksum(routed));
    packets
}

/// An IPv4 packet with the checksum of its header put right, so that it is looked at any further (RFC 791).
fn with_header_checksum(mut packet: Vec<u8>) -> Vec<u8> {
    let length = usize::from(packet[0] & 15) * 4;
    if packet[0] >> 4 == 4 && (20..=packet.len()).contains(&length) {
        packet[10..12].fill(0);
        let words = packet[..length].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum = words.sum::<u32>();
        let folded = (sum & 0xffff) + (sum >> 16);
        let folded = (folded & 0xffff) + (folded >> 16);
        let checksum = !u16::try_from(folded).expect("folded twice");
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    packet
}

#[test]
fn malformed_packets_are_dropped_and_every_other_flow_goes_on() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = Place::new(GOOD).start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        inject(&lab.host, "tunproxy0", &hostile_packets());
        for site in [V4, V6, NAME] {
            assert_eq!(act_in(&lab.host, &format!("ask {site}:7 x")), Ok("x".to_owned()), "{}", tunproxy.output());
            assert_eq!(act_in(&lab.host, &format!("datagram {site}:7 x")), Ok("x".to_owned()), "{}", tunproxy.output());
        }
        assert!(!tunproxy.output().contains("panicked"), "{}", tunproxy.output());
        let said = tunproxy.place().ask(&lab.host, "status");
        let status: serde_json::Value = serde_json::from_str(&said.stdout).expect("JSON");
        for counter in ["bad_length", "bad_header", "bad_options", "spoofed"] {
            assert!(status["packets"][counter].as_u64() > Some(0), "{counter}: {status}");
        }
        assert!(tunproxy.stop().success());
    });
}
