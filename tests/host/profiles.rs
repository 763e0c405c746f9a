//! The profiles that we ship run as they are, and carry what they promise.

use serde_json::Value;

use super::support::client::act_in;
use super::support::sites::{NAME, V4, V6};
use super::support::topology::{GATEWAY_V4, HOST_LAN_V4};
use super::support::tunproxy::{Place, Said};
use super::support::{Dump, Sites, Topology, run, third_party};

const TUN: &str = "/dev/net/tun";
const DESKTOP: &str = include_str!("../../profiles/desktop.yaml");
const GATEWAY: &str = include_str!("../../profiles/gateway.yaml");

#[test]
fn the_desktop_profile_runs_as_it_is() {
    run(&["curl", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = Place::new(DESKTOP);
        assert!(place.check(&lab.host).succeeded());
        let tunproxy = place.start(&lab.host);
        for url in [format!("http://{NAME}/"), format!("http://{V4}/"), format!("http://{V6}/")] {
            for proxy in [&[][..], &["-x", "http://127.0.0.1:7890"]] {
                let mut curl = lab.host.command("curl");
                curl.args(["-sSg", "--connect-timeout", "20"]).args(proxy).arg(&url);
                let (said, _line) = tunproxy.line_after(|| Said::of(&mut curl), &["MATCH,Proxy", "Proxy"]);
                assert!(said.stdout.contains("path=/"), "{url}: {said:?}\n{}", tunproxy.output());
            }
        }
        assert_eq!(act_in(&lab.host, "connect www.ads.example:80"), Err("ECONNREFUSED".to_owned()));
        assert!(!tunproxy.output().contains("WARN"), "{}", tunproxy.output());
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn the_gateway_profile_carries_a_lan_once_its_address_is_filled_in() {
    run(&["curl", "dig", TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        for key in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            lab.host.sysctl(key, "0");
        }
        let before = Dump::take(&lab.host);
        // As the profile asks its reader to do; and this internet has another public nameserver.
        let profile = GATEWAY.replace("192.168.1.1", HOST_LAN_V4).replace("192.168.1.0/24", "10.7.0.0/24");
        let place = Place::new(&profile.replace("9.9.9.9", GATEWAY_V4));
        assert!(place.check(&lab.host).succeeded());
        let tunproxy = place.start(&lab.host);
        let proxy = format!("http://{HOST_LAN_V4}:7890");
        for url in [format!("http://{NAME}/"), format!("http://{V4}/"), format!("http://{V6}/")] {
            for proxy in [&[][..], &["-x", &proxy]] {
                let mut curl = lab.client().command("curl");
                curl.args(["-sSg", "--connect-timeout", "20"]).args(proxy).arg(&url);
                let (said, _line) = tunproxy.line_after(|| Said::of(&mut curl), &["MATCH,Proxy", "Proxy"]);
                assert!(said.stdout.contains("path=/"), "{url}: {said:?}\n{}", tunproxy.output());
            }
        }
        let answer = lab.client().run("dig", &["+short", &format!("@{HOST_LAN_V4}"), NAME, "A"]);
        assert!(answer.starts_with("198.18."), "{answer}");
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
    });
}

#[test]
fn iperf3_measures_both_directions_and_datagrams() {
    run(&["iperf3", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let tunproxy = Place::new(DESKTOP).start(&lab.host);
        let tests =
            [&["-n", "20M"][..], &["-n", "20M", "-R"], &["-n", "20M", "-P", "4"], &["-u", "-b", "20M", "-n", "1M"]];
        for (port, words) in (5201..).zip(tests) {
            // One each: a server that has not heard yet of the end of a test is busy.
            let _server = third_party::iperf3_server(&lab.internet, V4.parse().unwrap(), port);
            let port = port.to_string();
            let iperf3 = || Said::of(lab.host.command("iperf3").args(["-J", "-c", V4, "-p", &port]).args(words));
            let (said, _line) = tunproxy.line_after(iperf3, &[&format!(":{port}"), "DIRECT"]);
            assert!(said.succeeded(), "{words:?}: {said:?}");
            let end = &serde_json::from_str::<Value>(&said.stdout).expect("JSON")["end"];
            let wanted = if words[0] == "-u" { 1 << 20 } else { 20 << 20 };
            // Of what was received iperf3 counts only what came before the word that the test is over, which takes
            // a connection of its own.
            let [sent, received] = ["sum_sent", "sum_received"].map(|side| end[side]["bytes"].as_u64());
            assert!(sent >= Some(wanted) && received > Some(0), "{words:?}: {said:?}");
        }
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn the_addresses_of_the_device_answer_echo_requests_and_a_host_that_is_not_there_does_not() {
    run(&["ping", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let _tunproxy = Place::new(DESKTOP).start(&lab.host);
        let ping = |address: &str| Said::of(lab.host.command("ping").args(["-n", "-c", "1", "-W", "20", address]));
        // Ours, which the kernel answers, and its neighbour, which we do.
        for address in ["198.18.0.1", "198.18.0.2"] {
            assert!(ping(address).succeeded(), "{address}: {:?}", ping(address));
        }
        assert!(ping(V4).succeeded(), "the host itself answers");
        let said = ping("198.18.77.77");
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stdout.contains("Unreachable"), "it is refused, and not left to wait: {said:?}");
    });
}
