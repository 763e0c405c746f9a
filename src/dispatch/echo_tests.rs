//! Echo requests through a dispatcher, on a network of this file's own.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::{LocalSet, yield_now};

use super::super::echoes::{MOST, MOST_OF_ONE};
use super::super::fixture::{World, dns};
use super::super::{EchoBack, Quote};
use super::*;
use crate::dns::Mode;
use crate::net::{
    BoxDatagram, BoxEchoSocket, BoxFuture, BoxStream, Echo, EchoArrival, EchoError, EchoFailure, EchoSocket,
};
use crate::outbound::Networks;

#[path = "echo_bounds_tests.rs"]
mod bounds;

const DIRECT: World<'_> = World { proxies: "", rules: &["MATCH,DIRECT"], names: &[] };

/// What waits to be received, and who waits for it.
type Arrivals = (VecDeque<(EchoArrival, Vec<u8>)>, Option<Waker>);

/// What happens on the wire.
#[derive(Default)]
struct Net {
    own_id: Option<u16>,
    opened: AtomicUsize,
    closed: AtomicUsize,
    /// Where to, id, number and time to live of all that has left.
    sent: Mutex<Vec<(IpAddr, u16, u16, u8)>>,
    arrivals: Mutex<Arrivals>,
    fails: Mutex<Option<DialError>>,
    /// The device is gone that all sockets were bound to.
    unplugged: AtomicBool,
}

impl Net {
    fn arrive(&self, arrival: EchoArrival, payload: &[u8]) {
        let mut arrivals = self.arrivals.lock();
        arrivals.0.push_back((arrival, payload.to_vec()));
        if let Some(waker) = arrivals.1.take() {
            waker.wake();
        }
    }

    fn reply(&self, from: IpAddr, id: u16, sequence: u16) {
        self.arrive(EchoArrival::Reply { from, id, sequence, ttl: 50, tos: 0, payload: 0..4 }, b"data");
    }

    fn error(&self, router: &str, to: IpAddr, id: u16, sequence: u16, message: EchoFailure) {
        let router = Some(router.parse().unwrap());
        self.arrive(
            EchoArrival::Error(EchoError { router, to, id, sequence, ttl: Some(1), message, payload: 0..2 }),
            b"da",
        );
    }
}

/// An outbound that leads there.
struct There(Arc<Net>);

impl Outbound for There {
    fn name(&self) -> &str {
        "there"
    }

    fn networks(&self) -> Networks {
        Networks::ALL
    }

    fn connect<'a>(&'a self, _: &'a Session) -> BoxFuture<'a, Result<BoxStream, DialError>> {
        Box::pin(async { Err(DialError::Refused) })
    }

    fn associate<'a>(&'a self, _: &'a Session) -> BoxFuture<'a, Result<BoxDatagram, DialError>> {
        Box::pin(async { Err(DialError::Refused) })
    }

    fn echo(&self, _: bool) -> Result<BoxEchoSocket, DialError> {
        self.0.opened.fetch_add(1, Relaxed);
        Ok(Box::new(Wired(Arc::clone(&self.0))))
    }
}

struct Wired(Arc<Net>);

impl Drop for Wired {
    fn drop(&mut self) {
        self.0.closed.fetch_add(1, Relaxed);
    }
}

impl EchoSocket for Wired {
    fn own_id(&self) -> Option<u16> {
        self.0.own_id
    }

    fn send(&mut self, to: IpAddr, request: &Echo<'_>) -> Result<(), DialError> {
        match self.0.fails.lock().take() {
            Some(error) => Err(error),
            None => {
                self.0.sent.lock().push((to, request.id, request.sequence, request.ttl));
                Ok(())
            }
        }
    }

    fn is_stranded(&self) -> bool {
        self.0.unplugged.load(Relaxed)
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<EchoArrival>> {
        let mut arrivals = self.0.arrivals.lock();
        match arrivals.0.pop_front() {
            Some((arrival, bytes)) => {
                buffer[..bytes.len()].copy_from_slice(&bytes);
                Poll::Ready(Ok(arrival))
            }
            None => {
                arrivals.1 = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// What clients were told, a line each.
#[derive(Default)]
struct Heard {
    lines: RefCell<Vec<String>>,
    news: Notify,
}

impl Heard {
    fn note(&self, line: String) {
        self.lines.borrow_mut().push(line);
        self.news.notify_one();
    }

    async fn times(&self, many: usize) -> Vec<String> {
        while self.lines.borrow().len() < many {
            self.news.notified().await;
        }
        std::mem::take(&mut *self.lines.borrow_mut())
    }
}

impl EchoBack for Heard {
    fn reply(&self, from: IpAddr, to: IpAddr, reply: &Echo<'_>) {
        let Echo { id, sequence, payload, ttl, .. } = reply;
        self.note(format!("{from} answers {to} {id}/{sequence} ttl {ttl} {}", String::from_utf8_lossy(payload)));
    }

    fn error(&self, router: Option<IpAddr>, to: IpAddr, message: EchoFailure, quote: &Quote<'_>) {
        let EchoFailure { kind, code, word } = message;
        let (head, payload) = (String::from_utf8_lossy(quote.head), String::from_utf8_lossy(quote.payload));
        self.note(format!("{router:?} tells {to} {kind}/{code}/{word} of {head}+{payload}"));
    }

    fn unreachable(&self, quoted: &[u8], why: Reach) {
        self.note(format!("{why:?} for {}", String::from_utf8_lossy(quoted)));
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The request number `sequence` of `source` with the id 7.
fn ask(source: &str, destination: &str, sequence: u16) -> Ping<'static> {
    let echo = Echo { id: 7, sequence, payload: b"data", ttl: 64, tos: 0, dont_fragment: false };
    Ping { source: ip(source), destination: ip(destination), echo, head: b"head", packet: b"headdata" }
}

/// A dispatcher and what its clients hear.
struct Bench {
    dispatcher: Rc<Dispatcher>,
    heard: Rc<Heard>,
    back: Rc<dyn EchoBack>,
    net: Arc<Net>,
}

impl Bench {
    fn new(world: &World<'_>, net: Net) -> Self {
        let heard = Rc::<Heard>::default();
        Self { dispatcher: world.dispatcher(), back: heard.clone(), heard, net: Arc::new(net) }
    }

    /// Opens the flow of a request through the outbound of this file, as the router would have it, and sends it.
    fn open(&self, ping: &Ping<'_>, to: &str) {
        let key = Key { source: ping.source, destination: ping.destination, id: ping.echo.id };
        let ticket = self.dispatcher.echoes.borrow_mut().begin(key, ping).unwrap();
        let (way, wire) = self.dispatcher.echo_way(&There(Arc::clone(&self.net)), ip(to).is_ipv6()).unwrap();
        let to_all = Address { host: Host::Ip(ping.destination), port: 0 };
        let session = Session::new(Network::Icmp, Inbound::Tun, SocketAddr::new(ping.source, 7), to_all);
        let account = Account::new(Arc::clone(&self.dispatcher.core.counters), session, None);
        let back = Rc::clone(&self.back);
        let flow = Flow::new(key, Opened { to: ip(to), wire, back, account, held: None });
        let waited = self.dispatcher.echoes.borrow_mut().enter(&ticket, &way, &flow).unwrap();
        for waiting in waited {
            self.dispatcher.request(&way, &flow, &waiting.ping(&key));
        }
    }

    /// The id on the wire of the last request.
    fn last_id(&self) -> u16 {
        self.net.sent.lock().last().unwrap().1
    }

    fn flows(&self) -> usize {
        self.dispatcher.echoes.borrow().len()
    }
}

async fn local<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

#[tokio::test]
async fn replies_go_to_the_client_that_asked_whatever_ids_the_clients_use() {
    local(async {
        let bench = Bench::new(&DIRECT, Net::default());
        bench.open(&ask("192.0.2.1", "198.51.100.9", 1), "198.51.100.9");
        let one = bench.last_id();
        bench.open(&ask("192.0.2.2", "198.18.0.9", 1), "198.51.100.9");
        let two = bench.last_id();
        assert_ne!(one, two);
        bench.dispatcher.echo(&ask("192.0.2.1", "198.51.100.9", 2), &bench.back);
        assert_eq!(bench.net.sent.lock()[2], (ip("198.51.100.9"), one, 2, 63), "one hop less, and the same id");

        let host = ip("198.51.100.9");
        bench.net.reply(host, two, 1);
        bench.net.reply(host, one, 2);
        // Nobody asked these.
        bench.net.reply(ip("198.51.100.8"), one, 2);
        bench.net.reply(host, one.wrapping_add(1).max(two.wrapping_add(1)), 2);
        bench.net.reply(host, one, 1);
        let expected = [
            "198.18.0.9 answers 192.0.2.2 7/1 ttl 49 data",
            "198.51.100.9 answers 192.0.2.1 7/2 ttl 49 data",
            "198.51.100.9 answers 192.0.2.1 7/1 ttl 49 data",
        ];
        assert_eq!(bench.heard.times(3).await, expected);
        assert_eq!(bench.net.opened.load(Relaxed), 1, "one socket for all");
    })
    .await;
}

#[tokio::test]
async fn errors_are_passed_on_if_they_speak_of_what_was_sent() {
    local(async {
        let bench = Bench::new(&DIRECT, Net::default());
        bench.open(&ask("192.0.2.1", "198.18.0.9", 1), "198.51.100.9");
        let (id, host) = (bench.last_id(), ip("198.51.100.9"));
        let expired = EchoFailure { kind: 11, code: 0, word: 0 };
        for (to, id, sequence) in [(ip("198.18.0.9"), id, 1), (host, id ^ 1, 1), (host, id, 2)] {
            bench.net.error("203.0.113.1", to, id, sequence, expired);
        }
        bench.net.error("203.0.113.2", host, id, 1, expired);
        assert_eq!(bench.heard.times(1).await, ["Some(203.0.113.2) tells 192.0.2.1 11/0/0 of head+da"]);
        // Only the latest requests are remembered.
        for sequence in 2..40 {
            bench.dispatcher.echo(&ask("192.0.2.1", "198.18.0.9", sequence), &bench.back);
        }
        bench.net.error("203.0.113.3", host, id, 1, expired);
        bench.net.error("203.0.113.4", host, id, 39, expired);
        assert_eq!(bench.heard.times(1).await, ["Some(203.0.113.4) tells 192.0.2.1 11/0/0 of head+da"]);
    })
    .await;
}

#[tokio::test]
async fn an_error_of_the_other_family_speaks_in_the_clients_numbers() {
    local(async {
        let bench = Bench::new(&DIRECT, Net::default());
        bench.open(&ask("192.0.2.1", "198.18.0.9", 1), "2001:db8::9");
        let (id, host) = (bench.last_id(), ip("2001:db8::9"));
        for (kind, code, word) in [(3, 0, 0), (2, 0, 1400), (1, 4, 0), (1, 1, 0), (4, 0, 0), (1, 0, 0)] {
            bench.net.error("2001:db8::77", host, id, 1, EchoFailure { kind, code, word });
        }
        let told = |numbers: &str| format!("Some(198.18.0.9) tells 192.0.2.1 {numbers} of head+da");
        let expected = ["11/0/0", "3/4/1380", "3/3/0", "3/13/0", "3/1/0"].map(told);
        assert_eq!(bench.heard.times(5).await, expected);
        bench.net.fails.lock().replace(DialError::Unreachable(Reach::TooBig(1420)));
        bench.dispatcher.echo(&ask("192.0.2.1", "198.18.0.9", 2), &bench.back);
        assert_eq!(bench.heard.times(1).await, ["TooBig(1400) for headdata"]);

        bench.open(&ask("2001:db8::1", "fdfe::9", 1), "198.51.100.9");
        let (id, host) = (bench.last_id(), ip("198.51.100.9"));
        for (kind, code, word) in [(11, 0, 0), (3, 4, 1400), (3, 3, 0), (3, 13, 0), (12, 0, 0), (3, 2, 0), (3, 1, 0)] {
            bench.net.error("203.0.113.1", host, id, 1, EchoFailure { kind, code, word });
        }
        let told = |numbers: &str| format!("Some(fdfe::9) tells 2001:db8::1 {numbers} of head+da");
        let expected = ["3/0/0", "2/0/1420", "1/4/0", "1/1/0", "1/0/0"].map(told);
        assert_eq!(bench.heard.times(5).await, expected);
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_sent_is_told_as_a_router_would() {
    local(async {
        let bench = Bench::new(&DIRECT, Net::default());
        bench.open(&ask("192.0.2.1", "198.51.100.9", 1), "198.51.100.9");
        let send = |error: DialError| {
            bench.net.fails.lock().replace(error);
            bench.dispatcher.echo(&ask("192.0.2.1", "198.51.100.9", 2), &bench.back);
        };
        send(DialError::Unreachable(Reach::Network));
        send(DialError::Io(io::ErrorKind::WouldBlock.into()));
        send(DialError::Unreachable(Reach::Prohibited));
        assert_eq!(bench.heard.times(2).await, ["Network for headdata", "Prohibited for headdata"]);
        assert_eq!(bench.dispatcher.core.counters.datagrams_dropped.load(Relaxed), 1);
    })
    .await;
}

#[tokio::test]
async fn a_socket_whose_device_is_gone_ends_with_its_flows_and_the_request_is_decided_anew() {
    local(async {
        // What is decided anew is told from what goes the old way.
        let bench = Bench::new(&World { rules: &["MATCH,REJECT"], ..DIRECT }, Net::default());
        for last in [1, 2] {
            bench.open(&ask(&format!("192.0.2.{last}"), "198.51.100.9", 1), "198.51.100.9");
        }
        let fail = |unplugged: bool| {
            bench.net.unplugged.store(unplugged, Relaxed);
            bench.net.fails.lock().replace(DialError::Io(io::Error::from_raw_os_error(libc::ENODEV)));
            bench.dispatcher.echo(&ask("192.0.2.1", "198.51.100.9", 2), &bench.back);
        };
        // An error by itself says nothing about the socket.
        fail(false);
        assert_eq!(bench.heard.times(1).await, ["Host for headdata"]);
        assert_eq!((bench.flows(), bench.net.closed.load(Relaxed)), (2, 0));
        fail(true);
        assert_eq!(bench.heard.times(1).await, ["Prohibited for headdata"], "the rules were asked");
        while bench.net.closed.load(Relaxed) == 0 {
            yield_now().await;
        }
        let counters = &bench.dispatcher.core.counters;
        assert_eq!(
            (bench.flows(), counters.closed.load(Relaxed)),
            (1, 2),
            "both flows ended; what is left is the refusal"
        );
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_flow_that_is_idle_ends_and_the_socket_with_the_last() {
    local(async {
        let bench = Bench::new(&DIRECT, Net::default());
        bench.open(&ask("192.0.2.1", "198.51.100.9", 1), "198.51.100.9");
        sleep(Duration::from_secs(40)).await;
        bench.open(&ask("192.0.2.2", "198.51.100.9", 1), "198.51.100.9");
        sleep(Duration::from_secs(25)).await;
        assert_eq!((bench.flows(), bench.net.closed.load(Relaxed)), (1, 0), "the first was idle for a minute");
        let counters = &bench.dispatcher.core.counters;
        assert_eq!((counters.opened.load(Relaxed), counters.closed.load(Relaxed)), (2, 1));
        sleep(Duration::from_secs(60)).await;
        assert_eq!((bench.flows(), bench.net.closed.load(Relaxed)), (0, 1));
        bench.open(&ask("192.0.2.2", "198.51.100.9", 1), "198.51.100.9");
        assert_eq!(bench.net.opened.load(Relaxed), 2);
    })
    .await;
}

#[tokio::test]
async fn a_socket_with_an_id_of_its_own_serves_one_flow_and_there_are_not_many() {
    local(async {
        let bench = Bench::new(&DIRECT, Net { own_id: Some(99), ..Net::default() });
        for last in 1..4 {
            bench.open(&ask(&format!("192.0.2.{last}"), "198.51.100.9", 1), "198.51.100.9");
            assert_eq!((bench.net.opened.load(Relaxed), bench.last_id()), (last, 99));
        }
        for id in 0..1000 {
            let mut ping = ask("192.0.2.9", "198.51.100.9", 1);
            ping.echo.id = id;
            bench.open(&ping, "198.51.100.9");
        }
        assert!(bench.flows() <= 260, "{}", bench.flows());
        while bench.net.opened.load(Relaxed) - bench.net.closed.load(Relaxed) > 260 {
            yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_with_many_flows_loses_its_own_and_nobody_elses() {
    local(async {
        let bench = Bench::new(&DIRECT, Net::default());
        bench.open(&ask("192.0.2.1", "198.51.100.9", 1), "198.51.100.9");
        let flood = |client: u32, many: u16| {
            for id in 0..many {
                let source = std::net::Ipv4Addr::from(0x0a00_0000 + client).to_string();
                let mut ping = ask(&source, "198.51.100.7", 1);
                ping.echo.id = id;
                bench.open(&ping, "198.51.100.7");
            }
        };
        flood(0, 10_000);
        assert!((MOST_OF_ONE / 2..=MOST_OF_ONE + 1).contains(&bench.flows()), "{}", bench.flows());
        // Nor do many of them take all.
        for client in 1..20 {
            flood(client, 1000);
        }
        assert!((MOST / 2..=MOST).contains(&bench.flows()), "{}", bench.flows());
        let sent = bench.net.sent.lock().len();
        bench.dispatcher.echo(&ask("192.0.2.1", "198.51.100.9", 2), &bench.back);
        assert_eq!(bench.net.sent.lock().len(), sent + 1, "the first flow is still open");
    })
    .await;
}

#[tokio::test]
async fn rules_decide_for_a_flow_and_what_is_not_carried_is_refused() {
    local(async {
        let proxies = "{name: far, type: http, server: 127.0.0.1, port: 9}";
        let rules = [
            "DST-PORT,0-65535,REJECT-DROP",
            "NETWORK,udp,REJECT-DROP",
            "IP-CIDR,198.51.100.1/32,REJECT",
            "IP-CIDR,198.51.100.2/32,REJECT-DROP",
            "IP-CIDR,198.51.100.3/32,far",
            "NETWORK,icmp,PASS",
            "IP-CIDR,198.51.100.0/24,REJECT",
            "MATCH,DIRECT",
        ];
        let world = World { proxies, rules: &rules, names: &[] };
        let bench = Bench::new(&world, Net::default());
        // Nothing passes over to MATCH,DIRECT: that would show what was meant to be hidden.
        for last in [1, 3, 4] {
            bench.dispatcher.echo(&ask("192.0.2.1", &format!("198.51.100.{last}"), 1), &bench.back);
            assert_eq!(bench.heard.times(1).await, ["Prohibited for headdata"], "{last}");
        }
        bench.dispatcher.echo(&ask("192.0.2.1", "198.51.100.2", 1), &bench.back);
        while bench.dispatcher.core.counters.rejected.load(Relaxed) < 3 {
            yield_now().await;
        }
        // The answer is remembered for a while: the second time it comes at once, or not at all.
        for last in [2, 1] {
            bench.dispatcher.echo(&ask("192.0.2.1", &format!("198.51.100.{last}"), 2), &bench.back);
        }
        assert_eq!(*bench.heard.lines.borrow(), ["Prohibited for headdata"]);
        let counters = &bench.dispatcher.core.counters;
        assert_eq!((counters.rejected.load(Relaxed), counters.failed.load(Relaxed)), (3, 1));
    })
    .await;
}

#[tokio::test]
async fn a_fake_address_that_stands_for_nothing_is_an_unreachable_host() {
    local(async {
        let range = "198.18.0.0/16".parse().unwrap();
        let filter = crate::dns::Filter::new(crate::dns::Wildcards::default(), crate::dns::FilterMode::Blacklist);
        let dispatcher = DIRECT.dispatcher_with(dns(Mode::FakeIp { range, range6: None, filter, ttl: 1 }, Vec::new()));
        let heard = Rc::<Heard>::default();
        let back: Rc<dyn EchoBack> = heard.clone();
        dispatcher.echo(&ask("192.0.2.1", "198.18.0.77", 1), &back);
        assert_eq!(heard.times(1).await, ["Host for headdata"]);
    })
    .await;
}
