use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::ReadBuf;
use tokio::time::Sleep;

use super::sparing::UNDER_WAY;
use super::*;
use crate::dispatch::fixture::{Heard, World, address, flow, source};
use crate::net::{BoxDatagram, Datagram, Received};
use crate::session::{Inbound, Network, Session};

/// A transport on which nothing happens.
struct Quiet;

impl Datagram for Quiet {
    fn poll_send_to(&mut self, _: &mut Context<'_>, _: &[u8], _: &Address, _: bool) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_recv_from(&mut self, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<Received>> {
        Poll::Pending
    }
}

/// A transport whose peer speaks once, at its time.
struct Later {
    from: Address,
    at: Pin<Box<Sleep>>,
    said: bool,
}

impl Datagram for Later {
    fn poll_send_to(&mut self, _: &mut Context<'_>, _: &[u8], _: &Address, _: bool) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_recv_from(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<Received>> {
        if self.said {
            return Poll::Pending;
        }
        ready!(self.at.as_mut().poll(cx));
        self.said = true;
        buffer.put_slice(b"at last");
        Poll::Ready(Ok(Received::Payload(self.from.clone())))
    }
}

/// A client with an association, among others of one worker.
struct Client {
    origin: Origin,
    back: Rc<dyn Back>,
    link: Rc<Link>,
}

fn associations(peers: usize, peers_of_one: usize, links: usize) -> Associations {
    Associations::new(Limits { links, ports: usize::MAX, peers, peers_of_one }, Arc::default())
}

impl Client {
    fn new(all: &mut Associations, last: u8) -> Self {
        Self::over(Box::new(Quiet), Heard::back(), all, last)
    }

    /// The client 192.0.2.`last`.
    fn over(transport: BoxDatagram, back: Rc<dyn Back>, all: &mut Associations, last: u8) -> Self {
        Self::at(SocketAddr::from(([192, 0, 2, last], 1)), transport, back, all)
    }

    fn at(source: SocketAddr, transport: BoxDatagram, back: Rc<dyn Back>, all: &mut Associations) -> Self {
        let link = Link::new(source, Rc::clone(&back), transport, None, Arc::clone(&all.counters));
        all.add(&link);
        Self { origin: Origin::of(source, &back), back, link }
    }

    fn knock(&self, all: &mut Associations, peer: u16) -> Ticket {
        let first = Waiting::new(&[1], false, &all.counters).unwrap();
        all.begin(self.origin, &self.back, &to(peer), first)
    }

    fn open(&self, all: &mut Associations, peer: u16) -> Rc<Flow> {
        let ticket = self.knock(all, peer);
        let flow = flow(&self.link, &to(peer));
        assert_eq!(all.enter(&ticket, &self.link, &flow).unwrap().len(), 1);
        flow
    }

    fn knows(&self, all: &mut Associations, peer: u16) -> bool {
        let known = all.peer(self.origin, &to(peer)).is_some();
        assert!(!known || self.link.is_taken(&to(peer), &to(0)) || self.link.has_ended());
        known
    }

    fn known(&self, all: &mut Associations) -> usize {
        (1..=200).filter(|peer| self.knows(all, *peer)).count()
    }
}

fn to(peer: u16) -> Address {
    address("198.51.100.1", peer)
}

/// Lets time pass: ages differ.
async fn later() {
    tokio::time::advance(Duration::from_millis(10)).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_with_too_many_peers_loses_those_idle_longest_from_its_association_too() {
    let mut all = associations(1000, 32, 9);
    let client = Client::new(&mut all, 1);
    let mut flows = Vec::new();
    for peer in 1..=32 {
        flows.push(client.open(&mut all, peer));
        later().await;
    }
    // The oldest is in use; of those it is the youngest now.
    client.link.send(b"x", None, &flows[0], false);
    later().await;
    client.open(&mut all, 33);
    let gone: Vec<u16> = (1..=33).filter(|peer| !client.knows(&mut all, *peer)).collect();
    assert_eq!(gone, [2, 3]);
    assert!(gone.iter().all(|peer| !client.link.is_taken(&to(*peer), &to(0))), "the association forgot them as well");
    assert_eq!(all.peers.all(), 31);
}

#[tokio::test(start_paused = true)]
async fn one_client_never_shuts_out_the_others() {
    let mut all = associations(100, 90, 9);
    let (greedy, modest, newcomer) = (Client::new(&mut all, 1), Client::new(&mut all, 2), Client::new(&mut all, 3));
    for peer in 1..=10 {
        modest.open(&mut all, peer);
    }
    later().await;
    for peer in 1..=90 {
        greedy.open(&mut all, peer);
    }
    newcomer.open(&mut all, 1);
    assert_eq!(modest.known(&mut all), 10, "older, and yet not the ones that are too many");
    assert_eq!(greedy.known(&mut all), 90 - 90 / 8);
    assert_eq!(newcomer.known(&mut all), 1);
}

/// The client 192.0.2.`last` on each of `ports`, with `peers` on each.
fn on_ports(all: &mut Associations, last: u8, ports: u16, peers: u16) -> Vec<Client> {
    let back: Rc<dyn Back> = Rc::new(Many(Rc::default()));
    let client = |port| {
        let source = SocketAddr::from(([192, 0, 2, last], port));
        let client = Client::at(source, Box::new(Quiet), Rc::clone(&back), all);
        (1..=peers).for_each(|peer| drop(client.open(all, peer)));
        client
    };
    (1..=ports).map(client).collect()
}

fn known(clients: &[Client], all: &mut Associations) -> usize {
    clients.iter().map(|client| client.known(all)).sum()
}

#[tokio::test(start_paused = true)]
async fn who_has_few_peers_on_each_of_many_ports_has_many() {
    let mut all = associations(200, 150, 999);
    let modest = on_ports(&mut all, 2, 1, 80);
    later().await;
    let greedy = on_ports(&mut all, 3, 60, 2);
    let newcomer = on_ports(&mut all, 4, 1, 1);
    assert_eq!(known(&modest, &mut all), 80, "older, and yet not the ones that are too many");
    assert_eq!((known(&greedy, &mut all), known(&newcomer, &mut all)), (120 - 120 / 8, 1));
}

#[tokio::test(start_paused = true)]
async fn a_client_with_too_many_peers_on_all_ports_loses_of_them_and_this_host_by_port_alone() {
    let mut all = associations(1000, 32, 999);
    let greedy = on_ports(&mut all, 3, 8, 4);
    assert_eq!(known(&greedy, &mut all), 32);
    let more = on_ports(&mut all, 3, 1, 1);
    assert_eq!(known(&greedy, &mut all) + known(&more, &mut all), 32 - 32 / 16 + 1);
    let own = on_ports(&mut all, 1, 8, 20);
    assert_eq!(known(&own, &mut all), 160);
}

#[tokio::test(start_paused = true)]
async fn where_nobody_has_many_peers_the_refused_go_first_and_then_the_idle() {
    let mut all = associations(64, 64, 9);
    let clients: Vec<_> = (1..=4).map(|port| Client::new(&mut all, port)).collect();
    for peer in 1..=16 {
        for client in &clients {
            client.open(&mut all, peer);
            later().await;
        }
    }
    clients[0].open(&mut all, 17);
    assert!(!clients[0].knows(&mut all, 1), "the oldest of all");
    assert_eq!(clients.iter().map(|client| client.known(&mut all)).sum::<usize>(), 64);

    let ticket = clients[1].knock(&mut all, 18);
    assert!(!clients[1].knows(&mut all, 1), "the oldest that was left");
    assert!(all.refuse(&ticket, None));
    clients[2].open(&mut all, 17);
    assert!(all.peer(clients[1].origin, &to(18)).is_none(), "younger, but of no use");
    assert!(clients[2].knows(&mut all, 1));
}

#[tokio::test(start_paused = true)]
async fn beyond_the_limit_the_association_idle_longest_ends() {
    let mut all = associations(1000, 100, 3);
    let clients: Vec<_> = (1..=3)
        .map(|port| {
            let client = Client::new(&mut all, port);
            client.open(&mut all, 1);
            client
        })
        .collect();
    later().await;
    let flow = clients[0].open(&mut all, 2);
    clients[2].open(&mut all, 2);
    clients[0].link.send(b"x", None, &flow, false);
    clients[2].link.send(b"x", None, &flow, false);
    later().await;
    let fourth = Client::new(&mut all, 4);
    let ended: Vec<bool> = clients.iter().map(|client| client.link.has_ended()).collect();
    assert_eq!(ended, [false, true, false]);
    assert!(!fourth.link.has_ended());
    assert_eq!(clients[1].known(&mut all), 0);
    assert_eq!(all.counters.associations.load(Relaxed), 3);
}

#[tokio::test(start_paused = true)]
async fn a_client_with_ever_new_ports_takes_no_association_from_others() {
    let mut all = associations(1000, 100, 99);
    let from = |last: u8, port: u16| SocketAddr::from(([192, 0, 2, last], port));
    let open = |all: &mut Associations, source: SocketAddr| {
        let link = Link::new(source, Heard::back(), Box::new(Quiet), None, Arc::clone(&all.counters));
        all.add(&link);
        link
    };
    let modest: Vec<_> = (1..=20).map(|port| open(&mut all, from(1, port))).collect();
    later().await;
    let mut greedy = Vec::new();
    for port in 1..=1000 {
        greedy.push(open(&mut all, from(2, port)));
        later().await;
    }
    assert!(modest.iter().all(|link| !link.has_ended()), "idle for longer, and yet not the ones that are too many");
    assert_eq!(greedy.iter().filter(|link| !link.has_ended()).count(), 79);
    assert!(greedy[921..].iter().all(|link| !link.has_ended()), "the oldest of them went");
}

/// The way back to many clients.
struct Many(Rc<Heard>);

impl Back for Many {
    fn deliver(&self, from: &Address, to: SocketAddr, payload: &[u8]) {
        self.0.deliver(from, to, payload);
    }

    fn unreachable(&self, from: &Address, to: SocketAddr, quoted: &[u8], why: Reach) {
        self.0.unreachable(from, to, quoted, why);
    }

    fn is_paced(&self, client: IpAddr) -> bool {
        client != source().ip()
    }
}

#[tokio::test(start_paused = true)]
async fn while_the_worker_is_behind_a_client_that_sprays_opens_few_ways_and_others_all_of_theirs() {
    let dispatcher = World { proxies: "", rules: &["MATCH,REJECT"], names: &[] }.dispatcher();
    let heard = Rc::<Heard>::default();
    let back: Rc<dyn Back> = Rc::new(Many(Rc::clone(&heard)));
    let send = |last: u8, port: u16| {
        dispatcher.begin_turn(true);
        let from = SocketAddr::from(([192, 0, 2, last], port));
        let session = Session::new(Network::Udp, Inbound::Tun, from, to(9));
        dispatcher.packet(&session, b"x", None, false, b"quoted", &back);
    };
    let tasks = tokio::task::LocalSet::new();
    let spray = async {
        (1..=5000).for_each(|port| send(7, port));
        (1..=100).for_each(|port| send(8, port));
        // This host itself.
        (1..=1000).for_each(|port| send(1, port));
        heard.times(512 + 100 + 1000).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    tasks.run_until(spray).await;
    let counters = &dispatcher.core().counters;
    assert_eq!((counters.rejected.load(Relaxed), counters.held_back.load(Relaxed)), (1612, 5000 - 512));
}

#[tokio::test(start_paused = true)]
async fn associations_that_nobody_has_answered_go_before_those_that_are_of_use() {
    let mut all = associations(1000, 100, 9);
    let link = |all: &mut Associations, last: u8, transport: BoxDatagram| {
        let source = SocketAddr::from(([192, 0, 2, last], 1));
        let link = Link::new(source, Heard::back(), transport, None, Arc::clone(&all.counters));
        all.add(&link);
        link
    };
    let at = Box::pin(tokio::time::sleep(Duration::ZERO));
    let answered = link(&mut all, 1, Box::new(Later { from: to(9), at, said: false }));
    let scratch = std::cell::RefCell::new(vec![0; crate::dispatch::link::SCRATCH].into_boxed_slice());
    later().await;
    std::future::poll_fn(|cx| Poll::Ready(answered.poll_answers(cx, &scratch).is_ready())).await;
    let forged: Vec<_> = (2..=9).map(|last| link(&mut all, last, Box::new(Quiet))).collect();
    tokio::time::advance(UNDER_WAY).await;
    let more: Vec<_> = (10..=17).map(|last| link(&mut all, last, Box::new(Quiet))).collect();
    assert!(!answered.has_ended() && forged.iter().all(|link| link.has_ended()), "older, and yet of use");
    link(&mut all, 18, Box::new(Quiet));
    assert!(answered.has_ended() && !more[0].has_ended(), "answers to the others may be under way");
}

#[tokio::test(start_paused = true)]
async fn a_flow_ends_by_itself_and_one_to_a_nameserver_sooner() {
    let mut all = associations(1000, 100, 9);
    let client = Client::new(&mut all, 1);
    client.open(&mut all, 53);
    client.open(&mut all, 80);
    let start = Instant::now();
    all.expire(&client.link, start + Duration::from_secs(9));
    assert_eq!(client.known(&mut all), 2);
    assert_eq!(client.link.next_look(start), Some(start + Duration::from_secs(10)));
    all.expire(&client.link, start + Duration::from_secs(10));
    assert!(!client.knows(&mut all, 53) && client.knows(&mut all, 80));
    all.expire(&client.link, start + Duration::from_secs(300));
    assert_eq!((client.known(&mut all), client.link.next_look(start)), (0, None));
}

#[tokio::test(start_paused = true)]
async fn a_flow_to_a_nameserver_ends_sooner_beside_an_older_one_too() {
    let dispatcher = World { proxies: "", rules: &["MATCH,DIRECT"], names: &[] }.dispatcher();
    let all = || dispatcher.associations.borrow_mut();
    let client = Client::new(&mut all(), 1);
    client.open(&mut all(), 80);
    let carrying = tokio::task::LocalSet::new();
    carrying.spawn_local(Rc::clone(&dispatcher).carry(Rc::clone(&client.link)));
    let watch = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        client.open(&mut all(), 53);
        tokio::time::sleep(Duration::from_secs(9)).await;
        assert_eq!(client.known(&mut all()), 2);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(!client.knows(&mut all(), 53) && client.knows(&mut all(), 80));
    };
    carrying.run_until(watch).await;
}

/// RFC 4787 REQ-5: no mapping ends before two minutes.
#[tokio::test(start_paused = true)]
async fn after_110_silent_seconds_a_client_still_hears_its_peer() {
    let dispatcher = World { proxies: "", rules: &["MATCH,DIRECT"], names: &[] }.dispatcher();
    let all = || dispatcher.associations.borrow_mut();
    let (start, heard) = (Instant::now(), Rc::<Heard>::default());
    let at = Box::pin(tokio::time::sleep(Duration::from_secs(110)));
    let transport = Box::new(Later { from: to(9), at, said: false });
    let client = Client::over(transport, heard.clone(), &mut all(), 1);
    client.open(&mut all(), 9);
    let carrying = tokio::task::LocalSet::new();
    carrying.spawn_local(Rc::clone(&dispatcher).carry(Rc::clone(&client.link)));
    carrying.run_until(heard.times(1)).await;
    assert_eq!((start.elapsed().as_secs(), heard.words()), (110, vec!["198.51.100.1:9 at last".to_owned()]));
    assert!(!client.link.has_ended());
}

/// RFC 4787 REQ-6: what the client sends keeps its mapping.
#[tokio::test(start_paused = true)]
async fn a_datagram_every_half_minute_keeps_the_same_association_for_hours() {
    let dispatcher = World { proxies: "", rules: &["MATCH,DIRECT"], names: &[] }.dispatcher();
    let all = || dispatcher.associations.borrow_mut();
    let client = Client::new(&mut all(), 1);
    let flow = client.open(&mut all(), 9);
    let carrying = tokio::task::LocalSet::new();
    carrying.spawn_local(Rc::clone(&dispatcher).carry(Rc::clone(&client.link)));
    let watch = async {
        for _ in 0..240 {
            tokio::time::sleep(Duration::from_secs(30)).await;
            assert!(!client.link.has_ended() && client.knows(&mut all(), 9));
            client.link.send(b"x", None, &flow, false);
        }
        tokio::time::sleep(Duration::from_secs(295)).await;
        assert!(!client.link.has_ended());
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert!(client.link.has_ended() && !client.knows(&mut all(), 9));
    };
    carrying.run_until(watch).await;
}

#[tokio::test]
async fn an_association_ends_with_its_last_flow() {
    let mut all = associations(1000, 100, 9);
    let client = Client::new(&mut all, 1);
    client.open(&mut all, 1);
    client.open(&mut all, 2);
    all.forget(client.origin, &to(1), &"enough");
    assert!(!client.link.has_ended());
    all.forget(client.origin, &to(2), &"enough");
    assert!(client.link.has_ended());
    assert_eq!((all.sources.len(), all.peers.all(), all.links.len()), (0, 0, 0));
}

#[tokio::test]
async fn an_old_attempt_has_no_say_over_a_new_one() {
    let mut all = associations(1000, 100, 9);
    let client = Client::new(&mut all, 1);
    let old = client.knock(&mut all, 1);
    all.give_up(&old);
    assert!(all.peer(client.origin, &to(1)).is_none());
    assert_eq!(all.counters.datagrams_dropped.load(Relaxed), 1);
    let new = client.knock(&mut all, 1);
    all.give_up(&old);
    assert!(!all.refuse(&old, None));
    let flow = flow(&client.link, &to(1));
    assert!(all.enter(&old, &client.link, &flow).is_none());
    assert!(all.enter(&new, &client.link, &flow).is_some());
}

#[tokio::test]
async fn few_datagrams_wait_for_an_opening_and_those_beyond_are_counted() {
    let mut all = associations(1000, 100, 9);
    let client = Client::new(&mut all, 1);
    let ticket = client.knock(&mut all, 1);
    for _ in 0..MOST_WAITING {
        let waiting = Waiting::new(&[2], false, &all.counters).unwrap();
        assert!(all.wait(client.origin, &to(1), waiting));
    }
    assert_eq!(all.counters.datagrams_dropped.load(Relaxed), 1);
    let flow = flow(&client.link, &to(1));
    assert_eq!(all.enter(&ticket, &client.link, &flow).unwrap().len(), MOST_WAITING);
    let waiting = Waiting::new(&[3], false, &all.counters).unwrap();
    assert!(!all.wait(client.origin, &to(1), waiting));
}

#[tokio::test]
async fn a_client_that_leaves_leaves_nothing_behind() {
    let mut all = associations(1000, 100, 9);
    let (client, other) = (Client::new(&mut all, 1), Client::new(&mut all, 2));
    client.open(&mut all, 1);
    client.knock(&mut all, 2);
    let ticket = client.knock(&mut all, 3);
    all.refuse(&ticket, None);
    other.open(&mut all, 1);
    all.leave(client.origin);
    assert!(client.link.has_ended() && !other.link.has_ended());
    assert_eq!((all.sources.len(), all.peers.all(), all.links.len()), (1, 1, 1));
    all.reopen(client.origin, &to(3));
    all.leave(client.origin);
    assert_eq!(all.peers.all(), 1);
}

#[tokio::test(start_paused = true)]
async fn where_there_are_fewer_ports_than_before_those_idle_longest_go_until_half_of_them_are_enough() {
    let mut all = associations(100, 100, 1000);
    let mut clients = Vec::new();
    for port in 1..=40 {
        clients.push(Client::new(&mut all, port));
        later().await;
    }
    assert!(all.spare_a_port(source().ip(), 10));
    let left: Vec<_> = (1..=40).filter(|port| !clients[port - 1].link.has_ended()).collect();
    assert_eq!(left, (31..=40).collect::<Vec<_>>());
    assert!(all.spare_a_port(source().ip(), 10), "and where they are no fewer, one");
    assert!(clients[30].link.has_ended() && !clients[31].link.has_ended());
}

#[tokio::test(start_paused = true)]
async fn where_no_port_is_to_be_had_a_client_that_asks_for_ever_more_ends_few_of_others() {
    let mut all = associations(1000, 1000, 10_000);
    let open = |all: &mut Associations, last: u8, port: u16| {
        let source = SocketAddr::from(([192, 0, 2, last], port));
        let link = Link::new(source, Heard::back(), Box::new(Quiet), None, Arc::clone(&all.counters));
        all.add(&link);
        link
    };
    let others: Vec<_> = (10..210).map(|last| open(&mut all, last, 1)).collect();
    later().await;
    let greedy: Vec<_> = (1..=5).map(|port| open(&mut all, 1, port)).collect();
    let client = IpAddr::from([192, 0, 2, 1]);
    let spared = (0..1000).filter(|_| all.spare_a_port(client, usize::MAX)).count();
    let ended = |links: &[Rc<Link>]| links.iter().filter(|link| link.has_ended()).count();
    let at_first = ended(&others);
    assert!((1..50).contains(&at_first), "{at_first}");
    assert_eq!(ended(&greedy), 5, "it gives its own, and gets none when it has none");
    assert!(spared < 50, "{spared}");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(all.spare_a_port(client, usize::MAX), "later others give some again");
    assert!(ended(&others) > at_first);
}
