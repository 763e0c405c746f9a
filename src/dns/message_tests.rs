use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use hickory_proto::rr::rdata::opt::EdnsOption;
use proptest::prelude::*;

use super::*;
use crate::dns::Transport;
use crate::dns::testing::{address, addresses, alias, answer, name, parsed, query, soa};

fn fitted(message: &[u8], client: &[u8], transport: Transport, age: u32) -> Vec<u8> {
    let mut out = vec![0xff; 7];
    let client = Query::parse(client, transport).unwrap();
    Message::parse(message).unwrap().fit(&client, age, true, &mut out);
    assert!(out.len() <= client.limit(), "{} bytes for a client of {}", out.len(), client.limit());
    out
}

#[test]
fn any_number_of_records_fits_any_client() {
    for count in (0..=300).step_by(7).chain([25, 28, 29, 30, 300]) {
        let ask = query("many.example.", RecordType::A, 0);
        let ips: Vec<String> = (0..count).map(|n| format!("203.0.{}.{}", n / 256, n % 256)).collect();
        let whole = addresses(&ask, 60, &ips.iter().map(String::as_str).collect::<Vec<_>>());
        for size in [0, 100, 512, 1232, 4096] {
            let client = query("many.example.", RecordType::A, size);
            let limit = if size == 0 { 512 } else { usize::from(size).clamp(512, 1232) };
            let opt = if size == 0 { 0 } else { OPT_LEN };
            let reply = parsed(&fitted(&whole, &client, Transport::Udp, 0));
            assert_eq!(reply.metadata.truncation, whole.len() + opt > limit, "{count} records, EDNS {size}");
            assert_eq!(reply.answers.len(), count.min((limit - opt - 30) / 16), "whole records, as many as fit");
            assert_eq!(reply.edns.is_some(), size != 0);
            let over_tcp = parsed(&fitted(&whole, &client, Transport::Tcp, 0));
            assert!(!over_tcp.metadata.truncation);
            assert_eq!(over_tcp.answers.len(), count);
        }
    }
}

#[test]
fn what_is_not_needed_goes_before_the_answer_is_cut() {
    let ask = query("many.example.", RecordType::A, 0);
    let mut whole = answer(&ask);
    for _ in 0..20 {
        whole.add_answer(address(&name("many.example."), 60, [203, 0, 113, 1].into()));
        whole.add_authority(address(&name("ns.example."), 60, [203, 0, 113, 2].into()));
        whole.add_additional(address(&name("ns.example."), 60, [203, 0, 113, 3].into()));
    }
    let reply = parsed(&fitted(&whole.to_vec().unwrap(), &ask, Transport::Udp, 0));
    assert!(!reply.metadata.truncation);
    assert_eq!((reply.answers.len(), reply.authorities.len(), reply.additionals.len()), (20, 0, 0));
}

#[test]
fn the_reply_has_the_clients_id_letters_and_flags() {
    let ask = query("WwW.ExAmPlE.", RecordType::A, 0);
    let mut upstream = answer(&query("www.example.", RecordType::A, 0));
    upstream.metadata.id = 7;
    upstream.metadata.authentic_data = true;
    upstream.add_answer(address(&name("www.example."), 60, [203, 0, 113, 1].into()));
    let reply = fitted(&upstream.to_vec().unwrap(), &ask, Transport::Udp, 0);
    assert_eq!(&reply[..2], &ask[..2]);
    assert_eq!(&reply[HEADER..ask.len()], &ask[HEADER..]);
    assert!(!parsed(&reply).metadata.authentic_data, "AD is for those who ask");
    let mut asking = ask;
    asking[3] |= 0x20;
    assert!(parsed(&fitted(&upstream.to_vec().unwrap(), &asking, Transport::Udp, 0)).metadata.authentic_data);
}

#[test]
fn ttls_count_down_to_zero_and_no_further() {
    let ask = query("a.example.", RecordType::A, 0);
    let whole = addresses(&ask, 60, &["203.0.113.1"]);
    let ttl = |age| parsed(&fitted(&whole, &ask, Transport::Udp, age)).answers[0].ttl;
    assert_eq!((ttl(0), ttl(59), ttl(61)), (60, 1, 0));
}

#[test]
fn answers_keep_as_long_as_their_shortest_record_and_denials_as_the_soa_says() {
    let ask = query("a.example.", RecordType::A, 0);
    let lifetime = |message: &hickory_proto::op::Message| Message::parse(&message.to_vec().unwrap()).unwrap().lifetime;
    let mut positive = answer(&ask);
    positive.add_answer(alias("a.example.", "b.example.", 30));
    positive.add_answer(address(&name("b.example."), 300, [203, 0, 113, 1].into()));
    assert_eq!(lifetime(&positive), 30);
    positive.answers[0].ttl = 0x8000_0001;
    assert_eq!(lifetime(&positive), 0, "a TTL with the top bit is none");
    positive.answers.iter_mut().for_each(|record| record.ttl = 0x7fff_ffff);
    assert_eq!(lifetime(&positive), MAX_LIFETIME);

    let mut denial = answer(&ask);
    assert_eq!(lifetime(&denial), 0, "nothing says how long it is true");
    denial.metadata.response_code = ResponseCode::NXDomain;
    denial.add_authority(soa(900, 40));
    assert_eq!(lifetime(&denial), 40);
    let reply = parsed(&fitted(&denial.to_vec().unwrap(), &ask, Transport::Udp, 10));
    assert_eq!(reply.authorities[0].ttl, 30, "the SOA's own TTL must not outlive the denial");

    let mut elsewhere = answer(&ask);
    elsewhere.add_answer(alias("a.example.", "b.example.", 5));
    elsewhere.add_authority(soa(900, 40));
    assert_eq!(lifetime(&elsewhere), 5);

    let mut failure = answer(&ask);
    failure.metadata.response_code = ResponseCode::ServFail;
    failure.add_authority(soa(900, 900));
    assert_eq!(lifetime(&failure), 5);
}

#[test]
fn addresses_are_those_at_the_end_of_the_aliases_and_no_others() {
    let ask = query("a.example.", RecordType::A, 0);
    let mut message = answer(&ask);
    message.add_answer(address(&name("stray.example."), 60, [192, 0, 2, 66].into()));
    message.add_answer(alias("A.Example.", "b.example.", 60));
    message.add_answer(address(&name("c.example."), 60, [203, 0, 113, 1].into()));
    message.add_answer(address(&name("c.example."), 60, [203, 0, 113, 1].into()));
    message.add_answer(alias("b.example.", "c.example.", 60));
    let read = Message::parse(&message.to_vec().unwrap()).unwrap();
    assert_eq!(&*read.addresses, &[IpAddr::from([203, 0, 113, 1])]);

    let mut circle = answer(&ask);
    circle.add_answer(alias("a.example.", "b.example.", 60));
    circle.add_answer(alias("b.example.", "a.example.", 60));
    assert!(Message::parse(&circle.to_vec().unwrap()).unwrap().addresses.is_empty());
}

#[test]
fn an_extended_error_travels_on_and_other_options_do_not() {
    let ask = query("a.example.", RecordType::A, 1232);
    let mut failure = answer(&ask);
    failure.metadata.response_code = ResponseCode::ServFail;
    let mut edns = hickory_proto::op::Edns::new();
    edns.options_mut().insert(EdnsOption::Unknown(10, b"a cookie".to_vec()));
    edns.options_mut().insert(EdnsOption::Unknown(EXTENDED_ERROR, b"\x00\x06bogus".to_vec()));
    failure.set_edns(edns);
    let failure = failure.to_vec().unwrap();
    let reply = fitted(&failure, &ask, Transport::Udp, 0);
    assert_eq!(parsed(&reply).metadata.response_code, ResponseCode::ServFail);
    assert!(reply.ends_with(b"\x00\x0f\x00\x07\x00\x06bogus"));
    assert!(!reply.windows(6).any(|window| window == b"cookie"));
    let plain = query("a.example.", RecordType::A, 0);
    assert!(parsed(&fitted(&failure, &plain, Transport::Udp, 0)).edns.is_none());
}

proptest! {
    #[test]
    fn no_answer_makes_it_panic_and_none_grows_past_the_limit(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        tail in prop::collection::vec(any::<u8>(), 0..40), records in 0usize..60, age: u32, size: u16,
    ) {
        let client = query("a.example.", RecordType::A, size);
        let mut bytes = addresses(&client, 60, &vec!["203.0.113.1"; records]);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.extend(tail);
        if let Ok(message) = Message::parse(&bytes) {
            let client = Query::parse(&client, Transport::Udp).unwrap();
            let mut out = Vec::new();
            message.fit(&client, age, true, &mut out);
            prop_assert!(out.len() <= client.limit());
            prop_assert_eq!(u16_at(&out, 0), Some(client.id));
        }
    }

    #[test]
    fn stray_bytes_are_no_answer_or_a_sound_one(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Message::parse(&bytes);
    }
}
