//! The LAN, the loopback and the services of this host, with the TUN up and rules that refuse all they are asked about:
//! whatever is answered here went past us, as it must.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use socket2::SockRef;

use super::super::support::client::{Session, act_in};
use super::super::support::netns::veth;
use super::super::support::peers::{Peer, Record};
use super::super::support::sites::{NAME, V4, V6};
use super::super::support::topology::{
    CLIENT_V4, CLIENT_V6, GATEWAY_V4, GATEWAY_V6, HOST_LAN_V4, HOST_LAN_V6, HOST_V4, HOST_V6,
};
use super::super::support::{Dump, Netns, Peers, Sites, Topology, run, world};
use super::{TUN, both_rp_filters, profile};

/// Echo servers on every address of a host, TCP and UDP.
fn echo_everywhere(peers: &Peers, port: u16) -> Vec<Peer> {
    let any = ["0.0.0.0", "[::]"].map(|any| format!("{any}:{port}").parse().expect("an address"));
    any.into_iter().flat_map(|at| [peers.tcp_echo(at), peers.udp_echo(at, &Record::default())]).collect()
}

/// The link-local address of `device` as a neighbour on `by` writes it.
fn link_local(ns: &Netns, device: &str, by: (&Netns, &str)) -> String {
    let said = ns.ip(&format!("-6 -o addr show dev {device} scope link"));
    let address = said.split_whitespace().find(|word| word.starts_with("fe80:")).expect("a link-local address");
    let name = by.1.to_owned();
    let index = by.0.enter(move || if_nametoindex(name.as_str()).expect("a device"));
    format!("[{}%{index}]", address.split('/').next().expect("an address"))
}

/// A network behind the gateway that this host knows by a static route.
fn office(lab: &Topology) -> Netns {
    let office = Netns::new("office");
    veth(&lab.gateway, "eth2", &office, "eth0");
    lab.gateway.address("eth2", &["10.9.0.1/16", "fd00:9::1/64"]);
    office.address("eth0", &["10.9.0.7/16", "fd00:9::7/64"]);
    office.routes(&["default via 10.9.0.1", "default via fd00:9::1"]);
    lab.host.routes(&[&format!("10.9.0.0/16 via {GATEWAY_V4}"), &format!("fd00:9::/64 via {GATEWAY_V6}")]);
    office
}

#[test]
fn neighbours_and_services_are_reached_over_every_kind_of_address() {
    run(&[TUN], || {
        both_rp_filters(Topology::with_lan, |lab| {
            let _sites = Sites::open(&lab);
            let office = office(&lab);
            lab.host.address("lan0", &["169.254.7.1/16"]);
            lab.client().address("eth0", &["169.254.7.2/16"]);
            let threads = [&lab.host, lab.client(), &office].map(Peers::new);
            let _servers: Vec<Peer> = threads.iter().flat_map(|peers| echo_everywhere(peers, 445)).collect();
            let _router = echo_everywhere(&lab.at_gateway, 445);
            let v6 = |address: &str| format!("[{address}]");
            let of_host = [HOST_V4.to_owned(), v6(HOST_V6), HOST_LAN_V4.to_owned(), v6(HOST_LAN_V6)];
            // A neighbour on the uplink has to be private: whoever runs it could call any public address a neighbour.
            let of_office = ["10.9.0.7".to_owned(), v6("fd00:9::7"), GATEWAY_V4.to_owned()];
            let mut from_host = [&of_host[..], &of_office].concat();
            from_host.extend([CLIENT_V4.to_owned(), v6(CLIENT_V6), "127.0.0.1".to_owned(), v6("::1")]);
            from_host.push("169.254.7.2".to_owned());
            from_host.push(link_local(lab.client(), "eth0", (&lab.host, "lan0")));
            from_host.push(link_local(&lab.gateway, "eth1", (&lab.host, "eth0")));
            let mut from_client = [&of_host[..], &of_office, &["169.254.7.1".to_owned()]].concat();
            from_client.push(link_local(&lab.host, "lan0", (lab.client(), "eth0")));
            let outside = &of_host[..2];
            let everything = || {
                let ways = [(&lab.host, &from_host[..]), (lab.client(), &from_client), (&lab.internet, outside)];
                let tries = ways.into_iter().flat_map(|(who, to)| to.iter().map(move |address| (who, address)));
                let try_one = |(who, address): (&Netns, &String)| {
                    let tcp = act_in(who, &format!("ask {address}:445 x"));
                    assert_eq!(tcp, Ok("x".to_owned()), "{address} from {}", who.name());
                    // A server on the wildcard address answers a neighbour by the address that is nearest to it.
                    (who.name().to_owned(), address.clone(), act_in(who, &format!("datagram {address}:445 x 2")))
                };
                tries.map(try_one).collect::<Vec<_>>()
            };
            let truth = everything();
            assert!(truth.iter().filter(|(_, _, outcome)| outcome.is_ok()).count() + 2 >= truth.len(), "{truth:?}");
            let before = Dump::take(&lab.host);
            let tunproxy = profile("auto-forward: true", "'MATCH,REJECT'").start(&lab.host);
            assert_eq!(everything(), truth);
            for who in [&lab.host, lab.client()] {
                for site in [V4, V6] {
                    let outcome = act_in(who, &format!("ask {site}:7 x"));
                    assert_eq!(outcome, Err("ECONNREFUSED".to_owned()), "it is at work for {}", who.name());
                }
            }
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        });
    });
}

/// Groups and addresses that everybody on a link listens to, with the port of who does.
const TO_ALL: [&str; 8] = [
    "224.0.0.251:5353",
    "239.255.255.250:1900",
    "255.255.255.255:9",
    "10.7.255.255:9",
    "[ff02::fb]:5353",
    "[ff02::c]:1900",
    "[ff02::1:3]:5355",
    "[ff02::1]:9",
];

/// Answers on `device` whoever speaks to everybody.
fn listeners(peers: &Peers, ns: &Netns, device: &str, own: Ipv4Addr) -> Vec<Peer> {
    let name = device.to_owned();
    let index = ns.enter(move || if_nametoindex(name.as_str()).expect("a device"));
    let listen = |to: &str| {
        let to: SocketAddr = to.parse().expect("an address");
        let any = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
        peers.udp(SocketAddr::new(any, to.port()), async move |socket| {
            match to.ip() {
                IpAddr::V4(group) if group.is_multicast() => socket.join_multicast_v4(group, own).expect("a group"),
                IpAddr::V6(group) => socket.join_multicast_v6(&group, index).expect("a group"),
                IpAddr::V4(_) => {}
            }
            let mut buffer = [0; 64];
            loop {
                let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
                let _ = socket.send_to(&buffer[..length], from).await;
            }
        })
    };
    // Both broadcast addresses have one listener.
    TO_ALL.iter().filter(|to| **to != "10.7.255.255:9").map(|to| listen(to)).collect()
}

/// Speaks to everybody on `device`, as mDNS and SSDP do; returns who answers.
fn speak(ns: &Netns, device: &str, own: Ipv4Addr, to: &str) -> io::Result<SocketAddr> {
    let (device, to) = (device.to_owned(), to.parse::<SocketAddr>().expect("an address"));
    ns.enter(move || {
        let index = if_nametoindex(device.as_str())?;
        // The limited broadcast leaves by the default route unless the sender says otherwise, as DHCP clients do.
        let source = if to.ip() == IpAddr::V4(Ipv4Addr::BROADCAST) { Some(device.as_bytes()) } else { None };
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        SockRef::from(&socket).bind_device(source)?;
        socket.set_broadcast(true)?;
        match to {
            SocketAddr::V4(_) => SockRef::from(&socket).set_multicast_if_v4(&own)?,
            SocketAddr::V6(_) => SockRef::from(&socket).set_multicast_if_v6(index)?,
        }
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        socket.send_to(b"anybody?", to)?;
        socket.recv_from(&mut [0; 64]).map(|(_, from)| from)
    })
}

#[test]
fn broadcast_mdns_and_ssdp_find_their_neighbours_in_both_directions() {
    run(&[TUN], || {
        both_rp_filters(Topology::with_lan, |lab| {
            let _sites = Sites::open(&lab);
            // The networks of the lab are /24; everybody in 10.7.0.0/16 is meant here.
            lab.host.address("lan0", &["10.7.1.1/16"]);
            lab.client().address("eth0", &["10.7.1.2/16"]);
            let (host, client): (Ipv4Addr, Ipv4Addr) = ("10.7.1.1".parse().unwrap(), "10.7.1.2".parse().unwrap());
            let threads = [Peers::new(lab.client()), Peers::new(&lab.host)];
            let _at_client = listeners(&threads[0], lab.client(), "eth0", client);
            let _at_host = listeners(&threads[1], &lab.host, "lan0", host);
            let before = Dump::take(&lab.host);
            let tunproxy = profile("auto-forward: true", "'MATCH,REJECT'").start(&lab.host);
            tunproxy.assert_carries(&lab.host);
            for to in TO_ALL {
                let answered = speak(&lab.host, "lan0", host, to);
                assert!(answered.is_ok(), "from the host to {to}: {answered:?}");
                let answered = speak(lab.client(), "eth0", client, to);
                assert!(answered.is_ok(), "from the client to {to}: {answered:?}");
            }
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        });
    });
}

#[test]
fn a_flow_of_a_lan_client_older_than_the_start_is_reset_at_once_and_may_connect_anew() {
    run(&[TUN], || {
        both_rp_filters(Topology::with_lan, |lab| {
            let _sites = Sites::open(&lab);
            let open = |from: &str, to: &str| {
                Session::open(lab.client(), format!("{from}:0").parse().unwrap(), format!("{to}:7").parse().unwrap())
            };
            let mut sessions = [open(CLIENT_V4, V4), open(&format!("[{CLIENT_V6}]"), V6)];
            for session in &mut sessions {
                assert_eq!(session.alive().map(drop), Ok(()));
            }
            let tunproxy = profile("auto-forward: true", "'MATCH,DIRECT'").start(&lab.host);
            for session in &mut sessions {
                assert_eq!(session.alive().map(drop), Err("ECONNRESET".to_owned()));
            }
            for site in [V4, V6] {
                assert_eq!(act_in(lab.client(), &format!("ask {site}:7 x")), Ok("x".to_owned()), "{site}");
            }
            assert!(tunproxy.stop().success());
        });
    });
}

#[test]
fn a_stub_on_loopback_gets_our_answers_when_it_asks_the_resolver_behind_it() {
    run(&["dig", TUN], || {
        both_rp_filters(Topology::desktop, |lab| {
            let sites = Sites::open(&lab);
            let at_host = Peers::new(&lab.host);
            // It asks from an unbound socket, as stubs do.
            let _stub = at_host.udp("127.0.0.53:53".parse().unwrap(), async |socket| {
                let mut buffer = [0; 2048];
                loop {
                    let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
                    let upstream = tokio::net::UdpSocket::bind("0.0.0.0:0").await.expect("a socket");
                    let _ = upstream.send_to(&buffer[..length], (GATEWAY_V4, 53)).await;
                    if let Ok((length, _)) = upstream.recv_from(&mut buffer).await {
                        let _ = socket.send_to(&buffer[..length], from).await;
                    }
                }
            });
            world::set_resolv_conf("nameserver 127.0.0.53\n");
            let ask = || lab.host.run("dig", &["+short", "+tries=1", "@127.0.0.53", NAME, "A"]);
            assert_eq!(ask(), format!("{V4}\n"));
            let (before, asked) = (Dump::take(&lab.host), sites.dns.queries.all().len());
            let tunproxy = profile("", "'DOMAIN,www.example.test,REJECT', 'MATCH,DIRECT'").start(&lab.host);
            assert!(ask().starts_with("198.18."), "{}", tunproxy.output());
            let by_name = act_in(&lab.host, &format!("ask {NAME}:7 x"));
            assert_eq!(by_name, Err("ECONNREFUSED".to_owned()), "the rule for the name holds");
            assert_eq!(sites.dns.queries.all().len(), asked, "nobody else was asked");
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        });
    });
}

#[test]
fn a_strict_filter_anywhere_is_lived_with_and_no_parameter_of_others_changes_but_one_of_the_uplink() {
    run(&["curl", TUN], || {
        for strict in [&["all"][..], &["eth0"], &["lan0"], &["default", "eth0", "lan0"]] {
            let lab = Topology::with_lan().rp_filter("0");
            let _sites = Sites::open(&lab);
            let at_client = Peers::new(lab.client());
            let _web = echo_everywhere(&at_client, 8000);
            // Two ways into the LAN: a port forward, and a route.
            lab.host.nft(
                "table ip forwards {
                   chain pre { type nat hook prerouting priority dstnat; iifname \"eth0\" meta l4proto { tcp, udp } th dport 8080 dnat to 10.7.0.2:8000; }
                 }",
            );
            for device in strict {
                lab.host.sysctl(&format!("net.ipv4.conf.{device}.rp_filter"), "1");
            }
            let before = Dump::take(&lab.host);
            let tunproxy = profile("", "'MATCH,DIRECT'").start(&lab.host);
            let changed = before.diff(&Dump::take(&lab.host));
            let others = changed.lines().filter(|line| line.contains("/proc/sys/") && !line.contains("/tunproxy0/"));
            let others: Vec<&str> = others.filter(|line| !line.contains("ipv4/conf/eth0/src_valid_mark")).collect();
            assert_eq!(others, Vec::<&str>::new(), "{strict:?}");
            for who in [&lab.host, lab.client()] {
                for site in [V4, V6, NAME].into_iter().take(if who.name() == "host" { 3 } else { 2 }) {
                    for act in ["ask", "datagram"] {
                        let outcome = act_in(who, &format!("{act} {site}:7 x"));
                        assert_eq!(outcome, Ok("x".to_owned()), "{strict:?}: {act} {site} from {}", who.name());
                    }
                }
            }
            for to in [format!("{HOST_V4}:8080"), format!("{CLIENT_V4}:8000"), format!("[{CLIENT_V6}]:8000")] {
                for act in ["ask", "datagram"] {
                    let outcome = act_in(&lab.internet, &format!("{act} {to} x"));
                    assert_eq!(outcome, Ok("x".to_owned()), "{strict:?}: {act} {to} from the internet");
                }
            }
            assert!(tunproxy.stop().success());
            before.assert_same(&Dump::take(&lab.host));
        }
    });
}
