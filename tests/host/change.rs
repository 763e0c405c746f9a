//! The network changes while we run: new flows find the way that there is, and nobody restarts anything.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::support::client::{Session, act_in};
use super::support::lengths::{asked, seconds};
use super::support::peers::proxy::Door;
use super::support::peers::{Peer, Record};
use super::support::program::{PATIENCE, Program};
use super::support::sites::{NAME, V4, V6, zone};
use super::support::tunproxy::{Place, Tunproxy};
use super::support::uplinks::{FIRST, SECOND, Uplink, Uplinks};
use super::support::{Netns, Sites, Topology, run, world};

const TUN: &str = "/dev/net/tun";
pub(super) const BOTH: &[&str] = &["-4", "-6"];
/// A site that is reached through the proxy.
pub(super) const PROXIED: &str = "203.0.113.20";
/// Two seconds, on a machine that has nothing else to do.
const LIMIT: Duration = Duration::from_secs(10);

fn at(address: &str) -> SocketAddr {
    address.parse().expect("an address")
}

pub(super) fn profile(more: &str) -> Place {
    Place::new(&format!(
        "
mode: rule
ipv6: true
log-level: info
tun: {{ enable: true, auto-route: true, dns-hijack: ['any:53'] }}
dns: {{ enable: true, enhanced-mode: fake-ip{more} }}
proxies: [{{ name: up, type: socks5, server: 203.0.113.3, port: 1080, udp: true }}]
rules: ['IP-CIDR,{PROXIED}/32,up', 'MATCH,DIRECT']
"
    ))
}

pub(super) const NAMESERVERS: &str = ", nameserver: [203.0.113.53, '[2001:db8:1::53]']";

/// The internet of these tests: the usual sites, one behind a proxy, and nameservers.
pub(super) struct Internet {
    _sites: Sites,
    _names: [super::support::peers::dns::NameServer; 2],
    _peers: Vec<Peer>,
}

impl Internet {
    pub(super) fn open(lab: &Topology) -> Self {
        let sites = &lab.sites;
        Self {
            _sites: Sites::open(lab),
            _names: ["203.0.113.53:53", "[2001:db8:1::53]:53"].map(|server| sites.dns(at(server), zone())),
            _peers: vec![
                sites.socks5(at("203.0.113.3:1080"), Door { datagrams_from_asker: true, ..Door::default() }),
                sites.tcp_echo(at(&format!("{PROXIED}:80"))),
                sites.udp_echo(at(&format!("{PROXIED}:7")), &Record::default()),
            ],
        }
    }
}

/// A program that keeps one socket for years, as games and calls do.
struct Talker {
    socket: UdpSocket,
    to: String,
    said: u32,
}

impl Talker {
    fn new(host: &Netns, to: &str) -> Self {
        let any = if to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        let (peer, any) = (at(to), at(any));
        let socket = host.enter(move || UdpSocket::bind(any).and_then(|it| it.connect(peer).map(|()| it)));
        let socket = socket.expect("a socket");
        socket.set_read_timeout(Some(Duration::from_millis(150))).expect("a time limit");
        Self { socket, to: to.to_owned(), said: 0 }
    }

    /// Whether a datagram comes back now.
    fn is_answered(&mut self) -> bool {
        self.said += 1;
        let word = format!("word {}", self.said);
        let mut heard = [0; 64];
        // An error of an earlier datagram is told here.
        let _ = self.socket.send(word.as_bytes());
        loop {
            match self.socket.recv(&mut heard) {
                Ok(length) if heard[..length] == *word.as_bytes() => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }
}

/// Waits until `works`, and tells how long that took since `since`.
fn until(what: &str, since: Instant, tunproxy: &Tunproxy, host: &Netns, mut works: impl FnMut() -> bool) -> Duration {
    let found = world::poll_until(PATIENCE, || works().then_some(()));
    let took = since.elapsed();
    let state = || format!("{}{}{}", host.ip("addr"), host.ip("route"), host.ip("-6 route"));
    assert!(found.is_some() && took < LIMIT, "{what}: {took:?}\n{}\n{}", state(), tunproxy.output());
    took
}

/// What a host does all day, over whichever families have a way.
pub(super) struct Day {
    talkers: Vec<Talker>,
    slowest: Duration,
}

impl Day {
    pub(super) fn new(host: &Netns) -> Self {
        let talkers = [format!("{V4}:7"), format!("{V6}:7"), format!("{PROXIED}:7")];
        Self { talkers: talkers.iter().map(|to| Talker::new(host, to)).collect(), slowest: Duration::ZERO }
    }

    /// New flows and old associations work again, soon after `since`.
    pub(super) fn goes_on(
        &mut self,
        event: &str,
        since: Instant,
        tunproxy: &Tunproxy,
        host: &Netns,
        families: &[&str],
    ) {
        let has = |family| families.contains(&family);
        let connects = |to: String| move || act_in(host, &format!("connect {to} 1")).is_ok();
        let mut took = vec![until(&format!("{event}: {NAME}"), since, tunproxy, host, connects(format!("{NAME}:80")))];
        for (site, family) in [(V4, "-4"), (V6, "-6"), (PROXIED, "-4")] {
            if has(family) {
                let what = format!("{event}: {site}");
                took.push(until(&what, since, tunproxy, host, connects(format!("{site}:80"))));
                let answers = || act_in(host, &format!("datagram {site}:7 x 1")) == Ok("x".to_owned());
                took.push(until(&format!("{what} by UDP"), since, tunproxy, host, answers));
            }
        }
        for talker in &mut self.talkers {
            if has(if talker.to.starts_with('[') { "-6" } else { "-4" }) {
                let what = format!("{event}: the association with {}", talker.to);
                took.push(until(&what, since, tunproxy, host, || talker.is_answered()));
            }
        }
        let slowest = took.into_iter().max().unwrap_or_default();
        world::measured(&format!("{event}: all of it works after {} ms", slowest.as_millis()));
        self.slowest = self.slowest.max(slowest);
    }
}

/// What others have on the host, as far as it has to do with us.
pub(super) fn of_others(host: &Netns) -> String {
    let tables = ["-4", "-6"].map(|family| host.ip(&format!("{family} rule")));
    let routes = ["2022", "2023"].map(|table| {
        // A table that is empty may not even exist.
        super::support::tunproxy::Said::of(host.command("ip").args(["route", "show", "table", table])).stdout
    });
    tables.concat()
        + &routes.concat()
        + &host.run("nft", &["list", "ruleset"])
        + &std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()
}

fn add_foreigners(host: &Netns) {
    for words in [
        "rule add priority 5210 fwmark 0x80000/0xff0000 lookup main",
        "rule add priority 9050 from 192.0.2.0/24 lookup 2022",
        "-6 rule add priority 32764 from 2001:db8:5::/48 lookup 300",
    ] {
        host.ip(words);
    }
    host.nft("add table inet administrator");
    host.nft("add chain inet administrator output { type filter hook output priority 0; }");
    host.nft("add rule inet administrator output ip daddr 203.0.113.99 drop");
}

#[test]
fn every_change_of_the_ways_out_is_followed() {
    run(&[TUN], || {
        let net = Uplinks::new();
        let host = &net.lab.host;
        let _internet = Internet::open(&net.lab);
        add_foreigners(host);
        let before = of_others(host);
        let tunproxy = profile(NAMESERVERS).start(host);
        let mut day = Day::new(host);
        day.goes_on("at the start", Instant::now(), &tunproxy, host, BOTH);

        net.default(SECOND, BOTH);
        day.goes_on("the default moved", Instant::now(), &tunproxy, host, BOTH);
        net.down(FIRST);
        day.goes_on("the old way went down", Instant::now(), &tunproxy, host, BOTH);
        net.renumber(SECOND, 77);
        net.default(SECOND, &["-4"]);
        day.goes_on("another address", Instant::now(), &tunproxy, host, BOTH);

        net.down(SECOND);
        // Whoever tries meanwhile is told so, and that must not be remembered for long.
        for talker in &mut day.talkers {
            assert!(!talker.is_answered(), "no way is up");
        }
        assert!(act_in(host, &format!("connect {NAME}:80 5")).is_err());
        net.up(SECOND);
        net.default(SECOND, BOTH);
        day.goes_on("all ways were down", Instant::now(), &tunproxy, host, BOTH);

        net.no_default(&["-6"]);
        day.goes_on("IPv4 alone", Instant::now(), &tunproxy, host, &["-4"]);
        net.default(SECOND, &["-6"]);
        net.no_default(&["-4"]);
        day.goes_on("IPv6 alone", Instant::now(), &tunproxy, host, &["-6"]);
        net.default(SECOND, BOTH);
        day.goes_on("both again", Instant::now(), &tunproxy, host, BOTH);

        assert!(tunproxy.stop().success());
        assert_eq!(of_others(host), before);
    });
}

#[test]
fn a_process_that_was_stopped_for_long_goes_on_where_it_was() {
    run(&[TUN], || {
        let net = Uplinks::new();
        let host = &net.lab.host;
        let _internet = Internet::open(&net.lab);
        let before = of_others(host);
        let tunproxy = profile(NAMESERVERS).start(host);
        let mut day = Day::new(host);
        day.goes_on("at the start", Instant::now(), &tunproxy, host, BOTH);
        let ways =
            [("0.0.0.0:0", format!("{V4}:7")), ("[::]:0", format!("{V6}:7")), ("0.0.0.0:0", format!("{PROXIED}:80"))];
        let mut sessions = ways.map(|(any, to)| Session::open(host, at(any), at(&to)));

        tunproxy.freeze();
        assert_eq!(act_in(host, &format!("connect {V4}:80 1")), Err("ETIMEDOUT".to_owned()), "nobody is there");
        std::thread::sleep(seconds("TUNPROXY_STOPPED", 3));
        tunproxy.signal(Signal::SIGCONT);
        day.goes_on("after a long stop", Instant::now(), &tunproxy, host, BOTH);
        for session in &mut sessions {
            assert_eq!(session.alive().map(drop), Ok(()), "{}", tunproxy.output());
        }

        tunproxy.freeze();
        net.default(SECOND, BOTH);
        net.down(FIRST);
        std::thread::sleep(Duration::from_secs(1));
        tunproxy.signal(Signal::SIGCONT);
        day.goes_on("asleep while the way changed", Instant::now(), &tunproxy, host, BOTH);
        net.up(FIRST);
        net.default(FIRST, BOTH);
        day.goes_on("back where it began", Instant::now(), &tunproxy, host, BOTH);

        assert!(tunproxy.stop().success());
        assert_eq!(of_others(host), before);
    });
}

#[test]
fn an_interface_that_is_named_may_be_pulled_out_and_plugged_in_again() {
    run(&[TUN], || {
        let net = Uplinks::new();
        let host = &net.lab.host;
        let _internet = Internet::open(&net.lab);
        net.default(SECOND, BOTH);
        let place = profile(NAMESERVERS);
        let written = std::fs::read_to_string(&place.profile).unwrap();
        place.rewrite(&format!("interface-name: eth1\n{written}"));
        let tunproxy = place.start(host);
        let mut day = Day::new(host);
        day.goes_on("at the start", Instant::now(), &tunproxy, host, BOTH);
        for _ in 0..2 {
            net.replug_second();
            // Its neighbours are asked for anew.
            net.default(SECOND, BOTH);
            day.goes_on("plugged in again", Instant::now(), &tunproxy, host, BOTH);
        }
        assert!(tunproxy.stop().success());
    });
}

/// Numbers that are the same every time (Knuth's MMIX).
pub(super) struct Chance(pub(super) u64);

impl Chance {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// One event, and the families that have a way after it.
fn happen(net: &Uplinks, chance: &mut Chance, tunproxy: &Tunproxy) -> (String, &'static [&'static str]) {
    let one: Uplink = if chance.below(2) == 0 { FIRST } else { SECOND };
    let other = if one == FIRST { SECOND } else { FIRST };
    let back = |uplink| {
        net.up(uplink);
        net.default(uplink, BOTH);
    };
    match chance.below(8) {
        0 => {
            back(one);
            (format!("the default is {}", one.device), BOTH)
        }
        1 => {
            net.down(one);
            back(other);
            (format!("{} went down", one.device), BOTH)
        }
        2 => {
            net.down(one);
            back(one);
            (format!("{} flapped", one.device), BOTH)
        }
        3 => {
            back(one);
            net.renumber(one, u8::try_from(20 + chance.below(200)).unwrap_or(20));
            net.default(one, &["-4"]);
            (format!("{} has another address", one.device), BOTH)
        }
        4 => {
            net.down(one);
            net.down(other);
            let _ = act_in(&net.lab.host, &format!("connect {NAME}:80 1"));
            back(one);
            (format!("all ways were down, and {} is back", one.device), BOTH)
        }
        5 => {
            back(one);
            net.no_default(&["-6"]);
            (format!("IPv4 alone, by {}", one.device), &["-4"])
        }
        6 => {
            back(one);
            net.no_default(&["-4"]);
            (format!("IPv6 alone, by {}", one.device), &["-6"])
        }
        _ => {
            tunproxy.freeze();
            net.down(one);
            back(other);
            std::thread::sleep(Duration::from_millis(500));
            tunproxy.signal(Signal::SIGCONT);
            (format!("asleep while {} went down", one.device), BOTH)
        }
    }
}

#[test]
fn whatever_happens_to_the_network_new_flows_find_their_way() {
    run(&[TUN], || {
        let net = Uplinks::new();
        let host = &net.lab.host;
        let _internet = Internet::open(&net.lab);
        add_foreigners(host);
        let before = of_others(host);
        let tunproxy = profile(NAMESERVERS).start(host);
        let (mut day, mut chance) = (Day::new(host), Chance(7));
        for number in 0..asked("TUNPROXY_EVENTS", 20) {
            let (event, families) = happen(&net, &mut chance, &tunproxy);
            day.goes_on(&format!("{number}, {event}"), Instant::now(), &tunproxy, host, families);
        }
        world::measured(&format!("the slowest of all {} ms", day.slowest.as_millis()));
        tunproxy.assert_carries(host);
        assert!(tunproxy.stop().success());
        assert_eq!(of_others(host), before);
    });
}

#[test]
fn a_start_before_there_is_any_network_works_once_there_is() {
    run(&["dig", TUN], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        world::own_etc("");
        std::fs::remove_file("/etc/resolv.conf").unwrap();
        lab.host.ip("link set eth0 down");
        lab.host.ip("addr flush dev eth0");
        let before = of_others(&lab.host);
        let path = world::fresh_dir("notify").join("socket");
        let supervisor = UnixDatagram::bind(&path).unwrap();
        supervisor.set_read_timeout(Some(PATIENCE)).unwrap();
        let place = profile(", listen: '10.7.0.1:53'");
        let mut command = place.run_command(&lab.host);
        command.env("NOTIFY_SOCKET", &path);
        let mut program = Program::start("tunproxy", command);
        let mut message = [0; 512];
        let length = supervisor.recv(&mut message).expect("a message to the supervisor");
        assert!(String::from_utf8_lossy(&message[..length]).contains("READY=1"), "{}", program.output());
        assert!(act_in(&lab.host, &format!("connect {NAME}:80 2")).is_err(), "there is no network");

        // As a network service does it: the link, the addresses, the routes, the resolver.
        lab.host.ip("link set eth0 up");
        lab.host.address("eth0", &["192.168.1.10/24", "2001:db8:2::10/64"]);
        lab.host.routes(&["default via 192.168.1.1", "default via 2001:db8:2::1"]);
        std::fs::write("/etc/resolv.conf.new", "nameserver 192.168.1.1\n").unwrap();
        std::fs::rename("/etc/resolv.conf.new", "/etc/resolv.conf").unwrap();
        let since = Instant::now();
        for site in [NAME, V4, V6] {
            let works = || act_in(&lab.host, &format!("connect {site}:80 1")).is_ok().then_some(());
            assert!(world::poll_until(PATIENCE, works).is_some(), "{site}: {}", program.output());
        }
        let took = since.elapsed();
        world::measured(&format!("from the network to all sites {} ms", took.as_millis()));
        assert!(took < LIMIT, "{took:?}");
        // What listens at an address that has only come now.
        lab.host.ip("addr add 10.7.0.1/24 dev eth0");
        let answered = || lab.host.run("dig", &["+short", "+tries=1", "@10.7.0.1", NAME, "A"]).starts_with("198.18.");
        assert!(world::poll_until(PATIENCE, || answered().then_some(())).is_some(), "{}", program.output());
        program.signal(Signal::SIGTERM);
        assert!(program.wait().success());
        assert_eq!(std::fs::read_to_string("/etc/resolv.conf").unwrap(), "nameserver 192.168.1.1\n");
        assert_eq!(of_others(&lab.host), before + "nameserver 192.168.1.1\n");
    });
}

/// A connection to an echo server that stays open.
struct Line {
    stream: TcpStream,
    to: String,
}

impl Line {
    fn open(host: &Netns, to: &str) -> Self {
        let peer = at(to);
        let stream = host.enter(move || TcpStream::connect_timeout(&peer, PATIENCE)).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        let mut line = Self { stream, to: to.to_owned() };
        line.carries();
        line
    }

    fn carries(&mut self) {
        self.stream.write_all(b"word").unwrap_or_else(|error| panic!("{}: {error}", self.to));
        let mut heard = [0; 4];
        self.stream.read_exact(&mut heard).unwrap_or_else(|error| panic!("{}: {error}", self.to));
        assert_eq!(&heard, b"word");
    }

    /// Waits for its end, which must be a reset.
    fn ends(&mut self, since: Instant, tunproxy: &Tunproxy) {
        let ended = self.stream.read(&mut [0]).map_err(|error| error.kind());
        assert_eq!(ended, Err(ErrorKind::ConnectionReset), "{}\n{}", self.to, tunproxy.output());
        assert!(since.elapsed() < LIMIT, "{}: {:?}", self.to, since.elapsed());
    }
}

#[test]
fn a_connection_from_an_address_that_is_lost_is_reset_at_once_and_others_live_on() {
    run(&[TUN], || {
        let net = Uplinks::new();
        let host = &net.lab.host;
        let _internet = Internet::open(&net.lab);
        // The proxy is reached by the second way, all the rest by the first.
        host.ip("route add 203.0.113.3 via 192.168.2.1 dev eth1");
        let tunproxy = profile(NAMESERVERS).start(host);
        let direct = format!("{V4}:7");
        let mut lost = [direct.clone(), format!("{V4}:7001")].map(|to| Line::open(host, &to));
        let mut kept = [format!("{PROXIED}:80"), format!("{V6}:7")].map(|to| Line::open(host, &to));
        // A lease that is renewed is no loss.
        host.ip("addr replace 192.168.1.10/24 dev eth0 valid_lft 4000 preferred_lft 4000");
        lost.iter_mut().chain(&mut kept).for_each(Line::carries);
        // Nor is one that comes back soon, as when an interface is set up anew.
        net.renumber(FIRST, 10);
        net.default(FIRST, &["-4"]);
        lost.iter_mut().chain(&mut kept).for_each(Line::carries);
        let since = Instant::now();
        net.renumber(FIRST, 11);
        lost.iter_mut().for_each(|line| line.ends(since, &tunproxy));
        kept.iter_mut().for_each(Line::carries);
        assert!(tunproxy.output().contains("2 connections from it were reset"), "{}", tunproxy.output());
        // Who begins anew finds a way.
        net.default(FIRST, &["-4"]);
        let again = || act_in(host, &format!("connect {direct} 1")).is_ok().then_some(());
        assert!(world::poll_until(PATIENCE, again).is_some(), "{}", tunproxy.output());
    });
}
