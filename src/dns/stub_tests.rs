use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::NS;
use hickory_proto::rr::{RData, Record, RecordType};
use tokio::net::UdpSocket;

use super::*;
use crate::dns::testing::{
    Nameserver, addresses, answer, ask, code, fake_mode, faking, ips, mapping, name, parsed, query,
};
use crate::dns::{Answer, Asker, Config, Dns, Source, System};
use crate::net::{Lookup, LookupError, Name};

fn a(text: &str) -> Vec<u8> {
    query(text, RecordType::A, 0)
}

/// Whether the nameserver is on this host.
struct OnHost(AtomicBool);

impl System for OnHost {
    fn nameservers(&self) -> Result<Vec<SocketAddr>, String> {
        Err("nobody asks".to_owned())
    }

    fn is_stub(&self, _: SocketAddr) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// One that is on this host for good.
fn stub_at(address: SocketAddr) -> Source {
    let stub = Source::Fixed(Upstream { address, tcp_only: false });
    Source::Checked(Box::new(stub), Arc::new(OnHost(true.into())))
}

/// What a stub does with a question.
enum Does {
    /// Answers it.
    Knows(Vec<u8>),
    /// Asks these, one after the other until one does not fail: None is us, on purpose. We are asked in their place.
    Asks(Vec<Option<SocketAddr>>),
    /// Asks this one, as late as that.
    AsksAfter(Duration, SocketAddr),
    /// Asks this one, and says nothing.
    Stops(SocketAddr),
    /// Answers it as soon as a tracer has come to us.
    KnowsLate(Vec<u8>),
    /// Says nothing.
    Drops,
}

/// A stub on this host, and those who ask through it.
struct World {
    dns: Arc<Dns>,
    stub: SocketAddr,
}

impl World {
    async fn new(config: Config, does: impl Fn(&[u8]) -> Does + Send + Sync + 'static) -> Self {
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = socket.local_addr().unwrap();
        let nameservers = vec![stub_at(address)];
        let dns = Arc::new(Dns::open(Config { nameservers, ..config }).unwrap());
        run(socket, Arc::clone(&dns), does);
        Self { dns, stub: address }
    }

    async fn lookup(&self, name: &str) -> Result<Vec<IpAddr>, LookupError> {
        self.dns.lookup(&Name::new(name).unwrap()).await.map(|found| found.to_vec())
    }
}

/// Runs the stub at `socket`, whose questions come to `dns`.
fn run(socket: Arc<UdpSocket>, dns: Arc<Dns>, does: impl Fn(&[u8]) -> Does + Send + Sync + 'static) {
    let (does, traced) = (Arc::new(does), Arc::new(tokio::sync::Notify::new()));
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((length, client)) = socket.recv_from(&mut buffer).await {
            let (query, dns, does) = (buffer[..length].to_vec(), Arc::clone(&dns), Arc::clone(&does));
            let traced = Arc::clone(&traced);
            let socket = Arc::clone(&socket);
            tokio::spawn(async move {
                let answer = match does(&query) {
                    Does::Knows(answer) => answer,
                    Does::Drops => return,
                    Does::KnowsLate(answer) => {
                        traced.notified().await;
                        answer
                    }
                    Does::AsksAfter(delay, server) => {
                        tokio::time::sleep(delay).await;
                        forwarded(&dns, &query, &[Some(server)]).await
                    }
                    Does::Stops(server) => {
                        forwarded(&dns, &query, &[Some(server)]).await;
                        return;
                    }
                    Does::Asks(servers) => {
                        let answer = forwarded(&dns, &query, &servers).await;
                        if parsed(&query).queries[0].name().iter().any(|label| label.len() == LABEL) {
                            traced.notify_one();
                        }
                        answer
                    }
                };
                let _ = socket.send_to(&answer, client).await;
            });
        }
    });
}

/// What a stub hears of us when it asks `servers`.
async fn forwarded(dns: &Dns, query: &[u8], servers: &[Option<SocketAddr>]) -> Vec<u8> {
    let mut reply = Vec::new();
    for server in servers {
        let asker = Asker { client: "198.18.0.1".parse().unwrap(), server: *server, is_host: true };
        if let Answer::Ask(question) = dns.answer(query, Transport::Udp, asker, crate::dns::now(), &mut reply) {
            reply = dns.ask(question).await;
        }
        if parsed(&reply).metadata.response_code != ResponseCode::ServFail {
            break;
        }
    }
    reply
}

async fn real() -> Nameserver {
    Nameserver::answering(|query| {
        let asked = parsed(query).queries[0].name().to_string();
        assert!(!asked.split('.').any(|label| label.len() == LABEL), "a tracer has left: {asked}");
        match asked.starts_with("nobody.") || asked.starts_with("nas.") {
            true => code(query, ResponseCode::NXDomain),
            false => addresses(query, 60, &["203.0.113.7"]),
        }
    })
    .await
}

#[tokio::test]
async fn those_whom_a_stub_asks_are_asked_in_its_place_while_programs_get_fake_addresses_of_it() {
    let server = real().await;
    let upstream = server.address;
    let world = World::new(faking(&[]), move |_| Does::Asks(vec![Some(upstream)])).await;
    let real: IpAddr = "203.0.113.7".parse().unwrap();
    assert_eq!(world.lookup("www.example").await.unwrap(), [real]);
    let asker = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    asker.send_to(&a("www.example."), world.stub).await.unwrap();
    let mut answer = [0; 512];
    let length = asker.recv(&mut answer).await.unwrap();
    assert!(ips(&answer[..length])[0].to_string().starts_with("198.18."));
    assert!(matches!(world.lookup("nobody.example").await, Err(LookupError::NoSuchName)));
    assert_eq!(world.dns.counters().snapshot().looped, 0);
}

#[tokio::test]
async fn names_that_get_no_fake_address_are_found_through_a_stub_as_well() {
    for config in [faking(&[]), mapping(&[])] {
        let server = real().await;
        let upstream = server.address;
        let world = World::new(config, move |_| Does::Asks(vec![Some(upstream)])).await;
        let begun = std::time::Instant::now();
        for name in ["www.real.example", "nobody.real.example"] {
            // What programs ask the stub comes to us, and goes to the stub once more.
            let query = query(&format!("{name}."), RecordType::A, 0);
            let reply = forwarded(&world.dns, &query, &[Some(upstream)]).await;
            assert_eq!(ips(&reply).len(), usize::from(name.starts_with("www")));
            assert_eq!(world.lookup(name).await.is_ok(), name.starts_with("www"));
        }
        assert!(begun.elapsed() < Duration::from_secs(4), "nobody waits for an answer that waits for it");
    }
}

#[tokio::test]
async fn what_a_stub_knows_by_itself_counts_before_what_others_say() {
    let server = real().await;
    let upstream = server.address;
    let world = World::new(faking(&[]), move |query| match parsed(query).queries[0].name().to_string().as_str() {
        "nas.home." | "www.override." => Does::Knows(addresses(query, 60, &["192.168.1.7"])),
        _ => Does::Asks(vec![Some(upstream)]),
    })
    .await;
    let known: IpAddr = "192.168.1.7".parse().unwrap();
    assert_eq!(world.lookup("nas.home").await.unwrap(), [known]);
    let found = world.dns.lookup_family(&Name::new("www.override").unwrap(), true).await.unwrap();
    assert_eq!(found[..], [known]);
}

#[tokio::test]
async fn what_a_stub_denies_or_has_without_data_by_itself_counts_before_what_others_say() {
    let server = real().await;
    let upstream = server.address;
    let world = World::new(faking(&[]), move |query| match parsed(query).queries[0].name().to_string().as_str() {
        "blocked.example." => Does::Knows(code(query, ResponseCode::NXDomain)),
        "nobody.example." => Does::Knows(addresses(query, 60, &[])),
        below if below.ends_with(".blocked.example.") => Does::Drops,
        _ => Does::Asks(vec![Some(upstream)]),
    })
    .await;
    let begun = std::time::Instant::now();
    assert!(matches!(world.lookup("blocked.example").await, Err(LookupError::NoSuchName)));
    assert!(begun.elapsed() < PATIENCE, "a no is not waited with until tracers are given up");
    assert!(matches!(world.lookup("nobody.example").await, Err(LookupError::NoAddress)));
}

#[tokio::test]
async fn what_a_stub_keeps_at_home_is_asked_of_nobody_though_its_tracer_comes_first() {
    let cases =
        [("printer", mapping(&[])), ("tv.lan", mapping(&[])), ("printer", faking(&[])), ("ads.example", faking(&[]))];
    for (name, config) in cases {
        let server = real().await;
        let upstream = server.address;
        let does = move |query: &[u8]| match parsed(query).queries[0].name().to_string().trim_end_matches('.') == name {
            true => Does::KnowsLate(code(query, ResponseCode::NXDomain)),
            false => Does::Asks(vec![Some(upstream)]),
        };
        let world = World::new(Config { ipv6: false, ..config }, does).await;
        assert_eq!(world.lookup(name).await, Err(LookupError::NoSuchName), "{name}");
        assert_eq!(server.udp_queries(), 0, "{name}");
    }
}

#[tokio::test]
async fn the_answers_of_a_stub_whose_questions_never_come_to_us_are_its_own() {
    let world = World::new(faking(&[]), |query| {
        Does::Knows(match parsed(query).queries[0].name().to_string().as_str() {
            "www.example." => addresses(query, 60, &["203.0.113.7"]),
            "empty.example." => addresses(query, 60, &[]),
            _ => code(query, ResponseCode::NXDomain),
        })
    })
    .await;
    assert_eq!(world.lookup("www.example").await.unwrap().len(), 1);
    assert!(matches!(world.lookup("empty.example").await, Err(LookupError::NoAddress)));
    assert!(matches!(world.lookup("nobody.example").await, Err(LookupError::NoSuchName)));
}

#[tokio::test]
async fn a_stub_that_drops_tracers_says_no_all_the_same() {
    let world = World::new(faking(&[]), |query| match parsed(query).queries[0].name().to_string().as_str() {
        "empty.example." => Does::Knows(addresses(query, 60, &[])),
        "broken.example." => Does::Knows(code(query, ResponseCode::Refused)),
        _ => Does::Drops,
    })
    .await;
    assert!(matches!(world.lookup("empty.example").await, Err(LookupError::NoAddress)));
    let failed = world.lookup("broken.example").await;
    assert!(matches!(&failed, Err(LookupError::Failed(why)) if why.contains("refused")), "{failed:?}");
}

#[tokio::test]
async fn a_server_that_is_silent_or_refuses_makes_the_stub_choose_another() {
    let (dead, refusing) =
        (Nameserver::silent().await, Nameserver::answering(|q| code(q, ResponseCode::Refused)).await);
    let server = real().await;
    let order = [dead.address, refusing.address, server.address].map(Some).to_vec();
    let world = World::new(faking(&[]), move |_| Does::Asks(order.clone())).await;
    assert_eq!(world.lookup("www.example").await.unwrap().len(), 1);
    let before = (dead.udp_queries(), refusing.udp_queries());
    assert_eq!(world.lookup("other.example").await.unwrap().len(), 1);
    assert_eq!((dead.udp_queries(), refusing.udp_queries()), before, "they are left alone for a while");
}

#[tokio::test]
async fn a_server_that_is_found_late_has_as_long_to_answer_as_any() {
    let server = real().await;
    let upstream = server.address;
    let shown = Arc::new(Mutex::new(HashSet::new()));
    let seen = Arc::clone(&shown);
    let world = World::new(Config { ipv6: false, ..faking(&[]) }, move |query| {
        let name = parsed(query).queries[0].name().to_string().to_ascii_lowercase();
        if name.split('.').next().unwrap().len() == LABEL {
            seen.lock().insert(name);
        }
        Does::AsksAfter(PATIENCE + Duration::from_millis(100), upstream)
    })
    .await;
    assert_eq!(world.lookup("www.example").await.unwrap().len(), 1);
    assert_eq!(shown.lock().len(), 1, "nobody was given up, and no further tracer was sent");
}

#[tokio::test]
async fn two_silent_servers_are_given_up_one_after_the_other() {
    let (one, other, server) = (Nameserver::silent().await, Nameserver::silent().await, real().await);
    let order = [one.address, other.address, server.address].map(Some).to_vec();
    let world = World::new(faking(&[]), move |_| Does::Asks(order.clone())).await;
    assert_eq!(world.lookup("www.example").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_server_that_failed_is_asked_again_where_there_is_no_other() {
    let server = Nameserver::answering(|query| match parsed(query).queries[0].name().to_string().as_str() {
        "broken.example." => code(query, ResponseCode::Refused),
        _ => addresses(query, 60, &["203.0.113.7"]),
    })
    .await;
    let upstream = server.address;
    let world = World::new(faking(&[]), move |_| Does::Asks(vec![Some(upstream)])).await;
    assert!(matches!(world.lookup("broken.example").await, Err(LookupError::Failed(_))));
    assert_eq!(world.lookup("www.example").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_server_that_failed_is_asked_again_where_those_that_did_not_are_silent() {
    for dead_failed_too in [false, true] {
        let (dead, server) = (Nameserver::silent().await, real().await);
        let order = [server.address, dead.address].map(Some).to_vec();
        let world = World::new(faking(&[]), move |_| Does::Asks(order.clone())).await;
        let tracers = &world.dns.resolver.tracers;
        tracers.judge(server.address, false);
        if dead_failed_too {
            tracers.judge(dead.address, false);
        }
        assert_eq!(world.lookup("www.example").await.unwrap().len(), 1);
        assert!(dead.udp_queries() > 0 && !tracers.is_unfit(server.address));
    }
}

#[tokio::test]
async fn a_server_that_failed_is_asked_again_where_the_stub_stops_after_it() {
    let server = real().await;
    let upstream = server.address;
    let world = World::new(faking(&[]), move |query| {
        match parsed(query).queries[0].name().to_string().split('.').next().unwrap().len() {
            LABEL => Does::Stops(upstream),
            _ => Does::Drops,
        }
    })
    .await;
    world.dns.resolver.tracers.judge(upstream, false);
    assert_eq!(world.lookup("www.example").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_nameserver_with_a_name_is_found_through_a_stub_whose_questions_come_to_the_service_that_needs_it() {
    for config in [faking(&[]), mapping(&[])] {
        let server = Nameserver::answering(|query| match parsed(query).queries[0].name().to_string().as_str() {
            "dns.example." => addresses(query, 60, &["127.0.0.1"]),
            _ => addresses(query, 60, &["203.0.113.7"]),
        })
        .await;
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let stub = stub_at(socket.local_addr().unwrap());
        let (dialer, tracers) = (config.dialer.clone(), Arc::clone(&config.tracers));
        let bootstrap = Config { nameservers: vec![stub], dialer, tracers, ..mapping(&[]) };
        let named = Source::Named {
            name: Name::new("dns.example").unwrap(),
            port: server.address.port(),
            tcp_only: false,
            lookup: Arc::new(Dns::open(bootstrap).unwrap()),
        };
        let dns = Arc::new(Dns::open(Config { nameservers: vec![named], ..config }).unwrap());
        let upstream = server.address;
        run(socket, Arc::clone(&dns), move |_| Does::Asks(vec![Some(upstream)]));
        let names = dns.fake_names();
        let real: IpAddr = "203.0.113.7".parse().unwrap();
        assert_eq!(dns.lookup(&Name::new("www.example").unwrap()).await.unwrap()[..], [real]);
        let spent = dns.fake_names() - names;
        assert!(spent <= 2, "the tracers got {spent} fake addresses");
    }
}

#[tokio::test]
async fn a_nameserver_is_asked_as_a_stub_while_it_is_on_this_host_and_as_any_other_before_and_after() {
    let server = real().await;
    let upstream = server.address;
    for is_named in [false, true] {
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = socket.local_addr().unwrap();
        let source = match is_named {
            false => Source::Fixed(Upstream { address, tcp_only: false }),
            true => Source::Named {
                name: Name::new("localhost").unwrap(),
                port: address.port(),
                tcp_only: false,
                lookup: Arc::new(Dns::open(Config { ipv6: false, ..mapping(&[]) }).unwrap()),
            },
        };
        let on_host = Arc::new(OnHost(false.into()));
        let nameservers = vec![Source::Checked(Box::new(source), Arc::clone(&on_host) as Arc<dyn System>)];
        let dns = Arc::new(Dns::open(Config { nameservers, ..faking(&[]) }).unwrap());
        run(socket, Arc::clone(&dns), move |_| Does::Asks(vec![Some(upstream)]));
        for (name, is_here) in [("www.before", false), ("www.then", true), ("www.after", false)] {
            on_host.0.store(is_here, Ordering::Relaxed);
            let found = dns.lookup(&Name::new(name).unwrap()).await;
            assert_eq!(found.is_ok(), is_here, "{name}: {found:?}");
        }
    }
}

#[tokio::test]
async fn a_stub_that_is_told_to_ask_us_has_nobody_behind_it() {
    for config in [faking(&[]), mapping(&[])] {
        let world = World::new(config, |_| Does::Asks(vec![None])).await;
        let failed = world.lookup("www.example").await;
        assert!(matches!(&failed, Err(LookupError::Failed(why)) if why.contains("it asks us")), "{failed:?}");
        assert!(world.dns.counters().snapshot().looped > 0);
    }
}

#[tokio::test]
async fn a_stub_that_resolves_by_itself_is_told_from_one_whose_server_knows_no_address() {
    let root = Nameserver::answering(|query| {
        let mut referral = answer(query);
        referral.metadata.recursion_available = false;
        if parsed(query).queries[0].name().to_string() != "empty.example." {
            referral.add_authority(Record::from_rdata(name("example."), 60, RData::NS(NS(name("ns.example.")))));
        }
        referral.to_vec().unwrap()
    })
    .await;
    let upstream = root.address;
    let world = World::new(faking(&[]), move |_| Does::Asks(vec![Some(upstream)])).await;
    let failed = world.lookup("www.example").await;
    assert!(matches!(&failed, Err(LookupError::Failed(why)) if why.contains("under dns.nameserver")), "{failed:?}");
    assert!(matches!(world.lookup("empty.example").await, Err(LookupError::NoAddress)));
}

#[tokio::test]
async fn a_stub_that_is_not_there_fails_at_once() {
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let nameservers = vec![stub_at(gone)];
    let dns = Dns::open(Config { nameservers, ..mapping(&[]) }).unwrap();
    let failed = ask(&dns, &a("www.example.")).await;
    assert_eq!(parsed(&failed).metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn tracers_are_known_in_any_case_and_forged_ones_are_names() {
    let mode = fake_mode("198.18.0.1/16", None, &[]);
    let dns = Dns::open(Config { mode, ..mapping(&[]) }).unwrap();
    let (noted, mut found) = mpsc::channel(1);
    let tracer = dns.resolver.tracers.send(b"\x03www\x07example\x00", noted);
    let text = |name: &[u8]| String::from_utf8_lossy(&name[1..=LABEL]).into_owned();
    let label = text(&tracer.name);
    let server: SocketAddr = "192.168.1.1:53".parse().unwrap();
    let heard = |label: &str| {
        let asker = Asker { client: "198.18.0.1".parse().unwrap(), server: Some(server), is_host: true };
        let mut reply = Vec::new();
        let question = a(&format!("{label}.www.example."));
        assert!(matches!(dns.answer(&question, Transport::Udp, asker, crate::dns::now(), &mut reply), Answer::Ready));
        parsed(&reply).metadata.response_code
    };
    let forged = format!("{}{}", &label[..LABEL / 2], "0".repeat(LABEL / 2));
    assert_eq!(heard(&forged), ResponseCode::NoError, "it has got a fake address");
    assert!(found.try_recv().is_err());
    assert_eq!(heard(&label.to_ascii_uppercase()), ResponseCode::NXDomain);
    assert_eq!(found.try_recv().unwrap().unwrap().address, server);
    drop(tracer);
    assert_eq!(heard(&label), ResponseCode::NXDomain, "a late one is no name either");
}

#[test]
fn tracers_fit_below_the_longest_names_and_below_the_root() {
    let tracers = Tracers::default();
    let (noted, _found) = mpsc::channel(1);
    let long: Vec<u8> =
        [&[63; 1][..], &[b'a'; 63]].concat().repeat(3).into_iter().chain([61]).chain([b'b'; 61]).chain([0]).collect();
    assert_eq!(long.len(), MAX_NAME);
    let tracer = tracers.send(&long, noted.clone());
    assert!(tracer.name.len() <= MAX_NAME && tracer.name.ends_with(&[b'b', 0]));
    assert_eq!(tracers.send(&[0], noted).name.len(), LABEL + 2);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_silent_on_one_name_stays_fit_while_it_answers_others() {
    let (tracers, server) = (Tracers::default(), "192.0.2.1:53".parse().unwrap());
    let asked_now = || Search { asked: vec![(server, Some(Instant::now()))], ..Search::default() };
    let slow = asked_now();
    tokio::time::advance(PATIENCE / 2).await;
    tracers.judge(server, true);
    tokio::time::advance(PATIENCE / 2).await;
    slow.lose_patience(&tracers);
    assert!(!tracers.is_unfit(server));
    let silent = asked_now();
    tokio::time::advance(PATIENCE).await;
    silent.lose_patience(&tracers);
    assert!(tracers.is_unfit(server), "it has answered nothing since");
}
