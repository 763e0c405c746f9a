use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::MX;
use hickory_proto::rr::{RData, Record, RecordType};
use proptest::prelude::*;

use super::testing::{
    CLIENT, Nameserver, address, addresses, answer, ask, fake_mode, faking, ips, mapping, name, parsed, query,
};
use super::*;

/// The answer that comes without asking anybody.
fn at_once(dns: &Dns, query: &[u8]) -> Option<Message> {
    let mut reply = Vec::new();
    match dns.answer(query, Transport::Udp, CLIENT, now(), &mut reply) {
        Answer::Ready => Some(parsed(&reply)),
        _ => None,
    }
}

fn of(dns: &Dns, text: &str, kind: RecordType) -> Option<Message> {
    at_once(dns, &query(text, kind, 0))
}

fn ips_of(reply: &Message) -> Vec<IpAddr> {
    reply.answers.iter().filter_map(|record| record.data.ip_addr()).collect()
}

fn nodata(reply: Option<Message>) -> bool {
    reply.is_some_and(|reply| reply.metadata.response_code == ResponseCode::NoError && reply.answers.is_empty())
}

fn denied(reply: Option<Message>) -> bool {
    reply.is_some_and(|reply| reply.metadata.response_code == ResponseCode::NXDomain)
}

#[tokio::test]
async fn a_fake_address_leads_back_to_its_name_in_every_way() {
    let dns = Dns::open(faking(&[])).unwrap();
    for kind in [RecordType::A, RecordType::AAAA] {
        let reply = of(&dns, "WWW.Example.com.", kind).unwrap();
        let record = &reply.answers[0];
        assert_eq!((record.ttl, record.record_type()), (1, kind));
        assert!(reply.metadata.recursion_available && reply.metadata.recursion_desired);
        let ip = record.data.ip_addr().unwrap();
        let name = Name::new("www.example.com").unwrap();
        assert_eq!(dns.name_of(ip), Fake::Name(name));
        let reverse = hickory_proto::rr::Name::from(ip).to_ascii();
        let pointer = of(&dns, &reverse, RecordType::PTR).unwrap();
        assert!(matches!(&pointer.answers[0].data, RData::PTR(name) if name.0.to_ascii() == "www.example.com."));
    }
    assert_eq!(dns.fake_names(), 2);
    assert!(denied(of(&dns, "200.200.18.198.in-addr.arpa.", RecordType::PTR)), "a fake address of nobody");
}

#[tokio::test]
async fn other_types_of_a_fake_name_say_nothing_that_leads_past_the_rules() {
    let dns = Dns::open(faking(&[])).unwrap();
    assert!(nodata(of(&dns, "www.example.com.", RecordType::HTTPS)));
    assert!(nodata(of(&dns, "www.example.com.", RecordType::SVCB)));
    let any = of(&dns, "www.example.com.", RecordType::ANY).unwrap();
    assert_eq!((any.answers.len(), any.answers[0].record_type()), (1, RecordType::HINFO));
    for kind in [RecordType::TXT, RecordType::MX, RecordType::SRV, RecordType::NS, RecordType::CNAME] {
        assert!(of(&dns, "www.example.com.", kind).is_none(), "{kind} is asked upstream");
    }
    assert_eq!(dns.fake_names(), 0, "only a question for an address takes one");
}

#[tokio::test]
async fn addresses_beside_an_answer_stay_out_of_it_where_they_are_to_be_fake() {
    let mail = || {
        Nameserver::answering(|query| {
            let mut reply = answer(query);
            let exchange = RData::MX(MX::new(1, name("mail.example.com.")));
            reply.add_answer(Record::from_rdata(name("example.com."), 60, exchange));
            reply.add_additional(address(&name("mail.example.com."), 60, [203, 0, 113, 7].into()));
            reply.to_vec().unwrap()
        })
    };
    let (server, question) = (mail().await, query("example.com.", RecordType::MX, 1232));
    for (config, beside) in [(faking(&[&server]), 0), (mapping(&[&server]), 1)] {
        let reply = parsed(&ask(&Dns::open(config).unwrap(), &question).await);
        assert_eq!((reply.answers.len(), reply.additionals.len()), (1, beside));
        assert!(!reply.metadata.truncation && reply.edns.is_some());
    }
}

#[tokio::test]
async fn how_the_network_translates_ipv4_is_asked_of_the_network() {
    let server = Nameserver::answering(|query| addresses(query, 60, &["192.0.0.170", "64:ff9b::c000:aa"])).await;
    let dns = Dns::open(faking(&[&server])).unwrap();
    for (kind, expected) in [(RecordType::A, "192.0.0.170"), (RecordType::AAAA, "64:ff9b::c000:aa")] {
        let reply = ask(&dns, &query("ipv4only.arpa.", kind, 0)).await;
        assert_eq!(ips(&reply), [expected.parse::<IpAddr>().unwrap()]);
    }
}

#[tokio::test]
async fn names_that_stay_real_are_asked_upstream_and_leave_a_hint() {
    let server = Nameserver::answering(|query| addresses(query, 60, &["203.0.113.9"])).await;
    let dns = Dns::open(faking(&[&server])).unwrap();
    let real = IpAddr::from([203, 0, 113, 9]);
    assert_eq!(dns.hint(real), None);
    assert_eq!(ips(&ask(&dns, &query("A.real.example.", RecordType::A, 0)).await), [real]);
    assert_eq!(dns.hint(real), Some(Name::new("a.real.example").unwrap()));
    ask(&dns, &query("b.real.example.", RecordType::A, 0)).await;
    assert_eq!(dns.hint(real), Some(Name::new("b.real.example").unwrap()), "the last one asked");
    ask(&dns, &query("a.real.example.", RecordType::A, 0)).await;
    assert_eq!(dns.hint(real), Some(Name::new("a.real.example").unwrap()), "from the cache as well");
    assert_eq!(dns.name_of(real), Fake::NotFake);
    assert_eq!(server.udp_queries(), 2);
}

#[tokio::test]
async fn without_ipv6_every_aaaa_is_empty_and_none_is_asked() {
    for mode in [Mode::Mapping, fake_mode("198.18.0.1/16", Some("fd00::/64"), &["+.real.example"])] {
        let dns = Dns::open(Config { ipv6: false, mode, ..mapping(&[]) }).unwrap();
        for name in ["www.example.com.", "a.real.example.", "localhost.", "nas."] {
            assert!(nodata(of(&dns, name, RecordType::AAAA)), "{name}");
        }
    }
}

#[tokio::test]
async fn a_pool_of_ipv4_alone_gives_no_aaaa_and_does_not_deny_the_name() {
    let dns = Dns::open(Config { mode: fake_mode("198.18.0.1/16", None, &[]), ..mapping(&[]) }).unwrap();
    assert!(nodata(of(&dns, "www.example.com.", RecordType::AAAA)));
}

#[tokio::test]
async fn special_names_never_leave_the_host() {
    let dns = Dns::open(faking(&[])).unwrap();
    let loopback = of(&dns, "a.localhost.", RecordType::A).unwrap();
    assert_eq!(loopback.answers[0].data.ip_addr(), Some([127, 0, 0, 1].into()));
    assert!(nodata(of(&dns, "localhost.", RecordType::TXT)));
    assert!(of(&dns, "1.0.0.127.in-addr.arpa.", RecordType::PTR).is_some_and(|reply| reply.answers.len() == 1));
    assert!(denied(of(&dns, "x.invalid.", RecordType::A)));
    assert!(nodata(of(&dns, "_dns.resolver.arpa.", RecordType::SVCB)));
    assert!(denied(of(&dns, "5.1.168.192.in-addr.arpa.", RecordType::PTR)), "no nameserver of the LAN to ask");
    assert!(of(&dns, "7.113.0.203.in-addr.arpa.", RecordType::PTR).is_none());
    assert_eq!(of(&dns, "a.onion.", RecordType::A).unwrap().answers.len(), 1, "a proxy may know it by name");
    let real = Dns::open(mapping(&[])).unwrap();
    assert!(denied(of(&real, "a.onion.", RecordType::A)));
}

#[tokio::test]
async fn a_nameserver_of_the_lan_is_asked_for_private_addresses() {
    let upstream = Upstream { address: "192.168.1.1:53".parse().unwrap(), tcp_only: false };
    let dns = Dns::open(Config { nameservers: vec![upstream.into()], ..mapping(&[]) }).unwrap();
    assert!(of(&dns, "5.1.168.192.in-addr.arpa.", RecordType::PTR).is_none());
}

#[tokio::test(start_paused = true)]
async fn a_pool_without_a_free_address_says_so_and_gives_none_twice() {
    let dns = Arc::new(Dns::open(Config { mode: fake_mode("198.18.0.0/29", None, &[]), ..mapping(&[]) }).unwrap());
    let three: Vec<_> = (0..3).map(|n| of(&dns, &format!("{n}.example."), RecordType::A).unwrap()).collect();
    let (_, held) = dns.hold(three[0].answers[0].data.ip_addr().unwrap(), CLIENT, now());
    let question = query("one.more.example.", RecordType::A, 1232);
    let mut reply = Vec::new();
    assert!(matches!(dns.answer(&question, Transport::Udp, CLIENT, now(), &mut reply), Answer::Ready));
    assert_eq!(parsed(&reply).metadata.response_code, ResponseCode::ServFail);
    assert!(String::from_utf8_lossy(&reply).contains("the fake addresses are in use"));
    assert_eq!(dns.counters().snapshot().exhausted, 1);
    let given = |text: &str| ips_of(&of(&dns, text, RecordType::A).unwrap());
    tokio::time::advance(Duration::from_secs(62)).await;
    let reused = [given("a.example."), given("b.example.")].concat();
    assert_eq!(reused.len(), 2, "nobody holds these");
    assert!(given("c.example.").is_empty(), "the third has a flow");
    drop(held);
    assert!(given("c.example.").is_empty(), "the flow is over, but its client may come again");
    tokio::time::advance(Duration::from_secs(62)).await;
    let mut all: Vec<_> = ["d.example.", "e.example.", "f.example."].into_iter().flat_map(given).collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 3);
}

#[tokio::test]
async fn queries_that_are_refused_still_get_their_opt_record() {
    let dns = Dns::open(faking(&[])).unwrap();
    let mut version = query("www.example.com.", RecordType::A, 1232);
    let at = version.len() - 5;
    version[at] = 1;
    let mut reply = Vec::new();
    assert!(matches!(dns.answer(&version, Transport::Udp, CLIENT, now(), &mut reply), Answer::Ready));
    let reply = parsed(&reply);
    // The number is also that of BADSIG, by which the reference calls it.
    assert_eq!(u16::from(reply.metadata.response_code), wire::rcode::BAD_VERS);
    assert_eq!(reply.edns.unwrap().version(), 0);
    let mut response = query("www.example.com.", RecordType::A, 0);
    response[2] |= 0x80;
    assert!(matches!(dns.answer(&response, Transport::Udp, CLIENT, now(), &mut Vec::new()), Answer::Drop));
}

#[tokio::test]
async fn a_name_of_odd_bytes_is_forwarded_and_never_faked() {
    let server = Nameserver::answering(|query| addresses(query, 60, &["203.0.113.9"])).await;
    let dns = Dns::open(faking(&[&server])).unwrap();
    let mut odd = query("a-b.example.", RecordType::A, 0);
    odd[wire::HEADER + 2] = b' ';
    assert_eq!(ips(&ask(&dns, &odd).await), [IpAddr::from([203, 0, 113, 9])]);
    assert_eq!(dns.fake_names(), 0);
}

#[tokio::test]
async fn answers_wait_for_the_log_and_survive_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let log = Some(folder.path().join("fake-ip"));
    let first = Dns::open(Config { log: log.clone(), ..faking(&[]) }).unwrap();
    let ask = |dns: &Dns| of(dns, "www.example.com.", RecordType::A).unwrap().answers[0].data.ip_addr().unwrap();
    let ip = ask(&first);
    first.flush();
    let second = Dns::open(Config { log, ..faking(&[]) }).unwrap();
    assert_eq!(second.name_of(ip), Fake::Name(Name::new("www.example.com").unwrap()));
    assert_eq!(ask(&second), ip);
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #[test]
    fn whatever_arrives_the_reply_is_sound_and_within_the_limit(
        base in prop::sample::select(vec![RecordType::A, RecordType::AAAA, RecordType::PTR, RecordType::ANY, RecordType::HTTPS]),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), size: u16,
        long in "[a-z]{1,63}\\.[a-z]{1,63}\\.[a-z]{1,63}\\.[a-z]{1,50}",
    ) {
        let runtime = runtime();
        let dns = runtime.block_on(async { Dns::open(faking(&[])).unwrap() });
        let mut bytes = query(&format!("{long}."), base, size);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let mut reply = Vec::new();
        if let Answer::Ready = dns.answer(&bytes, Transport::Udp, CLIENT, now(), &mut reply) {
            prop_assert!(reply.len() <= 512);
            prop_assert_eq!(&reply[..2], &bytes[..2]);
            prop_assert!(Message::from_vec(&reply).is_ok());
        }
    }
}
