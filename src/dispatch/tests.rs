use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Notify;
use tokio::task::{LocalSet, spawn_local};

use super::fixture::{Heard, World, address, dns_that_told, session, source};
use super::*;
use crate::dns::Mode;
use crate::net::Address;
use crate::outbound::socks5::wire;

pub(super) const EVERYTHING_DIRECT: World<'static> = World { proxies: "", rules: &["MATCH,DIRECT"], names: &[] };

/// Runs a test where tasks may be local.
pub(super) async fn local<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

/// A server that sends every datagram back, and notes who sent it.
pub(super) async fn echo(ip: &str) -> (SocketAddr, Rc<RefCell<Vec<SocketAddr>>>) {
    let socket = UdpSocket::bind((ip, 0)).await.unwrap();
    let (address, clients) = (socket.local_addr().unwrap(), Rc::<RefCell<Vec<SocketAddr>>>::default());
    let seen = Rc::clone(&clients);
    spawn_local(async move {
        let mut space = [0; 2048];
        while let Ok((length, client)) = socket.recv_from(&mut space).await {
            seen.borrow_mut().push(client);
            socket.send_to(&space[..length], client).await.unwrap();
        }
    });
    (address, clients)
}

pub(super) fn send(dispatcher: &Rc<Dispatcher>, to: &Address, payload: &[u8], back: &Rc<dyn Back>) {
    let session = Session::new(Network::Udp, Inbound::Tun, source(), to.clone());
    dispatcher.datagram(session, payload, false, back);
}

/// A SOCKS5 server that carries one request after `go`, for each connection.
struct Proxy {
    address: SocketAddr,
    /// What was asked for, as `3 0.0.0.0:0`.
    asked: Rc<RefCell<Vec<String>>>,
    /// Requests that had no answer yet, at most.
    peak: Rc<Cell<usize>>,
    /// Control connections that the client has closed.
    closed: Rc<Cell<usize>>,
    news: Rc<Notify>,
    go: Rc<Notify>,
}

impl Proxy {
    /// One that answers with `code`.
    async fn start(code: u8) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let relay = socket.local_addr().unwrap();
        let (asked, closed) = (Rc::<RefCell<Vec<String>>>::default(), Rc::<Cell<usize>>::default());
        let (news, go) = (Rc::new(Notify::new()), Rc::new(Notify::new()));
        let (peak, waiting) = (Rc::<Cell<usize>>::default(), Rc::<Cell<usize>>::default());
        let proxy = Self { address, asked, peak: Rc::clone(&peak), closed, news, go };
        let (asked, closed, news, go) =
            (Rc::clone(&proxy.asked), Rc::clone(&proxy.closed), Rc::clone(&proxy.news), Rc::clone(&proxy.go));
        spawn_local(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (asked, closed) = (Rc::clone(&asked), Rc::clone(&closed));
                let (news, go) = (Rc::clone(&news), Rc::clone(&go));
                let (peak, waiting) = (Rc::clone(&peak), Rc::clone(&waiting));
                spawn_local(async move {
                    let line = request(&mut stream).await;
                    asked.borrow_mut().push(line);
                    waiting.set(waiting.get() + 1);
                    peak.set(peak.get().max(waiting.get()));
                    news.notify_waiters();
                    let mut reply = Vec::new();
                    wire::put_reply(code, relay, &mut reply);
                    let mut space = [0; 16];
                    tokio::select! {
                        () = go.notified() => {
                            waiting.set(waiting.get() - 1);
                            // The client may have gone meanwhile.
                            let _ = stream.write_all(&reply).await;
                            while stream.read(&mut space).await.is_ok_and(|read| read > 0) {}
                        }
                        _ = stream.read(&mut space) => {}
                    }
                    closed.set(closed.get() + 1);
                    news.notify_waiters();
                });
            }
        });
        spawn_local(async move {
            let mut space = [0; 2048];
            while let Ok((length, client)) = socket.recv_from(&mut space).await {
                socket.send_to(&space[..length], client).await.unwrap();
            }
        });
        proxy
    }

    fn entry(&self) -> String {
        let Self { address, .. } = self;
        format!("{{name: up, type: socks5, server: {}, port: {}, udp: true}}", address.ip(), address.port())
    }

    async fn until(&self, reached: impl Fn(&Self) -> bool) {
        loop {
            let news = self.news.notified();
            if reached(self) {
                return;
            }
            news.await;
        }
    }
}

/// Reads the greeting and the request.
async fn request(stream: &mut TcpStream) -> String {
    let mut head = [0; 2];
    stream.read_exact(&mut head).await.unwrap();
    skip(stream, head[1].into()).await;
    stream.write_all(&[5, 0]).await.unwrap();
    let mut head = [0; 3];
    stream.read_exact(&mut head).await.unwrap();
    let to = wire::read_address(stream).await.unwrap();
    format!("{} {to}", head[1])
}

async fn skip(stream: &mut (impl AsyncRead + Unpin), many: usize) {
    stream.read_exact(&mut vec![0; many]).await.unwrap();
}

/// What the router made of a session.
async fn chosen(dispatcher: &Dispatcher, mut session: Session) -> String {
    dispatcher.choose(&mut session).await.unwrap().verdict.to_string()
}

#[tokio::test]
async fn a_rule_is_passed_over_whose_outbound_does_not_carry_the_network() {
    let proxies = "{name: up, type: http, server: 127.0.0.1, port: 1}";
    let world = World { proxies, rules: &["DST-PORT,7,up", "DST-PORT,8,PASS", "MATCH,REJECT"], names: &[] };
    let dispatcher = world.dispatcher();
    let ask = async |network, port| chosen(&dispatcher, session(network, "192.0.2.7", port)).await;
    assert_eq!(ask(Network::Tcp, 7).await, "up by DST-PORT,7,up (line 0)");
    for (network, port) in [(Network::Udp, 7), (Network::Tcp, 8), (Network::Udp, 8)] {
        assert_eq!(ask(network, port).await, "REJECT by MATCH,REJECT (line 0)", "{network} {port}");
    }
}

#[tokio::test]
async fn a_name_that_cannot_be_looked_up_misses_address_rules_and_is_an_unreachable_host() {
    let world = World { rules: &["IP-CIDR,0.0.0.0/0,REJECT", "MATCH,DIRECT"], ..EVERYTHING_DIRECT };
    let dispatcher = world.dispatcher();
    let error = dispatcher.dial(session(Network::Tcp, "nowhere.test", 80)).await.err().unwrap();
    assert_eq!(error.to_string(), "nowhere.test: no such name");
    assert_eq!(refusal(&error), Refusal::Host);
}

#[tokio::test]
async fn the_address_is_dialled_and_the_remembered_name_serves_the_rules_alone() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap();
    // Whoever dials the name ends elsewhere, where nobody listens.
    let names: &[(&str, &[&str])] = &[("www.test", &["127.0.0.9"])];
    let world = World { proxies: "", rules: &["DOMAIN,www.test,DIRECT", "MATCH,REJECT"], names };
    let dispatcher = world.dispatcher_with(dns_that_told(Mode::Mapping, "www.test", to.ip()).await);
    let upstream = dispatcher.dial(session(Network::Tcp, "127.0.0.1", to.port())).await.unwrap();
    assert_eq!(upstream.account.verdict().unwrap().rule.split(' ').next(), Some("DOMAIN,www.test,DIRECT"));
    assert_eq!(upstream.account.session().destination, to.into());
    assert_eq!(upstream.account.session().name().unwrap().as_str(), "www.test");
    listener.accept().await.unwrap();

    let dispatcher = world.dispatcher_with(dns_that_told(Mode::Plain, "www.test", to.ip()).await);
    let refused = dispatcher.dial(session(Network::Tcp, "127.0.0.1", to.port())).await;
    assert!(matches!(refused, Err(DialError::Rejected(_))), "nothing is remembered in normal mode");
}

#[tokio::test]
async fn an_upstream_is_told_the_address_and_not_the_remembered_name() {
    local(async {
        let proxy = Proxy::start(wire::reply::SUCCEEDED).await;
        let world =
            World { proxies: &proxy.entry(), rules: &["DOMAIN,www.test,up", "MATCH,REJECT"], ..EVERYTHING_DIRECT };
        let dispatcher = world.dispatcher_with(dns_that_told(Mode::Mapping, "www.test", [192, 0, 2, 7].into()).await);
        proxy.go.notify_one();
        dispatcher.dial(session(Network::Tcp, "192.0.2.7", 80)).await.unwrap();
        assert_eq!(*proxy.asked.borrow(), ["1 192.0.2.7:80"]);
    })
    .await;
}

#[tokio::test]
async fn datagrams_go_to_the_address_whose_name_is_remembered() {
    local(async {
        let (server, _) = echo("127.0.0.1").await;
        let names: &[(&str, &[&str])] = &[("www.test", &["127.0.0.9"])];
        let world = World { proxies: "", rules: &["DOMAIN,www.test,DIRECT", "MATCH,REJECT"], names };
        let dispatcher = world.dispatcher_with(dns_that_told(Mode::Mapping, "www.test", server.ip()).await);
        let heard = Rc::<Heard>::default();
        send(&dispatcher, &server.into(), b"hello", &(heard.clone() as Rc<dyn Back>));
        heard.times(1).await;
        assert_eq!(heard.words(), [format!("{server} hello")]);
    })
    .await;
}

#[tokio::test]
async fn one_socket_serves_all_peers_and_two_names_of_one_address_get_two() {
    local(async {
        let ((server, clients), (other, others)) = (echo("127.0.0.1").await, echo("127.0.0.2").await);
        let names: &[(&str, &[&str])] = &[("a.test", &["127.0.0.1"]), ("b.test", &["127.0.0.1"])];
        let dispatcher = World { names, ..EVERYTHING_DIRECT }.dispatcher();
        let heard = Rc::<Heard>::default();
        let back: Rc<dyn Back> = heard.clone();
        let (a, b) = (address("a.test", server.port()), address("b.test", server.port()));
        for (asked, to) in [&a, &b, &other.into(), &a].into_iter().enumerate() {
            send(&dispatcher, to, b"?", &back);
            heard.times(asked + 1).await;
        }
        assert_eq!(heard.words(), [format!("{other} ?"), format!("{a} ?"), format!("{a} ?"), format!("{b} ?")]);
        let (clients, others) = (clients.borrow(), others.borrow());
        assert_eq!((clients[0], clients[0]), (clients[2], others[0]), "one outer port for every peer");
        assert_ne!(clients[0], clients[1], "or the answer of `b` could not be told from that of `a`");
    })
    .await;
}

#[tokio::test]
async fn a_source_port_used_again_behind_another_way_back_is_another_client() {
    local(async {
        let (server, _) = echo("127.0.0.1").await;
        let dispatcher = EVERYTHING_DIRECT.dispatcher();
        let (first, second) = (Rc::<Heard>::default(), Rc::<Heard>::default());
        let backs: [Rc<dyn Back>; 2] = [first.clone(), second.clone()];
        for (heard, back) in [&first, &second].into_iter().zip(&backs) {
            send(&dispatcher, &server.into(), b"?", back);
            heard.times(1).await;
        }
        let open = || dispatcher.core().counters.associations.load(Relaxed);
        assert_eq!((first.words().len(), second.words().len(), open()), (1, 1, 2));
        dispatcher.leave(source(), &backs[0]);
        assert_eq!(open(), 1, "its socket is closed at once");
        send(&dispatcher, &server.into(), b"!", &backs[1]);
        second.times(2).await;
        dispatcher.leave(source(), &backs[1]);
        assert_eq!(open(), 0);
    })
    .await;
}

#[tokio::test]
async fn the_first_burst_of_a_client_opens_one_association_upstream() {
    local(async {
        let proxy = Proxy::start(wire::reply::SUCCEEDED).await;
        let world = World { proxies: &proxy.entry(), rules: &["MATCH,up"], names: &[] };
        let (dispatcher, heard) = (world.dispatcher(), Rc::<Heard>::default());
        let back: Rc<dyn Back> = heard.clone();
        for peer in 1..=20 {
            send(&dispatcher, &address(&format!("198.51.100.{peer}"), 7), b"?", &back);
        }
        proxy.until(|proxy| !proxy.asked.borrow().is_empty()).await;
        proxy.go.notify_one();
        heard.times(20).await;
        assert_eq!(*proxy.asked.borrow(), ["3 0.0.0.0:0"]);

        dispatcher.leave(source(), &back);
        proxy.until(|proxy| proxy.closed.get() == 1).await;
    })
    .await;
}

#[tokio::test]
async fn names_have_associations_of_their_own_and_few_are_opened_at_a_time() {
    local(async {
        let proxy = Proxy::start(wire::reply::SUCCEEDED).await;
        let world = World { proxies: &proxy.entry(), rules: &["MATCH,up"], names: &[] };
        let (dispatcher, heard) = (world.dispatcher(), Rc::<Heard>::default());
        let back: Rc<dyn Back> = heard.clone();
        for name in 1..=40 {
            send(&dispatcher, &address(&format!("{name}.test"), 7), b"?", &back);
        }
        proxy.until(|proxy| proxy.asked.borrow().len() >= associations::MOST_OPENING).await;
        for opened in 1..=40 {
            proxy.until(|proxy| proxy.asked.borrow().len() >= opened).await;
            proxy.go.notify_one();
        }
        heard.times(40).await;
        assert_eq!((proxy.asked.borrow().len(), proxy.peak.get()), (40, associations::MOST_OPENING));
        assert_eq!(dispatcher.core().counters.associations.load(Relaxed), 40);
    })
    .await;
}

#[tokio::test]
async fn what_one_opening_fails_with_all_that_wait_for_it_hear() {
    local(async {
        let proxy = Proxy::start(wire::reply::REFUSED).await;
        let world = World { proxies: &proxy.entry(), rules: &["MATCH,up"], names: &[] };
        let (dispatcher, heard) = (world.dispatcher(), Rc::<Heard>::default());
        let back: Rc<dyn Back> = heard.clone();
        for peer in 1..=20 {
            send(&dispatcher, &address(&format!("198.51.100.{peer}"), 7), b"?", &back);
        }
        proxy.until(|proxy| !proxy.asked.borrow().is_empty()).await;
        proxy.go.notify_one();
        heard.times(20).await;
        assert!(heard.errors.borrow().iter().all(|(_, why)| *why == Reach::Port), "{:?}", heard.errors.borrow());
        assert_eq!(proxy.asked.borrow().len(), 1);
        // While a refusal stands, nobody is asked again.
        send(&dispatcher, &address("198.51.100.1", 7), b"?", &back);
        heard.times(21).await;
        assert_eq!(proxy.asked.borrow().len(), 1);
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_openings_along() {
    local(async {
        let proxy = Proxy::start(wire::reply::SUCCEEDED).await;
        let world = World { proxies: &proxy.entry(), rules: &["MATCH,up"], names: &[] };
        let (dispatcher, back) = (world.dispatcher(), Heard::back());
        for peer in ["198.51.100.1", "198.51.100.2", "name.test"] {
            send(&dispatcher, &address(peer, 7), b"?", &back);
        }
        // The two addresses wait for one association, the name has its own.
        proxy.until(|proxy| proxy.asked.borrow().len() == 2).await;
        dispatcher.leave(source(), &back);
        proxy.until(|proxy| proxy.closed.get() == 2).await;
        assert_eq!(dispatcher.core().counters.associations.load(Relaxed), 0);
    })
    .await;
}

/// Notes each flow's end.
#[derive(Debug, Default)]
struct Ends(Mutex<Vec<String>>);

impl Listener for Ends {
    fn decided(&self, _: &Account) {}

    fn ended(&self, flow: &Account, outcome: Outcome, reason: &dyn std::fmt::Display) {
        let (session, verdict) = (flow.session(), flow.verdict().unwrap());
        let line = format!("{} {:?} {verdict} {outcome} {reason}", session.destination, flow.bytes());
        self.0.lock().push(line);
    }
}

#[tokio::test]
async fn every_peer_of_an_association_has_a_line_of_its_own() {
    local(async {
        let ((one, _), (two, _)) = (echo("127.0.0.1").await, echo("127.0.0.2").await);
        let world = World { rules: &["IP-CIDR,127.0.0.1/32,DIRECT", "MATCH,DIRECT"], ..EVERYTHING_DIRECT };
        let (dispatcher, heard) = (world.dispatcher(), Rc::<Heard>::default());
        let ends = Arc::<Ends>::default();
        dispatcher.core().counters.listen(ends.clone());
        let back: Rc<dyn Back> = heard.clone();
        for (asked, (to, payload)) in [(one, &b"four"[..]), (two, b"three"), (one, b"!")].into_iter().enumerate() {
            send(&dispatcher, &to.into(), payload, &back);
            heard.times(asked + 1).await;
        }
        dispatcher.leave(source(), &back);
        let mut ends = ends.0.lock().clone();
        ends.sort();
        let reason = "closed the client ended its association";
        let expected = [
            format!("{one} (5, 5) DIRECT by IP-CIDR,127.0.0.1/32,DIRECT (line 0) {reason}"),
            format!("{two} (5, 5) DIRECT by MATCH,DIRECT (line 0) {reason}"),
        ];
        assert_eq!(ends, expected);
    })
    .await;
}

#[tokio::test]
async fn datagrams_to_a_name_without_an_address_are_refused_at_once() {
    local(async {
        let (dispatcher, heard) = (EVERYTHING_DIRECT.dispatcher(), Rc::<Heard>::default());
        send(&dispatcher, &address("nowhere.test", 7), b"?", &(heard.clone() as Rc<dyn Back>));
        heard.times(1).await;
        assert_eq!(*heard.errors.borrow(), [(address("nowhere.test", 7), Reach::Port)]);
    })
    .await;
}
