use super::*;
use crate::dispatch::fixture::{Heard, address, flow, source};
use crate::net::Datagram;
use crate::session::{Inbound, Network, Session};

/// Answers with what it is given, then fails.
struct Answering(VecDeque<(Vec<u8>, Address)>);

impl Datagram for Answering {
    fn poll_send_to(&mut self, _: &mut Context<'_>, _: &[u8], _: &Address, _: bool) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_recv_from(&mut self, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<Received>> {
        let next = self.0.pop_front().ok_or_else(|| io::Error::other("the end"));
        Poll::Ready(next.map(|(payload, from)| {
            buffer.put_slice(&payload);
            Received::Payload(from)
        }))
    }

    fn reached_at(&self) -> Option<IpAddr> {
        Some([192, 0, 2, 1].into())
    }
}

fn heard(answers: &[(&str, &Address)], name: Option<Address>, peers: &[&Address]) -> Rc<Heard> {
    let answers = answers.iter().map(|(payload, from)| (payload.as_bytes().to_vec(), (*from).clone()));
    let (heard, transport) = (Rc::<Heard>::default(), Box::new(Answering(answers.collect())));
    let link = Link::new(source(), heard.clone(), transport, name, Arc::default());
    peers.iter().for_each(|peer| drop(flow(&link, peer)));
    let scratch = RefCell::new(vec![0; SCRATCH].into());
    let end = link.poll_answers(&mut Context::from_waker(Waker::noop()), &scratch);
    assert!(matches!(end, Poll::Ready(error) if error.to_string() == "the end"));
    heard
}

#[tokio::test]
async fn answers_that_come_one_by_one_are_handed_over_together() {
    let (one, two) = (address("198.51.100.1", 53), address("198.51.100.2", 53));
    let answers = [("aa", &one), ("bb", &one), ("c", &one), ("dd", &one), ("", &one), ("ee", &two), ("fff", &two)];
    let expected = [
        (one.clone(), b"aabbc".to_vec(), 2),
        (one.clone(), b"dd".to_vec(), 0),
        (one.clone(), Vec::new(), 0),
        (two.clone(), b"ee".to_vec(), 0),
        (two.clone(), b"fff".to_vec(), 0),
    ];
    assert_eq!(*heard(&answers, None, &[&one]).payloads.borrow(), expected);
}

#[tokio::test]
async fn what_was_opened_for_a_name_answers_from_it_whatever_the_relay_writes() {
    let (name, real) = (address("one.test", 7), address("198.51.100.1", 7));
    let heard = heard(&[("a", &real), ("bb", &address("198.51.100.1", 8))], Some(name.clone()), &[&name]);
    assert_eq!(heard.words(), ["one.test:7 a", "one.test:8 bb"]);
}

#[tokio::test]
async fn an_association_that_has_ended_sends_and_brings_nothing() {
    let counters = Arc::<Counters>::default();
    let transport = Box::new(Answering(VecDeque::new()));
    let link = Link::new(source(), Heard::back(), transport, None, Arc::clone(&counters));
    let flow = flow(&link, &address("198.51.100.1", 53));
    assert_eq!(link.end(&"enough").len(), 1);
    assert_eq!(link.end(&"twice").len(), 0);
    link.send(b"late", None, &flow, false);
    let scratch = RefCell::new(vec![0; SCRATCH].into());
    assert!(link.poll_answers(&mut Context::from_waker(Waker::noop()), &scratch).is_ready());
    assert_eq!(counters.datagrams_dropped.load(Relaxed), 1);
    assert_eq!(counters.associations.load(Relaxed), 0);
}

/// Sends by one port after the other: each is closed when the network is gone.
struct Moving(u16);

impl Datagram for Moving {
    fn poll_send_to(&mut self, _: &mut Context<'_>, _: &[u8], _: &Address, _: bool) -> Poll<io::Result<()>> {
        self.0 += 1;
        Poll::Ready(Err(io::Error::from_raw_os_error(libc::ENETUNREACH)))
    }

    fn poll_recv_from(&mut self, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<Received>> {
        Poll::Pending
    }

    fn port_towards(&mut self, _: &Address) -> Option<u16> {
        Some(self.0)
    }
}

#[tokio::test]
async fn a_socket_that_was_opened_anew_is_known_by_its_new_port_before_it_sends() {
    let (own, to) = (crate::platform::OwnSockets::new("tun7", None), address("127.0.0.9", 7));
    let real = to.socket().unwrap();
    let link = Link::new(source(), Heard::back(), Box::new(Moving(40000)), None, Arc::default());
    let flow = flow(&link, &to);
    *flow.sending.borrow_mut() = Some(own.sends(40000, real));
    let known = |port: u16| own.is_our_datagram(SocketAddr::new([127, 0, 0, 1].into(), port), real);
    link.send(b"fails", None, &flow, false);
    assert!(known(40000) && !known(40001));
    link.send(b"by another", None, &flow, false);
    assert!(known(40001) && !known(40000));
}

#[tokio::test]
async fn another_client_writes_from_its_outer_address_and_stays_known_while_it_does() {
    let (all, now) = (Arc::<Mappings>::default(), Instant::now());
    let neighbour: SocketAddr = "10.7.0.2:5000".parse().unwrap();
    let neighbours = Link::new(neighbour, Heard::back(), Box::new(Moving(0)), None, Arc::default());
    let flow_of_neighbour = flow(&neighbours, &address("198.51.100.1", 3478));
    neighbours.map(all.enter(neighbour, 40001, now));
    let over = flow_of_neighbour.used() + flow_of_neighbour.idle;
    assert_eq!(neighbours.over(over).len(), 1);

    let answers = [("a", neighbour), ("b", "10.7.0.3:5000".parse().unwrap())];
    let answers = answers.map(|(payload, from)| (payload.as_bytes().to_vec(), from.into()));
    let heard = Rc::<Heard>::default();
    let link = Link::new(source(), heard.clone(), Box::new(Answering(answers.into())), None, Arc::default());
    link.among(&all);
    flow(&link, &address("198.51.100.1", 3478));
    let scratch = RefCell::new(vec![0; SCRATCH].into());
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(link.poll_answers(&mut Context::from_waker(Waker::noop()), &scratch).is_ready());
    assert_eq!(heard.words(), ["10.7.0.3:5000 b", "192.0.2.1:40001 a"], "who is no client has no other address");
    assert_eq!(neighbours.over(over).len(), 0, "it has just written");
    neighbours.end(&"enough");
    assert_eq!(all.outer(neighbour, [192, 0, 2, 1].into(), now), None);
}

#[tokio::test]
async fn another_client_that_was_written_to_by_a_name_answers_from_the_fake_address() {
    let (all, neighbour) = (Arc::<Mappings>::default(), address("10.7.0.2", 5000));
    let _mapping = all.enter(neighbour.socket().unwrap(), 40001, Instant::now());
    let heard = Rc::<Heard>::default();
    let transport = Answering([(b"a".to_vec(), neighbour)].into());
    let link = Link::new(source(), heard.clone(), Box::new(transport), None, Arc::default());
    link.among(&all);
    let (real, fake) = (address("192.0.2.1", 40001), address("198.18.0.9", 40001));
    let session = Session::new(Network::Udp, Inbound::Tun, link.source, fake.clone());
    let account = Account::new(Arc::default(), session, None);
    let opened = Opened { to: real, quoted: Box::default(), account, held: None, sending: None };
    link.carry(&Flow::new(fake, opened, Duration::from_secs(300)));
    let scratch = RefCell::new(vec![0; SCRATCH].into());
    assert!(link.poll_answers(&mut Context::from_waker(Waker::noop()), &scratch).is_ready());
    assert_eq!(heard.words(), ["198.18.0.9:40001 a"]);
}
