//! Nameservers that misbehave, seen through [`Dns`].

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::AtomicBool;
use std::task::Poll;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use tokio::net::UdpSocket;

use super::super::upstream::Upstream;
use super::*;
use crate::dns::testing::{
    CLIENT, Nameserver, addresses, answer, ask, ask_as, code, faking, ips, mapping, parsed, query, soa,
};
use crate::dns::{Answer, Dns, System, Transport};
use crate::net::{Lookup, LookupError, Name};

const REAL: &str = "203.0.113.7";

fn a(text: &str) -> Vec<u8> {
    query(text, RecordType::A, 0)
}

fn good(query: &[u8]) -> Vec<u8> {
    addresses(query, 60, &[REAL, "2001:db8::7"])
}

fn open(upstreams: &[&Nameserver]) -> Arc<Dns> {
    Arc::new(Dns::open(mapping(upstreams)).unwrap())
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

#[tokio::test]
async fn questions_asked_together_travel_once() {
    let server = Nameserver::answering(good).await;
    let dns = open(&[&server]);
    let asked = (0..50).map(|_| {
        let dns = Arc::clone(&dns);
        tokio::spawn(async move { ips(&ask(&dns, &a("www.example.")).await) })
    });
    for answer in futures_util::future::join_all(asked).await {
        assert_eq!(answer.unwrap(), [IpAddr::from([203, 0, 113, 7])]);
    }
    assert_eq!(server.udp_queries(), 1);
    ask(&dns, &a("WWW.example.")).await;
    assert_eq!(server.udp_queries(), 1, "the cache does not mind the letters");
    assert_eq!(dns.counters().snapshot().upstream_queries, 1);
}

#[tokio::test]
async fn whoever_asked_first_may_go_and_the_others_still_get_the_answer() {
    let server = Nameserver::answering(good).await;
    let dns = open(&[&server]);
    let question = a("www.example.");
    let mut reply = Vec::new();
    let Answer::Ask(first) = dns.answer(&question, Transport::Udp, CLIENT, crate::dns::now(), &mut reply) else {
        panic!()
    };
    let mut leader = Box::pin(dns.ask(first));
    assert!(futures_util::poll!(&mut leader).is_pending());
    let waiting = {
        let dns = Arc::clone(&dns);
        tokio::spawn(async move { ask(&dns, &a("www.example.")).await })
    };
    drop(leader);
    assert_eq!(ips(&waiting.await.unwrap()).len(), 1);
    assert_eq!(server.udp_queries(), 1);
}

#[test]
fn the_end_of_the_runtime_that_carries_questions_is_a_failure_and_not_a_hang() {
    let control = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = control.block_on(Nameserver::silent());
    let dns = control.block_on(async { open(&[&server]) });
    let worker = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let reply = worker.block_on(async {
        let (first, second) = (a("www.example."), a("www.example."));
        let mut waiting = Box::pin(ask(&dns, &first));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        // The question is under way, and the runtime goes.
        control.shutdown_background();
        let reply = waiting.await;
        assert_eq!(parsed(&ask(&dns, &second).await).metadata.response_code, ResponseCode::ServFail);
        reply
    });
    assert_eq!(parsed(&reply).metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn garbage_before_the_answer_is_ignored_and_counted() {
    let server = Nameserver::start(
        |query| {
            let forged = addresses(query, 60, &["192.0.2.66"]);
            let mut wrong_id = forged.clone();
            wrong_id[0] ^= 0xff;
            let mut not_an_answer = forged.clone();
            not_an_answer[2] &= 0x7f;
            let mut wrong_name = forged.clone();
            wrong_name[13] ^= 1;
            let mut wrong_type = forged.clone();
            let end = query.len() - 11;
            wrong_type[end - 3] = 28;
            let mut cut = forged.clone();
            cut.truncate(forged.len() - 2);
            vec![wrong_id, not_an_answer, wrong_name, wrong_type, cut, vec![], vec![0; 5], vec![0xff; 600], good(query)]
        },
        |_| Vec::new(),
    )
    .await;
    let dns = open(&[&server]);
    assert_eq!(ips(&ask(&dns, &a("www.example.")).await), [IpAddr::from([203, 0, 113, 7])]);
    assert_eq!(dns.counters().snapshot().garbage, 8);
}

#[tokio::test]
async fn an_answer_from_elsewhere_never_arrives() {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let upstream = Upstream { address: socket.local_addr().unwrap(), tcp_only: false };
    let config = crate::dns::Config { nameservers: vec![upstream.into()], ..mapping(&[]) };
    let dns = Arc::new(Dns::open(config).unwrap());
    let asked = tokio::spawn(async move { ask(&dns, &a("www.example.")).await });
    let mut buffer = [0; 512];
    let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
    let forger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    // The kernel may tell the forger that nobody takes it, or not.
    let _ = forger.send_to(&addresses(&buffer[..length], 60, &["192.0.2.66"]), client).await;
    socket.send_to(&good(&buffer[..length]), client).await.unwrap();
    assert_eq!(ips(&asked.await.unwrap()), [IpAddr::from([203, 0, 113, 7])]);
}

#[tokio::test]
async fn a_truncated_answer_is_fetched_whole_over_tcp() {
    let many: Vec<String> = (0..200).map(|n| format!("203.0.113.{n}")).collect();
    let whole = move |query: &[u8]| addresses(query, 60, &many.iter().map(String::as_str).collect::<Vec<_>>());
    let truncated = |query: &[u8]| {
        let mut answer = answer(query);
        answer.metadata.truncation = true;
        vec![answer.to_vec().unwrap()]
    };
    let server = Nameserver::start(truncated, move |query| {
        let mut stray = whole(query);
        stray[0] ^= 1;
        vec![stray, whole(query)]
    })
    .await;
    let dns = open(&[&server]);
    let over_udp = parsed(&ask(&dns, &a("many.example.")).await);
    assert!(over_udp.metadata.truncation && over_udp.answers.len() < 200);
    let mut reply = Vec::new();
    let over_tcp = dns.answer(&a("many.example."), Transport::Tcp, CLIENT, crate::dns::now(), &mut reply);
    assert!(matches!(over_tcp, Answer::Ready));
    assert_eq!(ips(&reply).len(), 200);
    assert_eq!((server.udp_queries(), server.tcp_queries()), (1, 1));
}

#[tokio::test]
async fn a_nameserver_of_tcp_only_sees_no_datagram() {
    let server = Nameserver::start(|_| Vec::new(), |query| vec![good(query)]).await;
    let upstream = Upstream { tcp_only: true, ..server.upstream() };
    let dns = Dns::open(crate::dns::Config { nameservers: vec![upstream.into()], ..mapping(&[]) }).unwrap();
    assert_eq!(ips(&ask(&dns, &a("www.example.")).await).len(), 1);
    assert_eq!((server.udp_queries(), server.tcp_queries()), (0, 1));
}

#[tokio::test]
async fn the_first_nameserver_that_does_not_fail_wins() {
    let failing = Nameserver::answering(|query| code(query, ResponseCode::ServFail)).await;
    let refusing = Nameserver::answering(|query| code(query, ResponseCode::Refused)).await;
    let silent = Nameserver::silent().await;
    let working = Nameserver::answering(good).await;
    let dns = open(&[&failing, &refusing, &silent, &working]);
    assert_eq!(ips(&ask(&dns, &a("www.example.")).await).len(), 1);
    assert_eq!(silent.udp_queries(), 1, "all are asked");
}

#[tokio::test]
async fn a_failure_that_all_report_reaches_the_client_and_is_not_kept_long() {
    let server = Nameserver::answering(|query| code(query, ResponseCode::Refused)).await;
    let dns = open(&[&server]);
    let question = a("www.example.");
    let mut reply = Vec::new();
    assert_eq!(parsed(&ask(&dns, &question).await).metadata.response_code, ResponseCode::Refused);
    let now = crate::dns::now();
    assert!(matches!(dns.answer(&question, Transport::Udp, CLIENT, now, &mut reply), Answer::Ready));
    let later = now + Duration::from_secs(5);
    assert!(matches!(dns.answer(&question, Transport::Udp, CLIENT, later, &mut reply), Answer::Ask(_)));
}

#[tokio::test(start_paused = true)]
async fn silence_ends_in_servfail_after_five_seconds_with_two_more_tries() {
    let server = Nameserver::silent().await;
    let dns = open(&[&server]);
    let begun = tokio::time::Instant::now();
    let reply = parsed(&ask(&dns, &query("www.example.", RecordType::A, 1232)).await);
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(begun.elapsed().as_secs(), TOTAL.as_secs());
    assert_eq!(server.udp_queries(), 3);
    let counts = dns.counters().snapshot();
    assert_eq!((counts.upstream_queries, counts.upstream_failures), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_closed_port_fails_at_once() {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let upstream = Upstream { address: socket.local_addr().unwrap(), tcp_only: false };
    drop(socket);
    let dns = Dns::open(crate::dns::Config { nameservers: vec![upstream.into()], ..mapping(&[]) }).unwrap();
    let failed = dns.lookup(&name("www.example")).await;
    assert!(matches!(&failed, Err(LookupError::Failed(why)) if why.contains("refused")), "{failed:?}");
}

#[tokio::test]
async fn without_a_nameserver_the_answer_says_so() {
    let dns = open(&[]);
    let reply = ask(&dns, &query("www.example.", RecordType::A, 1232)).await;
    assert_eq!(parsed(&reply).metadata.response_code, ResponseCode::ServFail);
    assert!(String::from_utf8_lossy(&reply).contains("names no nameserver"));
}

#[tokio::test]
async fn a_server_that_knows_no_edns_is_asked_without() {
    let server = Nameserver::answering(|query| match parsed(query).edns {
        Some(_) => [&query[..2], &[0x80, 0x01, 0, 0, 0, 0, 0, 0, 0, 0]].concat(),
        None => good(query),
    })
    .await;
    let dns = open(&[&server]);
    let reply = parsed(&ask(&dns, &query("www.example.", RecordType::A, 1232)).await);
    assert_eq!((reply.answers.len(), reply.edns.is_some()), (1, true));
    assert_eq!(server.udp_queries(), 2);
}

#[tokio::test]
async fn a_nameserver_that_answers_with_our_fake_addresses_has_failed() {
    let server = Nameserver::answering(|query| addresses(query, 60, &["198.18.0.77"])).await;
    let config = faking(&[&server]);
    let dns = Dns::open(crate::dns::Config { ipv6: false, ..config }).unwrap();
    let failed = dns.lookup(&name("www.example")).await;
    assert!(matches!(&failed, Err(LookupError::Failed(why)) if why.contains("fake-ip-range")), "{failed:?}");
    let reply = parsed(&ask(&dns, &a("a.real.example.")).await);
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(dns.counters().snapshot().looped, 2);
    // Where the same range is somebody else's, who answers with it is right.
    let dns = Dns::open(crate::dns::Config { ipv6: false, dialer: Dialer::default(), ..faking(&[&server]) }).unwrap();
    assert_eq!(*dns.lookup(&name("www.example")).await.unwrap(), ["198.18.0.77".parse::<IpAddr>().unwrap()]);
}

#[tokio::test]
async fn a_cached_answer_counts_down_and_is_never_given_past_its_ttl() {
    let server = Nameserver::answering(good).await;
    let dns = open(&[&server]);
    let question = a("www.example.");
    ask(&dns, &question).await;
    let mut reply = Vec::new();
    let now = crate::dns::now();
    let mut at =
        |seconds| match dns.answer(&question, Transport::Udp, CLIENT, now + Duration::from_secs(seconds), &mut reply) {
            Answer::Ready => Some(parsed(&reply).answers[0].ttl),
            _ => None,
        };
    assert!(at(20).is_some_and(|ttl| (30..=40).contains(&ttl)));
    assert!(at(58).is_some_and(|ttl| ttl > 0));
    assert_eq!(at(60), None);
}

#[tokio::test]
async fn a_denial_is_kept_as_long_as_its_soa_says_and_an_answer_without_ttl_not_at_all() {
    let fresh = Arc::new(AtomicBool::new(false));
    let server = Nameserver::answering(move |query| {
        if parsed(query).queries[0].name().to_ascii().starts_with("zero") {
            return addresses(query, 0, &[REAL]);
        }
        let mut denial = answer(query);
        denial.metadata.response_code = ResponseCode::NXDomain;
        denial.add_authority(soa(900, 30));
        fresh.store(true, Ordering::Relaxed);
        denial.to_vec().unwrap()
    })
    .await;
    let dns = open(&[&server]);
    let denied = a("none.example.");
    let reply = parsed(&ask(&dns, &denied).await);
    assert_eq!((reply.metadata.response_code, reply.authorities.len()), (ResponseCode::NXDomain, 1));
    let mut reply = Vec::new();
    let now = crate::dns::now();
    let after = |seconds| now + Duration::from_secs(seconds);
    assert!(matches!(dns.answer(&denied, Transport::Udp, CLIENT, after(29), &mut reply), Answer::Ready));
    assert!(matches!(dns.answer(&denied, Transport::Udp, CLIENT, after(30), &mut reply), Answer::Ask(_)));
    for _ in 0..3 {
        assert_eq!(ips(&ask(&dns, &a("zero.example.")).await).len(), 1);
    }
    assert_eq!(server.udp_queries(), 4);
}

#[tokio::test]
async fn a_lookup_joins_both_families_with_ipv4_first_and_shares_the_cache() {
    let server = Nameserver::answering(good).await;
    let dns = open(&[&server]);
    let www = name("www.example");
    assert_eq!(dns.cached(&www), None);
    let found = dns.lookup(&www).await.unwrap();
    assert_eq!(*found, [REAL.parse::<IpAddr>().unwrap(), "2001:db8::7".parse().unwrap()]);
    assert_eq!(dns.cached(&www), Some(found));
    assert_eq!(dns.hint(REAL.parse().unwrap()), None, "only what clients were told is remembered");
    ask(&dns, &a("www.example.")).await;
    assert_eq!(server.udp_queries(), 2);
    assert_eq!(dns.hint(REAL.parse().unwrap()), Some(www));
}

#[tokio::test]
async fn a_lookup_without_ipv6_asks_for_none() {
    let server = Nameserver::answering(good).await;
    let dns = Dns::open(crate::dns::Config { ipv6: false, ..mapping(&[&server]) }).unwrap();
    assert_eq!(*dns.lookup(&name("www.example")).await.unwrap(), [REAL.parse::<IpAddr>().unwrap()]);
    assert_eq!(server.udp_queries(), 1);
    assert!(parsed(&ask(&dns, &query("www.example.", RecordType::AAAA, 0)).await).answers.is_empty());
    assert_eq!(server.udp_queries(), 1);
}

#[tokio::test]
async fn a_lookup_of_one_family_asks_for_no_other() {
    let server = Nameserver::answering(good).await;
    let dns = open(&[&server]);
    for (ipv4, address) in [(true, REAL), (false, "2001:db8::7")] {
        let found = dns.lookup_family(&name("www.example"), ipv4).await.unwrap();
        assert_eq!(*found, [address.parse::<IpAddr>().unwrap()]);
    }
    assert_eq!(server.udp_queries(), 2);
    assert!(dns.lookup_family(&name("localhost"), true).await.unwrap().iter().all(IpAddr::is_ipv4));
    let without = Dns::open(crate::dns::Config { ipv6: false, ..mapping(&[&server]) }).unwrap();
    assert_eq!(without.lookup_family(&name("www.example"), false).await, Err(LookupError::NoAddress));
    assert_eq!(server.udp_queries(), 2);
}

#[tokio::test(start_paused = true)]
async fn one_family_that_never_answers_does_not_hold_up_the_other() {
    for (dead, alive) in [(RecordType::AAAA, REAL), (RecordType::A, "2001:db8::7")] {
        let server = Nameserver::start(
            move |query| match parsed(query).queries[0].query_type() == dead {
                true => Vec::new(),
                false => vec![good(query)],
            },
            |_| Vec::new(),
        )
        .await;
        let begun = tokio::time::Instant::now();
        let found = open(&[&server]).lookup(&name("www.example")).await.unwrap();
        assert_eq!(*found, [alive.parse::<IpAddr>().unwrap()]);
        assert!(begun.elapsed() < Duration::from_secs(1));
    }
}

#[tokio::test]
async fn a_lookup_says_why_there_is_no_address() {
    let server = Nameserver::answering(|query| match &*parsed(query).queries[0].name().to_ascii() {
        "none.example." => code(query, ResponseCode::NXDomain),
        "empty.example." => answer(query).to_vec().unwrap(),
        _ => code(query, ResponseCode::ServFail),
    })
    .await;
    let dns = open(&[&server]);
    assert_eq!(dns.lookup(&name("none.example")).await, Err(LookupError::NoSuchName));
    assert_eq!(dns.lookup(&name("empty.example")).await, Err(LookupError::NoAddress));
    assert!(matches!(dns.lookup(&name("broken.example")).await, Err(LookupError::Failed(_))));
    assert_eq!(dns.lookup(&name("a.invalid")).await, Err(LookupError::NoSuchName));
    assert!(dns.lookup(&name("localhost")).await.unwrap().iter().all(IpAddr::is_loopback));
}

/// A look-up that fails until it is told an address.
#[derive(Default)]
struct Late(parking_lot::Mutex<Option<IpAddr>>);

impl Lookup for Late {
    fn lookup<'a>(&'a self, _: &'a Name) -> crate::net::BoxFuture<'a, Result<Arc<[IpAddr]>, LookupError>> {
        let found = *self.0.lock();
        Box::pin(async move { found.map(|ip| Arc::from([ip])).ok_or(LookupError::TimedOut) })
    }
}

#[tokio::test(start_paused = true)]
async fn a_nameserver_whose_name_was_not_found_at_first_is_looked_up_again() {
    let server = Nameserver::answering(good).await;
    let late = Arc::new(Late::default());
    let named = Source::Named {
        name: name("dns.example"),
        port: server.address.port(),
        tcp_only: false,
        lookup: Arc::clone(&late) as Arc<dyn Lookup>,
    };
    let dns = Dns::open(crate::dns::Config { nameservers: vec![named], ..mapping(&[]) }).unwrap();
    let failed = dns.lookup(&name("www.example")).await;
    assert!(
        matches!(&failed, Err(LookupError::Failed(why)) if why.contains("dns.example cannot be found")),
        "{failed:?}"
    );
    *late.0.lock() = Some(server.address.ip());
    // The failure is remembered for a moment.
    tokio::time::advance(Duration::from_secs(2)).await;
    let found = dns.lookup(&name("www.example")).await;
    assert_eq!(found.unwrap()[0], IpAddr::from([203, 0, 113, 7]));
}

/// A look-up that never ends.
struct Endless;

impl Lookup for Endless {
    fn lookup<'a>(&'a self, _: &'a Name) -> crate::net::BoxFuture<'a, Result<Arc<[IpAddr]>, LookupError>> {
        Box::pin(std::future::pending())
    }
}

#[tokio::test]
async fn a_nameserver_that_is_still_looked_up_keeps_no_other_from_being_asked() {
    let server = Nameserver::answering(good).await;
    let named = Source::Named { name: name("dns.example"), port: 53, tcp_only: false, lookup: Arc::new(Endless) };
    let nameservers = vec![named, server.upstream().into()];
    let dns = Dns::open(crate::dns::Config { nameservers, ..mapping(&[]) }).unwrap();
    assert_eq!(ips(&ask(&dns, &a("www.example.")).await).len(), 1);
}

/// The nameservers of a system that changes.
struct Changing(parking_lot::Mutex<Result<Vec<std::net::SocketAddr>, String>>);

impl System for Changing {
    fn nameservers(&self) -> Result<Vec<std::net::SocketAddr>, String> {
        self.0.lock().clone()
    }

    fn is_stub(&self, _server: std::net::SocketAddr) -> bool {
        false
    }
}

#[tokio::test(start_paused = true)]
async fn the_nameservers_of_the_system_are_those_of_now() {
    let server = Nameserver::answering(good).await;
    let system = Arc::new(Changing(parking_lot::Mutex::new(Err("there are none".to_owned()))));
    let nameservers = vec![Source::System(Arc::clone(&system) as Arc<dyn System>)];
    let dns = Dns::open(crate::dns::Config { nameservers, ..mapping(&[]) }).unwrap();
    let failed = dns.lookup(&name("www.example")).await;
    assert!(matches!(&failed, Err(LookupError::Failed(why)) if why.contains("there are none")), "{failed:?}");
    *system.0.lock() = Ok(vec![server.address]);
    tokio::time::advance(Duration::from_secs(2)).await;
    let found = dns.lookup(&name("www.example")).await;
    assert_eq!(found.unwrap()[0], IpAddr::from([203, 0, 113, 7]));
}

/// Says nothing about names below `silent.example`.
async fn silent_in_part() -> Nameserver {
    let silent = |query: &[u8]| query.windows(7).any(|window| window == b"\x06silent");
    Nameserver::start(move |query| if silent(query) { Vec::new() } else { vec![good(query)] }, |_| Vec::new()).await
}

#[tokio::test(start_paused = true)]
async fn one_client_whose_questions_nobody_answers_leaves_room_to_others_and_to_the_names_that_we_dial() {
    let server = silent_in_part().await;
    let dns = open(&[&server]);
    let (hog, other) = (IpAddr::from([192, 168, 1, 66]), IpAddr::from([192, 168, 1, 20]));
    let names: Vec<_> = (0..600).map(|n| a(&format!("n{n}.silent.example."))).collect();
    let mut asked: Vec<_> = names.iter().map(|query| Box::pin(ask_as(&dns, hog, query))).collect();
    let mut refused = 0;
    for asked in &mut asked {
        if let Poll::Ready(reply) = futures_util::poll!(asked) {
            assert_eq!(parsed(&reply).metadata.response_code, ResponseCode::ServFail);
            refused += 1;
        }
    }
    assert_eq!(refused, 600 - 128);
    for client in [other, CLIENT, Ipv4Addr::LOCALHOST.into()] {
        let reply = ask_as(&dns, client, &a(&format!("{client}.example."))).await;
        assert_eq!(parsed(&reply).metadata.response_code, ResponseCode::NoError, "{client}");
    }
    assert_eq!(dns.lookup(&name("own.example")).await.unwrap().len(), 2);
    assert!(futures_util::poll!(Box::pin(ask_as(&dns, hog, &names[0]))).is_pending(), "to join is free");
    futures_util::future::join_all(asked.into_iter().take(128)).await;
    let reply = ask_as(&dns, hog, &a("later.example.")).await;
    assert_eq!(parsed(&reply).metadata.response_code, ResponseCode::NoError, "it has its part again");
}
