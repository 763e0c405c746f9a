//! Which packets go into the TUN: the tables of observed behaviour, by asking the kernel and by real packets.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use socket2::SockRef;
use tunproxy::platform::{Applied, HostOptions, Journal};

use crate::host::{NODE, TUN, add_foreigners, build, open_tun, options, plan, strict_reverse_path, within};
use crate::sandbox::sh;
use crate::support::run;

/// Long enough for any packet on this machine; a test only waits so long when it fails.
const PATIENCE: Duration = Duration::from_secs(5);
const RESOLVER: &str = "nameserver 192.168.7.9\n";

/// A host with a plan in force, and a responder on the TUN that turns every UDP packet round with "TUN:" before it.
pub(crate) struct Running {
    pub(crate) applied: Applied,
    _state: tempfile::TempDir,
}

pub(crate) fn start(options: &HostOptions) -> Running {
    let state = tempfile::tempdir().expect("a state directory");
    let tun = open_tun(TUN);
    let planned = plan(options);
    assert!(planned.nft.is_some(), "{:?}", planned.warnings);
    let applied = planned.apply(Journal::open(state.path()).expect("journal")).expect("apply");
    assert!(applied.warnings().is_empty(), "{:?}", applied.warnings());
    thread::spawn(move || respond(tun));
    Running { applied, _state: state }
}

/// Answers "TUN" to every UDP packet. Both checksums are made anew.
fn respond(mut tun: File) {
    let mut packet = [0; 65536];
    while let Ok(length) = tun.read(&mut packet) {
        if let Some(answer) = answer(&packet[..length]) {
            tun.write_all(&answer).expect("write to the TUN");
        }
    }
}

fn answer(packet: &[u8]) -> Option<Vec<u8>> {
    let (header, protocol, addresses) = match packet.first()? >> 4 {
        4 => (20, *packet.get(9)?, 12..20),
        _ => (40, *packet.get(6)?, 8..40),
    };
    (protocol == 17).then_some(())?;
    let mut answer = packet.get(..header + 8)?.to_vec();
    answer.extend(b"TUN");
    let swap = |bytes: &mut [u8]| bytes.rotate_left(bytes.len() / 2);
    swap(&mut answer[addresses.clone()]);
    swap(&mut answer[header..header + 4]);
    let length = u16::try_from(answer.len() - header).ok()?;
    answer[header + 4..header + 6].copy_from_slice(&length.to_be_bytes());
    answer[header + 6..header + 8].fill(0);
    let mut pseudo = answer[addresses].to_vec();
    pseudo.extend([0, 17]);
    pseudo.extend(length.to_be_bytes());
    pseudo.extend(&answer[header..]);
    let sum = checksum(&pseudo);
    answer[header + 6..header + 8].copy_from_slice(&sum.to_be_bytes());
    if header == 20 {
        let total = u16::try_from(answer.len()).ok()?;
        answer[2..4].copy_from_slice(&total.to_be_bytes());
        answer[10..12].fill(0);
        let sum = checksum(&answer[..20]);
        answer[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        answer[4..6].copy_from_slice(&length.to_be_bytes());
    }
    Some(answer)
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum = words.sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

/// A UDP server in a namespace that answers with `name` to whoever asks.
pub(crate) fn serve(namespace: &str, name: &'static str, at: &str) {
    let at = at.to_owned();
    let socket = within(namespace, move || UdpSocket::bind(&*at).expect("bind a server"));
    serve_on(socket, name);
}

fn serve_on(socket: UdpSocket, name: &'static str) {
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(name.as_bytes(), from);
        }
    });
}

/// Asks `to` from `socket`; says who answered, and from where.
fn ask_on(socket: &UdpSocket, to: &str) -> std::io::Result<(String, SocketAddr)> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(b"?", to)?;
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok((String::from_utf8_lossy(&buffer[..length]).into_owned(), from))
}

/// Asks from a socket bound to `from`; "" binds it to no address.
pub(crate) fn ask(from: &str, to: &str) -> String {
    let socket = bound(from, to);
    ask_on(&socket, to).map_or_else(|error| error.kind().to_string(), |(who, _)| who)
}

fn bound(from: &str, to: &str) -> UdpSocket {
    let any = if to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    UdpSocket::bind(if from.is_empty() { any } else { from }).expect("bind")
}

/// The device by which the kernel would send, for the words of `ip route get`.
pub(crate) fn device(words: &str) -> String {
    let family = if words.contains(':') { "-6" } else { "-4" };
    let output = std::process::Command::new("ip").args([family, "route", "get"]).args(words.split(' ')).output();
    let output = output.expect("run ip");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = text.split_whitespace();
    match words.find(|word| *word == "dev").and_then(|_| words.next()) {
        Some(device) => device.to_owned(),
        None => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    }
}

#[track_caller]
fn assert_devices(wanted: &[(&str, &str)]) {
    let wanted: BTreeMap<&str, String> = wanted.iter().map(|(words, dev)| (*words, (*dev).to_owned())).collect();
    let found: BTreeMap<&str, String> = wanted.keys().map(|words| (*words, device(words))).collect();
    assert_eq!(found, wanted);
}

/// The rows of "observed, rules alone" that a route look-up can show.
const ROWS: &[(&str, &str)] = &[
    // unbound goes in
    ("203.0.113.9", TUN),
    ("203.0.113.9 ipproto udp dport 443", TUN),
    ("203.0.113.9 ipproto tcp dport 443", TUN),
    ("2001:db8:9::9", TUN),
    ("2001:db8:9::9 ipproto tcp dport 443", TUN),
    // our own sockets do not, not even to port 53
    ("203.0.113.9 mark 0x1000000", "eth0"),
    ("203.0.113.9 mark 0x1000000 ipproto udp dport 53", "eth0"),
    ("2001:db8:9::9 mark 0x1000000", "eth0"),
    ("2001:db8:9::9 mark 0x1000000 ipproto udp dport 53", "eth0"),
    // bound stays
    ("203.0.113.9 from 192.0.2.2", "eth0"),
    ("2001:db8:9::9 from 2001:db8:1::2", "eth0"),
    ("203.0.113.9 from 198.51.100.2", "eth1"),
    // the LAN, and private ranges that nobody knows
    ("192.168.7.9", "lan0"),
    ("2001:db8:7::9", "lan0"),
    ("10.9.9.9", TUN),
    ("169.254.7.7", TUN),
    ("100.64.1.1", TUN),
    ("fd00::1", TUN),
    // on-link of an uplink is no LAN
    ("192.0.2.77", TUN),
    // port 53, whatever the address
    ("203.0.113.9 ipproto udp dport 53", TUN),
    ("203.0.113.9 ipproto tcp dport 53", TUN),
    ("192.168.7.9 ipproto udp dport 53", TUN),
    ("192.168.7.9 ipproto tcp dport 53", TUN),
    ("2001:db8:7::9 ipproto udp dport 53", TUN),
    ("2001:db8:1::1 ipproto udp dport 53", TUN),
    // fake addresses, whatever the source
    ("198.18.5.5", TUN),
    ("198.18.5.5 from 192.0.2.2", TUN),
    ("fdfe:dcba:9877::5:5 from 2001:db8:1::2", TUN),
    // multicast and broadcast
    ("224.0.0.251", "eth0"),
    ("239.255.255.250", "eth0"),
    ("255.255.255.255 ipproto udp dport 67", "eth0"),
    // forwarded
    ("203.0.113.9 from 192.168.7.9 iif lan0", TUN),
    ("2001:db8:9::9 from 2001:db8:7::9 iif lan0", TUN),
    ("198.18.5.5 from 192.168.7.9 iif lan0", TUN),
    ("192.168.7.9 from 203.0.113.9 iif tun7", "lan0"),
    ("2001:db8:7::9 from 2001:db8:9::9 iif tun7", "lan0"),
    // what the firewall wants captured, what is bound to the TUN
    ("203.0.113.9 from 192.0.2.2 mark 0x2000000", TUN),
    ("203.0.113.9 oif tun7", TUN),
];

#[test]
fn look_ups_lead_where_the_design_says() {
    run(&[NODE], || {
        build(RESOLVER);
        sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let mut running = start(&options());
        assert_devices(ROWS);
        running.applied.revert().unwrap();
        assert_devices(&[("203.0.113.9", "eth0"), ("2001:db8:9::9", "eth0"), ("10.9.9.9", "eth0")]);
    });
}

#[test]
fn more_specific_routes_do_not_pull_traffic_out() {
    run(&[NODE], || {
        build(RESOLVER);
        let mut running = start(&options());
        sh("for to in 0.0.0.0/1 128.0.0.0/1 203.0.113.0/24 10.0.0.0/7 192.168.0.0/16; do ip route add $to via 198.51.100.1; done
            for to in 2000::/3 2001:db8:9::/64 fc00::/6; do ip -6 route add $to via 2001:db8:2::1; done");
        assert_devices(&[
            ("203.0.113.9", TUN),
            ("2001:db8:9::9", TUN),
            ("10.9.9.9", TUN),
            ("fd00::1", TUN),
            // A private network that the administrator routes is reached as before, and so is all of a private range.
            ("192.168.7.9", "lan0"),
            ("192.168.99.9", "eth1"),
        ]);
        running.applied.revert().unwrap();
    });
}

#[test]
fn excluded_prefixes_leave_but_their_port_53_does_not() {
    run(&[NODE], || {
        build(RESOLVER);
        sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let route_exclude = vec!["203.0.113.0/28".parse().unwrap(), "2001:db8:9::/64".parse().unwrap()];
        let mut running = start(&HostOptions { route_exclude, ..options() });
        assert_devices(&[
            ("203.0.113.9", "eth0"),
            ("203.0.113.9 from 192.168.7.9 iif lan0", "eth0"),
            ("203.0.113.77", TUN),
            ("2001:db8:9::9", "eth0"),
            ("203.0.113.9 ipproto udp dport 53", TUN),
            ("2001:db8:9::9 ipproto tcp dport 53", TUN),
        ]);
        running.applied.revert().unwrap();
    });
}

#[test]
fn other_tunnels_keep_their_carriers_and_a_moved_default_route_is_followed() {
    run(&[NODE], || {
        build(RESOLVER);
        sh("ip link add wg0 type veth peer name wgp; ip addr add 10.99.0.2/32 dev wg0; ip link set wg0 up; ip link set wgp up
            ip route add default dev wg0 table 51820
            ip rule add priority 32764 not fwmark 0xca6c lookup 51820
            ip rule add priority 32763 lookup main suppress_prefixlength 0
            ip rule add priority 5210 fwmark 0x80000/0xff0000 lookup main
            ip rule add priority 5270 lookup 52");
        let mut running = start(&options());
        assert_devices(&[
            ("203.0.113.9", TUN),
            // What DIRECT sends uses the other VPN, as everything did before.
            ("203.0.113.9 mark 0x1000000", "wg0"),
            ("203.0.113.9 mark 0xca6c", "eth0"),
            ("203.0.113.9 mark 0x80000", "eth0"),
        ]);
        sh("ip route replace default via 198.51.100.1 dev eth1");
        assert_devices(&[("203.0.113.9 mark 0xca6c", "eth1"), ("203.0.113.9", TUN)]);
        sh("ip route del default");
        let lost = device("203.0.113.9 mark 0xca6c");
        assert!(lost.contains("Network is unreachable"), "{lost}");
        assert_devices(&[("203.0.113.9", TUN)]);
        running.applied.revert().unwrap();
    });
}

#[test]
fn real_packets_go_where_they_should() {
    run(&[NODE], || {
        build(RESOLVER);
        add_foreigners();
        real_packets();
    });
}

#[test]
fn real_packets_go_where_they_should_under_a_strict_reverse_path_filter() {
    run(&[NODE], || {
        build(RESOLVER);
        strict_reverse_path();
        real_packets();
    });
}

fn real_packets() {
    for at in ["203.0.113.9:5000", "[2001:db8:9::9]:5000", "203.0.113.9:53", "[2001:db8:9::9]:53"] {
        serve("net", "NET", at);
    }
    for at in ["192.168.7.9:5000", "192.168.7.9:53"] {
        serve("lan", "LAN", at);
    }
    assert_eq!((ask("", "203.0.113.9:5000"), ask("", "[2001:db8:9::9]:5000")), ("NET".into(), "NET".into()));
    let mut outgoing = established_out();
    let mut running = start(&options());
    let own = running.applied.plan().numbers.own.mark;

    for (from, to, who) in [
        ("", "203.0.113.9:5000", "TUN"),
        ("", "[2001:db8:9::9]:5000", "TUN"),
        ("", "10.9.9.9:5000", "TUN"),
        ("", "192.168.7.9:5000", "LAN"),
        ("192.0.2.2:0", "203.0.113.9:5000", "NET"),
        ("[2001:db8:1::2]:0", "[2001:db8:9::9]:5000", "NET"),
        ("192.0.2.2:0", "198.18.5.5:5000", "TUN"),
        // Names: to a public server, to the LAN's, and from sockets bound to an uplink's address.
        ("", "203.0.113.9:53", "TUN"),
        ("", "[2001:db8:9::9]:53", "TUN"),
        ("", "192.168.7.9:53", "TUN"),
        ("192.0.2.2:0", "203.0.113.9:53", "TUN"),
        ("[2001:db8:1::2]:0", "[2001:db8:9::9]:53", "TUN"),
    ] {
        assert_eq!(ask(from, to), who, "{from} -> {to}");
    }
    for to in ["203.0.113.9:5000", "203.0.113.9:53", "[2001:db8:9::9]:5000", "[2001:db8:9::9]:53"] {
        let socket = bound("", to);
        SockRef::from(&socket).set_mark(own).expect("mark");
        assert_eq!(ask_on(&socket, to).expect("an answer").0, "NET", "own mark -> {to}");
    }
    bound_to_a_device_names_stay_inside();
    an_interface_that_is_only_wished_for_takes_no_name_out();
    wildcard_servers_answer_from_the_address_that_was_asked();
    echo(&mut outgoing);
    running.applied.revert().expect("revert");
    echo(&mut outgoing);
    assert_eq!(ask("", "203.0.113.9:5000"), "NET");
}

fn bound_to_a_device_names_stay_inside() {
    let socket = bound("", "203.0.113.9:53");
    SockRef::from(&socket).bind_device(Some(b"eth0")).expect("bind to eth0");
    let refused = ask_on(&socket, "203.0.113.9:53").expect_err("nobody may answer");
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{refused}");
}

/// systemd-resolved's way to choose a link: the socket is bound to nothing, and the look-up has an interface.
fn an_interface_that_is_only_wished_for_takes_no_name_out() {
    let index = nix::net::if_::if_nametoindex("eth0").expect("eth0");
    for (to, level, option) in [
        ("203.0.113.9:53", libc::IPPROTO_IP, libc::IP_UNICAST_IF),
        ("[2001:db8:9::9]:53", libc::IPPROTO_IPV6, libc::IPV6_UNICAST_IF),
    ] {
        let socket = bound("", to);
        let (wish, length) = (index.to_be(), size_of::<u32>() as libc::socklen_t);
        // SAFETY: the kernel reads one number from a place of that size.
        let set = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const wish).cast(), length) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        assert_eq!(ask_on(&socket, to).expect("an answer").0, "TUN", "{to}");
    }
    // A link-local server is on its link and nowhere else.
    let to = format!("[fe80::1%{index}]:53");
    let refused = ask_on(&bound("", &to), &to).expect_err("nobody may answer");
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{refused}");
}

/// Unbound, their answers would be captured; without the firewall's memory they would leave through the TUN.
fn wildcard_servers_answer_from_the_address_that_was_asked() {
    for (at, asked, client) in [
        ("0.0.0.0:6000", "192.0.2.2:6000", "192.0.2.1:0"),
        ("[::]:6001", "[2001:db8:1::2]:6001", "[2001:db8:9::9]:0"),
        ("0.0.0.0:6002", "198.51.100.2:6002", "198.51.100.1:0"),
    ] {
        serve_on(UdpSocket::bind(at).expect("bind a wildcard server"), "HOST");
        let (who, from) = within("net", move || {
            let socket = UdpSocket::bind(client).expect("bind");
            ask_on(&socket, asked).unwrap_or_else(|error| panic!("{asked}: {error}"))
        });
        assert_eq!((who.as_str(), from), ("HOST", asked.parse().expect("an address")));
    }
}

/// A TCP connection out, made before anything is applied.
fn established_out() -> (TcpStream, TcpStream) {
    let (send, receive) = mpsc::channel();
    let listener = within("net", || TcpListener::bind("203.0.113.9:7000").expect("listen"));
    thread::spawn(move || send.send(listener.accept().expect("accept").0));
    let client = TcpStream::connect("203.0.113.9:7000").expect("connect");
    assert_eq!(client.local_addr().expect("bound").ip(), "192.0.2.2".parse::<IpAddr>().expect("an address"));
    (client, receive.recv().expect("accepted"))
}

fn echo((client, server): &mut (TcpStream, TcpStream)) {
    for (from, to) in [(&*client, &*server), (&*server, &*client)] {
        to.set_read_timeout(Some(PATIENCE)).expect("timeout");
        (&mut &*from).write_all(b"alive").expect("send");
        let mut buffer = [0; 5];
        (&mut &*to).read_exact(&mut buffer).expect("the connection lives");
        assert_eq!(&buffer, b"alive");
    }
    assert!(client.as_raw_fd() >= 0);
}

#[test]
fn a_lan_client_and_the_ways_in_from_outside_work_through_a_gateway() {
    run(&[NODE], || {
        build(RESOLVER);
        gateway();
    });
}

#[test]
fn a_gateway_works_under_a_strict_reverse_path_filter() {
    run(&[NODE], || {
        build(RESOLVER);
        strict_reverse_path();
        gateway();
    });
}

fn gateway() {
    // A port forward of the administrator's own, to the LAN host.
    sh(
        "nft 'add table ip admin { chain pre { type nat hook prerouting priority dstnat; iifname eth0 udp dport 8000 dnat to 192.168.7.9:5000; }; }'",
    );
    serve("lan", "LAN", "192.168.7.9:5000");
    serve("lan", "LAN6", "[2001:db8:7::9]:5000");
    let mut running = start(&HostOptions { auto_forward: true, lan_dns: vec!["lan0".to_owned()], ..options() });
    // Out of the LAN: everything goes into the TUN, and names that the host itself is asked for as well.
    for (from, to) in [
        ("192.168.7.9:0", "203.0.113.9:5000"),
        ("[2001:db8:7::9]:0", "[2001:db8:9::9]:5000"),
        ("192.168.7.9:0", "203.0.113.9:53"),
        ("192.168.7.9:0", "198.18.5.5:443"),
        ("192.168.7.9:0", "192.168.7.1:53"),
        ("[2001:db8:7::9]:0", "[2001:db8:7::1]:53"),
    ] {
        assert_eq!(within("lan", move || ask(from, to)), "TUN", "{from} -> {to}");
    }
    // Into the LAN: the port forward, and global IPv6.
    let (who, from) = within("net", || {
        let socket = UdpSocket::bind("203.0.113.9:0").expect("bind");
        ask_on(&socket, "192.0.2.2:8000").expect("the port forward answers")
    });
    assert_eq!((who.as_str(), from.to_string().as_str()), ("LAN", "192.0.2.2:8000"));
    assert_eq!(within("net", || ask("[2001:db8:9::9]:0", "[2001:db8:7::9]:5000")), "LAN6");
    running.applied.revert().expect("revert");
}

#[test]
fn the_tun_address_is_nobodys_business_on_the_lan() {
    run(&[NODE], || {
        build(RESOLVER);
        sh("ip -n lan route add 198.18.0.1/32 dev lan0");
        let probe = "ip netns exec lan ping -c 1 -W 1 198.18.0.1 > /dev/null 2>&1 && echo answered || echo silent";
        let state = tempfile::tempdir().unwrap();
        let _tun = open_tun(TUN);
        let mut planned = plan(&options());
        let nft = planned.nft.take();
        // What the host answers by itself enters the TUN, with these; the firewall is to do without.
        planned.rules.retain(|rule| rule.from.is_none_or(|from| from.addr() != IpAddr::from([198, 18, 0, 1])));
        let mut open = planned.clone().apply(Journal::open(state.path()).unwrap()).unwrap();
        assert_eq!(sh(probe), "answered\n", "the probe must be able to succeed");
        open.revert().unwrap();
        drop(open);
        sh("ip -n lan neigh flush all");
        planned.nft = nft;
        let mut closed = planned.apply(Journal::open(state.path()).unwrap()).unwrap();
        assert_eq!(sh(probe), "silent\n");
        closed.revert().unwrap();
    });
}
