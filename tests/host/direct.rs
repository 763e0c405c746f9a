//! DIRECT: what a program sees through `exec` is what it sees without us.

use super::support::client::act_in;
use super::support::peers::digest::of_pattern;
use super::support::sites::{BULK, V4, V6};
use super::support::topology::{BLACK_HOLE_V4, BLACK_HOLE_V6, HOST_V4, HOST_V6};
use super::support::tunproxy::Place;
use super::support::{Sites, Topology, run};

/// Everything goes out directly.
const DIRECT: &str = "
mode: rule
ipv6: true
log-level: info
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['MATCH,DIRECT']
";

/// The profile in its place, once it is certain that nothing gets past it.
fn direct(lab: &Topology) -> Place {
    let place = Place::new(DIRECT);
    place.assert_encloses(&lab.host);
    place
}

#[test]
fn curl_reaches_a_site_by_address_in_both_families() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        for (site, host) in [(V4, HOST_V4), (V6, HOST_V6)] {
            let said = direct(&lab).exec(&lab.host, "curl", &["-sS", "-g", &format!("http://{site}/a")]);
            assert!(said.stdout.contains(&format!("host={site} path=/a client={host}")), "{said:?}");
            let logged = said.stderr.lines().any(|line| line.contains("MATCH") && line.contains("DIRECT"));
            assert!(logged, "one line says which rule sent the flow where: {said:?}");
        }
    });
}

#[test]
fn bulk_data_of_a_site_arrives_whole() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let script = format!("curl -sSg {} | curl -sSg --data-binary @- http://{V4}/sink", bulk_of(V6));
        let said = direct(&lab).exec(&lab.host, "sh", &["-c", &script]);
        assert!(said.stdout.contains(&format!("bytes={BULK} sha256={}", of_pattern(BULK))), "{said:?}");
    });
}

fn bulk_of(site: &str) -> String {
    format!("http://{site}/bytes/{BULK}")
}

#[test]
fn a_closed_port_is_refused_at_once() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = direct(&lab);
        for site in [V4, V6] {
            let url = format!("http://{site}:81/");
            // 7 is "connection refused"; a silent port would be 28, "timed out".
            assert_eq!(place.exec(&lab.host, "curl", &["-sg", "--connect-timeout", "20", &url]).code, Some(7));
            assert_eq!(place.act(&lab.host, &format!("connect {site}:81")), Err("ECONNREFUSED".to_owned()));
        }
    });
}

#[test]
fn failures_are_those_the_host_itself_would_see() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = direct(&lab);
        for words in [
            format!("connect {BLACK_HOLE_V4}:80 3"),
            format!("connect [{BLACK_HOLE_V6}]:80 3"),
            // The gateway has no route there and says so.
            "connect 192.0.2.1:80 20".to_owned(),
            "connect [2001:db8:ffff::1]:80 20".to_owned(),
            format!("ask {V4}:9001 x"),
            format!("ask {V6}:9001 x"),
            format!("datagram {V4}:8 x 5"),
            format!("datagram {V6}:8 x 5"),
        ] {
            let truth = act_in(&lab.host, &words);
            assert!(truth.is_err(), "{words}");
            assert_eq!(place.act(&lab.host, &words), truth, "{words}");
        }
    });
}

#[test]
fn each_side_may_close_its_half_first_and_lose_nothing() {
    run(&[], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let place = direct(&lab);
        let digest = of_pattern(BULK);
        for site in [V4, V6] {
            for direction in ["up", "down", "both"] {
                let words = format!("{direction} {site}:9000 {BULK}");
                assert_eq!(place.act(&lab.host, &words), Ok(digest.clone()), "{words}");
            }
        }
        assert_eq!(sites.exchanged.count(|line| line.ends_with(&digest)), 6, "{:?}", sites.exchanged.all());
    });
}

#[test]
fn twenty_thousand_short_connections_are_all_answered() {
    run(&[], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let servers: Vec<String> = (7001..=7008).map(|port| format!("{V4}:{port}")).collect();
        let words = format!("churn 20000 64 {}", servers.join(" "));
        assert_eq!(direct(&lab).act(&lab.host, &words), Ok("20000".to_owned()));
    });
}

#[test]
fn datagrams_go_there_and_back_in_both_families() {
    run(&[], || {
        let lab = Topology::desktop();
        let sites = Sites::open(&lab);
        let place = direct(&lab);
        for site in [V4, V6] {
            assert_eq!(place.act(&lab.host, &format!("datagram {site}:7 hello")), Ok("hello".to_owned()));
        }
        assert_eq!(sites.datagrams.count(|from| from.starts_with(HOST_V4)), 1);
    });
}

#[test]
fn the_exit_status_of_a_program_is_passed_on() {
    run(&[], || {
        let lab = Topology::desktop();
        let place = direct(&lab);
        for code in [0, 7, 255] {
            assert_eq!(place.exec(&lab.host, "sh", &["-c", &format!("exit {code}")]).code, Some(code));
        }
    });
}
