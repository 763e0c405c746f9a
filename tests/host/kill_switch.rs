//! The kill switch: closed from the first `ready` on, through every end that nobody asked for, until somebody does.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::support::client::{Session, act_in};
use super::support::escapes::{self, Attempts, escaped};
use super::support::lengths::asked;
use super::support::peers::proxy::Door;
use super::support::peers::{Peer, Peers};
use super::support::program::Program;
use super::support::sites::{V4, V6};
use super::support::topology::{CLIENT_V4, CLIENT_V6, GATEWAY_V4, HOST_V4, HOST_V6};
use super::support::tunproxy::{Place, Said};
use super::support::{Capture, Dump, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";
/// Attempts to get out across each change of state.
pub(super) fn tries() -> usize {
    asked("TUNPROXY_LEAK_TRIES", 240)
}

fn kills() -> usize {
    asked("TUNPROXY_KILLS", 20)
}

pub(super) fn profile(rules: &str) -> Place {
    with("", rules)
}

fn with(more: &str, rules: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, kill-switch: true{more} }}
dns: {{ enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }}
proxies: [{{ name: up, type: socks5, server: 203.0.113.3, port: 1080, udp: true }}]
rules: [{rules}]
"
    ))
}

fn at(address: &str) -> SocketAddr {
    address.parse().expect("an address")
}

/// A capture on the uplink that has seen every way out while nothing was closed.
pub(super) fn proven_capture(lab: &Topology) -> Capture {
    let mut capture = Capture::start(&lab.host, "eth0");
    // After these the neighbours are known, and nothing waits for them.
    for site in [V4, V6] {
        capture.prove(|mark| assert_eq!(act_in(&lab.host, &format!("datagram {site}:7 {mark}")), Ok(mark.to_owned())));
    }
    let ways = lab.host.enter(escapes::all_ways);
    let seen = capture.packets().iter().filter(|packet| escaped(packet)).count();
    assert_eq!(seen, ways, "an open host lets every attempt out");
    capture
}

/// Since `already` many attempts were seen, no more were.
pub(super) fn assert_closed(capture: &mut Capture, already: usize, when: &str) {
    let packets = capture.packets();
    let out: Vec<String> =
        packets.iter().filter(|packet| escaped(packet)).skip(already).map(ToString::to_string).collect();
    assert!(out.is_empty(), "{} left {when}: {:?}", out.len(), &out[..out.len().min(20)]);
}

pub(super) fn escapes_in(capture: &mut Capture) -> usize {
    capture.packets().iter().filter(|packet| escaped(packet)).count()
}

#[test]
fn nothing_leaves_while_it_runs_is_killed_is_gone_and_starts_again() {
    run(&[TUN], || {
        for rp_filter in ["0", "1"] {
            let lab = Topology::desktop().rp_filter(rp_filter);
            let _sites = Sites::open(&lab);
            let mut capture = proven_capture(&lab);
            let tries = tries();
            let mut tunproxy = profile("'MATCH,REJECT'").start(&lab.host);
            let already = escapes_in(&mut capture);
            let attempts = Attempts::from(&lab.host);
            for round in 0..3 {
                attempts.wait(tries);
                assert_closed(&mut capture, already, "while it ran");
                let place = tunproxy.kill();
                attempts.wait(tries);
                assert_closed(&mut capture, already, "after a kill");
                for site in [V4, V6] {
                    let begun = Instant::now();
                    let refused = act_in(&lab.host, &format!("connect {site}:80 20"));
                    let told = refused.is_err() && begun.elapsed() < Duration::from_secs(10);
                    assert!(told, "a program must not wait: {refused:?} after {:?}", begun.elapsed());
                }
                tunproxy = place.start(&lab.host);
                tunproxy.line("left its kill switch closed");
                assert_closed(&mut capture, already, &format!("while it started again ({round})"));
            }
            tunproxy.assert_carries(&lab.host);
            attempts.wait(tries);
            assert_closed(&mut capture, already, "at work again");
            drop(attempts);
            assert!(tunproxy.stop().success());
            lab.host.enter(escapes::all_ways);
            assert!(escapes_in(&mut capture) > already, "a stop opens");
        }
    });
}

#[test]
fn nothing_goes_past_a_proxy_that_is_down() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let mut capture = proven_capture(&lab);
        let proxy = lab.sites.socks5(at("203.0.113.3:1080"), Door::default());
        let tunproxy = profile("'MATCH,up'").start(&lab.host);
        assert_eq!(act_in(&lab.host, &format!("ask {V4}:7 x")), Ok("x".to_owned()), "through the proxy");
        let already = escapes_in(&mut capture);
        drop(proxy);
        let attempts = Attempts::from(&lab.host);
        attempts.wait(tries());
        drop(attempts);
        assert_eq!(act_in(&lab.host, &format!("connect {V4}:7")), Err("ECONNREFUSED".to_owned()), "the proxy is gone");
        assert_closed(&mut capture, already, "with the proxy down");
        assert!(tunproxy.stop().success());
    });
}

/// Somebody at work on the host from outside.
fn log_in(lab: &Topology, port: u16) -> (Vec<Session>, Vec<Peer>, Peers) {
    let at_host = Peers::new(&lab.host);
    let servers = ["0.0.0.0", "[::]"].map(|any| at_host.tcp_echo(at(&format!("{any}:{port}")))).into();
    let ways = [("203.0.113.50:0", HOST_V4.to_owned()), ("[2001:db8:1::50]:0", format!("[{HOST_V6}]"))];
    let open = |(from, to): &(&str, String)| Session::open(&lab.internet, at(from), at(&format!("{to}:{port}")));
    (ways.iter().map(open).collect(), servers, at_host)
}

#[test]
fn what_may_pass_passes_and_goes_on_passing_after_a_kill() {
    run(&["ping", TUN], || {
        for rp_filter in ["0", "1"] {
            let lab = Topology::desktop().rp_filter(rp_filter);
            let _sites = Sites::open(&lab);
            let (mut old, _servers, _thread) = log_in(&lab, 22);
            let neighbour = Peers::new(&lab.gateway);
            let _printer = neighbour.tcp_echo(at(&format!("{GATEWAY_V4}:9100")));
            let tunproxy = profile("'MATCH,DIRECT'").start(&lab.host);
            for site in [V4, V6] {
                assert_eq!(
                    act_in(&lab.host, &format!("ask {site}:7 x")),
                    Ok("x".to_owned()),
                    "our own sockets: {site}"
                );
            }
            let (mut late, _late_servers, _late_thread) = log_in(&lab, 2222);
            let mut in_both_states = |when: &str| {
                for session in old.iter_mut().chain(&mut late) {
                    assert_eq!(session.alive().map(drop), Ok(()), "a session from outside died {when}");
                }
                let (mut new, _servers, _thread) = log_in(&lab, 2223);
                assert!(new.iter_mut().all(|session| session.alive().is_ok()), "a new one {when}");
                let printer = act_in(&lab.host, &format!("ask {GATEWAY_V4}:9100 x"));
                assert_eq!(printer, Ok("x".to_owned()), "the LAN {when}");
                lab.internet.run("ping", &["-c1", "-W5", "-I", "203.0.113.50", HOST_V4]);
                lab.internet.run("ping", &["-c1", "-W5", "-I", "2001:db8:1::50", HOST_V6]);
            };
            in_both_states("while it runs");
            let place = tunproxy.kill();
            in_both_states("after a kill");
            place.clean_up(&lab.host);
            in_both_states("after the clean-up");
        }
    });
}

#[test]
fn a_dhcp_client_may_renew_its_lease_after_a_kill() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let mut capture = proven_capture(&lab);
        let _place = profile("'MATCH,REJECT'").start(&lab.host).kill();
        // By unicast from the address that it has, to a server that may have a public one.
        lab.host.enter(|| {
            let client = std::net::UdpSocket::bind((HOST_V4, 68)).expect("port 68");
            client.send_to(b"please renew", "203.0.113.67:67").expect("it is let out");
            let other = std::net::UdpSocket::bind((HOST_V4, 69)).expect("port 69");
            assert!(other.send_to(b"something else", "203.0.113.67:67").is_err(), "from another port it is not");
        });
        let seen = |payload: &str, capture: &mut Capture| {
            capture.packets().iter().any(|packet| packet.contains(payload.as_bytes()))
        };
        assert!(seen("please renew", &mut capture) && !seen("something else", &mut capture));
    });
}

#[test]
fn a_server_that_speaks_first_keeps_its_older_session() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let listener = lab.host.enter(|| TcpListener::bind("0.0.0.0:2200").expect("a listener"));
        let mut client = lab.internet.enter(|| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
            socket.bind(&at("203.0.113.50:0").into()).expect("an address of the internet");
            socket.connect(&at(&format!("{HOST_V4}:2200")).into()).expect("the server accepts");
            std::net::TcpStream::from(socket)
        });
        client.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out");
        let (mut served, _) = listener.accept().expect("the session");
        let tunproxy = profile("'MATCH,REJECT'").start(&lab.host);
        // Connection tracking has never seen this session, and the server begins.
        served.write_all(b"hello").expect("an open session");
        let mut heard = [0; 5];
        client.read_exact(&mut heard).expect("what the server said");
        assert_eq!(&heard, b"hello");
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn a_stop_opens_and_leaves_the_host_as_it_was() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile("'MATCH,DIRECT'");
        for signal in [Some(Signal::SIGTERM), Some(Signal::SIGINT), None] {
            let tunproxy = place.start(&lab.host);
            assert_ne!(before.diff(&Dump::take(&lab.host)), "", "a run that changes nothing takes no traffic");
            match signal {
                Some(signal) => tunproxy.signal(signal),
                None => assert!(place.ask(&lab.host, "stop").succeeded()),
            }
            assert!(tunproxy.wait().success());
            before.assert_same(&Dump::take(&lab.host));
            assert_eq!(act_in(&lab.host, &format!("ask {V4}:7 x")), Ok("x".to_owned()), "open again");
            assert!(!place.state.join("journal").exists());
        }
    });
}

#[test]
fn a_failed_service_stays_closed_until_somebody_opens_by_hand() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let mut capture = proven_capture(&lab);
        let before = Dump::take(&lab.host);
        let place = profile("'MATCH,REJECT'").start(&lab.host).kill();
        let already = escapes_in(&mut capture);
        let mut command = lab.host.command(super::support::tunproxy::binary());
        command.args(["cleanup", "--state-dir"]).arg(&place.state);
        // systemd.exec(5): what ExecStopPost= is told of the service.
        command.envs([("SERVICE_RESULT", "signal"), ("EXIT_CODE", "killed"), ("EXIT_STATUS", "KILL")]);
        for _ in 0..2 {
            let said = Said::of(&mut command);
            assert!(said.succeeded(), "{said:?}");
            assert!(said.stdout.contains("stays closed") && said.stdout.contains("by hand"), "{said:?}");
            lab.host.enter(escapes::all_ways);
            assert_closed(&mut capture, already, "after the service manager's clean-up");
        }
        let said = place.clean_up(&lab.host);
        assert!(said.contains("delete the firewall table tunproxy"), "{said}");
        before.assert_same(&Dump::take(&lab.host));
        lab.host.enter(escapes::all_ways);
        assert!(escapes_in(&mut capture) > already, "it is open");
        // After a stop that went well there is nothing to keep.
        let said = Said::of(command.env("SERVICE_RESULT", "success"));
        assert!(said.succeeded() && said.stdout.contains("nothing to undo"), "{said:?}");
    });
}

#[test]
fn a_start_that_fails_and_a_run_that_ends_by_an_error_leave_it_closed() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let mut capture = proven_capture(&lab);
        let before = Dump::take(&lab.host);
        let place = profile("'MATCH,REJECT'").start(&lab.host).kill();
        let already = escapes_in(&mut capture);
        let profile = std::fs::read_to_string(&place.profile).expect("the profile");
        // Somebody else has the port; the other profile cannot be read at all.
        let at_host = Peers::new(&lab.host);
        let squatter = at_host.tcp_echo(at("127.0.0.1:7890"));
        for broken in [format!("{profile}\nmixed-port: 7890\n"), "rules: [".to_owned()] {
            place.rewrite(&broken);
            assert!(place.try_start(&lab.host).is_err(), "it cannot start");
            lab.host.enter(escapes::all_ways);
            assert_closed(&mut capture, already, "after a start that failed");
        }
        drop(squatter);
        place.rewrite(&profile);
        let tunproxy = place.start(&lab.host);
        tunproxy.assert_carries(&lab.host);
        lab.host.ip("link del tunproxy0");
        lab.host.enter(escapes::all_ways);
        assert!(!tunproxy.wait().success(), "it cannot go on without its device");
        lab.host.enter(escapes::all_ways);
        assert_closed(&mut capture, already, "after the end by an error");
        place.clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
        lab.host.enter(escapes::all_ways);
        assert!(escapes_in(&mut capture) > already, "it is open");
    });
}

#[test]
fn a_start_without_a_kill_switch_opens_what_a_crash_left_closed() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let before = Dump::take(&lab.host);
        let place = profile("'MATCH,DIRECT'").start(&lab.host).kill();
        place.rewrite("tun: { enable: true }\nipv6: true\nrules: ['MATCH,DIRECT']\n");
        let tunproxy = place.start(&lab.host);
        assert_eq!(act_in(&lab.host, &format!("ask {V4}:7 x")), Ok("x".to_owned()));
        let rules = lab.host.nft("list ruleset");
        assert!(!rules.contains("kill switch"), "{rules}");
        assert!(tunproxy.stop().success());
        before.assert_same(&Dump::take(&lab.host));
        // A run without the device has no use for it either.
        let place = profile("'MATCH,DIRECT'").start(&lab.host).kill();
        place.rewrite("mixed-port: 7890\nrules: ['MATCH,DIRECT']\n");
        let tunproxy = place.start(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn without_nftables_or_with_a_table_that_does_not_load_it_refuses_to_start() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let nft = super::support::needs::find("nft").and_then(|path| path.canonicalize().ok()).expect("nft");
        let desk = world::fresh_dir("nft");
        let real = desk.join("nft");
        std::fs::copy(&nft, &real).expect("a copy of nft");
        let before = Dump::take(&lab.host);
        let place = profile("'MATCH,DIRECT'");
        for (script, words) in [
            ("", ["apt install nftables", "tun.kill-switch: false"]),
            ("exit 0", ["in part only", "tun.kill-switch: false"]),
            (
                "case \"$*\" in *--check*) echo 'Error: not today' >&2; exit 1;; esac",
                ["not today", "tun.kill-switch: false"],
            ),
            (
                "case \"$*\" in --file*) echo 'Error: not today' >&2; exit 1;; esac",
                ["not today", "tun.kill-switch: false"],
            ),
        ] {
            let stand_in = desk.join("stand-in");
            std::fs::write(&stand_in, format!("#!/bin/sh\n{script}\nexec {} \"$@\"\n", real.display()))
                .expect("a script");
            std::fs::set_permissions(&stand_in, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("its mode");
            let flags = nix::mount::MsFlags::MS_BIND;
            // What no program can be started from stands for one that is missing.
            let cover = if script.is_empty() { Path::new("/dev/null") } else { &stand_in };
            nix::mount::mount(Some(cover), &nft, None::<&str>, flags, None::<&str>).expect("a stand-in");
            let refused = place.try_start(&lab.host).map(drop).expect_err("it cannot be closed");
            nix::mount::umount(&nft).expect("the real one");
            assert!(words.iter().all(|word| refused.contains(word)), "{refused}");
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}

#[test]
fn a_lan_client_gets_nothing_past_it_either() {
    run(&[TUN], || {
        let lab = Topology::with_lan();
        let _sites = Sites::open(&lab);
        let mut capture = Capture::start(&lab.host, "eth0");
        let from_client = |lab: &Topology, word: &str| {
            [V4, V6].map(|site| act_in(lab.client(), &format!("datagram {site}:7 {word} 1")))
        };
        capture.prove(|mark| assert_eq!(from_client(&lab, mark), [Ok(mark.to_owned()), Ok(mark.to_owned())]));
        // A session of the client that is older than the run, and one into the LAN.
        let at_client = Peers::new(lab.client());
        let _published = ["0.0.0.0:9100", "[::]:9100"].map(|any| at_client.tcp_echo(at(any)));
        let inward = |lab: &Topology| {
            let session = Session::open(&lab.internet, at("203.0.113.50:0"), at(&format!("{CLIENT_V4}:9100")));
            { session }.alive().map(drop)
        };
        let mut older = Session::open(lab.client(), at(&format!("{CLIENT_V4}:0")), at(&format!("{V4}:7")));
        assert_eq!(older.alive().map(drop), Ok(()));
        let before = Dump::take(&lab.host);
        let tunproxy = with(", auto-forward: true", "'MATCH,REJECT'").start(&lab.host);
        assert_eq!(inward(&lab), Ok(()), "into the LAN, while it runs");
        let place = tunproxy.kill();
        let _ = from_client(&lab, "past-us");
        // In ten seconds what is not acknowledged is sent six times.
        let mut older = older.patient_for(Duration::from_secs(10));
        assert!(older.alive().is_err(), "what was open before cannot go past us");
        for site in [V4, V6] {
            let start = Instant::now();
            let refused = act_in(lab.client(), &format!("connect {site}:80 20"));
            assert!(refused.is_err() && start.elapsed() < Duration::from_secs(10), "told at once: {refused:?}");
        }
        assert_eq!(inward(&lab), Ok(()), "into the LAN, after a kill");
        capture.assert_nothing("a client's packet past us", |packet| {
            packet.contains(b"past-us")
                || packet.ip.is_some_and(|ip| {
                    let (source, port) = (ip.source.ip().to_string(), ip.destination.port());
                    [CLIENT_V4, CLIENT_V6].contains(&source.as_str()) && port == 80
                })
        });
        place.clean_up(&lab.host);
        before.assert_same(&Dump::take(&lab.host));
        assert_eq!(from_client(&lab, "open-again"), [Ok("open-again".to_owned()), Ok("open-again".to_owned())]);
    });
}

#[test]
fn killed_at_random_moments_it_stays_closed_and_a_clean_up_puts_everything_back() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let mut capture = proven_capture(&lab);
        let place = profile("'MATCH,REJECT'");
        let before = Dump::take(&lab.host);
        let begun = Instant::now();
        assert!(place.start(&lab.host).stop().success());
        let whole_life = begun.elapsed();
        let mut already = escapes_in(&mut capture);
        for round in 0..kills() {
            // Closed by a run that was killed; then one is killed somewhere on its way from start to stop.
            let closed = place.start(&lab.host).kill();
            let attempts = Attempts::from(&lab.host);
            let fraction = (round as u32 * 37 % 101) as f64 / 80.0;
            let program = Program::start("tunproxy", closed.run_command(&lab.host));
            std::thread::sleep(whole_life.mul_f64(fraction));
            program.signal(Signal::SIGKILL);
            drop(program);
            attempts.wait(escapes_per_kill());
            drop(attempts);
            assert_closed(&mut capture, already, &format!("around kill {round}, {fraction} of a life after its start"));
            closed.clean_up(&lab.host);
            before.assert_same(&Dump::take(&lab.host));
            already = escapes_in(&mut capture);
        }
    });
}

#[test]
fn killed_on_its_way_out_it_leaves_what_a_clean_up_puts_back() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = profile("'MATCH,REJECT'");
        let before = Dump::take(&lab.host);
        let tunproxy = place.start(&lab.host);
        let begun = Instant::now();
        assert!(tunproxy.stop().success());
        let way_out = begun.elapsed();
        for round in 0..kills() / 2 {
            let tunproxy = place.start(&lab.host);
            tunproxy.signal(Signal::SIGTERM);
            std::thread::sleep(way_out.mul_f64((round as u32 * 37 % 101) as f64 / 100.0));
            tunproxy.kill().clean_up(&lab.host);
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}

/// Two rounds of every way.
fn escapes_per_kill() -> usize {
    48
}
