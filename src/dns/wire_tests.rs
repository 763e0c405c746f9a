use hickory_proto::op::{Edns as TheirEdns, Message, MessageType, OpCode, Query as Their};
use hickory_proto::rr::rdata::opt::{EdnsCode, EdnsOption};
use hickory_proto::rr::{Name, RecordType};
use proptest::prelude::*;

use super::*;
use crate::dns::key::{Dotted, Key, Parts};

fn code(message: &[u8]) -> Option<u16> {
    match Query::parse(message, Transport::Udp) {
        Ok(_) => None,
        Err(Fault::Silence) => panic!("a query is not met with silence"),
        Err(Fault::Refused(_, code)) => Some(code),
    }
}

fn labels() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(any::<u8>(), 1..=63), 0..6)
        .prop_filter("at most 255 bytes", |labels| labels.iter().map(|label| label.len() + 1).sum::<usize>() < 255)
}

prop_compose! {
    fn message()(
        labels in labels(), id: u16, kind in 1u16..=200, checking: bool,
        edns in prop::option::of((any::<u16>(), any::<bool>(), prop::collection::vec(any::<u8>(), 0..40))),
    ) -> Message {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.metadata.checking_disabled = checking;
        message.add_query(Their::query(Name::from_labels(labels).unwrap(), RecordType::from(kind)));
        if let Some((size, dnssec_ok, option)) = edns {
            let mut edns = TheirEdns::new();
            edns.set_max_payload(size).set_dnssec_ok(dnssec_ok);
            edns.options_mut().insert(EdnsOption::Unknown(u16::from(EdnsCode::Unknown(65_001)), option));
            message.set_edns(edns);
        }
        message
    }
}

proptest! {
    #[test]
    fn a_query_reads_as_the_reference_wrote_it(message in message()) {
        let bytes = message.to_vec().unwrap();
        let theirs = &message.queries[0];
        prop_assume!(theirs.query_type() != RecordType::OPT);
        let ours = Query::parse(&bytes, Transport::Udp).unwrap();
        prop_assert_eq!(ours.id, message.metadata.id);
        prop_assert_eq!(ours.kind(), u16::from(theirs.query_type()));
        prop_assert_eq!(ours.bits & bit::CD != 0, message.metadata.checking_disabled);
        prop_assert_eq!(ours.dnssec_ok(), message.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok));
        prop_assert_eq!(ours.edns.map(|edns| edns.size.max(512)), message.edns.as_ref().map(TheirEdns::max_payload));
        let wire: Vec<u8> = theirs.name().iter().flat_map(|l| [&[l.len() as u8][..], l].concat()).chain([0]).collect();
        prop_assert_eq!(ours.name(), wire);
        prop_assert!((512..=1232).contains(&ours.limit()));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = Query::parse(&bytes, Transport::Udp);
        let _ = name_end(&bytes, 0);
        let _ = Record::read(&bytes, 0);
        let _ = Dotted::new(&bytes);
    }

    #[test]
    fn damage_is_never_read_as_something_else_than_the_reference_reads(
        message in message(), at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = message.to_vec().unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        bytes.truncate(cut.index(bytes.len()) + 1);
        if let (Ok(ours), Ok(theirs)) = (Query::parse(&bytes, Transport::Tcp), Message::from_vec(&bytes)) {
            prop_assert_eq!(theirs.queries.len(), 1);
            prop_assert_eq!(u16::from(theirs.queries[0].query_type()), ours.kind());
            prop_assert_eq!(theirs.queries[0].name().iter().map(|label| label.len() + 1).sum::<usize>() + 1, ours.name().len());
            prop_assert_eq!(theirs.edns.is_some(), ours.edns.is_some());
        }
    }

    #[test]
    fn a_name_that_can_be_written_is_one_that_the_program_takes(labels in labels()) {
        let wire: Vec<u8> = labels.iter().flat_map(|l| [&[l.len() as u8][..], l].concat()).chain([0]).collect();
        if let Some(dotted) = Dotted::new(&wire) {
            let name = crate::net::Name::new(dotted.as_str()).unwrap();
            prop_assert_eq!(name.as_str(), dotted.as_str());
            let key = Key::own(&name, kind::A).unwrap();
            prop_assert_eq!(Parts::of(key.as_bytes()).name, wire.to_ascii_lowercase());
        } else {
            let odd = |byte: &u8| !byte.is_ascii_graphic() || b"/:@[]\\\".".contains(byte);
            prop_assert!(labels.is_empty() || labels.iter().flatten().any(odd));
        }
    }
}

#[test]
fn what_is_no_query_is_met_with_silence() {
    let mut response = crate::dns::testing::query("a.example.", RecordType::A, 0);
    response[2] |= 0x80;
    for message in [&[][..], &[0; 11], &response] {
        assert!(matches!(Query::parse(message, Transport::Udp), Err(Fault::Silence)));
    }
}

#[test]
fn each_kind_of_odd_query_gets_the_code_that_its_rfc_names() {
    let plain = crate::dns::testing::query("a.example.", RecordType::A, 0);
    let with = |at: usize, byte: u8| {
        let mut query = plain.clone();
        query[at] = byte;
        query
    };
    assert_eq!(code(&plain), None);
    assert_eq!(code(&with(2, 0x28)), Some(rcode::NOT_IMP), "opcode UPDATE");
    assert_eq!(code(&with(5, 0)), Some(rcode::FORM_ERR), "no question");
    assert_eq!(code(&with(5, 2)), Some(rcode::FORM_ERR), "two questions");
    assert_eq!(code(&with(12, 0xc0)), Some(rcode::FORM_ERR), "a pointer in the question");
    assert_eq!(code(&plain[..plain.len() - 1]), Some(rcode::FORM_ERR), "cut");
    assert_eq!(code(&with(plain.len() - 1, 3)), Some(rcode::NOT_IMP), "class CH");
    let edns = crate::dns::testing::query("a.example.", RecordType::A, 1232);
    let opt = plain.len();
    let mut version = edns.clone();
    version[opt + 6] = 1;
    assert_eq!(code(&version), Some(rcode::BAD_VERS));
    let mut twice = edns.clone();
    twice.extend_from_slice(&edns[opt..]);
    twice[11] = 2;
    assert_eq!(code(&twice), Some(rcode::FORM_ERR), "two OPT records");
    let mut elsewhere = edns.clone();
    elsewhere.swap(7, 11);
    assert_eq!(code(&elsewhere), Some(rcode::FORM_ERR), "OPT in the answer section");
    let mut option = edns;
    option[opt + 10] = 3;
    option.extend_from_slice(&[0, 1, 9]);
    assert_eq!(code(&option), Some(rcode::FORM_ERR), "an option that ends early");
}

#[test]
fn a_transfer_is_refused_over_either_transport() {
    for kind in [RecordType::AXFR, RecordType::IXFR] {
        let query = crate::dns::testing::query("a.example.", kind, 0);
        assert_eq!(code(&query), Some(rcode::REFUSED));
    }
}

#[test]
fn a_name_of_255_bytes_is_read_and_one_of_256_is_not() {
    let query = |last: usize| {
        let mut query = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for length in [63, 63, 63, last] {
            query.push(length as u8);
            query.extend(std::iter::repeat_n(b'a', length));
        }
        query.extend_from_slice(&[0, 0, 1, 0, 1]);
        query
    };
    assert_eq!(Query::parse(&query(61), Transport::Udp).unwrap().name().len(), 255);
    assert_eq!(code(&query(62)), Some(rcode::FORM_ERR));
}
