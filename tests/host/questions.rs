//! Odd questions to port 53, and plain ones asked in odd ways: all are answered by us, as their RFCs say, and none leaves.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{CNAME, HTTPS, MX, svcb};
use hickory_proto::rr::{Name, RData, RecordType};

use super::leaks::{at, profile};
use super::support::peers::dns::{NameServer, Zone};
use super::support::sites::{NAME, V4, zone};
use super::support::topology::GATEWAY_V4;
use super::support::tunproxy::Said;
use super::support::{Sites, Topology, run};

const TUN: &str = "/dev/net/tun";
/// A name with more text than fits into a datagram.
const LONG: &str = "long.example.test";
/// Who is asked, and is not there.
const SERVER: &str = "203.0.113.53";

fn name(text: &str) -> Name {
    Name::from_ascii(format!("{text}.")).expect("a name")
}

/// The nameserver that we ask.
fn behind(lab: &Topology) -> NameServer {
    let words = |number: u32| format!("{number:03}{}", "x".repeat(200));
    let zone: Zone = (0..20).fold(zone(), |zone, number| zone.text(LONG, &words(number)));
    let hint = svcb::SvcParamValue::Ipv4Hint(svcb::IpHint(vec![V4.parse().expect("an address")]));
    let service = svcb::SVCB::new(1, Name::root(), vec![(svcb::SvcParamKey::Ipv4Hint, hint)]);
    let zone = zone
        .record(NAME, RData::HTTPS(HTTPS(service)))
        .record(NAME, RData::MX(MX::new(1, name("mail.example.test"))))
        .record("alias.example.test", RData::CNAME(CNAME(name(NAME))))
        .pointer("192.168.1.7", "nas.home.test");
    lab.at_gateway.dns(at(&format!("{GATEWAY_V4}:5353")), zone)
}

fn dig(lab: &Topology, words: &str) -> String {
    let mut dig = lab.host.command("dig");
    dig.args(["+tries=1", "+timeout=20", &format!("@{SERVER}")]).args(words.split(' '));
    Said::of(&mut dig).stdout
}

/// The answers to these messages, sent at once on one connection.
fn pipelined(lab: &Topology, messages: &[Vec<u8>]) -> Vec<Message> {
    let frame = |message: &Vec<u8>| [&(message.len() as u16).to_be_bytes()[..], message].concat();
    let (sent, many) = (messages.iter().flat_map(frame).collect::<Vec<u8>>(), messages.len());
    lab.host.enter(move || {
        let mut stream = TcpStream::connect(at(&format!("{SERVER}:53"))).expect("a hijacked connection");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a limit");
        stream.write_all(&sent).expect("questions");
        let answer = |_| {
            let mut length = [0; 2];
            stream.read_exact(&mut length).expect("a length");
            let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut answer).expect("an answer");
            Message::from_vec(&answer).expect("a message")
        };
        (0..many).map(answer).collect()
    })
}

fn question(id: u16, opcode: OpCode, asked: &[(&str, RecordType)]) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, opcode);
    message.metadata.recursion_desired = true;
    for (text, kind) in asked {
        message.add_query(Query::query(name(text), *kind));
    }
    message.to_vec().expect("a message")
}

#[test]
fn many_questions_on_one_connection_are_each_answered_odd_ones_among_them() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let (sites, behind) = (Sites::open(&lab), behind(&lab));
        let tunproxy = profile("", "", "'MATCH,REJECT'").start(&lab.host);
        let a = RecordType::A;
        let asked = [
            question(1, OpCode::Query, &[(LONG, RecordType::TXT)]),
            question(2, OpCode::Query, &[(NAME, a)]),
            question(3, OpCode::Query, &[]),
            question(4, OpCode::Query, &[(NAME, a), ("other.example.test", a)]),
            question(5, OpCode::Notify, &[("example.test", RecordType::SOA)]),
            question(6, OpCode::Update, &[("example.test", RecordType::SOA)]),
            question(7, OpCode::Query, &[(NAME, RecordType::AXFR)]),
            question(8, OpCode::Query, &[("nobody.example.test", RecordType::TXT)]),
            question(9, OpCode::Query, &[(NAME, a)]),
        ];
        let mut answers = pipelined(&lab, &asked);
        answers.sort_by_key(|answer| answer.metadata.id);
        let codes: Vec<_> = answers.iter().map(|it| (it.metadata.id, it.metadata.response_code)).collect();
        use ResponseCode::{FormErr, NXDomain, NoError, NotImp, Refused};
        let expected = [NoError, NoError, FormErr, FormErr, NotImp, NotImp, Refused, NXDomain, NoError];
        assert_eq!(codes, (1..).zip(expected).collect::<Vec<_>>(), "{}", tunproxy.output());
        assert_eq!(answers[0].answers.len(), 20, "whole over TCP");
        assert_eq!(answers[1].answers, answers[8].answers);
        assert_eq!(behind.queries.count(|query| query.ends_with(" A")), 0, "fake addresses are asked of nobody");
        assert_eq!(sites.dns.queries.all(), Vec::<String>::new());
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn long_answers_are_cut_to_what_a_client_takes_and_whole_over_tcp() {
    run(&["dig", TUN], || {
        let lab = Topology::desktop();
        let (_sites, _behind) = (Sites::open(&lab), behind(&lab));
        let tunproxy = profile("", "", "'MATCH,REJECT'").start(&lab.host);
        for (limit, most) in [("+noedns", 512), ("+bufsize=700", 700), ("+bufsize=1232", 1232), ("+bufsize=4096", 1232)]
        {
            let cut = dig(&lab, &format!("+ignore {limit} {LONG} TXT"));
            assert!(cut.contains(" tc "), "{limit}: {cut}");
            let size = cut.lines().find_map(|line| line.strip_prefix(";; MSG SIZE  rcvd: ")).expect("its size");
            assert!(size.parse::<usize>().expect("a number") <= most, "{limit}: {size}");
            let whole = dig(&lab, &format!("+short {limit} {LONG} TXT"));
            assert_eq!(whole.lines().count(), 20, "{limit}: {whole}");
        }
        // A question of more than 512 bytes.
        let option = "00".repeat(700);
        let padded = dig(&lab, &format!("+ednsopt=65001:{option} +short {NAME} A"));
        assert!(padded.starts_with("198.18."), "{padded}");
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn what_is_said_of_a_faked_name_bears_no_real_address() {
    run(&["dig", TUN], || {
        let lab = Topology::desktop();
        let (sites, behind) = (Sites::open(&lab), behind(&lab));
        let mut past = lab.host.command("dig");
        past.args(["+tries=1", "+timeout=20", "-p", "5353", &format!("@{GATEWAY_V4}"), NAME, "HTTPS"]);
        let real = Said::of(&mut past).stdout;
        assert!(real.contains(V4), "the hint is there to be leaked: {real}");
        let tunproxy = profile("", "", "'MATCH,REJECT'").start(&lab.host);
        for kind in ["A", "AAAA", "HTTPS", "SVCB", "ANY", "MX", "NS", "CNAME", "TXT"] {
            let said = dig(&lab, &format!("{NAME} {kind}"));
            assert!(said.contains("status: NOERROR") && !said.contains("203.0.113.10"), "{kind}: {said}");
        }
        let alias = dig(&lab, "+short alias.example.test A");
        assert!(alias.starts_with("198.18."), "an alias has a fake address of its own: {alias}");
        assert_eq!(dig(&lab, "+short alias.example.test CNAME"), format!("{NAME}.\n"));
        assert!(dig(&lab, "version.bind CH TXT").contains("status: NOTIMP"));
        // What is known of private addresses is known in the LAN.
        assert_eq!(dig(&lab, "+short -x 192.168.1.7"), "nas.home.test.\n");
        assert!(dig(&lab, "-x 198.18.77.77").contains("status: NXDOMAIN"));
        assert_eq!(behind.queries.count(|query| query.contains("18.198")), 0);
        assert_eq!(sites.dns.queries.all(), Vec::<String>::new());
        assert!(tunproxy.stop().success());
    });
}
